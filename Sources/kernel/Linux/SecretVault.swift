// SPDX-License-Identifier: Apache-2.0

/// Files in memory for secrets that travel between processes as descriptors: on a file system that is attached nowhere and goes to
/// no swap. A file lives as long as somebody has it open, also when the process that made it is gone.
package final class SecretVault: Sendable {
  private let root: Handle

  package init() throws(Errno) {
    let hardening: MountAttributes = [.noSetuid, .noDevices, .noExec]
    let mount: Descriptor
    do throws(Errno) {
      mount = try Mount.make(
        "tmpfs", [("size", "67108864"), ("nr_inodes", "65536"), ("mode", "0700"), ("noswap", "")], attributes: hardening)
    } catch {
      // Kernels before 6.4 lack noswap. ramfs is never swapped either; `SecretStore` bounds what is read of it.
      mount = try Mount.make("ramfs", [("mode", "0700")], attributes: hardening)
    }
    root = Handle(mount)
  }

  /// A file without a name that holds `content`.
  package func file(_ content: [UInt8]) throws(Errno) -> Handle {
    let file = try root.descriptor.open(".", [.readWrite, .temporary], mode: 0o400)
    try file.write(content)
    return Handle(file)
  }
}

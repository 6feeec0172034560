// SPDX-License-Identifier: Apache-2.0

/// Files in memory for secrets that are passed between processes as descriptors, on a file system that is not attached and never
/// swapped. A file exists while any process has it open, even after the process that made it has exited.
package final class SecretVault: Sendable {
  private let root: Handle

  package init() throws(Errno) {
    let hardening: MountAttributes = [.noSetuid, .noDevices, .noExec]
    let mount: Descriptor
    do throws(Errno) {
      mount = try Mount.make(
        "tmpfs", [("size", "67108864"), ("nr_inodes", "65536"), ("mode", "0700"), ("noswap", "")], attributes: hardening)
    } catch {
      // Kernels before 6.4 lack noswap. ramfs is never swapped either, but has no size limit; `SecretStore` bounds what it reads of
      // a file.
      mount = try Mount.make("ramfs", [("mode", "0700")], attributes: hardening)
    }
    root = Handle(mount)
  }

  /// Creates a file without a name that holds `content`.
  package func file(_ content: [UInt8]) throws(Errno) -> Handle {
    let file = try root.descriptor.open(".", [.readWrite, .temporary], mode: 0o400)
    try file.write(content)
    return Handle(file)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A block device that is backed by a file (loop(4)). The kernel detaches it when its last user closes it; this value is one user.
package struct LoopDevice: ~Copyable {
  private let device: Descriptor
  package let path: String

  /// Returns a device for a file that is open for reading and writing: the existing one if there is one, since two devices would
  /// overwrite each other's blocks, otherwise a new one. Throws `Errno.again` if no device is free.
  package static func attach(_ file: borrowing Descriptor, named name: String) throws(Errno) -> LoopDevice {
    if let found = try existing(file) { return found }
    let control = try Descriptor.open("/dev/loop-control", [.readWrite])
    // Another process may configure the free device first; the kernel then reports EBUSY.
    for _ in 0..<64 {
      let path = "/dev/loop\(try check(clx_loop_free(control.number)))"
      let device = try Descriptor.open(path, [.readWrite])
      let (number, backing) = (device.number, file.number)
      do throws(Errno) {
        try check(name.withCString { clx_loop_configure(number, backing, $0) })
        return LoopDevice(device: device, path: path)
      } catch {
        guard error == .busy else { throw error }
      }
    }
    throw .again
  }

  private static func existing(_ file: borrowing Descriptor) throws(Errno) -> LoopDevice? {
    let status = try file.status()
    let blocks = try Descriptor.open("/sys/block", [.readOnly, .directory])
    // Only a device that has a file has a directory `loop`.
    for name in try blocks.entries() where name.hasPrefix("loop") && blocks.exists(name + "/loop") {
      // Open it for reading only: udev probes a device again after it was open for writing.
      guard let device = try? Descriptor.open("/dev/" + name, [.readOnly]) else { continue }
      var (fileDevice, inode): (UInt64, UInt64) = (0, 0)
      if clx_loop_file(device.number, &fileDevice, &inode) == 0, fileDevice == status.device, inode == status.inode {
        return LoopDevice(device: device, path: "/dev/" + name)
      }
    }
    return nil
  }
}

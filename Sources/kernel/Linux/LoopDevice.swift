// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A block device whose blocks lie in a file (loop(4)). It goes with its last user; this is one.
package struct LoopDevice: ~Copyable {
  private let device: Descriptor
  package let path: String

  /// The device of a file that is open for reading and writing: the one that it has already, since two would write over
  /// each other, or a new one. No device to be had: `Errno.again`.
  package static func attach(_ file: borrowing Descriptor, named name: String) throws(Errno) -> LoopDevice {
    if let found = try existing(file) { return found }
    let control = try Descriptor.open("/dev/loop-control", [.readWrite])
    // Somebody else may take the free one first.
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
    // Those with a file have a directory that the others do not.
    for name in try blocks.entries() where name.hasPrefix("loop") && blocks.exists(name + "/loop") {
      // For reading: udev looks anew at whatever was open for writing.
      guard let device = try? Descriptor.open("/dev/" + name, [.readOnly]) else { continue }
      var (fileDevice, inode): (UInt64, UInt64) = (0, 0)
      if clx_loop_file(device.number, &fileDevice, &inode) == 0, fileDevice == status.device, inode == status.inode {
        return LoopDevice(device: device, path: "/dev/" + name)
      }
    }
    return nil
  }
}

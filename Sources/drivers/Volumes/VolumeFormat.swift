// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Linux

/// The file systems that the volume file of a home can contain, and their programs.
package enum VolumeFormat: String, CaseIterable, Sendable {
  case ext4, xfs, btrfs

  /// The smallest size, in bytes: a smaller one has no journal, or mkfs refuses it.
  package var floor: UInt64 {
    switch self {
    case .ext4: 16 << 20
    case .xfs: 300 << 20
    // The kernel does not resize a smaller one.
    case .btrfs: 256 << 20
    }
  }

  /// Returns the format of a volume file by the magic number that the kernel checks; nil if it is all zeros: no file system yet.
  static func found(in file: borrowing Descriptor, of image: String) throws -> VolumeFormat? {
    func holds(_ bytes: [UInt8], at offset: UInt64) throws(Errno) -> Bool { try file.read(at: offset, upTo: bytes.count) == bytes }
    do throws(Errno) {
      if try holds([0x53, 0xEF], at: 1080) { return .ext4 }
      if try holds(Array("XFSB".utf8), at: 0) { return .xfs }
      if try holds(Array("_BHRfS_M".utf8), at: 0x10040) { return .btrfs }
      for offset: UInt64 in [0, 0x10000] {
        if try file.read(at: offset, upTo: 2048).contains(where: { $0 != 0 }) { throw .invalid }
      }
      return nil
    } catch {
      throw DriverError(
        .failedPrecondition,
        error == .invalid
          ? "home \(image) does not hold a file system of a home (expected \(allCases.map(\.rawValue).joined(separator: ", ")))"
          : "home \(image) cannot be read: \(error.sentence)")
    }
  }

  func make(_ image: String, isEncrypted: Bool) -> [String] {
    switch self {
    case .ext4:
      ["mkfs.ext4", "-q", "-F", "-m", "0", "-i", "16384", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"]
        + (isEncrypted ? ["-O", "encrypt"] : []) + [image]
    case .xfs: ["mkfs.xfs", "-q", "-f", "-K", image]
    case .btrfs: ["mkfs.btrfs", "-q", "-f", "--nodiscard", image]
    }
  }

  var mountOptions: [(String, String)] {
    // A copy has the same UUID as its source, and both may be mounted.
    self == .xfs ? [("nouuid", "")] : []
  }

  /// Returns the command that grows a mounted file system. ext4 needs CAP_SYS_RESOURCE.
  func grow(_ device: String, at point: String) -> [String] {
    switch self {
    case .ext4: ["resize2fs", device]
    case .xfs: ["xfs_growfs", point]
    case .btrfs: ["btrfs", "filesystem", "resize", "max", point]
    }
  }

  /// Returns the command that gives a copy a UUID of its own, for a file system that cannot be mounted twice with one UUID.
  func rename(_ image: String) -> [String]? { self == .btrfs ? ["btrfstune", "-f", "-m", image] : nil }
}

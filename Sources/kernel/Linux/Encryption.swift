// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Encryption of directories by the file system that they are on (fscrypt, policies of version 2: AES-256-XTS for contents,
/// AES-256-CTS for names). A key is held by the kernel, for one mounted file system, until it is removed or that is unmounted.
extension Descriptor {
  /// Gives a key to this file's file system. Returns the identifier by which policies name it. A file system that cannot encrypt:
  /// `Errno.notSupported`, or that of a foreign ioctl.
  package func addEncryptionKey(_ key: [UInt8]) throws(Errno) -> [UInt8] {
    var identifier = [UInt8](repeating: 0, count: 16)
    try check(
      key.withUnsafeBytes { bytes in
        identifier.withUnsafeMutableBufferPointer { clx_encryption_add_key(number, bytes.baseAddress, bytes.count, $0.baseAddress) }
      })
    return identifier
  }

  /// What is still open with it stays readable to who has it open.
  package func removeEncryptionKey(_ identifier: [UInt8]) throws(Errno) {
    try check(identifier.withUnsafeBufferPointer { clx_encryption_remove_key(number, $0.baseAddress) })
  }

  /// Everything that is made in this directory, which has to be empty, is encrypted from now on.
  package func setEncryptionPolicy(_ identifier: [UInt8]) throws(Errno) {
    try check(identifier.withUnsafeBufferPointer { clx_encryption_set_policy(number, $0.baseAddress) })
  }

  /// The identifier of the key that this directory is encrypted with; nil where it is not.
  package var encryptionPolicy: [UInt8]? {
    var identifier = [UInt8](repeating: 0, count: 16)
    return identifier.withUnsafeMutableBufferPointer({ clx_encryption_policy(number, $0.baseAddress) }) == 0 ? identifier : nil
  }
}

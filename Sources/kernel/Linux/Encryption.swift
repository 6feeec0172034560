// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Encryption of directories by their file system (fscrypt, policies of version 2: AES-256-XTS for contents, AES-256-CTS for
/// names). The kernel holds a key for one mounted file system until the key is removed or the file system is unmounted.
extension Descriptor {
  /// Adds a key to this file's file system and returns the identifier by which policies refer to it. On a file system that cannot
  /// encrypt, throws `Errno.notSupported` or the error of an unknown ioctl.
  package func addEncryptionKey(_ key: [UInt8]) throws(Errno) -> [UInt8] {
    var identifier = [UInt8](repeating: 0, count: 16)
    try check(
      key.withUnsafeBytes { bytes in
        identifier.withUnsafeMutableBufferPointer { clx_encryption_add_key(number, bytes.baseAddress, bytes.count, $0.baseAddress) }
      })
    return identifier
  }

  /// Removes the key. Files that are open at that moment stay readable to the processes that have them open.
  package func removeEncryptionKey(_ identifier: [UInt8]) throws(Errno) {
    try check(identifier.withUnsafeBufferPointer { clx_encryption_remove_key(number, $0.baseAddress) })
  }

  /// Encrypts everything that is made in this directory from now on; the directory must be empty.
  package func setEncryptionPolicy(_ identifier: [UInt8]) throws(Errno) {
    try check(identifier.withUnsafeBufferPointer { clx_encryption_set_policy(number, $0.baseAddress) })
  }

  /// The identifier of the key with which this directory is encrypted; nil if it is not encrypted.
  package var encryptionPolicy: [UInt8]? {
    var identifier = [UInt8](repeating: 0, count: 16)
    return identifier.withUnsafeMutableBufferPointer({ clx_encryption_policy(number, $0.baseAddress) }) == 0 ? identifier : nil
  }
}

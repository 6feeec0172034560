// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Linux

/// Homes that are encrypted with the owner's key. The key is part of a request and is passed to the kernel only, which holds it while
/// the home is mounted.
enum HomeEncryption {
  /// Unlocks a home that was just mounted or is in use already: each request for an encrypted home needs its key.
  static func open(_ path: String, of home: String, isAsked: Bool, key: [UInt8]?) throws(DriverError) {
    func refusal(_ why: String) -> DriverError { DriverError(.failedPrecondition, "home \(home) \(why)") }
    guard let folder = try? Descriptor.openPlain(path, [.readOnly, .directory]) else { throw refusal("cannot be opened") }
    let policy = folder.encryptionPolicy
    guard isAsked else {
      if policy == nil { return }
      throw refusal("is encrypted; it needs storage.encrypted, and its key with the request")
    }
    guard let key else { throw refusal("is encrypted, and the request has no key for it") }
    let identifier: [UInt8]
    do throws(Errno) { identifier = try folder.addEncryptionKey(key) } catch {
      throw refusal(
        error == .notSupported
          ? "was not made for encryption, and stays as it is" : "cannot be encrypted by this kernel and its file system: \(error.sentence)")
    }
    do throws(Errno) {
      if policy == nil { try folder.setEncryptionPolicy(identifier) }
    } catch {
      try? folder.removeEncryptionKey(identifier)
      throw refusal(
        error == .notEmpty ? "contains unencrypted files; only an empty home can be encrypted" : "cannot be encrypted: \(error.sentence)")
    }
    guard policy == nil || policy == identifier else {
      try? folder.removeEncryptionKey(identifier)
      throw refusal("is encrypted with another key than the one that came with the request")
    }
  }

  static func isEncrypted(_ path: String) -> Bool {
    guard let folder = try? Descriptor.openPlain(path, [.readOnly, .directory]) else { return false }
    return folder.encryptionPolicy != nil
  }

  /// Removes the key from the kernel.
  static func close(_ path: String) {
    guard let folder = try? Descriptor.openPlain(path, [.readOnly, .directory]), let policy = folder.encryptionPolicy else { return }
    try? folder.removeEncryptionKey(policy)
  }
}

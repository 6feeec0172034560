// SPDX-License-Identifier: Apache-2.0

internal import CCrypto

/// A SHA-256 digest in the form of the OCI image specification: `sha256:` and 64 lower-case hex digits.
package struct Digest: Hashable, Sendable, CustomStringConvertible {
  package let hex: String

  /// Parses a digest; nil for any other text, since a digest becomes part of a path.
  package init?(_ text: String) {
    guard text.hasPrefix("sha256:") else { return nil }
    let hex = text.dropFirst(7)
    guard hex.utf8.count == 64, hex.utf8.allSatisfy({ (0x30...0x39).contains($0) || (0x61...0x66).contains($0) }) else {
      return nil
    }
    self.hex = String(hex)
  }

  fileprivate init(bytes: [UInt8]) {
    let digits = Array("0123456789abcdef")
    hex = String(bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] })
  }

  package var description: String { "sha256:\(hex)" }
}

/// SHA-256 over a stream.
package final class Hasher256 {
  private let context: OpaquePointer

  package init() {
    // SAFETY: OpenSSL documents these two calls to fail only when memory is exhausted.
    context = EVP_MD_CTX_new()
    precondition(EVP_DigestInit_ex(context, EVP_sha256(), nil) == 1)
  }

  deinit { EVP_MD_CTX_free(context) }

  package func update(_ bytes: UnsafeRawBufferPointer) { EVP_DigestUpdate(context, bytes.baseAddress, bytes.count) }
  package func update(_ bytes: [UInt8]) { bytes.withUnsafeBytes { update($0) } }

  /// Ends the stream; call it once.
  package func finish() -> Digest {
    var bytes = [UInt8](repeating: 0, count: 32)
    EVP_DigestFinal_ex(context, &bytes, nil)
    return Digest(bytes: bytes)
  }

  package static func digest(_ bytes: [UInt8]) -> Digest {
    let hasher = Hasher256()
    hasher.update(bytes)
    return hasher.finish()
  }
}

// SPDX-License-Identifier: Apache-2.0

package struct IPv4Address: Equatable, Sendable, CustomStringConvertible {
  package let value: UInt32

  package init(_ value: UInt32) { self.value = value }

  package init?(_ text: String) {
    let parts = text.split(separator: ".", omittingEmptySubsequences: false).map { UInt8($0) }
    guard parts.count == 4, !parts.contains(nil) else { return nil }
    value = parts.reduce(0) { $0 << 8 | UInt32($1 ?? 0) }
  }

  package var bytes: [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) } }
  package var description: String { bytes.map(String.init).joined(separator: ".") }
}

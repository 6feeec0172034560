// SPDX-License-Identifier: Apache-2.0

/// Kubernetes' quantity notation (kubernetes.io, "Quantity" in the API reference), without exponents: `500m`, `4Gi`, `1.5`.
package enum Quantity {
  private static let binary: [String: UInt64] = [
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
  ]
  private static let decimal: [String: UInt64] = [
    "": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000, "T": 1_000_000_000_000, "P": 1_000_000_000_000_000,
  ]

  /// Parses whole units, such as bytes or processes. Returns nil if `text` is not a quantity, is negative, is finer than one
  /// unit, or exceeds 2^63 / 1000, which is more than any host has of anything.
  package static func whole(_ text: String) -> UInt64? {
    guard let thousandths = thousandths(text), thousandths % 1000 == 0 else { return nil }
    return thousandths / 1000
  }

  /// Parses thousandths of a unit, such as milli-CPUs.
  package static func thousandths(_ text: String) -> UInt64? {
    let number = text.prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
    let suffix = String(text.dropFirst(number.count))
    let parts = number.split(separator: ".", omittingEmptySubsequences: false)
    guard !number.isEmpty, parts.count <= 2, let whole = UInt64(parts[0]) else { return nil }
    var fraction: UInt64 = 0
    if parts.count == 2 {
      guard (1...3).contains(parts[1].count), let digits = UInt64(parts[1]) else { return nil }
      fraction = digits
      for _ in parts[1].count..<3 { fraction *= 10 }
    }
    let (scaled, overflow) = whole.multipliedReportingOverflow(by: 1000)
    let mantissa = scaled &+ fraction
    if overflow || mantissa < scaled { return nil }
    if suffix == "m" { return mantissa % 1000 == 0 ? mantissa / 1000 : nil }
    guard let factor = binary[suffix] ?? decimal[suffix] else { return nil }
    let (value, tooLarge) = mantissa.multipliedReportingOverflow(by: factor)
    return tooLarge || value > UInt64(Int64.max) ? nil : value
  }

  /// Formats bytes for people, in the largest binary unit that they reach, rounded down to a tenth.
  package static func describe(bytes: UInt64) -> String {
    for (unit, size) in [("Pi", UInt64(1) << 50), ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)]
    where bytes >= size {
      let tenths = bytes * 10 / size
      return tenths % 10 == 0 ? "\(tenths / 10)\(unit)" : "\(tenths / 10).\(tenths % 10)\(unit)"
    }
    return "\(bytes)"
  }
}

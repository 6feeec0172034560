// SPDX-License-Identifier: Apache-2.0

/// The reason why bytes do not decode, and their offset.
package struct PlanError: Error, Equatable, Sendable {
  package enum Problem: Equatable, Sendable {
    case notAPlan
    case otherVersion
    case truncated
    case trailingBytes
    case unknownOperation
    case wrongField
    case numberOutOfRange
    case textHoldsNUL
    case tooLarge
  }
  package let problem: Problem
  package let offset: Int
}

/// The flat encoding: "CRLP", a version, the number of operations, and for each its code, its number of fields and the fields.
/// Numbers are little-endian. There are no references, so a reader only moves forward.
extension Plan {
  static let magic: [UInt8] = [0x43, 0x52, 0x4C, 0x50]
  static let version: UInt8 = 4
  /// The size limit in bytes: more than any plan needs, and small enough to read into memory.
  package static let sizeLimit = 4 << 20

  package func encoded() -> [UInt8] {
    var bytes = Plan.magic
    bytes.append(Plan.version)
    bytes.append(number: UInt64(operations.count), width: 4)
    for operation in operations {
      let fields = operation.fields
      bytes.append(operation.kind.rawValue)
      bytes.append(UInt8(fields.count))
      for (_, value) in fields {
        switch value {
        case .number(let number):
          bytes.append(1)
          bytes.append(number: number, width: 8)
        case .text(let text):
          bytes.append(2)
          bytes.append(counted: Array(text.utf8))
        case .bytes(let content):
          bytes.append(3)
          bytes.append(counted: content)
        case .list(let list):
          bytes.append(4)
          bytes.append(number: UInt64(list.count), width: 4)
          for item in list { bytes.append(counted: Array(item.utf8)) }
        }
      }
    }
    return bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    if bytes.count > Plan.sizeLimit { throw PlanError(problem: .tooLarge, offset: Plan.sizeLimit) }
    var reader = Reader(bytes)
    for expected in Plan.magic where try reader.byte() != expected { throw reader.error(.notAPlan) }
    if try reader.byte() != Plan.version { throw reader.error(.otherVersion) }
    let count = try reader.number(width: 4)
    operations = []
    for _ in 0..<count { operations.append(try Operation(from: &reader)) }
    if reader.position != bytes.count { throw reader.error(.trailingBytes) }
  }
}

package extension [UInt8] {
  mutating func append(number: UInt64, width: Int) {
    for index in 0..<width { append(UInt8(truncatingIfNeeded: number >> UInt64(8 * index))) }
  }
  mutating func append(counted content: [UInt8]) {
    append(number: UInt64(content.count), width: 4)
    append(contentsOf: content)
  }
}

/// A reader that moves forward through encoded bytes and checks every length before it uses it.
package struct Reader {
  private let bytes: [UInt8]
  package private(set) var position = 0

  package init(_ bytes: [UInt8]) { self.bytes = bytes }

  package var isAtEnd: Bool { position == bytes.count }

  package func error(_ problem: PlanError.Problem) -> PlanError { PlanError(problem: problem, offset: position) }

  package mutating func byte() throws(PlanError) -> UInt8 {
    if position >= bytes.count { throw error(.truncated) }
    position += 1
    return bytes[position - 1]
  }

  package mutating func number(width: Int) throws(PlanError) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<width { value |= UInt64(try byte()) << UInt64(8 * index) }
    return value
  }

  package mutating func counted() throws(PlanError) -> [UInt8] {
    let count = Int(try number(width: 4))
    if count > bytes.count - position { throw error(.truncated) }
    position += count
    return Array(bytes[(position - count)..<position])
  }

  private mutating func expect(_ kind: UInt8) throws(PlanError) {
    if try byte() != kind { throw error(.wrongField) }
  }

  package mutating func number() throws(PlanError) -> UInt64 {
    try expect(1)
    return try number(width: 8)
  }

  package mutating func number32() throws(PlanError) -> UInt32 {
    let value = try number()
    if value > UInt64(UInt32.max) { throw error(.numberOutOfRange) }
    return UInt32(value)
  }

  package mutating func signed32() throws(PlanError) -> Int32 {
    guard let value = Int32(exactly: Int64(bitPattern: try number())) else { throw error(.numberOutOfRange) }
    return value
  }

  package mutating func text() throws(PlanError) -> String {
    try expect(2)
    return try plainText()
  }

  package mutating func content() throws(PlanError) -> [UInt8] {
    try expect(3)
    return try counted()
  }

  package mutating func list() throws(PlanError) -> [String] {
    try expect(4)
    let count = try number(width: 4)
    var list: [String] = []
    for _ in 0..<count { list.append(try plainText()) }
    return list
  }

  package mutating func ranges() throws(PlanError) -> [IDRange] {
    var ranges: [IDRange] = []
    for text in try list() {
      let parts = text.split(separator: " ")
      guard parts.count == 3, let inside = UInt32(parts[0]), let outside = UInt32(parts[1]), let count = UInt32(parts[2]),
        count > 0, !inside.addingReportingOverflow(count).overflow, !outside.addingReportingOverflow(count).overflow
      else { throw error(.numberOutOfRange) }
      ranges.append(IDRange(inside: inside, outside: outside, count: count))
    }
    return ranges
  }

  /// Reads text that becomes a C string, which a NUL inside would truncate silently.
  private mutating func plainText() throws(PlanError) -> String {
    let raw = try counted()
    for byte in raw where byte == 0 { throw error(.textHoldsNUL) }
    return String(decoding: raw, as: UTF8.self)
  }
}

extension Operation {
  init(from reader: inout Reader) throws(PlanError) {
    guard let kind = Kind(rawValue: try reader.byte()) else { throw reader.error(.unknownOperation) }
    let count = try reader.byte()
    self = kind.definition.blank
    var coder = FieldCoder(reading: reader)
    try code(&coder)
    reader = coder.reader
    if coder.count != Int(count) { throw reader.error(.wrongField) }
  }
}

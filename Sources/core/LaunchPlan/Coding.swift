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
  static let version: UInt8 = 3
  /// The size limit in bytes: more than any plan needs, and small enough to read into memory.
  package static let sizeLimit = 4 << 20

  package func encoded() -> [UInt8] {
    var bytes = Plan.magic
    bytes.append(Plan.version)
    bytes.append(number: UInt64(operations.count), width: 4)
    for operation in operations {
      let schema = operation.schema
      bytes.append(schema.code)
      bytes.append(UInt8(schema.fields.count))
      for (_, value) in schema.fields {
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

  package mutating func change() throws(PlanError) -> MountChange {
    var change = MountChange(set: try number(), clear: try number())
    change.recursiveSet = try number()
    change.recursiveClear = try number()
    change.propagation = try number()
    return change
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
    let code = try reader.byte()
    let count = try reader.byte()
    self = try Operation.read(code, from: &reader)
    if schema.fields.count != Int(count) { throw reader.error(.wrongField) }
  }

  private static func read(_ code: UInt8, from reader: inout Reader) throws(PlanError) -> Operation {
    switch code {
    case 1: return .cgroup(path: try reader.text())
    case 2: return .userNamespace(owner: try reader.number32(), uids: try reader.ranges(), gids: try reader.ranges())
    case 3: return .namespaces(try reader.number())
    case 4: return .layer(path: try reader.text())
    case 5: return .root(scratchBytes: try reader.number(), scratchInodes: try reader.number())
    case 6:
      return .directory(
        path: try reader.text(), mode: try reader.number32(), uid: try reader.number32(), gid: try reader.number32())
    case 7:
      let (source, target) = (try reader.text(), try reader.text())
      var options = BindOptions(change: try reader.change())
      options.recursive = try reader.number() != 0
      options.followsSource = try reader.number() != 0
      options.uids = try reader.ranges()
      options.gids = try reader.ranges()
      options.mapsRecursively = try reader.number() != 0
      return .bind(source: source, target: target, options: options)
    case 8: return .secrets(target: try reader.text(), bytes: try reader.number())
    case 11:
      return .cgroupFileSystem(hierarchies: try reader.list(), target: try reader.text(), attributes: try reader.number())
    case 13:
      return .device(path: try reader.text(), major: try reader.number32(), minor: try reader.number32())
    case 16: return .symlink(path: try reader.text(), target: try reader.text())
    case 17:
      return .file(path: try reader.text(), mode: try reader.number32(), content: try reader.content())
    case 18: return .mask(path: try reader.text())
    case 19: return .readOnly(path: try reader.text())
    case 20: return .pivotRoot
    case 21: return .hostname(try reader.text())
    case 22: return .sysctl(key: try reader.text(), value: try reader.text())
    case 23:
      return .resourceLimit(
        resource: try reader.number32(), soft: try reader.number(), hard: try reader.number(), strict: try reader.number() != 0)
    case 24:
      return .outOfMemoryScore(try reader.signed32())
    case 25: return .sessionKeyring
    case 26: return .cgroupNamespace
    case 27: return .awaitStart
    case 29:
      let (uid, gid) = (try reader.number32(), try reader.number32())
      var groups: [UInt32] = []
      for text in try reader.list() {
        guard let group = UInt32(text) else { throw reader.error(.numberOutOfRange) }
        groups.append(group)
      }
      let mask = try reader.number32()
      var sets = CapabilitySets()
      sets.bounding = try reader.number()
      sets.effective = try reader.number()
      sets.permitted = try reader.number()
      sets.inheritable = try reader.number()
      sets.ambient = try reader.number()
      return .user(uid: uid, gid: gid, groups: groups, mask: mask, capabilities: sets)
    case 30: return .undumpable
    case 31: return .noNewPrivileges
    case 32: return .seccomp(program: try reader.content(), flags: try reader.number())
    case 33:
      return .log(
        segmentBytes: try reader.number(), segments: try reader.number32(), bytesPerSecond: try reader.number())
    case 34:
      return .execute(
        arguments: try reader.list(), environment: try reader.list(), directory: try reader.text())
    case 35:
      return .fileSystem(
        type: try reader.text(), source: try reader.text(), target: try reader.text(), options: try reader.list(),
        change: try reader.change(), copyUp: try reader.number() != 0)
    case 36: return .joinNamespace(kind: try reader.number(), path: try reader.text())
    case 37: return .rootDirectory(path: try reader.text())
    case 38: return .attributes(path: try reader.text(), change: try reader.change())
    case 39:
      return .node(
        path: try reader.text(), mode: try reader.number32(), major: try reader.number32(), minor: try reader.number32(),
        uid: try reader.number32(), gid: try reader.number32())
    case 40: return .domainname(try reader.text())
    case 41: return .rendezvous
    case 42:
      return .hook(
        arguments: try reader.list(), environment: try reader.list(), seconds: try reader.number32(), input: try reader.list())
    case 43: return .terminal(socket: try reader.text(), rows: try reader.number32(), columns: try reader.number32())
    case 44: return .personality(try reader.number())
    case 46: return .workingDirectory(path: try reader.text())
    case 45: return .timeOffsets(try reader.list())
    case 47: return .label(file: try reader.text(), text: try reader.text())
    case 48:
      var scheduler = Scheduler()
      scheduler.policy = try reader.number32()
      scheduler.flags = try reader.number()
      scheduler.nice = try reader.signed32()
      scheduler.priority = try reader.number32()
      scheduler.runtime = try reader.number()
      scheduler.deadline = try reader.number()
      scheduler.period = try reader.number()
      return .scheduler(scheduler)
    case 49: return .ioPriority(try reader.number32())
    case 50: return .cpuAffinity(try reader.content())
    case 51: return .seccompListener(socket: try reader.text(), state: try reader.list())
    case 52:
      return .outerNode(
        path: try reader.text(), mode: try reader.number32(), major: try reader.number32(), minor: try reader.number32(),
        uid: try reader.number32(), gid: try reader.number32())
    default: throw reader.error(.unknownOperation)
    }
  }
}

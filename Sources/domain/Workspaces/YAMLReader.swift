// SPDX-License-Identifier: Apache-2.0

internal import Yams

/// Reads a mapping of YAML strictly: unknown keys, duplicate keys and wrong types are errors with their line.
///
/// A reader records which keys were read; `finish()` refuses the others.
package struct YAMLReader {
  private let mapping: Node.Mapping
  private let path: String
  private let line: Int?
  private var known: [String] = []

  /// The size limit of a text, in bytes, because the memory of the parser is a multiple of its input.
  package static let sizeLimit = 1 << 20

  /// The limit of aliases in a document. Nested ones multiply: 9 levels of 9 are a text of 600 bytes and 400 million nodes.
  private static let aliasLimit = 24

  /// Returns how many words of a text could be aliases; quoted ones and those of scripts are counted as well.
  private static func aliases(_ text: String) -> Int {
    var count = 0
    // The bytes of all separators, those of line breaks beyond ASCII included.
    var before = UInt8(ascii: "\n")
    var star = false
    for byte in text.utf8 {
      if star, byte > 0x20, byte != UInt8(ascii: "*") { count += 1 }
      star = byte == UInt8(ascii: "*") && (before <= 0x20 || before >= 0x80 || "[{,:?-".utf8.contains(before))
      before = byte
    }
    return text.utf8.contains(UInt8(ascii: "&")) ? count : 0
  }

  package init(text: String) throws(InvalidField) {
    guard text.utf8.count <= YAMLReader.sizeLimit else {
      throw InvalidField("", "the document must not exceed \(YAMLReader.sizeLimit) bytes")
    }
    guard YAMLReader.aliases(text) <= YAMLReader.aliasLimit else {
      throw InvalidField("", "more than \(YAMLReader.aliasLimit) aliases (`*name`); write out what they stand for")
    }
    let node: Node?
    do {
      node = try Yams.compose(yaml: text, Resolver.default)
    } catch let error as YamlError {
      throw YAMLReader.translate(error)
    } catch {
      throw InvalidField("", "is not YAML")
    }
    guard let node, case .mapping(let mapping) = node else {
      throw InvalidField("", "expected a mapping of fields", line: node?.mark?.line)
    }
    try self.init(mapping, path: "", line: node.mark?.line)
  }

  private init(_ mapping: Node.Mapping, path: String, line: Int?) throws(InvalidField) {
    self.mapping = mapping
    self.path = path
    self.line = line
  }

  private static func translate(_ error: YamlError) -> InvalidField {
    switch error {
    case .scanner(_, let problem, let mark, _), .parser(_, let problem, let mark, _), .composer(_, let problem, let mark, _):
      return InvalidField("", problem, line: mark.line)
    case .duplicatedKeysInMapping(let duplicates, let context):
      let name = duplicates.first ?? "a key"
      return InvalidField(name, "is set twice", line: context.mark.line)
    default:
      return InvalidField("", "is not YAML: \(error)")
    }
  }

  private func name(_ key: String) -> String { path.isEmpty ? key : "\(path).\(key)" }

  private mutating func node(_ key: String) -> Node? {
    known.append(key)
    guard let node = mapping[key] else { return nil }
    // A `key:` without a value is absent, as in Kubernetes.
    if node.null != nil, node.scalar?.style == .plain { return nil }
    return node
  }

  package mutating func text(_ key: String) throws(InvalidField) -> String? {
    guard let node = node(key) else { return nil }
    guard let scalar = node.scalar else { throw InvalidField(name(key), "expected text", line: node.mark?.line) }
    return scalar.string
  }

  package mutating func requiredText(_ key: String) throws(InvalidField) -> String {
    guard let value = try text(key) else { throw InvalidField(name(key), "is missing", line: line) }
    return value
  }

  package mutating func number(_ key: String, in range: ClosedRange<UInt64>) throws(InvalidField) -> UInt64? {
    guard let node = node(key) else { return nil }
    // Digits only: "+1", "0x0", "01" and 2^32 in a 32-bit field are mistakes, not numbers (CVE-2024-40635).
    guard let text = node.scalar?.string, text.utf8.allSatisfy({ (0x30...0x39).contains($0) }),
      text == "0" || !text.hasPrefix("0"), let value = UInt64(text), range.contains(value)
    else {
      throw InvalidField(
        name(key), "expected a whole number between \(range.lowerBound) and \(range.upperBound)", line: node.mark?.line)
    }
    return value
  }

  package mutating func flag(_ key: String) throws(InvalidField) -> Bool? {
    guard let node = node(key) else { return nil }
    guard let value = node.bool else { throw InvalidField(name(key), "expected true or false", line: node.mark?.line) }
    return value
  }

  package mutating func choice<T: RawRepresentable & CaseIterable>(_ key: String, _ type: T.Type) throws(InvalidField) -> T?
  where T.RawValue == String {
    guard let node = node(key) else { return nil }
    guard let text = node.scalar?.string, let value = T(rawValue: text) else {
      throw InvalidField(
        name(key), "expected one of " + T.allCases.map(\.rawValue).joined(separator: ", "), line: node.mark?.line)
    }
    return value
  }

  package mutating func texts(_ key: String) throws(InvalidField) -> [String]? {
    guard let node = node(key) else { return nil }
    guard let sequence = node.sequence else { throw InvalidField(name(key), "expected a list", line: node.mark?.line) }
    var all: [String] = []
    for (index, item) in sequence.enumerated() {
      guard let scalar = item.scalar else {
        throw InvalidField("\(name(key))[\(index)]", "expected text", line: item.mark?.line)
      }
      all.append(scalar.string)
    }
    return all
  }

  package mutating func textMap(_ key: String) throws(InvalidField) -> [String: String]? {
    guard let node = node(key) else { return nil }
    guard let mapping = node.mapping else { throw InvalidField(name(key), "expected a mapping", line: node.mark?.line) }
    var all: [String: String] = [:]
    for (entryKey, value) in mapping {
      guard let keyText = entryKey.string, let scalar = value.scalar else {
        throw InvalidField(name(key), "expected text under every key", line: value.mark?.line)
      }
      all[keyText] = scalar.string
    }
    return all
  }

  package mutating func section<T>(
    _ key: String, _ body: (inout YAMLReader) throws(InvalidField) -> T
  ) throws(InvalidField) -> T? {
    guard let node = node(key) else { return nil }
    return try YAMLReader.read(node, name(key), body)
  }

  package mutating func sections<T>(
    _ key: String, _ body: (inout YAMLReader) throws(InvalidField) -> T
  ) throws(InvalidField) -> [T] {
    guard let node = node(key) else { return [] }
    guard let sequence = node.sequence else { throw InvalidField(name(key), "expected a list", line: node.mark?.line) }
    var all: [T] = []
    for (index, item) in sequence.enumerated() { all.append(try YAMLReader.read(item, "\(name(key))[\(index)]", body)) }
    return all
  }

  private static func read<T>(
    _ node: Node, _ path: String, _ body: (inout YAMLReader) throws(InvalidField) -> T
  ) throws(InvalidField) -> T {
    guard case .mapping(let mapping) = node else {
      throw InvalidField(path, "expected a mapping of fields", line: node.mark?.line)
    }
    var reader = try YAMLReader(mapping, path: path, line: node.mark?.line)
    let value = try body(&reader)
    try reader.finish()
    return value
  }

  /// Refuses keys that were not read, and names the known ones.
  package func finish() throws(InvalidField) {
    for (key, value) in mapping {
      let text = key.string ?? "?"
      if !known.contains(text) {
        throw InvalidField(
          name(printable(text)), "is not a known key; known: " + known.joined(separator: ", "),
          line: key.mark?.line ?? value.mark?.line)
      }
    }
  }

  /// Returns the line of a key, for errors that are found later.
  package func line(of key: String) -> Int? { mapping[key]?.mark?.line }
}

// SPDX-License-Identifier: Apache-2.0

internal import CJSON

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// An error of the runtime, as one sentence for the user.
package struct RuntimeError: Error, Equatable, Sendable {
  package let message: String
  package init(_ message: String) { self.message = message }
}

/// A value of a JSON document, with its path for errors. A missing or null field is nil; a field of another type is an error that
/// names the path.
package struct JSON {
  private final class Document {
    let root: OpaquePointer
    init(_ root: OpaquePointer) { self.root = root }
    // SAFETY: the document owns the one reference; values keep the document.
    deinit { json_object_put(root) }
  }

  private let document: Document
  private let value: OpaquePointer
  private let path: String

  /// The size limit of a document: many times what a process's arguments and environment need.
  package static var sizeLimit: Int { Defence.boundedConfiguration.isOn ? 4 << 20 : 1 << 30 }

  package init(parsing bytes: [UInt8], name: String) throws(RuntimeError) {
    guard bytes.count <= JSON.sizeLimit else { throw RuntimeError("\(name): larger than \(JSON.sizeLimit) bytes") }
    // The depth is bounded, so that nested brackets cannot exhaust the stack.
    guard let tokener = json_tokener_new_ex(64) else { throw RuntimeError("\(name): out of memory") }
    defer { json_tokener_free(tokener) }
    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8)
    // The final NUL tells the parser that a number at the end is complete.
    let parsed = (bytes + [0]).withUnsafeBytes {
      json_tokener_parse_ex(tokener, $0.baseAddress?.assumingMemoryBound(to: CChar.self), Int32($0.count))
    }
    guard let parsed, json_tokener_get_error(tokener) == json_tokener_success else {
      if let parsed { json_object_put(parsed) }
      let reason = String(cString: json_tokener_error_desc(json_tokener_get_error(tokener)))
      throw RuntimeError("\(name): invalid JSON at byte \(json_tokener_get_parse_end(tokener)): \(reason)")
    }
    document = Document(parsed)
    value = parsed
    path = ""
    guard json_object_is_type(value, json_type_object) != 0 else { throw RuntimeError("\(name): expected a JSON object") }
  }

  private init(_ document: Document, _ value: OpaquePointer, _ path: String) {
    self.document = document
    self.value = value
    self.path = path
  }

  package func error(_ problem: String) -> RuntimeError { RuntimeError(path.isEmpty ? problem : "\(path): \(problem)") }
  package func error(_ name: String, _ problem: String) -> RuntimeError { RuntimeError("\(join(name)): \(problem)") }

  private func join(_ name: String) -> String { path.isEmpty ? name : "\(path).\(name)" }

  private func member(_ name: String) -> OpaquePointer? {
    var found: OpaquePointer?
    guard name.withCString({ json_object_object_get_ex(value, $0, &found) }) != 0 else { return nil }
    return found
  }

  private func member(_ name: String, _ type: json_type, _ expected: String) throws(RuntimeError) -> OpaquePointer? {
    guard let found = member(name) else { return nil }
    guard json_object_is_type(found, type) != 0 else { throw error(name, "expected \(expected)") }
    return found
  }

  package func has(_ name: String) -> Bool { member(name) != nil }

  package func object(_ name: String) throws(RuntimeError) -> JSON? {
    guard let found = try member(name, json_type_object, "an object") else { return nil }
    return JSON(document, found, join(name))
  }

  package func array(_ name: String) throws(RuntimeError) -> [JSON] {
    guard let found = try member(name, json_type_array, "a list") else { return [] }
    var items: [JSON] = []
    for index in 0..<json_object_array_length(found) {
      guard let item = json_object_array_get_idx(found, index) else { throw error("\(name)[\(index)]", "expected a value, found null") }
      items.append(JSON(document, item, "\(join(name))[\(index)]"))
    }
    return items
  }

  package func objects(_ name: String) throws(RuntimeError) -> [JSON] {
    let items = try array(name)
    for item in items where json_object_is_type(item.value, json_type_object) == 0 { throw item.error("expected an object") }
    return items
  }

  package func string(_ name: String) throws(RuntimeError) -> String? {
    guard let found = try member(name, json_type_string, "a string") else { return nil }
    return try JSON(document, found, join(name)).text()
  }

  package func strings(_ name: String) throws(RuntimeError) -> [String] {
    var texts: [String] = []
    for item in try array(name) { texts.append(try item.text()) }
    return texts
  }

  package func bool(_ name: String) throws(RuntimeError) -> Bool? {
    guard let found = try member(name, json_type_boolean, "true or false") else { return nil }
    return json_object_get_boolean(found) != 0
  }

  package func signed(_ name: String) throws(RuntimeError) -> Int64? {
    guard let found = try member(name, json_type_int, "a whole number") else { return nil }
    let number = json_object_get_int64(found)
    guard number < 0 || UInt64(number) == json_object_get_uint64(found) else { throw error(name, "is too large") }
    return number
  }

  package func unsigned(_ name: String) throws(RuntimeError) -> UInt64? {
    guard let found = try member(name, json_type_int, "a whole number") else { return nil }
    guard json_object_get_int64(found) >= 0 else { throw error(name, "must not be negative") }
    return json_object_get_uint64(found)
  }

  package func numbers(_ name: String) throws(RuntimeError) -> [UInt64] {
    var numbers: [UInt64] = []
    for item in try array(name) {
      guard json_object_is_type(item.value, json_type_int) != 0, json_object_get_int64(item.value) >= 0 else {
        throw item.error("expected a whole number that is not negative")
      }
      numbers.append(json_object_get_uint64(item.value))
    }
    return numbers
  }

  package func number32(_ name: String) throws(RuntimeError) -> UInt32? {
    guard let number = try unsigned(name) else { return nil }
    guard let small = UInt32(exactly: number) else { throw error(name, "\(number) does not fit 32 bits") }
    return small
  }

  /// Returns the members of an object whose values are all strings.
  package func stringMembers() throws(RuntimeError) -> [(key: String, value: String)] {
    var members: [(key: String, value: String)] = []
    for name in names { members.append((name, try string(name) ?? "")) }
    return members
  }

  package var names: [String] {
    var names: [String] = []
    var iterator = json_object_iter_begin(value)
    var end = json_object_iter_end(value)
    while json_object_iter_equal(&iterator, &end) == 0 {
      names.append(String(cString: json_object_iter_peek_name(&iterator)))
      json_object_iter_next(&iterator)
    }
    return names
  }

  /// Returns this string value. A NUL inside is refused: the kernel would silently truncate the string there.
  private func text() throws(RuntimeError) -> String {
    guard json_object_is_type(value, json_type_string) != 0, let start = json_object_get_string(value) else {
      throw error("expected a string")
    }
    let bytes = UnsafeRawBufferPointer(start: start, count: Int(json_object_get_string_len(value)))
    for byte in bytes where byte == 0 { throw error("holds a NUL") }
    return String(decoding: bytes, as: UTF8.self)
  }

  /// The value as compact JSON text.
  package var encoded: String { String(cString: json_object_to_json_string_ext(value, JSON_C_TO_STRING_PLAIN)) }
}

/// JSON to write.
package indirect enum JSONText {
  case string(String)
  case number(Int64)
  case unsigned(UInt64)
  case bool(Bool)
  case array([JSONText])
  case object([(key: String, value: JSONText)])

  package var encoded: String {
    switch self {
    case .string(let text): return JSONText.quoted(text)
    case .number(let number): return "\(number)"
    case .unsigned(let number): return "\(number)"
    case .bool(let value): return value ? "true" : "false"
    case .array(let items):
      var text = "["
      for (index, item) in items.enumerated() { text += (index > 0 ? "," : "") + item.encoded }
      return text + "]"
    case .object(let members):
      var text = "{"
      for (index, member) in members.enumerated() {
        text += (index > 0 ? "," : "") + JSONText.quoted(member.key) + ":" + member.value.encoded
      }
      return text + "}"
    }
  }

  private static func quoted(_ text: String) -> String {
    var bytes: [UInt8] = [UInt8(ascii: "\"")]
    for byte in text.utf8 {
      switch byte {
      case UInt8(ascii: "\""), UInt8(ascii: "\\"): bytes += [UInt8(ascii: "\\"), byte]
      case 0..<0x20:
        let hex = Array("0123456789abcdef".utf8)
        bytes += Array("\\u00".utf8) + [hex[Int(byte >> 4)], hex[Int(byte & 15)]]
      default: bytes.append(byte)
      }
    }
    return String(decoding: bytes + [UInt8(ascii: "\"")], as: UTF8.self)
  }
}

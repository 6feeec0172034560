// SPDX-License-Identifier: Apache-2.0

import Foundation
import SwiftProtobuf
import Testing

@testable import API

/// What releases promise each other (docs/compatibility.md), and what the manifest promises its readers.
@Suite("Promises") struct PromiseTests {
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()

  static func descriptors(base64: String) throws -> Google_Protobuf_FileDescriptorSet {
    let data = try #require(Data(base64Encoded: base64.trimmingCharacters(in: .whitespacesAndNewlines)))
    return try Google_Protobuf_FileDescriptorSet(serializedBytes: data)
  }

  /// The interface of the last release. The file is replaced when a release is made (docs/releasing.md).
  static func released() throws -> Google_Protobuf_FileDescriptorSet {
    try descriptors(base64: String(contentsOf: root.appendingPathComponent("Tests/Fixtures/api-0.1.0.base64"), encoding: .utf8))
  }

  /// What a client of `before` would find broken in `after`, a sentence each. What was deprecated in `before` may go if its number is
  /// reserved.
  static func breaks(from before: Google_Protobuf_FileDescriptorSet, to after: Google_Protobuf_FileDescriptorSet) -> [String] {
    var found: [String] = []
    let files = Dictionary(after.file.map { ($0.package, [$0]) }, uniquingKeysWith: +)
    for old in before.file {
      let new = files[old.package] ?? []
      check("", old.messageType, new.flatMap(\.messageType), &found)
      check("", old.enumType, new.flatMap(\.enumType), &found)
      for service in old.service {
        let methods = new.flatMap(\.service).first { $0.name == service.name }?.method ?? []
        for method in service.method {
          let now = methods.first { $0.name == method.name }
          let isSame =
            now?.inputType == method.inputType && now?.outputType == method.outputType && now?.clientStreaming == method.clientStreaming
            && now?.serverStreaming == method.serverStreaming
          if !isSame && !(now == nil && method.options.deprecated) { found.append("rpc \(service.name).\(method.name) is gone or another") }
        }
      }
    }
    return found
  }

  private static func check(
    _ path: String, _ before: [Google_Protobuf_DescriptorProto], _ after: [Google_Protobuf_DescriptorProto], _ found: inout [String]
  ) {
    for old in before {
      let name = path + old.name
      guard let new = after.first(where: { $0.name == old.name }) else {
        if !old.options.deprecated { found.append("message \(name) is gone") }
        continue
      }
      for field in old.field {
        guard let now = new.field.first(where: { $0.number == field.number }) else {
          let isReserved = new.reservedRange.contains { $0.start <= field.number && field.number < $0.end }
          if !field.options.deprecated || !isReserved { found.append("field \(name).\(field.name) is gone") }
          continue
        }
        if now.name != field.name || now.type != field.type || now.label != field.label || now.typeName != field.typeName
          || now.proto3Optional != field.proto3Optional
        {
          found.append("field \(name).\(field.name) is now \(now.name), or of another type")
        }
      }
      check(name + ".", old.nestedType, new.nestedType, &found)
      check(name + ".", old.enumType, new.enumType, &found)
    }
  }

  private static func check(
    _ path: String, _ before: [Google_Protobuf_EnumDescriptorProto], _ after: [Google_Protobuf_EnumDescriptorProto],
    _ found: inout [String]
  ) {
    for old in before {
      let now = after.first { $0.name == old.name }?.value ?? []
      for value in old.value where !now.contains(where: { $0.name == value.name && $0.number == value.number }) {
        found.append("value \(path)\(old.name).\(value.name) is gone or has another number")
      }
    }
  }

  @Test("a client of the last release finds everything that it knows in carrel.v1") func interface() throws {
    #expect(try Self.breaks(from: Self.released(), to: Self.descriptors(base64: DescriptorSet.base64)) == [])
  }

  @Test("a change that breaks a client is found") func interfaceControl() throws {
    let before = try Self.released()
    var after = before
    let file = try #require(after.file.firstIndex { $0.package == "carrel.v1" && $0.messageType.contains { $0.name == "WorkspaceSpec" } })
    let spec = try #require(after.file[file].messageType.firstIndex { $0.name == "WorkspaceSpec" })
    let policy = try #require(after.file[file].enumType.firstIndex { $0.name == "HomeDriver" })
    after.file[file].messageType[spec].field.removeAll { $0.name == "tool" }
    after.file[file].messageType[spec].field[0].type = .bytes
    after.file[file].enumType[policy].value[1].number = 9
    after.file[file].service[0].method[0].serverStreaming = true
    #expect(Self.breaks(from: before, to: after).count == 4)
    // What is added breaks nobody.
    #expect(Self.breaks(from: after, to: before).count == 3)
    #expect(Self.breaks(from: before, to: before) == [])
  }

  @Test("every package that is resolved is pinned by Package.swift, and at that version") func dependencies() throws {
    struct Resolved: Decodable {
      struct Pin: Decodable {
        struct State: Decodable { let version: String? }
        let identity: String
        let state: State
      }
      let pins: [Pin]
    }
    let resolved = try JSONDecoder().decode(Resolved.self, from: Data(contentsOf: Self.root.appendingPathComponent("Package.resolved")))
    let manifest = try String(contentsOf: Self.root.appendingPathComponent("Package.swift"), encoding: .utf8)
    var pinned: [String: String] = [:]
    for match in manifest.matches(of: #/\.package\(url: "([^"]+)", exact: "([^"]+)"/#) {
      let name = match.1.split(separator: "/").last.map(String.init) ?? ""
      pinned[(name.hasSuffix(".git") ? String(name.dropLast(4)) : name).lowercased()] = String(match.2)
    }
    #expect(Dictionary(uniqueKeysWithValues: resolved.pins.map { ($0.identity.lowercased(), $0.state.version ?? "") }) == pinned)
  }
}

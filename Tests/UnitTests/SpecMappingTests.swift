// SPDX-License-Identifier: Apache-2.0

import Foundation
import SwiftProtobuf
import Agent
import Concurrency
import Errors
import GRPCCore
import GRPCProtobuf
import Testing

@testable import API
@testable import WireMapping
@testable import Workspaces

/// A spec is written as protobuf, as YAML and as a Swift type. These tests take every field that the proto file has from one to the next.
@Suite("A spec on the wire and as YAML") struct SpecMappingTests {
  /// Values for fields that take no text or number of any kind, by path. A field that is new and needs one fails the first test.
  static var values: [String: Any] {
    [
      "id": "ada-1", "owner.uid": 2001, "owner.gid": 2002, "owner.name": "ada", "resources.memory": "1Gi", "resources.cpu": "500m",
      "resources.pids": "64", "resources.shm": "64Mi", "resources.scratch": "128Mi", "storage.home": "/srv/homes/ada",
      "storage.size": "2Gi",
      "storage.driver": "HOME_DRIVER_IMAGE", "storage.fileSystem": "FILE_SYSTEM_EXT4", "command": ["/bin/true"],
      "lifecycle.gracePeriodSeconds": 30, "lifecycle.maxLifetimeSeconds": "3600", "lifecycle.restartPolicy": "RESTART_POLICY_NEVER",
      "network": "NETWORK_POLICY_OPEN", "environment": ["A": "b"], "labels": ["team": "x"], "aws.roles": ["reader"],
      "git.host": "git.example.org", "git.organisations": ["moj"], "credentials": ["key"],
      "storage.datasets": [
        ["source": "/srv/data/a", "target": "/data/a", "writable": true],
        ["dataset": "sales@v1", "path": "2026", "target": "/data/b"],
      ],
    ]
  }

  static let messages: [String: Google_Protobuf_DescriptorProto] = {
    let all = (try? PromiseTests.descriptors(base64: DescriptorSet.base64))?.file.filter { $0.package == "carrel.v1" } ?? []
    return Dictionary(uniqueKeysWithValues: all.flatMap(\.messageType).map { ($0.name, $0) })
  }()

  /// A JSON object with every field of a message set.
  static func object(_ message: String, _ path: String = "") throws -> [String: Any] {
    var object: [String: Any] = [:]
    for field in try #require(messages[message], "\(message)").field {
      let path = path + field.jsonName
      let type = field.typeName.split(separator: ".").last.map(String.init) ?? ""
      if let value = values[path] {
        object[field.jsonName] = value
      } else if field.type == .message {
        let inner = try Self.object(type, path + ".")
        object[field.jsonName] = field.label == .repeated ? [inner] : inner
      } else {
        switch field.type {
        case .string: object[field.jsonName] = field.label == .repeated ? ["x"] : "x"
        case .bool: object[field.jsonName] = true
        default: object[field.jsonName] = field.label == .repeated ? [7] : 7
        }
      }
    }
    return object
  }

  static func whole() throws -> (json: [String: Any], wire: Carrel_V1_WorkspaceSpec) {
    let json = try object("WorkspaceSpec")
    let text = String(decoding: try JSONSerialization.data(withJSONObject: json), as: UTF8.self)
    return (json, try Carrel_V1_WorkspaceSpec(jsonString: text))
  }

  /// The paths of the fields that are set.
  static func paths(_ message: String, _ json: Any, _ path: String = "") throws -> Set<String> {
    var found: Set<String> = []
    if let list = json as? [[String: Any]] {
      for entry in list { found.formUnion(try paths(message, entry, path)) }
    } else if let object = json as? [String: Any] {
      for field in try #require(messages[message]).field {
        guard let value = object[field.jsonName] else { continue }
        let type = field.typeName.split(separator: ".").last.map(String.init) ?? ""
        let isMap = type.hasSuffix("Entry")
        found.insert(path + field.jsonName)
        if field.type == .message && !isMap { found.formUnion(try paths(type, value, path + field.jsonName + ".")) }
      }
    }
    return found
  }

  static func all(_ message: String, _ path: String = "") throws -> Set<String> {
    var found: Set<String> = []
    for field in try #require(messages[message]).field {
      found.insert(path + field.jsonName)
      let type = field.typeName.split(separator: ".").last.map(String.init) ?? ""
      if field.type == .message && !type.hasSuffix("Entry") { found.formUnion(try all(type, path + field.jsonName + ".")) }
    }
    return found
  }

  @Test("the spec of these tests sets every field of the proto file") func coverage() throws {
    #expect(try Self.paths("WorkspaceSpec", Self.whole().json) == Self.all("WorkspaceSpec"))
  }

  @Test("no field is lost from the wire to the domain, to YAML, back to the domain and to the wire") func roundTrip() throws {
    let wire = try Self.whole().wire
    let spec = try WorkspaceSpec(wire)
    // Records keep specs as JSON, which is YAML, under the names of the manifest; but for a dataset's.
    var object = try #require(try JSONSerialization.jsonObject(with: JSONEncoder().encode(spec)) as? [String: Any])
    var storage = try #require(object["storage"] as? [String: Any])
    storage["datasets"] = try #require(storage["datasets"] as? [[String: Any]]).map { entry in
      var entry = entry
      entry["dataset"] = entry.removeValue(forKey: "name")
      return entry.filter { $0.value as? String != "" }
    }
    object["storage"] = storage
    let yaml = String(decoding: try JSONSerialization.data(withJSONObject: object), as: UTF8.self)
    let again = try WorkspaceSpec(yaml: yaml)
    #expect(again == spec)
    #expect(Carrel_V1_WorkspaceSpec(again) == wire)
  }

  @Test("every value of every enumeration of a spec is taken there and back") func enumerations() throws {
    func expect(_ change: (inout Carrel_V1_WorkspaceSpec) -> Void) throws {
      var wire = try Self.whole().wire
      change(&wire)
      #expect(try Carrel_V1_WorkspaceSpec(WorkspaceSpec(wire)) == wire)
    }
    for value in Carrel_V1_HomeDriver.allCases { try expect { $0.storage.driver = value } }
    for value in Carrel_V1_FileSystem.allCases { try expect { $0.storage.fileSystem = value } }
    for value in Carrel_V1_NetworkPolicy.allCases { try expect { $0.network = value } }
    for value in Carrel_V1_RestartPolicy.allCases where value != .unspecified { try expect { $0.lifecycle.restartPolicy = value } }
  }
}

@Suite("Errors on the wire") struct ErrorTests {
  @Test("every reason and the field of a bad request are in the details, with the code that belongs to the reason") func details() throws {
    for reason in AgentError.Reason.allCases {
      let error = RPCError(AgentError(reason: reason, "x: is wrong"))
      let status = try #require(try error.unpackGoogleRPCStatus())
      #expect(error.message == "x: is wrong" && status.message == error.message && status.code == error.code)
      #expect(status.details.compactMap(\.errorInfo).map(\.reason) == [reason.rawValue])
    }
    let field = RPCError(InvalidField("owner.uid", "expected 1000 to 2147483647"))
    let status = try #require(try field.unpackGoogleRPCStatus())
    #expect(field.code == .invalidArgument && field.message == "owner.uid: expected 1000 to 2147483647")
    #expect(status.details.compactMap(\.badRequest).flatMap(\.violations).map(\.field) == ["owner.uid"])
    #expect(RPCError(AgentError(DriverError(.notFound, "there is no image x"))).code == .notFound)
    #expect(RPCError(LaneError.full(lane: "exec", queued: 1)).code == .resourceExhausted)
    #expect(RPCError(CancellationError()).code == .cancelled)
  }
}

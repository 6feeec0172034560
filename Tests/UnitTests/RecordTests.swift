// SPDX-License-Identifier: Apache-2.0

import Foundation
import Journal
import Testing

@testable import Agent
@testable import ShimClient
@testable import Workspaces

@Suite("Workspace records") struct WorkspaceRecordTests {
  static func record(_ id: String = "a") -> WorkspaceRecord {
    let spec = WorkspaceSpec(id: id, owner: .init(name: "ada", uid: 2001, gid: 2001), tool: "command", image: "i")
    let amounts = ResourceLimits(memoryBytes: 1, milliCPUs: 1, pids: 1, shmBytes: 1, scratchBytes: 1)
    return WorkspaceRecord(spec: spec, amounts: amounts, slot: 3, address: "10.0.0.5", firstID: 1_048_576, created: "t")
  }

  @Test("a record is the same after it was written and read") func coding() throws {
    var record = Self.record()
    #expect(try WorkspaceRecord(record.journalRecord()).encoded() == record.encoded())
    record.startedNanoseconds = 7
    record.sandbox = SandboxPlace(id: SandboxPlace.freshID())
    record.stop = WorkspaceRecord.StopRequest(by: "me", killAt: 7, bootID: "b")
    record.setCondition(.rescue, "why")
    record[HomeFeature.self] = HomeState(kind: .volume(bytes: 4096), filled: 95)
    record[BrokerFeature.self].revoked = ["reader"]
    record[RescueFeature.self].isPending = true
    let read = try WorkspaceRecord(record.journalRecord())
    #expect(try read.encoded() == record.encoded())
    #expect(read[HomeFeature.self].kind == .volume(bytes: 4096) && read[RescueFeature.self].isPending)
    #expect(read.condition(.rescue)?.message == "why" && read.sandbox == record.sandbox)
  }

  @Test("what a feature of another release keeps is kept, and fields that lack have their defaults") func unknown() throws {
    let text = try Self.record().encoded()
    var object = try #require(try JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any])
    object["features"] = ["idle": ["since": 9_007_199_254_740_993, "list": [1, "x", true]], "broker": ["revoked": []]]
    object["phases"] = nil
    let body = String(decoding: try JSONSerialization.data(withJSONObject: object), as: UTF8.self)
    let record = try WorkspaceRecord(JournalRecord(id: "a", state: "pending", slot: 3, body: body))
    #expect(record.phases.isEmpty && record.attempt == 1)
    #expect(try record.encoded().contains(#""idle":{"list":[1,"x",true],"since":9007199254740993}"#))
  }

  @Test("every feature with a state is known where records are decoded, and its state has a default for every field") func states() throws {
    let state = FileManager.default.temporaryDirectory.appendingPathComponent("carrel-states-\(UUID().uuidString)").path
    defer { try? FileManager.default.removeItem(atPath: state) }
    let features = try Features(Bench.services(FakeSandboxes(), FakeEvents(), state: state))
    func name<F: WorkspaceFeature>(_ feature: F) -> String? { F.State.self == NoState.self ? nil : F.name }
    #expect(Set(features.list.compactMap { name($0) }) == Set(featureStates.keys))
    func readsNothing<S: FeatureState>(_ type: S.Type) throws -> Bool { try S(kept: .object([:])) == S() }
    for (name, type) in featureStates { #expect(try readsNothing(type), "\(name)") }
    #expect(try OutOfMemoryState(kept: .object(["later": .flag(true)])) == OutOfMemoryState())
  }

  @Test("a journal of commit 7ede341 is read: nothing of its records is lost") func migration() throws {
    let fixtures = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().appendingPathComponent(
      "Fixtures")
    let copy = FileManager.default.temporaryDirectory.appendingPathComponent("carrel-journal-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: copy, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: copy) }
    let path = copy.appendingPathComponent("journal.sqlite").path
    try FileManager.default.copyItem(atPath: fixtures.appendingPathComponent("journal-7ede341.sqlite").path, toPath: path)
    let journal = try Journal(path: path)
    defer { try? journal.close() }
    #expect(journal.loss == nil)
    let records = try journal.allRecords().map { try WorkspaceRecord($0) }
    let all = Dictionary(uniqueKeysWithValues: records.map { ($0.spec.id, $0) })
    #expect(all.keys.sorted() == ["asked", "batch", "boxed", "desk", "late", "loop", "missing", "roles", "sales"])
    #expect(all["batch"]?.state == .stopped && all["batch"]?.reason?.exitCode == 3)
    #expect(all["missing"]?.reason?.code == .executable && all["missing"]?.startedNanoseconds == nil)
    #expect(all["boxed"]?[HomeFeature.self].kind == .volume(bytes: 33_554_432))
    #expect(all["desk"]?[HomeFeature.self].kind == .directory(limit: nil))
    #expect(all["asked"]?.stop != nil && all["asked"]?.condition(.credentialsExpiring)?.message == "soon removed: short")
    #expect(all["asked"]?[CredentialsFeature.self].ends["short"] != nil && all["desk"]?[CredentialsFeature.self].ends["day"] != nil)
    #expect(all["roles"]?[BrokerFeature.self].revoked == ["writer"])
    #expect(all["sales"]?[DatasetsFeature.self].mounted.map(\.target) == ["/data/sales", "/data/extra"])
    #expect(all["sales"]?[DatasetsFeature.self].mounted.last?.isAttached == true)
    #expect(all["loop"]?.spec.lifecycle.restartPolicy == .onFailure && all["late"]?.spec.lifecycle.maxLifetimeSeconds != nil)
    for record in records {
      #expect(record.sandbox?.isLegacy == true && record.sandbox?.folder == "workspaces/\(record.spec.id)")
      #expect(record.sandbox?.cgroup.hasPrefix(record.spec.id + "-") == true)
      // Written again it is of this release, and the same.
      #expect(try WorkspaceRecord(record.journalRecord()).encoded() == record.encoded())
    }
  }
}

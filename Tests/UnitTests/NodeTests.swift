// SPDX-License-Identifier: Apache-2.0

@testable import Configuration
import Concurrency
import Foundation
import Images
import Journal
import Linux
import Volumes
import Synchronization
import Testing

@testable import Agent
@testable import Credentials
@testable import ShimProtocol
@testable import ShimClient
@testable import Workspaces

@Suite("A node") struct NodeTests {
  /// A node over a real journal and stand-ins for the rest.
  private func node(_ sandboxes: FakeSandboxes, _ change: (inout Configuration) -> Void = { _ in }) throws -> (Node, String) {
    let state = FileManager.default.temporaryDirectory.appendingPathComponent("carrel-node-\(UUID().uuidString)").path
    try FileManager.default.createDirectory(atPath: state, withIntermediateDirectories: true)
    let journal = try Journal(path: state + "/journal.sqlite")
    let feed = EventFeed()
    let first = try Bench.services(sandboxes, FakeEvents(), state: state)
    let sink = JournalSink(journal, feed, first.logger)
    let services = try Bench.services(sandboxes, sink, state: state, change)
    return (Node(services, journal, sink, feed, try ImageStore(path: state + "/images"), try Features(services), nil), state)
  }

  @Test("two launches of the same spec at once are one workspace, and of another spec a refusal") func twice() async throws {
    let sandboxes = FakeSandboxes()
    let (node, state) = try node(sandboxes)
    defer { try? FileManager.default.removeItem(atPath: state) }
    let committing = Task { try await node.sink.run() }
    defer { committing.cancel() }
    async let first = node.launch(Bench.spec(), credentials: [])
    async let second = node.launch(Bench.spec(), credentials: [])
    let created = try await [first.created, second.created]
    #expect(created.filter { $0 }.count == 1)
    #expect(try await node.journal.records().map(\.id) == ["a"])
    await #expect(throws: AgentError.self) { try await node.launch(Bench.spec { $0.command = ["/bin/false"] }, credentials: []) }
    #expect(await node.list().count == 1)
  }

  @Test("a node that no controller acknowledges goes on: the older half of its events goes when the journal reaches its limit")
  func nobodyAcknowledges() async throws {
    let (node, state) = try node(FakeSandboxes()) {
      $0.journalLimit = "256Ki"
      $0.journalKeep = 10
    }
    defer { try? FileManager.default.removeItem(atPath: state) }
    let committing = Task { try await node.sink.run() }
    defer { committing.cancel() }
    let folder = String(repeating: "x", count: 2000)
    while node.journal.bytesInUse <= node.journalRoom { try await node.services.record(.swept, ["folder": folder]) }
    #expect(try await node.launch(Bench.spec(), credentials: []).created)
    let extent = try await node.journal.extent()
    #expect(extent.oldest > 10 && extent.bytes < node.journalRoom)
  }

  @Test("what was submitted before an agent ends is on disk when it has ended") func submittedAtTheEnd() async throws {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("carrel-sink-\(UUID().uuidString)").path
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let services = try Bench.services(FakeSandboxes(), FakeEvents())
    let journal = try Journal(path: folder + "/j.sqlite")
    let sink = JournalSink(journal, EventFeed(), services.logger)
    let done = sink.submit([Journal.Entry(try services.nodeEvent(.swept, [:]))], retriesUntilDurable: true)
    let run = Task { try await sink.run() }
    run.cancel()
    try await run.value
    #expect(done.isFulfilled)
    #expect(try await journal.head() == 1)
  }

  @Test("a stop that comes while a launch is accepted takes effect after it, and nothing is left") func stopDuringAcceptance() async throws
  {
    let sandboxes = FakeSandboxes()
    let (node, state) = try node(sandboxes)
    defer { try? FileManager.default.removeItem(atPath: state) }
    let running = Task {
      await withDiscardingTaskGroup { group in
        group.addTask { try? await node.sink.run() }
        group.addTask { await node.runLives() }
      }
    }
    defer { running.cancel() }
    let gate = Promise<Void>()
    sandboxes.state.withLock { $0.gate = gate }
    let spec = Bench.spec { $0.credentials = ["key"] }
    let launching = Task { try await node.launch(spec, credentials: [Credential(name: "key", content: [1])]) }
    while await node.list().isEmpty { try await Task.sleep(for: .milliseconds(1)) }
    let stopping = Task { try await node.stop("a", grace: 0, by: "me") }
    try await Task.sleep(for: .milliseconds(20))
    gate.fulfil(.success(()))
    #expect(try await launching.value.created)
    #expect(try await stopping.value.state == .stopped)
    try await node.delete("a")
    #expect(try await node.launch(Bench.spec("b"), credentials: []).created)
  }

  @Test("a spec that no longer can be fulfilled still finds its workspace") func idempotent() async throws {
    let sandboxes = FakeSandboxes()
    let (node, state) = try node(sandboxes)
    defer { try? FileManager.default.removeItem(atPath: state) }
    // As if its dataset's registration had gone since.
    let spec = Bench.spec { $0.storage.datasets = [WorkspaceSpec.Dataset(target: "/data", writable: false, name: "gone")] }
    await #expect(throws: AgentError.self) { try await node.launch(spec, credentials: []) }
    let amounts = ResourceLimits(memoryBytes: 1, milliCPUs: 1, pids: 1, shmBytes: 1, scratchBytes: 1)
    let record = WorkspaceRecord(spec: spec, amounts: amounts, slot: 1, address: "10.0.0.3", firstID: 1_048_576, created: "t")
    await node.insert(Workspace(record, node.services, [], isOnRecord: true))
    #expect(try await node.launch(spec, credentials: []).created == false)
  }
}

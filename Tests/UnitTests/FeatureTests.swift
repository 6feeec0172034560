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

@Suite("Features") struct FeatureTests {
  private func workspace(_ features: [any WorkspaceFeature], _ services: NodeServices, _ spec: WorkspaceSpec) -> Workspace {
    let amounts = ResourceLimits(memoryBytes: 1, milliCPUs: 1, pids: 1, shmBytes: 1, scratchBytes: 1)
    var record = WorkspaceRecord(spec: spec, amounts: amounts, slot: 1, address: "10.0.0.3", firstID: 1_048_576, created: "t")
    record.state = .ready
    return Workspace(record, services, features, isOnRecord: true)
  }

  private func until(_ what: String, _ condition: () async -> Bool) async throws {
    for _ in 0..<5000 {
      if await condition() { return }
      try await Task.sleep(for: .milliseconds(1))
    }
    throw TestFailure(what)
  }

  @Test("each credential that ends is warned of once, whatever it is called") func expiring() async throws {
    let (sandboxes, events) = (FakeSandboxes(), FakeEvents())
    let services = try Bench.services(sandboxes, events)
    let feature = CredentialsFeature(services: services)
    let workspace = workspace([feature], services, Bench.spec { $0.credentials = ["a", "soon", "late"] })
    await workspace.use(FakeLink(.started(pid: getpid())))
    // A warning comes when a quarter of the time is left: at once for these.
    await workspace.update { record in
      for name in ["a", "soon", "late"] {
        record[CredentialsFeature.self].ends[name] = CredentialExpiry(given: 0, seconds: Date.now.timeIntervalSince1970 + 100)
      }
    }
    #expect((feature.nextExpiry(in: workspace.record) ?? .infinity) < Date.now.timeIntervalSince1970)
    for _ in 0..<2 { #expect(await feature.expire(workspace)) }
    #expect(events.types.filter { $0 == .credentialsExpiring }.count == 3)
    #expect((feature.nextExpiry(in: workspace.record) ?? 0) > Date.now.timeIntervalSince1970 + 90)
    #expect(workspace.record.condition(.credentialsExpiring)?.message == "soon removed: a, late, soon")
    await workspace.update { $0[CredentialsFeature.self].ends["soon"] = CredentialExpiry(given: 0, seconds: 1) }
    #expect(await feature.expire(workspace))
    #expect(events.types.contains(.credentialsRemoved))
    #expect(workspace.record[CredentialsFeature.self].ends.keys.sorted() == ["a", "late"])
  }

  @Test("the file of the tool's token is reserved for the agent, at the launch and after") func reserved() async throws {
    let services = try Bench.services(FakeSandboxes(), FakeEvents())
    let feature = CredentialsFeature(services: services)
    let tool = try Tool(yaml: "name: t\nhome: /h\ntokenFile: mytoken\narguments: [x]\n")
    await #expect(throws: InvalidField.self) { try await feature.validate(Bench.spec { $0.credentials = ["mytoken"] }, tool) }
    try await feature.validate(Bench.spec { $0.credentials = ["other"] }, tool)
  }

  @Test("a provider that is dead delays no start: it is reported once, and asked again") func deadProvider() async throws {
    let events = FakeEvents()
    let state = FileManager.default.temporaryDirectory.appendingPathComponent("carrel-provider-\(UUID().uuidString)").path
    defer { try? FileManager.default.removeItem(atPath: state) }
    let services = try Bench.services(FakeSandboxes(), events, state: state) {
      $0.webIdentity = (.program(["/bin/false"], timeoutSeconds: 1), "arn:{role}")
    }
    let feature = try Features(services).broker
    let spec = Bench.spec { $0.aws = WorkspaceSpec.AWS(roles: ["reader"], webIdentity: true) }
    let workspace = workspace([feature], services, spec)
    let link = FakeLink(.started(pid: getpid()))
    await workspace.use(link)
    try await feature.connect(workspace, try #require(link.process))
    #expect(events.types == [.credentialsFailed])
    let running = Task { await feature.run(workspace, isAdopted: false, reports: link.reports) }
    try await Task.sleep(for: .milliseconds(1200))
    running.cancel()
    link.end()
    await running.value
    #expect(events.types == [.credentialsFailed])
  }

  @Test("the end of a further program is on record once: from its client, from the end of the workspace, or from the next agent")
  func ends() async throws {
    let events = FakeEvents()
    let services = try Bench.services(FakeSandboxes(), events)
    let feature = ExecFeature()
    let workspace = workspace([feature], services, Bench.spec())
    let link = FakeLink(.started(pid: getpid()))
    await workspace.use(link)
    let asked = ExecAsked(command: ["true", "secret"], environment: [:], directory: "", terminal: false, rows: 24, columns: 80)
    var programs: [RunningProgram] = []
    for _ in 0..<3 { programs.append(try await feature.start(asked, in: workspace, by: "uid 0")) }
    #expect(events.types == [.execStarted, .execStarted, .execStarted])
    await programs[0].ended(.ended(.exited(7)))
    let first = try #require(events.attributes.last)
    #expect(first["exitCode"] == "7" && first["program"] == "true" && first["arguments"] == "1" && first["by"] == "uid 0")
    #expect(workspace.record[ExecFeature.self].running.count == 2)

    // What the next agent reads from the record of this one.
    let next = Workspace(try WorkspaceRecord(workspace.record.journalRecord()), services, [ExecFeature()], isOnRecord: true)
    #expect(ExecFeature().hasWork(in: next.record, isAdopted: true))
    await ExecFeature().run(next, isAdopted: true, reports: link.reports)
    #expect(events.types.suffix(2) == [.execEnded, .execEnded])
    #expect(events.attributes.last?["outcome"] == "the agent ended first; the program was hung up on")
    #expect(next.record[ExecFeature.self].running.isEmpty)

    let before = events.types.count
    #expect(!feature.hasWork(in: workspace.record, isAdopted: false))
    await feature.run(workspace, isAdopted: false, reports: link.reports)
    #expect(events.types.count == before, "its own programs go on")
    await feature.ended(Reason(.exited, "x"), workspace)
    await programs[1].ended(.lost)
    await programs[2].ended(nil, clientLeft: true)
    #expect(events.types.dropFirst(before) == [.execEnded, .execEnded])
    #expect(events.attributes.last?["outcome"] == "the workspace ended first")
  }
}

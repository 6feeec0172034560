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

@Suite("The life of a workspace") struct LifeTests {
  @Test("a launch runs through its hooks to its end, and everything is given back") func whole() async throws {
    let bench = try Bench()
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.finish(link, 7)
    await life.value
    let record = bench.workspace.record
    #expect(record.state == .stopped && record.reason?.code == .exited && record.reason?.exitCode == 7)
    #expect(bench.feature.calls == ["prepare", "connect", "run", "run ended", "ended Exited", "release"])
    #expect(bench.events.types == [.created, .preparing, .starting, .ready, .stopped])
    #expect(bench.sandboxes.removed == [record.sandbox?.id])
  }

  @Test("a stop during the preparation ends it at once, and nothing is launched") func stopDuringPrepare() async throws {
    let bench = try Bench(Bench.spec(), FakeFeature(gate: Promise()))
    let life = try await bench.launch()
    try await bench.feature.wait(for: "prepare")
    let record = try await bench.workspace.stop(grace: nil, by: "me")
    #expect(record.state == .stopped && record.reason?.code == .requested && record.reason?.stoppedBy == "me")
    await life.value
    #expect(!bench.sandboxes.links[0].asked.contains(.launch) && bench.sandboxes.links[0].asked.contains(.kill))
    #expect(bench.feature.calls == ["prepare", "ended Requested", "release"])
    #expect(bench.sandboxes.removed.count == 1)
  }

  @Test("a step that refuses is why the start failed") func refusal() async throws {
    let bench = try Bench(Bench.spec(), FakeFeature(refusal: Refusal(.storage, "no such export")))
    try await bench.launch().value
    #expect(bench.workspace.record.state == .failed && bench.workspace.record.reason?.code == .storage)
    #expect(bench.events.types == [.created, .preparing, .failed])
  }

  @Test("a stop signals before the disk takes anything") func stopOnFullDisk() async throws {
    let bench = try Bench()
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.events.become(.hangs)
    let stopping = Task { try await bench.workspace.stop(grace: 60, by: "me") }
    try await link.wait(for: .signal(Signals.terminate))
    bench.finish(link, 0)
    try await bench.until(.stopped)
    // It is told when it is on disk, and not before.
    #expect(await !bench.workspace.end.isFulfilled)
    bench.events.become(.takes)
    #expect(try await stopping.value.reason?.code == .requested)
    await life.value
  }

  @Test("what has expired is ended when the tool runs, once while that takes, and as often as it is due") func expiry() async throws {
    let bench = try Bench()
    bench.feature.expiry.withLock { $0 = 1 }
    let life = try await bench.launch()
    let link = try await bench.start()
    try await bench.feature.wait(for: "expire")
    await bench.workspace.update { $0.outOfMemoryKills += 1 }
    try await Task.sleep(for: .milliseconds(20))
    func expiries() -> Int { bench.feature.calls.count { $0 == "expire" } }
    #expect(expiries() == 1)
    #expect(bench.feature.calls.prefix(2) == ["prepare", "connect"])
    bench.feature.expiry.withLock { $0 = Date.now.timeIntervalSince1970 + 0.05 }
    bench.feature.expiryGate.fulfil(.success(()))
    for _ in 0..<1000 where expiries() < 2 { try await Task.sleep(for: .milliseconds(1)) }
    #expect(expiries() >= 2)
    bench.feature.expiry.withLock { $0 = nil }
    bench.finish(link, 0)
    try await bench.until(.stopped)
    await life.value
  }

  @Test("the end of the tool cancels what ends something that has expired") func expiryAtTheEnd() async throws {
    let bench = try Bench()
    bench.feature.expiry.withLock { $0 = 1 }
    let life = try await bench.launch()
    let link = try await bench.start()
    try await bench.feature.wait(for: "expire")
    bench.finish(link, 0)
    await life.value
    #expect(bench.feature.calls.contains("expiry cancelled"))
    #expect(bench.feature.calls.last == "release")
  }

  @Test("a launch that the journal refuses leaves nothing") func journalFull() async throws {
    let bench = try Bench()
    bench.events.become(.refuses)
    await #expect(throws: AgentError.self) { try await bench.launch() }
    #expect(bench.sandboxes.links[0].asked == [.kill] && bench.sandboxes.removed.count == 1)
    #expect(bench.feature.calls.isEmpty)

    let secret = try Bench(Bench.spec { $0.credentials = ["key"] })
    secret.events.become(.refuses)
    let secrets = LaunchSecrets(credentials: [Credential(name: "key", content: [7])])
    await #expect(throws: AgentError.self) { try await secret.launch(secrets) }
    #expect(secret.sandboxes.links[0].asked.last == .kill && secret.sandboxes.removed.count == 1)
    #expect(secret.feature.calls.isEmpty)
  }

  @Test("a launch without secrets is answered before its supervisor runs, and a stop then ends it") func answeredFirst() async throws {
    let bench = try Bench()
    let gate = Promise<Void>()
    bench.sandboxes.state.withLock { $0.gate = gate }
    let life = try await bench.launch()
    try await bench.feature.wait(for: "prepare")
    #expect(bench.sandboxes.links.isEmpty)
    let workspace = bench.workspace
    let stopping = Task { try await workspace.stop(grace: nil, by: "me") }
    try await bench.until(.stopping)
    gate.fulfil(.success(()))
    #expect(try await stopping.value.reason?.stoppedBy == "me")
    await life.value
    // The supervisor that was started meanwhile is not left behind.
    #expect(bench.sandboxes.links[0].asked == [.kill] && bench.sandboxes.removed.count == 1)
  }

  @Test("an agent that ends before the supervisor runs: the next one starts it, in the same attempt") func endedBeforeSupervisor()
    async throws
  {
    let bench = try Self.recovered(.preparing, nil)
    bench.sandboxes.state.withLock { $0.absent = [bench.workspace.record.sandbox?.id ?? ""] }
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    let link = try await bench.start()
    bench.finish(link, 3)
    await life.value
    #expect(bench.events.types == [.starting, .ready, .stopped] && workspace.record.reason?.exitCode == 3)
  }

  @Test("a launch for which no supervisor can be started is accepted and failed") func noSupervisor() async throws {
    let bench = try Bench()
    bench.sandboxes.state.withLock { $0.failsToCreate = true }
    try await bench.launch().value
    #expect(bench.workspace.record.state == .failed && bench.workspace.record.reason?.code == .isolation)
  }

  @Test("the restart policy brings another attempt, in a sandbox of its own; a drain does not") func restart() async throws {
    let bench = try Bench(Bench.spec { $0.lifecycle.restartPolicy = .always })
    let life = try await bench.launch()
    let first = bench.workspace.record.sandbox
    let link = try await bench.start()
    link.report(.ended(.exited(0)))
    bench.sandboxes.put(.ended(.exited(0)), of: first)
    link.end()
    try await bench.start(1)
    #expect(bench.workspace.record.attempt == 2 && bench.workspace.record.sandbox != first)
    bench.finish(try await bench.sandboxes.link(1), 1)
    try await bench.until(.stopped)
    while await !bench.workspace.isPausing { try await Task.sleep(for: .milliseconds(1)) }
    await bench.workspace.drain()
    while await bench.workspace.isPausing { try await Task.sleep(for: .milliseconds(1)) }
    try await Task.sleep(for: .milliseconds(20))
    #expect(bench.workspace.record.attempt == 2 && bench.workspace.record.state == .stopped)
    #expect(bench.sandboxes.links.count == 2)
    // When the drain ends, the policy holds again.
    await bench.workspace.undrain()
    while await !bench.workspace.isPausing { try await Task.sleep(for: .milliseconds(1)) }
    await bench.workspace.endPause()
    _ = try await bench.workspace.stop(grace: nil, by: "me")
    await life.value
    #expect(bench.events.types.last == .restartsEnded && bench.sandboxes.links.count == 2)
  }

  @Test("a deletion between two attempts is the end: no other follows") func deletedWhilePausing() async throws {
    let bench = try Bench(Bench.spec { $0.lifecycle.restartPolicy = .always })
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.finish(link, 0)
    try await bench.until(.stopped)
    // It may come before the pause has begun, or in it.
    try await bench.workspace.delete()
    await life.value
    #expect(bench.sandboxes.links.count == 1 && bench.events.types.last == .deleted)
  }

  @Test("a deletion that fails between two attempts ends nothing: the policy holds") func deletionFails() async throws {
    let bench = try Bench(Bench.spec { $0.lifecycle.restartPolicy = .always })
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.finish(link, 0)
    try await bench.until(.stopped)
    // The state is in memory before its event is submitted.
    while !bench.events.types.contains(.stopped) { try await Task.sleep(for: .milliseconds(1)) }
    bench.events.become(.refuses)
    await #expect(throws: AgentError.self) { try await bench.workspace.delete() }
    bench.events.become(.takes)
    try await bench.start(1)
    life.cancel()
  }

  @Test("a supervisor that cannot be started for another attempt is tried again after a pause") func restartFails() async throws {
    let bench = try Bench(Bench.spec { $0.lifecycle.restartPolicy = .always })
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.sandboxes.state.withLock { $0.failsToCreate = true }
    bench.finish(link, 0)
    try await bench.until(.stopped)
    while await !bench.workspace.isPausing { try await Task.sleep(for: .milliseconds(1)) }
    bench.sandboxes.state.withLock { $0.failsToCreate = false }
    try await bench.start(1)
    #expect(!bench.events.types.contains(.restartsEnded) && bench.workspace.record.attempt == 2)
    life.cancel()
  }

  @Test("a supervisor that does not reply to a new agent is killed when a stop is due") func stopOfUnreachable() async throws {
    let bench = try Self.recovered(.stopping, FakeLink(.started(pid: getpid())), plan: true) {
      $0.startedNanoseconds = 1
      $0.stop = WorkspaceRecord.StopRequest(by: "me", killAt: 0, bootID: $0.bootID)
    }
    bench.sandboxes.state.withLock { $0.isSilent = true }
    await bench.workspace.runAttempts(.recovered)
    #expect(bench.workspace.record.state == .stopped && bench.workspace.record.reason?.stoppedBy == "me")
  }

  @Test("a stop between two attempts holds, also before the pause has begun") func stoppedBetween() async throws {
    let bench = try Bench(Bench.spec { $0.lifecycle.restartPolicy = .always })
    let life = try await bench.launch()
    let link = try await bench.start()
    bench.finish(link, 0)
    try await bench.until(.stopped)
    _ = try await bench.workspace.stop(grace: nil, by: "me")
    await life.value
    #expect(bench.sandboxes.links.count == 1 && bench.events.types.last == .restartsEnded)
  }

  @Test("credentials are with the supervisor before the launch is on record") func entrusted() async throws {
    let bench = try Bench(Bench.spec { $0.credentials = ["key"] })
    bench.events.become(.hangs)
    let launching = Task { try await bench.launch(LaunchSecrets(credentials: [Credential(name: "key", content: [1, 2])])) }
    let link = try await bench.sandboxes.link(0)
    try await link.wait(for: .putSecret(name: "key", content: []))
    #expect(try link.secrets["key"]?.descriptor.read(at: 0, upTo: 10) == [1, 2])
    bench.events.become(.takes)
    _ = try await launching.value
  }

  // ----------------------------------------------------------------- recovery

  static func recovered(
    _ state: WorkspaceState, _ link: FakeLink?, spec: WorkspaceSpec = Bench.spec(), plan: Bool = false, exit: ExitRecord? = nil,
    _ change: (inout WorkspaceRecord) -> Void = { _ in }
  ) throws -> Bench {
    try Bench(spec, isOnRecord: true) { record, sandboxes in
      let place = SandboxPlace(id: SandboxPlace.freshID())
      record.sandbox = place
      record.state = state
      if state.isUp { record.startedNanoseconds = 1 }
      change(&record)
      sandboxes.state.withLock { sandboxes in
        sandboxes.living[place.id] = link
        if plan { sandboxes.plans.insert(place.id) }
        sandboxes.exits[place.id] = exit
      }
    }
  }

  @Test("a new agent goes on wherever the sandbox stands, and the known exit is what is reported", arguments: 0..<5)
  func resume(step: Int) async throws {
    let states: [SandboxState] = [
      .awaitingPlan, .preparing, .created(pid: getpid()), .waiting(pid: getpid()), .started(pid: getpid()),
    ]
    let link = FakeLink(states[step])
    let bench = try Self.recovered(.preparing, link, plan: step > 0)
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    if step == 0 { try await link.wait(for: .launch) }
    if step < 2 { link.report(.created(pid: getpid())) }
    if step < 3 { link.report(.waiting(pid: getpid())) }
    if step < 4 {
      try await link.wait(for: .start)
      link.report(.started(pid: getpid()))
    }
    try await bench.feature.wait(for: step == 4 ? "run adopted" : "run")
    bench.finish(link, 48)
    await life.value
    #expect(workspace.record.state == .stopped && workspace.record.reason?.exitCode == 48)
    #expect(workspace.record.attempt == 1)
    #expect(bench.events.types.filter { $0 == .adopted }.count == (step == 4 ? 1 : 0))
  }

  @Test("an exit that is on record is reported, whatever the agent knew before", arguments: [WorkspaceState.preparing, .starting, .ready])
  func exitOnRecord(state: WorkspaceState) async throws {
    let bench = try Self.recovered(state, nil, plan: true, exit: .ended(.exited(48)))
    await bench.workspace.runAttempts(.recovered)
    #expect(bench.workspace.record.reason?.code == .exited && bench.workspace.record.reason?.exitCode == 48)
  }

  @Test("an agent that ends while it waits for a supervisor kills nothing and records nothing") func cancelledRecovery() async throws {
    let bench = try Self.recovered(.ready, FakeLink(.started(pid: getpid())), plan: true)
    bench.sandboxes.state.withLock { $0.gate = Promise() }
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    try await Task.sleep(for: .milliseconds(20))
    life.cancel()
    await life.value
    #expect(bench.events.types.isEmpty && bench.sandboxes.state.withLock { $0.killed.isEmpty })
    #expect(workspace.record.state == .ready)
  }

  @Test("an agent that ends while a sandbox is connected leaves it to the next one") func endDuringConnect() async throws {
    let bench = try Bench(Bench.spec(), FakeFeature(connection: Promise()))
    let life = try await bench.launch()
    let link = try await bench.sandboxes.link(0)
    try await link.wait(for: .launch)
    link.report(.created(pid: getpid()))
    try await bench.feature.wait(for: "connect")
    life.cancel()
    await life.value
    #expect(!link.asked.contains(.kill) && bench.sandboxes.state.withLock { $0.killed.isEmpty })
    #expect(bench.workspace.record.state == .preparing && bench.events.types == [.created, .preparing])
  }

  @Test("a supervisor that goes while its plan is made: the launch is tried again") func lostDuringPrepare() async throws {
    let gate = Promise<Void>()
    let bench = try Bench(Bench.spec(), FakeFeature(gate: gate))
    let life = try await bench.launch()
    try await bench.feature.wait(for: "prepare")
    let first = try await bench.sandboxes.link(0)
    bench.sandboxes.state.withLock { $0.living = [:] }
    first.end()
    gate.fulfil(.success(()))
    let second = try await bench.start(1)
    bench.finish(second, 4)
    await life.value
    #expect(bench.workspace.record.reason?.exitCode == 4 && bench.events.types.contains(.restarting))
  }

  @Test("a supervisor lost before its plan: the launch is tried again, unless its credentials went with it")
  func supervisorLost() async throws {
    let bench = try Self.recovered(.preparing, nil)
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    let link = try await bench.start()
    #expect(bench.events.types == [.restarting, .preparing, .starting, .ready])
    bench.finish(link, 0)
    await life.value
    #expect(workspace.record.reason?.exitCode == 0)

    let secret = try Self.recovered(.preparing, nil, spec: Bench.spec { $0.credentials = ["key"] })
    await secret.workspace.runAttempts(.recovered)
    #expect(secret.workspace.record.state == .failed && secret.workspace.record.reason?.code == .credentialsLost)
  }

  @Test("one whose supervisor has the credentials starts with them") func credentialsRecovered() async throws {
    let key = try FakeVault().file([7, 8])
    let link = FakeLink(.awaitingPlan, secrets: ["key": key])
    let bench = try Self.recovered(.preparing, link, spec: Bench.spec { $0.credentials = ["key"] })
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    try await link.wait(for: .launch)
    #expect(await workspace.secrets.credentials.map(\.content) == [[7, 8]])
    bench.finish(link, 0)
    await life.value
  }

  @Test("a supervisor that is gone without a record is reported as that, and after a reboot as lost to it") func lost() async throws {
    let gone = try Self.recovered(.ready, nil, plan: true)
    await gone.workspace.runAttempts(.recovered)
    #expect(gone.workspace.record.reason?.code == .unknown)
    let rebooted = try Self.recovered(.ready, nil, plan: true) { $0.bootID = "another" }
    await rebooted.workspace.runAttempts(.recovered)
    #expect(rebooted.workspace.record.reason?.code == .lost)
    #expect(rebooted.events.types == [.stopped])

    // One that had ended before it: its status is known, and not how long it ran, for the clock is another.
    let ended = try Self.recovered(.ready, nil, plan: true) {
      $0.bootID = "another"
      $0.startedNanoseconds = 1
    }
    ended.sandboxes.put(.ended(.exited(4)), of: ended.workspace.record.sandbox)
    await ended.workspace.runAttempts(.recovered)
    let reason = try #require(ended.workspace.record.reason)
    #expect(reason.code == .exited && reason.exitCode == 4 && reason.ranMilliseconds == nil)
  }

  @Test("a stop that an earlier agent began is carried on, and says who asked") func stopResumed() async throws {
    let link = FakeLink(.started(pid: getpid()))
    let bench = try Self.recovered(.stopping, link, plan: true) {
      $0.startedNanoseconds = 1
      $0.stop = WorkspaceRecord.StopRequest(by: "me", killAt: 0, bootID: $0.bootID)
    }
    let workspace = bench.workspace
    let life = Task { await workspace.runAttempts(.recovered) }
    try await link.wait(for: .kill)
    await life.value
    #expect(workspace.record.state == .stopped && workspace.record.reason?.stoppedBy == "me")
  }

  @Test("a request to launch that is lost with its connection is made again") func launchedOverAnother() async throws {
    let bench = try Bench()
    let life = try await bench.launch()
    let link = try await bench.sandboxes.link(0)
    try await link.wait(for: .launch)
    let again = FakeLink()
    bench.sandboxes.state.withLock { $0.living[bench.workspace.record.sandbox?.id ?? ""] = again }
    link.close()
    try await again.wait(for: .launch)
    bench.finish(again, 3)
    await life.value
    #expect(bench.workspace.record.reason?.exitCode == 3)
  }

  @Test("a sandbox that cannot be connected is killed, over another connection where the first breaks")
  func killedOverAnother() async throws {
    let bench = try Bench(Bench.spec(), FakeFeature(connectionRefusal: Refusal(.network, "no link")))
    let life = try await bench.launch()
    let link = try await bench.sandboxes.link(0)
    try await link.wait(for: .launch)
    let again = FakeLink(.waiting(pid: getpid()))
    bench.sandboxes.state.withLock { $0.living[bench.workspace.record.sandbox?.id ?? ""] = again }
    link.report(.created(pid: getpid()))
    // The connection is closed before the request to kill it has come.
    link.close()
    try await again.wait(for: .kill)
    await life.value
    #expect(bench.workspace.record.state == .failed && bench.workspace.record.reason?.message.contains("no link") == true)
  }

  @Test("a connection that breaks is no end: the same sandbox is connected to again") func reconnect() async throws {
    let bench = try Bench()
    let life = try await bench.launch()
    let link = try await bench.start()
    let again = FakeLink(.started(pid: getpid()))
    bench.sandboxes.state.withLock { $0.living[bench.workspace.record.sandbox?.id ?? ""] = again }
    link.close()
    bench.finish(again, 3)
    await life.value
    #expect(bench.workspace.record.reason?.exitCode == 3)
    #expect(bench.feature.calls.filter { $0 == "run" }.count == 1)
  }
}

@Suite("What follows an end") struct AftermathTests {
  private func facts(_ change: (inout Aftermath.Facts) -> Void = { _ in }) -> Aftermath.Facts {
    var facts = Aftermath.Facts()
    facts.policy = .always
    facts.quickEnds = 1
    change(&facts)
    return facts
  }

  @Test("restarts by the policy, not for who stopped it, drains, or needs secrets") func decisions() {
    let failed = Reason(.exited, "", exitCode: 1)
    let done = Reason(.exited, "", exitCode: 0)
    #expect(Aftermath.decide(.stopped, failed, facts()) == .restart(afterSeconds: 1))
    #expect(Aftermath.decide(.stopped, done, facts { $0.policy = .onFailure }) == .none)
    #expect(Aftermath.decide(.stopped, failed, facts { $0.policy = .onFailure }) == .restart(afterSeconds: 1))
    #expect(Aftermath.decide(.stopped, failed, facts { $0.policy = .never }) == .none)
    #expect(Aftermath.decide(.stopped, failed, facts { $0.isStopRequested = true }) == .none)
    #expect(Aftermath.decide(.stopped, failed, facts { $0.isDraining = true }) == .none)
    #expect(Aftermath.decide(.stopped, failed, facts { $0.needsSecrets = true }) == .none)
    #expect(Aftermath.decide(.stopped, Reason(.lifetime, ""), facts()) == .none)
    #expect(Aftermath.decide(.ready, failed, facts()) == .none)
    #expect(
      Aftermath.decide(
        .failed, failed,
        facts {
          $0.isRescuePending = true; $0.needsSecrets = true
        }) == .rescue)
  }

  @Test("the pause doubles to five minutes") func pauses() {
    #expect((0...12).map { Aftermath.delay($0) } == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300])
  }
}

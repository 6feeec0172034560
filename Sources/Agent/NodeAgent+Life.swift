// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Images
internal import Journal
internal import LaunchPlan
internal import Limits
internal import Linux
internal import Logging
internal import Networking
package import Sandbox
internal import Storage
internal import Supervision
internal import Workspaces

/// How a workspace is brought up, watched and brought down.
extension NodeAgent {
  /// A step of the preparation that failed, as the reason that the controller hears.
  struct Refusal: Error {
    let reason: Reason
    init(_ code: Reason.Code, _ message: String) { reason = Reason(code, message) }
    init(_ reason: Reason) { self.reason = reason }
  }

  /// What a life in this process begins with: an attempt, or what an earlier agent left.
  enum Beginning {
    case attempt
    /// An attempt that is told of already.
    case preparation(Step)
    case adopt(SupervisorLink)
    /// The supervisor is gone: only its end is left to tell.
    case settle(Reason?)
    /// It has ended already; perhaps its restart policy asks for more.
    case ended
  }

  func begin(_ managed: Managed, with beginning: Beginning = .attempt) {
    managed.life = Task { await live(managed, beginning) }
  }

  /// Attempts, one after another, as long as the restart policy asks for another.
  private func live(_ managed: Managed, _ beginning: Beginning) async {
    var quickEnds: UInt32 = 0
    var next = beginning
    while true {
      let begun = ContinuousClock.now
      switch next {
      case .attempt: if let began = enter(managed, .preparationBegan) { await attempt(managed, began) }
      case .preparation(let began): await attempt(managed, began)
      case .adopt(let link): await adopt(managed, link)
      case .settle(let failure): await settle(managed, failure: failure)
      case .ended: break
      }
      next = .attempt
      if await rescue(managed) {
        await anew(managed)
        continue
      }
      guard shouldRestart(managed.record) else { return }
      // Doubling from a second to five minutes; an attempt that lasted ten minutes was no loop.
      quickEnds = begun.duration(to: .now) > .seconds(600) ? 0 : min(quickEnds + 1, 9)
      do { try await Task.sleep(for: .seconds(min(300, (1 << quickEnds) >> 1))) } catch { return }
      guard shouldRestart(managed.record), workspaces[managed.record.spec.id] === managed else { return }
      await anew(managed)
    }
  }

  /// Everything as before the first attempt.
  private func anew(_ managed: Managed) async {
    managed.record.attempt += 1
    managed.verdict = nil
    managed.record.phases = []
    managed.record.startedNanoseconds = nil
    managed.record.outOfMemoryKills = 0
    if let tool = tool(managed.record.spec.tool), tool.tokenFile != nil { managed.token = managed.token ?? NodeAgent.freshToken() }
    await transition(managed, .restartDecided)
  }

  func shouldRestart(_ record: WorkspaceRecord) -> Bool {
    guard record.stopRequestedBy == nil, record.state.isTerminal, let reason = record.reason, drain == nil else { return false }
    // Credentials, and the key of a home, came with the request and are not kept: such a workspace needs a new launch.
    guard !record.spec.needsSecrets, reason.code != .lifetime else { return false }
    switch record.spec.lifecycle.restartPolicy {
    case .never: return false
    case .always: return true
    case .onFailure: return !(reason.code == .exited && reason.exitCode == 0)
    }
  }

  private func attempt(_ managed: Managed, _ began: Step) async {
    await managed.cleaning?.value
    let (id, folder, helper) = (managed.record.spec.id, managed.folder, helper)
    // Its start takes as long as all that is made for it meanwhile.
    let supervisor = Task {
      try await blocking {
        folder.reset()
        return try folder.standBy(id: id, helper: helper, errors: 2)
      }
    }
    do {
      let link = try await prepare(managed, began, supervisor)
      await supervise(managed, link)
    } catch {
      await arrive(managed, began)
      // It ends unheard; the next attempt has the folder for itself.
      _ = await supervisor.result
      managed.forgetSecrets()
      await clean(managed)
      await transition(managed, .preparationFailed(await complete(error.reason, managed)))
    }
  }

  // ---------------------------------------------------------------- preparing

  private func prepare(
    _ managed: Managed, _ began: Step, _ supervisor: Task<StandingSupervisor, any Error>
  ) async throws(Refusal) -> SupervisorLink {
    let spec = managed.record.spec
    guard let tool = tool(spec.tool) else { throw Refusal(.internal, "there is no tool \(spec.tool) any more") }
    var clock = PhaseClock()

    let image = try await outcome(.imageNotFound) { try await self.image(spec.image) }
    managed.record.imageDigest = image.digest
    clock.lap("image", managed)

    try await openStorage(managed)
    await prepareRescue(managed, tool)
    await preparePackages(managed, tool)
    clock.lap("storage", managed)

    managed.record.bootID = facts.bootID
    managed.record.cgroup = "\(spec.id)-\(UInt32.random(in: .min ... .max))"
    let cgroup = cgroup(of: managed.record)
    let amounts = managed.record.amounts
    try await step(.limits) {
      try cgroup.create()
      try cgroup.apply(
        Resources(memoryBytes: amounts.memoryBytes, milliCPUs: amounts.milliCPUs, pids: amounts.pids).values(cgroup.layout))
    }
    clock.lap("limits", managed)
    Fault.at(.limited)

    let copy = try? managed.record.encoded()
    let plan = compile(managed.record, tool, image)
    // What is made from here on outlives this agent: the next one has to know.
    await arrive(managed, began)
    guard managed.record.state == .preparing else {
      throw Refusal(.requested, "stopped by \(managed.record.stopRequestedBy ?? "somebody") before it was started")
    }
    let standing = try await outcome(.isolation) { try await supervisor.value }
    let link = try await step(.isolation) { [folder = managed.folder] in
      if let copy { try folder.keep(record: Array(copy.utf8)) }
      return try folder.launch(plan, by: standing)
    }
    managed.link = link
    clock.lap("supervisor", managed)
    Fault.at(.spawned)
    return link
  }

  func step<T: Sendable>(
    _ code: Reason.Code, _ body: @escaping @Sendable () throws -> T
  ) async throws(Refusal) -> T {
    try await outcome(code) { try await blocking(body) }
  }

  private func outcome<T: Sendable>(_ code: Reason.Code, _ body: () async throws -> T) async throws(Refusal) -> T {
    do {
      return try await body()
    } catch let error as StepFailure {
      throw Refusal(Reason(error))
    } catch {
      throw Refusal(code, "\(error)")
    }
  }

  // -------------------------------------------------------------- supervising

  /// Follows a supervisor from where it is to its end, and settles the end.
  func supervise(_ managed: Managed, _ link: SupervisorLink) async {
    var clock = PhaseClock()
    var outstanding = 0
    var waiting = false
    var connecting = false
    var connected = false
    var probe: Task<Void, Never>?
    var failure: Reason?
    defer { probe?.cancel() }

    for await received in link.messages {
      switch received.message {
      case .created(let pid), .waiting(let pid):
        if case .waiting = received.message {
          waiting = true
          clock.lap("isolation", managed)
        }
        // Whichever of the two comes first: a quick child waits before this connection was accepted.
        if !connecting {
          connecting = true
          do throws(Refusal) {
            outstanding = try handOverSecrets(managed, link)
            Fault.at(.entrusted)
            try await connect(managed, pid: pid)
            try await openBroker(managed, pid: pid)
            connected = true
            Fault.at(.connected)
          } catch {
            failure = error.reason
            try? link.send(.kill)
          }
          clock.lap("network", managed)
        }
      case .done: outstanding -= 1
      case .refused(let code):
        failure = Reason(.isolation, "a credential could not be stored: \(Errno(code).sentence)")
        try? link.send(.kill)
      case .started:
        clock.lap("execute", managed)
        managed.record.startedNanoseconds = Clock.boottime
        await transition(managed, .launched)
        probe = startProbe(managed, clock)
        watchLifetime(managed)
        watchCredentials(managed)
        watchDatasets(managed)
      case .failed(let step):
        failure = failure ?? Reason(step)
      case .issued(let role, let count): hear(managed, issued: role, count)
      case .outOfMemory(let kills): hear(managed, outOfMemory: kills)
      default: break
      }
      if waiting && connected && outstanding == 0 {
        waiting = false
        try? link.send(.start)
        Fault.at(.released)
        clock.lap("secrets", managed)
      }
    }
    // The supervisor is gone, and with it the workspace: its record is on disk, or there is none.
    probe?.cancel()
    await settle(managed, failure: failure)
  }

  private func handOverSecrets(_ managed: Managed, _ link: SupervisorLink) throws(Refusal) -> Int {
    var all = managed.credentials
    if let name = tool(managed.record.spec.tool)?.tokenFile, let token = managed.token {
      all.append(Credential(name: name, content: Array(token.utf8)))
    }
    for credential in all {
      do throws(Errno) {
        try link.send(.putSecret(name: credential.name, content: credential.content))
      } catch {
        throw Refusal(.isolation, "credential \(credential.name) could not be handed over: \(error.sentence)")
      }
    }
    managed.secondStart = managed.credentials
    managed.credentials = []
    if tool(managed.record.spec.tool)?.rescue == nil || managed.record.isRescued == true { managed.forgetSecrets() }
    return all.count
  }

  private func connect(_ managed: Managed, pid: Int32) async throws(Refusal) {
    let attachment = attachment(managed.record)
    try await step(.network) { [network] in
      try network.attach(attachment, namespace: try Descriptor.open("/proc/\(pid)/ns/net", [.readOnly]))
    }
  }

  func attachment(_ record: WorkspaceRecord) -> NetworkDriver.Attachment {
    NetworkDriver.Attachment(slot: record.slot, open: networkPolicy(record.spec) == .open)
  }

  func startProbe(_ managed: Managed, _ clock: PhaseClock) -> Task<Void, Never>? {
    let record = managed.record
    guard let tool = tool(record.spec.tool) else { return nil }
    return Task {
      if let port = tool.port, let readiness = tool.readiness {
        do {
          try await ReadinessProbe.wait(host: record.address, port: port, probe: readiness)
        } catch is CancellationError {
          return
        } catch {
          await condemn(managed, Reason(.readinessTimeout, "\(error)"))
          return
        }
      }
      var clock = clock
      clock.lap("ready", managed)
      managed.forgetSecrets()
      await transition(managed, .becameReady)
    }
  }

  func watchLifetime(_ managed: Managed) {
    guard let seconds = managed.record.spec.lifecycle.maxLifetimeSeconds else { return }
    let attempt = managed.record.attempt
    // From the start of the tool, not from that of this agent.
    let end = (managed.record.startedNanoseconds ?? Clock.boottime) + Int64(seconds) * 1_000_000_000
    Task {
      try? await Task.sleep(for: .nanoseconds(max(0, end - Clock.boottime)))
      await expire(managed, attempt, seconds)
    }
  }

  private func expire(_ managed: Managed, _ attempt: UInt32, _ seconds: UInt64) async {
    guard managed.record.attempt == attempt, !managed.record.state.isTerminal else { return }
    managed.verdict = Reason(.lifetime, "ended after its maximum lifetime of \(seconds) s")
    _ = try? await stop(managed.record.spec.id, grace: nil, by: "the agent: maximum lifetime")
  }

  /// Ends a workspace for a reason of the agent's own.
  private func condemn(_ managed: Managed, _ reason: Reason) async {
    managed.verdict = reason
    try? managed.link?.send(.kill)
  }

  // ------------------------------------------------------------------- ending

  /// From what the supervisor left to the last event, and everything given back.
  func settle(_ managed: Managed, failure: Reason?) async {
    Fault.at(.exitSeen)
    for task in managed.keepers + managed.expiries.values { task.cancel() }
    managed.keepers = []
    managed.expiries = [:]
    await noteIssues(managed)
    let usage = managed.record.cgroup.isEmpty ? Usage() : cgroup(of: managed.record).usage()
    let record = managed.folder.exitRecord
    // What failed in the supervisor came first: the agent then cannot hand over, and says so too.
    if case .failed(let step)? = record, managed.record.state == .preparing {
      await tellEnd(managed, .preparationFailed(await complete(Reason(step), managed)), Reason(step))
    } else if let failure, managed.record.state == .preparing {
      await tellEnd(managed, .preparationFailed(await complete(failure, managed)), failure)
    } else if let verdict = managed.verdict, verdict.code == .readinessTimeout {
      await tellEnd(managed, .preparationFailed(await complete(verdict, managed)), verdict)
    } else {
      let certificate = StopCertificate(
        record: managed.record, exit: record, usage: usage, bootID: facts.bootID, verdict: managed.verdict)
      await tellEnd(managed, .ended(await complete(certificate.reason, managed)), certificate.reason)
    }
  }

  /// The end of a tool; where it did not come up and its home may be why, that it will be started once more.
  private func tellEnd(_ managed: Managed, _ occurrence: Occurrence, _ reason: Reason) async {
    // The home is looked at, and changed, before it is given back.
    let suspects = await suspects(managed, reason)
    if !suspects.isEmpty { await setAside(managed, suspects, "the tool did not come up (\(reason.message)), and these may be why") }
    managed.suspects = suspects
    // Kept for a second start only.
    if suspects.isEmpty { managed.forgetSecrets() }
    managed.cleaning = Task { await clean(managed) }
    await transition(managed, occurrence, suspects.isEmpty ? [:] : ["rescue": "follows"])
  }

  /// Gives back what a workspace held on the host. Every part may be gone already.
  func clean(_ managed: Managed) async {
    managed.link?.close()
    managed.link = nil
    let group = managed.record.cgroup.isEmpty ? nil : cgroup(of: managed.record)
    let closeStorage = closingStorage(managed.record)
    Fault.at(.cleaning)
    defer { Fault.at(.cleaned) }
    try? await blocking {
      defer { closeStorage() }
      guard let group else { return }
      for attempt in 0..<50 where !group.remove() {
        // Dying processes leave a cgroup a little late; what does not leave is ended.
        if attempt == 5 { group.signal(Signals.kill) }
        Thread.sleep(forTimeInterval: 0.02)
      }
    }
  }

  /// Applies an occurrence by the state machine and makes it durable. Nothing if the state does not allow it: it was
  /// overtaken, and the one that overtook it stands.
  func transition(_ managed: Managed, _ occurrence: Occurrence, _ more: [String: String] = [:]) async {
    guard let step = enter(managed, occurrence, more) else { return }
    await arrive(managed, step)
  }

  /// A transition that is made in memory and on its way to the disk.
  struct Step {
    let event: EventType
    let done: Answer<Void>
  }

  /// The first half of a transition: what comes after it acts on the new state, and is told after it.
  private func enter(_ managed: Managed, _ occurrence: Occurrence, _ more: [String: String] = [:]) -> Step? {
    guard let (event, entry) = try? advance(managed, occurrence, more) else { return nil }
    return Step(event: event, done: submit([entry], insist: true))
  }

  /// In memory alone: the new state, and the entry that tells of it.
  func advance(
    _ managed: Managed, _ occurrence: Occurrence, _ more: [String: String] = [:]
  ) throws -> (EventType, Journal.Entry) {
    let next = try StateMachine.apply(occurrence, to: managed.record.state)
    managed.record.state = next.state
    managed.record.reason = next.reason
    if next.state.isTerminal { managed.token = managed.record.spec.lifecycle.restartPolicy == .never ? nil : managed.token }
    var attributes = more
    attributes["attempt"] = "\(managed.record.attempt)"
    if next.event == .ready {
      let total = managed.record.phases.map(\.milliseconds).reduce(0, +)
      attributes["milliseconds"] = String(format: "%.1f", total)
    }
    logger.info(
      "workspace \(next.event.rawValue.lowercased())",
      metadata: [
        "workspace": "\(managed.record.spec.id)", "state": "\(next.state.rawValue)",
        "reason": "\(next.reason?.message ?? "")",
      ])
    return (next.event, try entry(managed, next.event, attributes))
  }

  /// The second half: returns when it is on disk.
  private func arrive(_ managed: Managed, _ step: Step) async {
    defer { Fault.at("after \(step.event.rawValue)") }
    guard (try? await step.done.value) != nil, [.stopped, .failed].contains(step.event) else { return }
    for waiter in managed.endWaiters { waiter.resume() }
    managed.endWaiters = []
  }

  // ----------------------------------------------------------------- stopping

  /// SIGTERM, and after the grace period SIGKILL to everything. Returns when the workspace has ended.
  package func stop(_ id: String, grace: UInt32?, by: String) async throws -> WorkspaceRecord {
    let managed = try find(id)
    if managed.record.state.isTerminal {
      // A stop of a workspace between two attempts ends the attempts, also for the next agent.
      if shouldRestart(managed.record) || !managed.suspects.isEmpty {
        managed.life?.cancel()
        managed.record.stopRequestedBy = by
        try await commit(managed, .restartsEnded, ["by": by])
      }
      return managed.record
    }
    let seconds = grace ?? managed.record.spec.lifecycle.gracePeriodSeconds ?? tool(managed.record.spec.tool)?.gracePeriodSeconds ?? 10
    if managed.record.state != .stopping {
      managed.record.stopRequestedBy = by
      await transition(managed, .stopRequested(by: by))
    }
    guard !managed.record.state.isTerminal else { return managed.record }
    // Before the start there is no tool that could be asked.
    if seconds > 0 { try? managed.link?.send(.signal(Signals.terminate)) }
    let killer = Task {
      try? await Task.sleep(for: .seconds(seconds))
      while !Task.isCancelled, kill(managed) { try? await Task.sleep(for: .seconds(1)) }
    }
    await withCheckedContinuation { continuation in
      if managed.record.state.isTerminal { continuation.resume() } else { managed.endWaiters.append(continuation) }
    }
    killer.cancel()
    return managed.record
  }

  /// False when there is nothing left to kill.
  private func kill(_ managed: Managed) -> Bool {
    guard !managed.record.state.isTerminal else { return false }
    try? managed.link?.send(.kill)
    return true
  }

  /// Of "bind SOURCE at TARGET".
  private static func source(of step: String) -> String { step.dropFirst(5).components(separatedBy: " at ").first ?? "" }

  /// A failed step as a sentence, with the causes told apart that an analyst can do something about.
  package static func explain(_ failure: StepFailure) -> String {
    let why: String =
      switch Errno(failure.errno) {
      case .noEntry where failure.step.hasPrefix("find the interpreter"): "the file is there, the interpreter that it names is not"
      case .noEntry where failure.step.hasPrefix("execute"): "there is no such program in the image"
      case .access where failure.step.hasPrefix("execute"): "it is not executable"
      case .invalid where failure.step.hasPrefix("bind "):
        "workspaces need id-mapped mounts, which its file system (\(HostFolder.fileSystem(of: source(of: failure.step)))) has not"
      case .notExecutable: "it is no program for this machine's architecture"
      default: Errno(failure.errno).sentence
      }
    return "\(failure.step): \(why)"
  }
}

/// Measures the phases of a start.
struct PhaseClock {
  private var last = ContinuousClock.now

  mutating func lap(_ name: String, _ managed: NodeAgent.Managed) {
    let now = ContinuousClock.now
    let elapsed = last.duration(to: now)
    managed.record.phases.append(
      WorkspaceRecord.Phase(
        name: name, milliseconds: Double(elapsed.components.seconds) * 1000 + Double(elapsed.components.attoseconds) / 1e15))
    last = now
  }
}

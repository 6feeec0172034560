// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Images
internal import Isolation
internal import LaunchPlan
internal import Linux
internal import Logging
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Starts a workspace, follows it to its end, and restarts it.
///
/// ```
/// runAttempts ─► attempt: prepare ─► follow: created → connect · waiting → start · started → features run · ended ─► finishAttempt
///   ▲                                                                                                                        │
///   └──────────────────────────────── next attempt (restart policy, rescue) ◄───────────────────────────────────────────────┘
/// ```
///
/// A new agent enters at `recover` (`Workspace+Recovery.swift`) and continues at the step that the sandbox has reached.
extension Workspace {
  enum AttemptOrigin: Sendable {
    /// This agent accepted the launch: the sandbox waits for a plan, and its supervisor has the secrets of the request.
    case accepted(any SandboxLink)
    /// The launch has no secrets: the supervisor starts beside the preparation. The promise is fulfilled when the launch is on disk.
    case accepting(Promise<Void>)
    /// A previous agent wrote the record, which says how far the workspace has come.
    case recovered
    /// A previous agent started the supervisor.
    case adopted(any SandboxLink)
  }

  /// The supervisor of an attempt: it runs, or is being started beside the preparation.
  enum AttemptSupervisor: Sendable {
    case running(any SandboxLink)
    case starting(Promise<any SandboxLink>)
  }

  /// Runs attempts, one after another, as long as one follows. A cancelled task leaves the sandbox as it is.
  func runAttempts(_ beginning: AttemptOrigin) async {
    var quickEnds: UInt32 = 0
    var begun = ContinuousClock.now
    await run(beginning)
    func count() { quickEnds = begun.duration(to: .now) > .seconds(Aftermath.settledSeconds) ? 0 : min(quickEnds + 1, 10) }
    count()
    while !Task.isCancelled {
      let decision = decision
      switch aftermath(quickEnds) {
      case .none:
        guard isUndecided else { return await giveUpRescue() }
        guard (try? await decision.value) != nil else { return }
        continue
      case .rescue: break
      case .restart(let seconds):
        // The event that ended the pause is part of the next decision.
        guard await pause(seconds) else { continue }
      }
      begun = .now
      switch await nextAttempt() {
      case .begun(let link):
        await run(.accepted(link))
        count()
      case .failed: quickEnds = min(quickEnds + 1, 10)
      case .given: return
      }
    }
  }

  /// Runs one attempt. A launch whose supervisor is lost before it has anything to start begins again, in the same attempt.
  private func run(_ beginning: AttemptOrigin) async {
    var next: AttemptOrigin? = beginning
    while let origin = next {
      switch origin {
      case .accepted(let link): next = await attempt(.running(link), isAdopted: false)
      case .adopted(let link): next = await attempt(.running(link), isAdopted: true)
      case .accepting(let accepted): next = await attemptStarting(accepted)
      // This returns before the attempt begins, so that nothing of the recovery remains in memory while it lasts.
      case .recovered: next = await recover()
      }
    }
  }

  /// Whether an attempt may still follow: after a deletion in progress, which may fail, or a drain, which may end.
  private var isUndecided: Bool {
    guard record.state.isTerminal, record.stop == nil, !record[RescueFeature.self].isPending else { return false }
    return isDeleting || !isDeleted && isDraining && aftermath(despiteDrain: true) != .none
  }

  /// Ends a supervisor that was retained for a rescue attempt that does not follow; the secrets that it holds end with it.
  private func giveUpRescue() async {
    guard !Task.isCancelled, record.state.isTerminal, let kept = link else { return }
    link = nil
    if record[RescueFeature.self].isPending {
      update { $0[RescueFeature.self].isPending = false }
      submit(.restartsEnded, ["by": "the agent", "why": "the node takes no starts"])
    }
    secrets = LaunchSecrets()
    try? kept.send(.release)
    kept.close()
    await discard(record.sandbox)
  }

  func aftermath(_ quickEnds: UInt32 = 1, despiteDrain: Bool = false) -> Aftermath {
    let record = record
    var facts = Aftermath.Facts()
    facts.isStopRequested = record.stop != nil || isDeleting || isDeleted
    facts.isDraining = isDraining && !despiteDrain
    facts.needsSecrets = record.spec.needsSecrets
    facts.isRescuePending = record[RescueFeature.self].isPending
    facts.policy = record.spec.lifecycle.restartPolicy
    facts.quickEnds = quickEnds
    return Aftermath.decide(record.state, record.reason, facts)
  }

  /// Waits before another attempt. Returns false if the pause was ended or the task cancelled.
  private func pause(_ seconds: UInt32) async -> Bool {
    let pause = Promise<Void>()
    attempt.pause = pause
    defer { attempt.pause = nil }
    guard (try? await pause.value(within: .seconds(seconds), else: CancellationError())) == nil else { return false }
    return !Task.isCancelled
  }

  var isPausing: Bool { attempt.pause != nil }
  func endPause() { attempt.pause?.fulfil(.success(())) }

  // ---------------------------------------------------------------- sandboxes

  /// Creates another sandbox for this workspace, which does not occupy it yet.
  func newSandbox() async throws -> (SandboxPlace, any SandboxLink) {
    let place = SandboxPlace(id: SandboxPlace.freshID())
    return (place, try await newSandbox(place))
  }

  /// Creates a sandbox and hands the secrets of the attempt to its supervisor.
  func newSandbox(_ place: SandboxPlace) async throws -> any SandboxLink {
    if let name = services.tool(of: spec)?.tokenFile, secrets.token == nil { secrets.token = (name, NodeServices.freshToken()) }
    var found: (any SandboxLink)?
    do {
      let link = try await services.sandboxes.create(place, for: id)
      found = link
      try await secrets.entrust(to: link, services.vault)
      return link
    } catch {
      await end(found, place)
      throw error
    }
  }

  /// Removes a sandbox in which nothing was started.
  func end(_ link: (any SandboxLink)?, _ place: SandboxPlace) async {
    if let link { await endSupervisor(link, place) }
    await discard(place)
  }

  /// Ends a supervisor that has started nothing, over another connection if this one is broken. Returns when its process has exited, or
  /// after at most 2 s on each connection.
  func endSupervisor(_ link: any SandboxLink, _ place: SandboxPlace?) async {
    try? link.send(.kill)
    if await link.hasEnded(within: .seconds(2)) == true { return }
    guard let place, let again = (try? await services.sandboxes.connect(place)) ?? nil else { return }
    try? again.send(.kill)
    _ = await again.hasEnded(within: .seconds(2))
    again.close()
  }

  func discard(_ place: SandboxPlace?) async {
    guard let place else { return }
    await services.sandboxes.removeCgroup(place)
    await services.sandboxes.remove(place)
  }

  private enum Next {
    case begun(any SandboxLink)
    /// No attempt began; `runAttempts` decides again.
    case failed
    /// No attempt follows: what was held for it is released, or the task was cancelled.
    case given
  }

  /// Resets the workspace for another attempt, in a new sandbox.
  private func nextAttempt() async -> Next {
    let old = (place: record.sandbox, link: link)
    let isRescue = record[RescueFeature.self].isPending
    do {
      if isRescue { try await recoverSecrets(old.place) }
      let (place, found) = try await newSandbox()
      // A stop, a drain or a deletion may have arrived in the meantime.
      guard aftermath() != .none else {
        await end(found, place)
        return .failed
      }
      update {
        $0.occupy(place, services.facts.bootID)
        $0.attempt += 1
        $0.stopReason = nil
        $0.phases = []
        $0.startedNanoseconds = nil
        $0.outOfMemoryKills = 0
        $0.supervisorsLost = 0
        if isRescue {
          $0[RescueFeature.self].isPending = false
          $0[RescueFeature.self].isRescued = true
        }
      }
      await transition(.restartDecided)
      // The old supervisor is released only now: until the new sandbox is on record, the next agent finds the secrets nowhere else.
      if isRescue {
        try? old.link?.send(.release)
        await discard(old.place)
      }
      await transition(.preparationBegan)
      return .begun(found)
    } catch {
      guard !Task.isCancelled else { return .given }
      logger.error("an attempt cannot begin", metadata: ["workspace": "\(id)", "error": "\(describe(error))"])
      // A host without capacity for another process may have it after the next pause.
      guard isRescue else { return .failed }
      update { $0[RescueFeature.self].isPending = false }
      try? old.link?.send(.release)
      await discard(old.place)
      try? await commit(.restartsEnded, ["by": "the agent", "why": describe(error)])
      return .given
    }
  }

  /// Restores the secrets for a rescue attempt, from memory or from the supervisor of the previous attempt, which was retained for this.
  private func recoverSecrets(_ place: SandboxPlace?) async throws {
    guard secrets.credentials.isEmpty, secrets.homeKey == nil, spec.needsSecrets, let place else { return }
    if link == nil { link = try await services.sandboxes.connect(place) }
    guard let link, let found = try await LaunchSecrets.recover(from: link, for: spec, tokenName: services.tool(of: spec)?.tokenFile)
    else { throw AgentError(.failedPrecondition, "the credentials of the launch are lost; launch it again") }
    secrets = found
  }

  // ------------------------------------------------------------------ attempt

  /// Runs an attempt whose supervisor starts beside its preparation.
  private func attemptStarting(_ accepted: Promise<Void>) async -> AttemptOrigin? {
    let started = Promise<any SandboxLink>()
    async let starting: Void = {
      do {
        guard let place = self.record.sandbox else { throw Refusal(.internal, "the record names no sandbox") }
        // If this agent ends in the meantime, the next one continues with what has been started.
        started.fulfil(.success(try await uncancelled { try await self.newSandbox(place) }))
      } catch {
        started.fulfil(.failure(error as? Refusal ?? Refusal(.isolation, describe(error))))
      }
    }()
    var next: AttemptOrigin?
    if (try? await accepted.valueWhateverHappens) != nil {
      next = await attempt(.starting(started), isAdopted: false)
    } else {
      await reject(.starting(started))
    }
    await starting
    return next
  }

  /// Removes what was made for a launch that the journal did not take.
  private func reject(_ supervisor: AttemptSupervisor) async {
    if let found = try? await reach(supervisor), let place = record.sandbox { await end(found, place) }
    released.fulfil(.success(()))
  }

  /// Returns the connection to the supervisor of an attempt as soon as there is one, also in a cancelled task.
  private func reach(_ supervisor: AttemptSupervisor) async throws -> any SandboxLink {
    switch supervisor {
    case .running(let link): return link
    case .starting(let started): return try await started.valueWhateverHappens
    }
  }

  /// Runs one attempt to its end. Returns how it begins again if its supervisor was lost before it had anything to start.
  ///
  /// The steps are not inlined: the frame of this function exists as long as the attempt, and would have the variables of all of them.
  private func attempt(_ supervisor: AttemptSupervisor, isAdopted: Bool) async -> AttemptOrigin? {
    switch await begin(supervisor) {
    case .ended: return nil
    case .lost: return await launchAgain()
    case .failed: break
    case .launched:
      await follow(isAdopted)
      guard !Task.isCancelled else { return nil }
    }
    await finishAttempt(attempt.failure)
    return nil
  }

  private enum Begun {
    /// The request to launch has been sent, by this agent or an earlier one.
    case launched
    /// The start failed; the reason is `attempt.failure`.
    case failed
    /// The supervisor exited before it had anything to start.
    case lost
    /// Nothing is left to do: the workspace had been stopped, or this agent ends.
    case ended
  }

  /// Begins an attempt, and prepares it unless an earlier agent did.
  @inline(never)
  private func begin(_ supervisor: AttemptSupervisor) async -> Begun {
    if case .running(let first) = supervisor { link = first }
    holdResources()
    attempt = AttemptState()
    guard !record.state.isTerminal else {
      // The workspace was stopped before anything was prepared.
      if let first = try? await reach(supervisor) { await endSupervisor(first, record.sandbox) }
      await discard(record.sandbox)
      link = nil
      released.fulfil(.success(()))
      return .ended
    }
    guard link == nil || link?.status.state == .awaitingPlan else { return .launched }
    do throws(Refusal) {
      if try await prepareCancellably(supervisor) { return .launched }
      return Task.isCancelled ? .ended : .lost
    } catch {
      guard !Task.isCancelled else { return .ended }
      attempt.failure = error.reason
      if let link { await endSupervisor(link, record.sandbox) }
      return .failed
    }
  }

  /// Prepares the attempt so that a stop ends it at once, whatever it waits for. Returns false if the supervisor exited before the launch
  /// was requested.
  @inline(never)
  private func prepareCancellably(_ supervisor: AttemptSupervisor) async throws(Refusal) -> Bool {
    let preparation = Task { try await prepare(supervisor) }
    attempt.cancelPreparation = { preparation.cancel() }
    defer { attempt.cancelPreparation = nil }
    let result = await withTaskCancellationHandler {
      await preparation.result
    } onCancel: {
      preparation.cancel()
    }
    do { return try result.get() } catch {
      throw error as? Refusal ?? requested ?? Refusal(.internal, describe(error))
    }
  }

  private var requested: Refusal? {
    record.stop.map { Refusal(.requested, "stopped by \($0.by) before the tool started") }
  }

  private func prepare(_ supervisor: AttemptSupervisor) async throws -> Bool {
    guard let place = record.sandbox else { throw Refusal(.internal, "the record names no sandbox") }
    let plan: Plan
    do { plan = try await preparePlan() } catch {
      // The caller ends it.
      link = try? await reach(supervisor)
      throw error
    }
    link = try await reach(supervisor)
    do { try await services.sandboxes.write(plan, record: try record.encoded(), to: place) } catch {
      throw Refusal(.isolation, describe(error))
    }
    if let requested { throw requested }
    guard try await requestLaunch(place) else { return false }
    finishPhase("supervisor")
    Fault.at(.spawned)
    return true
  }

  private func preparePlan() async throws -> Plan {
    guard let tool = services.tool(of: spec) else { throw Refusal(.internal, "there is no tool \(spec.tool) any more") }
    let image = try await image()
    update { $0.imageDigest = image.digest }
    finishPhase("image")
    for feature in features {
      try await feature.prepare(self)
      if let phase = type(of: feature).phase { finishPhase(phase) }
      if let requested { throw requested }
      try Task.checkCancellation()
    }
    return compile(record, tool, image)
  }

  /// Requests the launch, over another connection if this one is broken. Returns false if the supervisor has exited.
  private func requestLaunch(_ place: SandboxPlace) async throws -> Bool {
    do throws(SupervisorError) {
      try link?.send(.launch)
      return true
    } catch {
      guard error == .disconnected else { throw Refusal(.isolation, "\(error)") }
    }
    guard let again = try await reach(place) else { return false }
    link = again
    if again.status.state == .awaitingPlan { try again.send(.launch) }
    return true
  }

  private func image() async throws(Refusal) -> StoredImage {
    let record = record
    do {
      // The digest from the launch is looked up first; an image that was replaced since is found by its name.
      if !record.imageDigest.isEmpty, let image = try? await services.images.find(record.imageDigest) { return image }
      return try await services.images.find(record.spec.image)
    } catch {
      throw Refusal(.imageNotFound, "\(error)")
    }
  }

  private func finishPhase(_ name: String) {
    let phase = attempt.clock.finish(name)
    update { $0.phases.append(phase) }
  }

  /// Compiles the launch plan from a record, its tool and its image.
  nonisolated func compile(_ record: WorkspaceRecord, _ tool: Tool, _ image: StoredImage) -> Plan {
    var draft = draft(record, tool, image)
    draft.sandbox.layers = services.images.layerPaths(image)
    draft.sandbox.environment = AttemptDraft.entries(draft.variables(record.spec))
    let configuration = services.configuration
    draft.sandbox.logSegmentBytes = Quantity.whole(configuration.logSegment) ?? draft.sandbox.logSegmentBytes
    draft.sandbox.logSegments = configuration.logSegments
    draft.sandbox.logBytesPerSecond = Quantity.whole(configuration.logRate) ?? draft.sandbox.logBytesPerSecond
    return PlanCompiler.compile(draft.sandbox, seccomp: services.seccomp)
  }

  // ---------------------------------------------------------------- following

  /// Follows a sandbox from its current state to its confirmed end. If its start fails, the reason is in `attempt.failure`.
  @inline(never)
  private func follow(_ isAdopted: Bool) async {
    let streams = makeStreams()
    // Discarding, because most features have nothing to run, and a task that has ended is kept by other groups.
    await withDiscardingTaskGroup { group in
      let (graces, continuation) = AsyncStream<Duration>.makeStream()
      attempt.graces = continuation
      group.addTask { await self.endAfterGrace(graces) }
      if let stop = record.stop { continuation.yield(killDelay(stop)) }
      var isAnother = false
      while let link, !attempt.isOver {
        // The request to launch was lost with the last connection.
        if isAnother, link.status.state == .awaitingPlan { try? link.send(.launch) }
        isAnother = true
        // A stop that was requested while there was no connection has not been signalled to the tool.
        if let stop = record.stop, link.status.state.isStarted, killDelay(stop) > .zero { try? link.send(.signal(Signals.terminate)) }
        await handle(.state(link.status.state), streams, &group, isAdopted)
        if !attempt.isOver {
          for await report in link.reports {
            await handle(report, streams, &group, isAdopted)
            if attempt.isOver { break }
          }
        }
        if attempt.isOver || Task.isCancelled { break }
        guard let next = await reconnect(link) else { break }
        self.link = next
      }
      for report in attempt.reports { report.finish() }
      continuation.finish()
      group.cancelAll()
    }
  }

  /// Makes a stream of reports for each feature; they are buffered only for features that read them.
  private func makeStreams() -> [AsyncStream<ShimReport>] {
    features.map { feature in
      let (stream, continuation) = AsyncStream<ShimReport>.makeStream()
      if type(of: feature).readsReports { attempt.reports.append(continuation) } else { continuation.finish() }
      return stream
    }
  }

  /// Connects again: a sandbox ends with the exit of its supervisor, not with a connection. Returns nil if the supervisor has exited.
  @inline(never)
  private func reconnect(_ link: any SandboxLink) async -> (any SandboxLink)? {
    if await link.hasEnded(within: .seconds(2)) == true { return nil }
    guard !Task.isCancelled, let place = record.sandbox else { return nil }
    logger.warning("supervisor connection closed; reconnecting", metadata: ["workspace": "\(id)", "sandbox": "\(place.id)"])
    return try? await reach(place)
  }

  @inline(never)
  private func handle(
    _ report: ShimReport, _ streams: [AsyncStream<ShimReport>], _ group: inout DiscardingTaskGroup, _ isAdopted: Bool
  ) async {
    guard case .state(let state) = report else {
      for stream in attempt.reports { stream.yield(report) }
      return
    }
    switch state {
    case .awaitingPlan, .preparing: break
    case .created, .waiting:
      // The kill request may have been lost with the last connection.
      if attempt.failure != nil { return await killTool() }
      if case .waiting = state, !attempt.isWaiting {
        attempt.isWaiting = true
        finishPhase("isolation")
      }
      // Connects at `created` or `waiting`, whichever arrives first: a quick child may wait before this connection was accepted.
      if !attempt.isConnecting {
        attempt.isConnecting = true
        do throws(Refusal) {
          try await connect()
          attempt.isConnected = true
        } catch {
          // If this agent ends here, the next one connects.
          guard !Task.isCancelled else { return }
          attempt.failure = error.reason
          try? link?.send(.kill)
        }
      }
      if attempt.isWaiting, attempt.isConnected {
        if record.stop != nil { return await killTool() }
        // A failed send closes the connection; the next connection reaches this line again.
        try? link?.send(.start)
        Fault.at(.released)
        if !attempt.isReleased { finishPhase("secrets") }
        attempt.isReleased = true
      }
    case .started:
      guard !attempt.isRunning else { return }
      attempt.isRunning = true
      // A sandbox that this agent itself brought to its start is not adopted.
      let isAdopted = isAdopted && !attempt.isConnecting
      await started(isAdopted)
      for (feature, reports) in zip(features, streams) {
        group.addTask { await feature.run(self, isAdopted: isAdopted, reports: reports) }
      }
    case .failed(let failure):
      attempt.reported = .failed(failure)
      attempt.failure = attempt.failure ?? Reason(failure)
      attempt.isOver = true
    case .ended(let status):
      attempt.reported = .ended(status)
      attempt.isOver = true
    }
  }

  @inline(never)
  private func connect() async throws(Refusal) {
    guard let process = link?.process else { throw Refusal(.isolation, "supervisor did not report PID 1") }
    Fault.at(.entrusted)
    for feature in features { try await feature.connect(self, process) }
    finishPhase("network")
    Fault.at(.connected)
  }

  @inline(never)
  private func started(_ isAdopted: Bool) async {
    if isAdopted {
      logger.notice("adopted", metadata: ["workspace": "\(id)"])
      try? await commit(.adopted, ["pid": "\(link?.process?.pid ?? 0)", "sandbox": record.sandbox?.id ?? ""])
    }
    guard record.state == .preparing else { return }
    finishPhase("execute")
    update { $0.startedNanoseconds = $0.startedNanoseconds ?? Clock.boottime }
    await transition(.launched)
  }

  /// Records that the tool is ready, or has no readiness probe. The secrets of the launch are no longer needed.
  func becameReady() async {
    guard record.state == .starting else { return }
    finishPhase("ready")
    forgetSecrets()
    await transition(.becameReady)
  }

  private func forgetSecrets() {
    secrets.credentials = []
    secrets.homeKey = nil
    try? link?.send(.release)
  }
}

extension Reason {
  /// Creates the reason for a failed step of a start.
  init(_ failure: StepFailure) {
    self.init(failure.kind.isProgram ? .executable : .isolation, explain(failure))
    step = failure.step
    errno = failure.errno
  }
}

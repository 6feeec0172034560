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

/// How a workspace is brought up, followed to its end, and brought up again.
///
/// ```
/// live ─► attempt: prepare ─► follow: created → connect · waiting → start · started → features run · ended ─► settle
///   ▲                                                                                                          │
///   └──────────────────────────────── next attempt (restart policy, rescue) ◄─────────────────────────────────┘
/// ```
///
/// A new agent enters at `recover` (`Workspace+Recovery.swift`), from which it goes on at whatever step the sandbox stands.
extension Workspace {
  enum Beginning: Sendable {
    /// This agent has accepted it: its sandbox waits for a plan and has what came with the launch.
    case accepted(any SandboxLink)
    /// As the record says, which an earlier agent wrote.
    case recovered
  }

  /// Attempts, one after another, as long as one follows. A cancelled task leaves the sandbox as it is.
  func live(_ beginning: Beginning) async {
    var quickEnds: UInt32 = 0
    var begun = ContinuousClock.now
    switch beginning {
    case .accepted(let link): await attempt(link, isAdopted: false)
    case .recovered: await recover()
    }
    while !Task.isCancelled {
      quickEnds = begun.duration(to: .now) > .seconds(Aftermath.settledSeconds) ? 0 : min(quickEnds + 1, 10)
      switch aftermath(quickEnds) {
      case .none: return await giveUpRescue()
      case .rescue: break
      case .restart(let seconds):
        guard await pause(seconds), aftermath(quickEnds) != .none else { return await giveUpRescue() }
      }
      begun = .now
      guard let link = await nextAttempt() else { return }
      await attempt(link, isAdopted: false)
    }
  }

  /// A supervisor that has waited for another start, to which it did not come, goes with what it was entrusted with.
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

  func aftermath(_ quickEnds: UInt32 = 1) -> Aftermath {
    let record = record
    var facts = Aftermath.Facts()
    facts.isStopRequested = record.stop != nil || isDeleting
    facts.isDraining = isDraining
    facts.needsSecrets = record.spec.needsSecrets
    facts.isRescuePending = record[RescueFeature.self].isPending
    facts.policy = record.spec.lifecycle.restartPolicy
    facts.quickEnds = quickEnds
    return Aftermath.decide(record.state, record.reason, facts)
  }

  /// Waits ahead of another attempt; false where somebody ended the pause.
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

  /// Makes another sandbox for this workspace, which does not occupy it yet.
  func newSandbox() async throws -> (SandboxPlace, any SandboxLink) {
    let place = SandboxPlace(id: SandboxPlace.freshID())
    if let name = services.tool(of: spec)?.tokenFile, secrets.token == nil { secrets.token = (name, NodeServices.freshToken()) }
    return (place, try await newSandbox(place))
  }

  /// Makes a sandbox, and entrusts its supervisor with what the attempt needs.
  func newSandbox(_ place: SandboxPlace) async throws -> any SandboxLink {
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

  /// Takes back a sandbox in which nothing was started.
  func end(_ link: (any SandboxLink)?, _ place: SandboxPlace) async {
    if let link { await endSupervisor(link, place) }
    await discard(place)
  }

  /// Ends a supervisor that has started nothing, over another connection where this one is broken. Returns when its process has ended,
  /// or when it does not reply: the sandbox's directory then stays for another agent to sweep.
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

  /// Everything as before the first attempt; nil where there can be no other.
  private func nextAttempt() async -> (any SandboxLink)? {
    let old = (place: record.sandbox, link: link)
    let isRescue = record[RescueFeature.self].isPending
    do {
      if isRescue { try await recoverSecrets(old.place) }
      let (place, found) = try await newSandbox()
      // A stop, a drain or a deletion may have come meanwhile.
      guard aftermath() != .none else {
        await end(found, place)
        await giveUpRescue()
        return nil
      }
      update {
        $0.occupy(place, services.facts.bootID)
        $0.attempt += 1
        $0.verdict = nil
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
      // Only now: until the new one is on record, what the old supervisor was entrusted with is all there is.
      if isRescue {
        try? old.link?.send(.release)
        await discard(old.place)
      }
      await transition(.preparationBegan)
      return found
    } catch {
      guard !Task.isCancelled else { return nil }
      logger.error("no further attempt", metadata: ["workspace": "\(id)", "error": "\(describe(error))"])
      update { $0[RescueFeature.self].isPending = false }
      try? old.link?.send(.release)
      await discard(old.place)
      try? await commit(.restartsEnded, ["by": "the agent", "why": describe(error)])
      return nil
    }
  }

  /// For another start after a rescue: from memory, or from the supervisor of the attempt before, which has waited for this.
  private func recoverSecrets(_ place: SandboxPlace?) async throws {
    guard secrets.credentials.isEmpty, secrets.homeKey == nil, spec.needsSecrets, let place else { return }
    if link == nil { link = try await services.sandboxes.connect(place) }
    guard let link, let found = try await LaunchSecrets.recover(from: link, for: spec, tokenName: services.tool(of: spec)?.tokenFile)
    else { throw AgentError(.failedPrecondition, "the credentials of the launch are lost; launch it again") }
    secrets = found
  }

  // ------------------------------------------------------------------ attempt

  func attempt(_ first: any SandboxLink, isAdopted: Bool) async {
    link = first
    released = Promise()
    attempt = AttemptState()
    guard !record.state.isTerminal else {
      // It was stopped before anything was prepared.
      await endSupervisor(first, record.sandbox)
      await discard(record.sandbox)
      link = nil
      return released.fulfil(.success(()))
    }
    var failure: Reason?
    let streams = features.map { _ in AsyncStream<ShimReport>.makeStream() }
    for (feature, stream) in zip(features, streams) {
      // What nobody reads is not kept.
      if type(of: feature).readsReports { attempt.reports.append(stream.continuation) } else { stream.continuation.finish() }
    }
    var first = first
    if first.status.state == .awaitingPlan {
      do throws(Refusal) {
        guard let link = try await prepareCancellably(first) else {
          guard !Task.isCancelled else { return }
          return await launchAgain()
        }
        first = link
      } catch {
        guard !Task.isCancelled else { return }
        failure = error.reason
        await endSupervisor(first, record.sandbox)
      }
    }
    if failure == nil {
      failure = await follow(first, streams.map(\.stream), isAdopted: isAdopted)
      guard !Task.isCancelled else { return }
    }
    await settle(failure)
  }

  /// A stop ends the preparation at once, whatever it waits for. Returns the connection over which the launch was requested; nil where the
  /// supervisor has gone before that.
  private func prepareCancellably(_ link: any SandboxLink) async throws(Refusal) -> (any SandboxLink)? {
    let preparation = Task { try await prepare(link) }
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
    record.stop.map { Refusal(.requested, "stopped by \($0.by) before it was started") }
  }

  private func prepare(_ link: any SandboxLink) async throws -> (any SandboxLink)? {
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
    let plan = compile(record, tool, image)
    guard let place = record.sandbox else { throw Refusal(.internal, "the record names no sandbox") }
    do { try await services.sandboxes.write(plan, record: try record.encoded(), to: place) } catch {
      throw Refusal(.isolation, describe(error))
    }
    if let requested { throw requested }
    let launched = try await requestLaunch(link, place)
    finishPhase("supervisor")
    Fault.at(.spawned)
    return launched
  }

  /// Over another connection where this one is broken; nil where the supervisor has gone.
  private func requestLaunch(_ link: any SandboxLink, _ place: SandboxPlace) async throws -> (any SandboxLink)? {
    do throws(SupervisorError) {
      try link.send(.launch)
      return link
    } catch {
      guard error == .disconnected else { throw Refusal(.isolation, "\(error)") }
    }
    guard let again = try await reach(place) else { return nil }
    self.link = again
    if again.status.state == .awaitingPlan { try again.send(.launch) }
    return again
  }

  private func image() async throws(Refusal) -> StoredImage {
    let record = record
    do {
      // By what it was when the launch was accepted; an image that has been replaced since is found by its name.
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

  /// From a record, its tool and its image to the launch plan.
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

  /// How far the sandbox has come with this agent.
  private struct Progress {
    var isConnected = false
    var isConnecting = false
    var isWaiting = false
    var isReleased = false
    var isRunning = false
    var isOver = false
    var failure: Reason?
  }

  /// Follows a sandbox from where it is to its confirmed end. Returns why its start failed, if it did.
  private func follow(_ first: any SandboxLink, _ streams: [AsyncStream<ShimReport>], isAdopted: Bool) async -> Reason? {
    await withTaskGroup(of: Void.self) { group in
      let (graces, continuation) = AsyncStream<Duration>.makeStream()
      attempt.graces = continuation
      group.addTask { await self.endAfterGrace(graces) }
      if let stop = record.stop { continuation.yield(killDelay(stop)) }
      var progress = Progress()
      var current: (any SandboxLink)? = first
      var isAnother = false
      while let link = current, !progress.isOver {
        self.link = link
        // The request to launch was lost with the last connection.
        if isAnother, link.status.state == .awaitingPlan { try? link.send(.launch) }
        isAnother = true
        // What was asked to stop while there was no connection has not heard of it.
        if let stop = record.stop, link.status.state.isStarted, killDelay(stop) > .zero { try? link.send(.signal(Signals.terminate)) }
        await handle(.state(link.status.state), &progress, streams, &group, isAdopted)
        if !progress.isOver {
          for await report in link.reports {
            await handle(report, &progress, streams, &group, isAdopted)
            if progress.isOver { break }
          }
        }
        if progress.isOver || Task.isCancelled { break }
        current = await reconnect(link)
      }
      for report in attempt.reports { report.finish() }
      continuation.finish()
      group.cancelAll()
      await group.waitForAll()
      return progress.failure
    }
  }

  /// The connection has ended, which is not the end of the sandbox: that is its process's. Nil where that has ended.
  private func reconnect(_ link: any SandboxLink) async -> (any SandboxLink)? {
    if await link.hasEnded(within: .seconds(2)) == true { return nil }
    guard !Task.isCancelled, let place = record.sandbox else { return nil }
    logger.warning("the connection to a supervisor ended", metadata: ["workspace": "\(id)", "sandbox": "\(place.id)"])
    return try? await reach(place)
  }

  private func handle(
    _ report: ShimReport, _ progress: inout Progress, _ streams: [AsyncStream<ShimReport>], _ group: inout TaskGroup<Void>,
    _ isAdopted: Bool
  ) async {
    guard case .state(let state) = report else {
      for stream in attempt.reports { stream.yield(report) }
      return
    }
    switch state {
    case .awaitingPlan, .preparing: break
    case .created, .waiting:
      // The request to kill it may have been lost with the last connection.
      if progress.failure != nil { return await killTool() }
      if case .waiting = state, !progress.isWaiting {
        progress.isWaiting = true
        finishPhase("isolation")
      }
      // Whichever of the two comes first: a quick child waits before this connection was accepted.
      if !progress.isConnecting {
        progress.isConnecting = true
        do throws(Refusal) {
          try await connect()
          progress.isConnected = true
        } catch {
          // Where this agent ends, the next one connects.
          guard !Task.isCancelled else { return }
          progress.failure = error.reason
          try? link?.send(.kill)
        }
      }
      if progress.isWaiting, progress.isConnected {
        if record.stop != nil { return await killTool() }
        // What cannot be sent closes the connection; over the next one it comes to this again.
        try? link?.send(.start)
        Fault.at(.released)
        if !progress.isReleased { finishPhase("secrets") }
        progress.isReleased = true
      }
    case .started:
      guard !progress.isRunning else { return }
      progress.isRunning = true
      // What has come to its start with this agent is adopted from nobody.
      let isAdopted = isAdopted && !progress.isConnecting
      await started(isAdopted)
      for (feature, reports) in zip(features, streams) {
        group.addTask { await feature.run(self, isAdopted: isAdopted, reports: reports) }
      }
    case .failed(let failure):
      attempt.reported = .failed(failure)
      progress.failure = progress.failure ?? Reason(failure)
      progress.isOver = true
    case .ended(let status):
      attempt.reported = .ended(status)
      progress.isOver = true
    }
  }

  private func connect() async throws(Refusal) {
    guard let process = link?.process else { throw Refusal(.isolation, "its supervisor did not name PID 1") }
    Fault.at(.entrusted)
    for feature in features { try await feature.connect(self, process) }
    finishPhase("network")
    Fault.at(.connected)
  }

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

  /// The tool serves, or has no way to tell: what it was launched with is needed no more.
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
  /// A step of the start that failed.
  init(_ failure: StepFailure) {
    let isProgram = failure.step.hasPrefix("execute") || failure.step.hasPrefix("find the")
    self.init(isProgram ? .executable : .isolation, explain(failure))
    step = failure.step
    errno = failure.errno
  }
}

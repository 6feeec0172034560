// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Logging
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Runs the attempts of a workspace, one after another.
///
/// ```
/// runAttempts ─► attempt: prepare ─► follow: created → connect · waiting → start · started → features run · ended ─► finishAttempt
///   ▲                                                                                                                        │
///   └──────────────────────────────── next attempt (restart policy, rescue) ◄───────────────────────────────────────────────┘
/// ```
///
/// `Workspace+Start.swift` has the preparation, `Workspace+Follow.swift` what follows it, and `Workspace+End.swift` the end. A new agent
/// enters at `recover` (`Workspace+Recovery.swift`) and continues at the step that the sandbox has reached.
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
  func run(_ beginning: AttemptOrigin) async {
    var next: AttemptOrigin? = beginning
    while let origin = next {
      switch origin {
      case .accepted(let link): next = await attempt(.running(link), isAdopted: false)
      case .adopted(let link): next = await attempt(.running(link), isAdopted: true)
      case .accepting(let accepted): next = await attemptStarting(accepted)
      case .recovered: next = await apart { await self.recover() }
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
}

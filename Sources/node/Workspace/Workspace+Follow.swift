// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Linux
internal import Logging
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Follows the sandbox of an attempt.
extension Workspace {
  /// Follows a sandbox from its current state to its confirmed end. If its start fails, the reason is in `attempt.failure`.
  func follow(_ isAdopted: Bool) async {
    var running = runningFeatures()
    // Discarding: other groups keep the tasks that have ended.
    await withDiscardingTaskGroup { group in
      if let stop = record.stop { killTool(after: killDelay(stop)) }
      group.addTask { await self.runTimers() }
      var isAnother = false
      while let link, !attempt.isOver {
        resume(link, isAnother: isAnother)
        isAnother = true
        await handle(.state(link.status.state), &running, &group, isAdopted)
        if !attempt.isOver {
          for await report in link.reports {
            await handle(report, &running, &group, isAdopted)
            if attempt.isOver { break }
          }
        }
        if attempt.isOver || Task.isCancelled { break }
        guard let next = await apart({ await self.reconnect(link) }) else { break }
        self.link = next
      }
      for reports in attempt.reports.values { reports.finish() }
      group.cancelAll()
    }
  }

  /// Sends again what may not have reached the supervisor.
  private func resume(_ link: any SandboxLink, isAnother: Bool) {
    // The request to launch was lost with the last connection.
    if isAnother, link.status.state == .awaitingPlan { try? link.send(.launch) }
    // A stop that was requested while there was no connection has not been signalled to the tool.
    if let stop = record.stop, link.status.state.isStarted, killDelay(stop) > .zero { try? link.send(.signal(Signals.terminate)) }
  }

  private typealias Running = (feature: any RunningFeature, reports: AsyncStream<ShimReport>)

  /// Makes a stream of reports for each feature that runs beside the tool; they are buffered only for features that read them.
  private func runningFeatures() -> [Running] {
    features.compactMap { $0 as? any RunningFeature }.map { feature in
      guard type(of: feature).readsReports else { return (feature, Workspace.noReports) }
      let (stream, continuation) = AsyncStream<ShimReport>.makeStream()
      attempt.reports[type(of: feature).name] = continuation
      return (feature, stream)
    }
  }

  private static let noReports = AsyncStream<ShimReport> { $0.finish() }

  /// Connects again: a sandbox ends with the exit of its supervisor, not with a connection. Returns nil if the supervisor has exited.
  private func reconnect(_ link: any SandboxLink) async -> (any SandboxLink)? {
    if await link.hasEnded(within: .seconds(2)) == true { return nil }
    guard !Task.isCancelled, let place = record.sandbox else { return nil }
    logger.warning("supervisor connection closed; reconnecting", metadata: ["workspace": "\(id)", "sandbox": "\(place.id)"])
    return try? await reach(place)
  }

  private func handle(_ report: ShimReport, _ running: inout [Running], _ group: inout DiscardingTaskGroup, _ isAdopted: Bool) async {
    guard case .state(let state) = report else {
      for reports in attempt.reports.values { reports.yield(report) }
      return
    }
    guard await apart({ await self.enter(state, isAdopted) }) else { return }
    // A sandbox that this agent itself brought to its start is not adopted.
    let isAdopted = isAdopted && !attempt.isConnecting
    for (feature, reports) in take(&running, isAdopted) {
      group.addTask { await feature.run(self, isAdopted: isAdopted, reports: reports) }
    }
  }

  /// Takes the features that have something to do. No report is buffered for the others any more.
  private func take(_ running: inout [Running], _ isAdopted: Bool) -> [Running] {
    let record = record
    var working: [Running] = []
    for one in running {
      if one.feature.hasWork(in: record, isAdopted: isAdopted) {
        working.append(one)
      } else {
        attempt.reports.removeValue(forKey: type(of: one.feature).name)?.finish()
      }
    }
    running = []
    return working
  }

  /// Does what follows when the sandbox has reached a state. Returns whether the tool has just started.
  private func enter(_ state: SandboxState, _ isAdopted: Bool) async -> Bool {
    switch state {
    case .awaitingPlan, .preparing: break
    case .created, .waiting:
      // The kill request may have been lost with the last connection.
      if attempt.failure != nil {
        await killTool()
        break
      }
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
          guard !Task.isCancelled else { return false }
          attempt.failure = error.reason
          try? link?.send(.kill)
        }
      }
      if attempt.isWaiting, attempt.isConnected {
        if record.stop != nil {
          await killTool()
          break
        }
        // A failed send closes the connection; the next connection reaches this line again.
        try? link?.send(.start)
        Fault.at(.released)
        if !attempt.isReleased { finishPhase("secrets") }
        attempt.isReleased = true
      }
    case .started:
      guard !attempt.isRunning else { break }
      await started(isAdopted && !attempt.isConnecting)
      attempt.isRunning = true
      // From now on, what features have may expire.
      announceChange()
      return true
    case .failed(let failure):
      attempt.reported = .failed(failure)
      attempt.failure = attempt.failure ?? Reason(failure)
      attempt.isOver = true
    case .ended(let status):
      attempt.reported = .ended(status)
      attempt.isOver = true
    }
    return false
  }

  private func connect() async throws(Refusal) {
    guard let process = link?.process else { throw Refusal(.isolation, "supervisor did not report PID 1") }
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

  // ------------------------------------------------------------------- timers

  /// Does what is due by the clock: the kill at the end of a grace period, and the expiry of what features have. Runs until it is cancelled.
  private func runTimers() async {
    await withDiscardingTaskGroup { group in
      while !Task.isCancelled {
        let change = nextChange
        let (due, pause) = timers()
        for action in due { group.addTask { await self.act(action) } }
        try? await wait(for: change, atMost: pause)
      }
    }
  }

  private enum TimedAction {
    case kill
    case expiry(any ExpiringFeature)
  }

  /// Returns what is due now and not in progress, and the time until something else is.
  private func timers() -> ([TimedAction], Duration?) {
    var due: [TimedAction] = []
    var pause: Duration?
    if let moment = attempt.killAt, !attempt.isKilling {
      let left = Duration.nanoseconds(moment - Clock.boottime)
      if left > .zero {
        pause = left
      } else {
        attempt.isKilling = true
        due.append(.kill)
      }
    }
    let record = record
    guard record.state.isUp, attempt.isRunning else { return (due, pause) }
    for case let feature as any ExpiringFeature in features where !attempt.expiring.contains(type(of: feature).name) {
      guard let moment = feature.nextExpiry(in: record) else { continue }
      let left = Duration.seconds(moment - Date.now.timeIntervalSince1970)
      if left > .zero {
        pause = min(pause ?? left, left)
      } else {
        attempt.expiring.insert(type(of: feature).name)
        due.append(.expiry(feature))
      }
    }
    return (due, pause)
  }

  private func act(_ action: TimedAction) async {
    switch action {
    case .kill: await keepKilling()
    case .expiry(let feature):
      if await !feature.expire(self) { try? await Task.sleep(for: .seconds(5)) }
      attempt.expiring.remove(type(of: feature).name)
      announceChange()
    }
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

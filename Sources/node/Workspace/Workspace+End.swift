// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Cgroups
internal import Linux
internal import Logging
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Stops a workspace, and finishes an attempt that has ended.
extension Workspace {
  // ----------------------------------------------------------------- stopping

  /// Sends SIGTERM to the tool, and after the grace period SIGKILL to everything. Returns when the workspace has ended. The signal waits
  /// for nothing, not even for the disk.
  func stop(grace: UInt32?, by: String, reason: Reason? = nil) async throws -> WorkspaceRecord {
    // A caller that leaves waits for nothing; the stop, which may be the end itself, is completed.
    if let transition = try await requestStop(grace: grace, by: by, reason: reason) { await uncancelled { await self.finish(transition) } }
    try await end.value
    return record
  }

  private func requestStop(grace: UInt32?, by: String, reason: Reason?) async throws -> PendingTransition? {
    let record = record
    let seconds = grace ?? gracePeriodSeconds
    let request = WorkspaceRecord.StopRequest(
      by: by, killAt: Clock.boottime + Int64(seconds) * 1_000_000_000, bootID: services.facts.bootID)
    if record.state.isTerminal {
      // A stop between two attempts prevents the next one, also after a restart of the agent.
      if record.stop == nil, aftermath() != .none {
        update {
          $0.stop = request
          $0[RescueFeature.self].isPending = false
        }
        endPause()
        decideAgain()
        try await commit(.restartsEnded, ["by": by])
      }
      return nil
    }
    // Before the start there is no tool to signal.
    if seconds > 0, record.startedNanoseconds != nil { try? link?.send(.signal(Signals.terminate)) }
    let isFirst = record.state != .stopping
    update {
      if isFirst || ($0.stop?.killAt ?? .max) > request.killAt {
        $0.stop =
          isFirst
          ? request
          : $0.stop.map { before in
            WorkspaceRecord.StopRequest(by: before.by, killAt: request.killAt, bootID: request.bootID)
          }
      }
      if isFirst { $0.stopReason = $0.stopReason ?? reason }
    }
    let transition = isFirst ? apply(.stopRequested(by: by)) : nil
    attempt.cancelPreparation?()
    killTool(after: .seconds(record.startedNanoseconds == nil ? 0 : seconds))
    return transition
  }

  /// Kills the tool for a reason that the agent decided.
  func kill(for reason: Reason) {
    // A stop has a grace period of its own.
    guard record.stop == nil else { return }
    update { $0.stopReason = $0.stopReason ?? reason }
    killTool(after: .zero)
  }

  private var gracePeriodSeconds: UInt32 { spec.lifecycle.gracePeriodSeconds ?? services.tool(of: spec)?.gracePeriodSeconds ?? 10 }

  /// Returns the time until SIGKILL is due.
  func killDelay(_ stop: WorkspaceRecord.StopRequest) -> Duration {
    // A deadline of another boot, or none on record, cannot be used: the tool gets its whole grace period.
    guard stop.bootID == services.facts.bootID else {
      return .seconds(gracePeriodSeconds)
    }
    return .nanoseconds(max(0, stop.killAt - Clock.boottime))
  }

  /// Kills the sandbox after `delay`, or at the end of an earlier grace period.
  func killTool(after delay: Duration) {
    attempt.killAt = min(attempt.killAt ?? .max, Clock.boottime + Int64(delay / .nanoseconds(1)))
    announceChange()
  }

  /// Kills the sandbox, and again every second until it is cancelled at the end of the attempt.
  func keepKilling() async {
    var attempts = 0
    // A supervisor that is stuck, perhaps by SIGSTOP, does not block a stop: later attempts kill its sandbox, then itself.
    while !Task.isCancelled {
      await killTool(byCgroup: attempts >= 3, supervisorToo: attempts >= 6)
      attempts += 1
      try? await Task.sleep(for: .seconds(1))
    }
  }

  func killTool(byCgroup: Bool = false, supervisorToo: Bool = false) async {
    try? link?.send(.kill)
    guard byCgroup, let place = record.sandbox, await services.sandboxes.kill(place), supervisorToo else { return }
    link?.killSupervisor()
  }

  // ------------------------------------------------------------------- ending

  /// Finishes an attempt: reads what the sandbox left, commits the last event and releases everything.
  func finishAttempt(_ failure: Reason?) async {
    Fault.at(.exitSeen)
    let place = record.sandbox
    var usage = Usage()
    var exit: ExitRecord?
    if let place {
      usage = await services.sandboxes.usage(place)
      // Retries until the exit record is read or known to be absent: no guess may replace a known status.
      while !Task.isCancelled {
        do {
          exit = try await services.sandboxes.exitRecord(place)
          break
        } catch {
          _ = try? await Task.sleep(for: .milliseconds(200))
        }
      }
    }
    guard !Task.isCancelled else { return }
    exit = exit ?? attempt.reported
    let summary = StopSummary(
      record: record, exit: exit, failure: failure, usage: usage, bootID: services.facts.bootID)
    var reason = summary.reason
    if reason.code == .outOfMemory { reason.killed = await OutOfMemoryFeature.lastKill(record, services)?.process }
    reason = await complete(reason)
    // Features examine the end, and set files aside, before anything is released.
    for feature in features.reversed() { await feature.ended(reason, self) }
    let isFailedStart = summary.isFailedStart
    let follows = record[RescueFeature.self].isPending
    if !follows {
      // A restart by the policy has the same token, because the owner's browser uses it.
      let token = spec.lifecycle.restartPolicy == .never ? nil : secrets.token
      secrets = LaunchSecrets()
      secrets.token = token
    }
    let transition = apply(isFailedStart ? .preparationFailed(reason) : .ended(reason), follows ? ["rescue": "follows"] : [:])
    // A release that has begun is completed even if this agent ends in the meantime.
    async let giving: Void = uncancelled { await self.release(place, keepsSupervisor: follows) }
    // The copy restores the record if the journal is lost.
    if let copy = try? record.encoded() { await services.sandboxes.keep(copy, of: id) }
    if let transition { await finish(transition) } else { end.fulfil(.success(())) }
    await giving
    // The sandbox directory is removed last: until the end is on disk, its exit record is the only evidence of it.
    if let place, !follows, !Task.isCancelled { await services.sandboxes.remove(place) }
    released.fulfil(.success(()))
  }

  /// Releases what the attempt holds on the host. Idempotent: any part may be absent already.
  private func release(_ place: SandboxPlace?, keepsSupervisor: Bool) async {
    if !keepsSupervisor {
      try? link?.send(.release)
      link?.close()
      link = nil
    }
    Fault.at(.cleaning)
    if let place { await services.sandboxes.removeCgroup(place) }
    for feature in features.reversed() { await feature.release(self) }
    Fault.at(.cleaned)
  }

  /// Returns the reason with the fields that every end has.
  private func complete(_ reason: Reason) async -> Reason {
    let record = record
    let folder = HostSandboxes.logs(services.configuration.state, id)
    let tail = (try? await services.lanes.launch.run(within: .seconds(2)) { (try? LogReader(path: folder))?.tail(lines: 10) }) ?? nil
    return StopSummary.complete(reason, of: record, bootID: services.facts.bootID, logTail: tail)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Images
internal import Isolation
internal import LaunchPlan
internal import Linux
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// Prepares an attempt and requests its launch.
extension Workspace {
  /// Runs an attempt whose supervisor starts beside its preparation.
  func attemptStarting(_ accepted: Promise<Void>) async -> AttemptOrigin? {
    let started = Promise<any SandboxLink>()
    let starting = Task {
      do {
        guard let place = self.record.sandbox else { throw Refusal(.internal, "the record names no sandbox") }
        // Not cancelled if this agent ends in the meantime: the next one continues with what has been started.
        started.fulfil(.success(try await self.newSandbox(place)))
      } catch {
        started.fulfil(.failure(error as? Refusal ?? Refusal(.isolation, describe(error))))
      }
    }
    var next: AttemptOrigin?
    if (try? await accepted.valueWhateverHappens) != nil {
      next = await attempt(.starting(started), isAdopted: false)
    } else {
      await reject(.starting(started))
    }
    await starting.value
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
  func attempt(_ supervisor: AttemptSupervisor, isAdopted: Bool) async -> AttemptOrigin? {
    switch await apart({ await self.begin(supervisor) }) {
    case .ended: return nil
    case .lost: return await apart { await self.launchAgain() }
    case .failed: break
    case .launched:
      await follow(isAdopted)
      guard !Task.isCancelled else { return nil }
    }
    await apart { await self.finishAttempt(self.attempt.failure) }
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
  private func prepareCancellably(_ supervisor: AttemptSupervisor) async throws(Refusal) -> Bool {
    let preparation = Task { try await prepare(supervisor) }
    attempt.cancelPreparation = { preparation.cancel() }
    if record.stop != nil { preparation.cancel() }
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

  func finishPhase(_ name: String) {
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
}

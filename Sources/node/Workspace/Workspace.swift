// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Images
internal import Journal
internal import LaunchPlan
package import Linux
internal import Logging
package import ShimProtocol
internal import ShimClient
internal import Synchronization
package import Workspaces

/// One workspace: its record, its state machine and its current attempt. Features (`WorkspaceFeature`) contribute what an attempt needs;
/// `Workspace+Life.swift` has the course of an attempt.
package actor Workspace {
  package nonisolated let id: String
  nonisolated let services: NodeServices
  nonisolated let features: [any WorkspaceFeature]
  /// The record that callers outside this actor read, at any time and without waiting.
  private nonisolated let published: Mutex<WorkspaceRecord>
  /// The state in the last event; nil before the first event.
  private var reported: WorkspaceState?
  /// Whether the record has changed since it was last given to the journal.
  private var isChanged: Bool
  /// Whether the workspace is deleted: no event and no attempt follows.
  private(set) var isDeleted = false
  private(set) var isDeleting = false
  /// Fulfilled at the next change of the record.
  private var change = Promise<Void>()
  /// Fulfilled when the workspace has ended and its last event is on disk; replaced for each attempt.
  private(set) var end = Promise<Void>()
  /// Fulfilled when everything that the last attempt held on the host is released.
  var released = Promise<Void>(())
  /// Fulfilled when the decision about a next attempt must be made again.
  private(set) var decision = Promise<Void>()
  /// The connection to the supervisor of the current attempt.
  var link: (any SandboxLink)?
  var secrets = LaunchSecrets()
  /// The state of the current attempt that lives only in this process.
  var attempt = AttemptState()
  /// Whether the node is draining: no further attempt follows.
  var isDraining = false

  package init(_ record: WorkspaceRecord, _ services: NodeServices, _ features: [any WorkspaceFeature], isOnRecord: Bool) {
    id = record.spec.id
    self.services = services
    self.features = features
    published = Mutex(record)
    reported = isOnRecord ? record.state : nil
    isChanged = !isOnRecord
    if record.state.isTerminal { end.fulfil(.success(())) }
  }

  // ------------------------------------------------------------------- record

  package nonisolated var record: WorkspaceRecord { published.withLock { $0 } }
  nonisolated var spec: WorkspaceSpec { record.spec }
  nonisolated var logger: Logger { services.logger }

  /// Changes the record in memory. The next event makes the change durable.
  package func update(_ body: (inout WorkspaceRecord) -> Void) {
    published.withLock { body(&$0) }
    isChanged = true
    announceChange()
  }

  /// Wakes the tasks that wait for a change of the record.
  func announceChange() {
    let changed = change
    change = Promise()
    changed.fulfil(.success(()))
  }

  func setCondition(_ type: Condition.Kind, _ message: String?) { update { $0.setCondition(type, message) } }

  /// The next change of the record. Get it before reading the record, so that no change in between is missed.
  var nextChange: Promise<Void> { change }

  /// Waits for `next`, at most for `pause`. Throws when the task is cancelled.
  nonisolated func wait(for next: Promise<Void>, atMost pause: Duration?) async throws {
    guard let pause else { return try await next.value }
    // A minute at most: the wall clock may be set, and the runtime keeps a cancelled sleep until its time.
    _ = try? await next.value(within: min(pause, .seconds(60)), else: CancellationError())
    try Task.checkCancellation()
  }

  // ------------------------------------------------------------------- events

  /// Returns an event together with the record as it is now, if that has changed.
  private func entry(_ type: EventType, _ attributes: [String: String] = [:]) throws -> Journal.Entry {
    let event = try event(type, attributes)
    guard isChanged else { return Journal.Entry(event) }
    let record = try record.journalRecord()
    isChanged = false
    return Journal.Entry(event, .record(record))
  }

  private func event(_ type: EventType, _ attributes: [String: String] = [:]) throws -> JournalEvent {
    // A late event must not restore the record of a deleted workspace.
    guard !isDeleted else { throw AgentError.noWorkspace(id) }
    let record = record
    let event = try services.event(type, record, after: reported, attributes)
    reported = record.state
    Fault.at("before \(type.rawValue)")
    return event
  }

  /// Records an event with the current record. Without `retriesUntilDurable` it throws if the disk is full or fails, for the caller to report.
  package func commit(_ type: EventType, _ attributes: [String: String] = [:], retriesUntilDurable: Bool = true) async throws {
    let done = services.events.submit([try entry(type, attributes)], retriesUntilDurable: retriesUntilDurable)
    defer { Fault.at("after \(type.rawValue)") }
    do { try await done.value } catch {
      // The record may not have been written.
      isChanged = true
      throw error
    }
  }

  /// Records an event without waiting for the disk.
  package func submit(_ type: EventType, _ attributes: [String: String] = [:]) {
    guard let entry = try? entry(type, attributes) else { return }
    _ = services.events.submit([entry], retriesUntilDurable: true)
  }

  /// A transition that is applied in memory and in flight to the disk.
  struct PendingTransition: Sendable {
    let event: EventType
    let done: Promise<Void>
  }

  /// Applies an input with the state machine. Returns nil if the state does not allow it, because another transition came first and
  /// holds. What follows acts on the new state, and its events come after this one.
  @discardableResult
  func apply(_ input: StateMachineInput, _ attributes: [String: String] = [:]) -> PendingTransition? {
    guard !isDeleted, let (event, entry) = try? advance(input, attributes) else { return nil }
    return PendingTransition(event: event, done: services.events.submit([entry], retriesUntilDurable: true))
  }

  /// Waits until a transition is on disk.
  func finish(_ transition: PendingTransition) async {
    defer { Fault.at("after \(transition.event.rawValue)") }
    guard (try? await transition.done.value) != nil, [.stopped, .failed].contains(transition.event) else { return }
    end.fulfil(.success(()))
  }

  func transition(_ input: StateMachineInput, _ attributes: [String: String] = [:]) async {
    if let transition = apply(input, attributes) { await finish(transition) }
  }

  private func advance(_ input: StateMachineInput, _ more: [String: String]) throws -> (EventType, Journal.Entry) {
    let next = try StateMachine.apply(input, to: record.state)
    update {
      $0.state = next.state
      $0.reason = next.reason
    }
    if record.state.isTerminal == false, end.isFulfilled { end = Promise() }
    let record = record
    var attributes = more
    attributes["attempt"] = "\(record.attempt)"
    if next.event == .ready {
      attributes["milliseconds"] = String(format: "%.1f", record.phases.map(\.milliseconds).reduce(0, +))
    }
    logger.info(
      "workspace \(next.event.rawValue.lowercased())",
      metadata: ["workspace": "\(id)", "state": "\(next.state.rawValue)", "reason": "\(next.reason?.message ?? "")"])
    return (next.event, try entry(next.event, attributes))
  }

  /// Accepts a new workspace: hands the secrets of the request to the supervisor of its sandbox, and commits its first two events in one
  /// transaction, for which `untilAccepted` waits. Returns how its first attempt begins.
  func accept(_ entrusted: LaunchSecrets) async throws -> AttemptOrigin {
    secrets = entrusted
    let place = SandboxPlace(id: SandboxPlace.freshID())
    update { $0.occupy(place, services.facts.bootID) }
    if secrets.isEmpty {
      let accepted = try submitAcceptance()
      holdResources()
      return .accepting(accepted)
    }
    var link: (any SandboxLink)?
    var failure = ""
    // Secrets cannot be fetched again: the supervisor has them before a record needs them. With a token alone, the two steps overlap.
    if spec.needsSecrets { link = try await newSandbox(place) }
    let accepted: Promise<Void>
    do { accepted = try submitAcceptance() } catch {
      await end(link, place)
      throw error
    }
    if link == nil { do { link = try await newSandbox(place) } catch { failure = describe(error) } }
    do { try await untilAccepted(accepted) } catch {
      await end(link, place)
      throw error
    }
    if let link { return .accepted(link) }
    await transition(.preparationFailed(Reason(.isolation, failure)))
    return .recovered
  }

  /// Waits until an accepted launch is on disk, even if the caller is cancelled: what is on disk by then has been accepted.
  private func untilAccepted(_ accepted: Promise<Void>) async throws {
    do { try await accepted.valueWhateverHappens } catch { throw AgentError(.internal, "the journal cannot be written: \(error)") }
    Fault.at(.afterCreated)
    Fault.at(.afterPreparing)
  }

  /// Waits until the launch is on disk, or until nothing is left of one that the journal did not take. `runAttempts(origin)` runs.
  func untilAccepted(_ origin: AttemptOrigin) async throws {
    guard case .accepting(let accepted) = origin else { return }
    do { try await untilAccepted(accepted) } catch {
      try await released.value
      throw error
    }
  }

  private func submitAcceptance() throws -> Promise<Void> {
    let created = try event(.created)
    let (_, preparing) = try advance(.preparationBegan, [:])
    // The second entry has the record, which is in the same transaction.
    return services.events.submit([Journal.Entry(created), preparing], retriesUntilDurable: false)
  }

  /// Records that an attempt holds resources of the host. Callers that wait for the release of the last attempt then wait for this one.
  func holdResources() { if released.isFulfilled { released = Promise() } }

  // ------------------------------------------------------------------ deleting

  /// Deletes the record of a workspace that has ended.
  func delete() async throws {
    let record = record
    guard record.state.isTerminal else {
      throw AgentError(reason: .workspaceRunning, "workspace \(id) is \(record.state.rawValue); stop it first")
    }
    // `isDeleting` counts as a stop request in `aftermath`: no attempt follows.
    isDeleting = true
    defer {
      isDeleting = false
      decideAgain()
    }
    endPause()
    try await released.value
    guard !isDeleted else { throw AgentError.noWorkspace(id) }
    guard self.record.state.isTerminal else {
      throw AgentError(reason: .workspaceRunning, "workspace \(id) is \(self.record.state.rawValue); stop it first")
    }
    let entry = Journal.Entry(
      try services.event(.deleted, record, after: record.state), .deletion(of: id))
    isDeleted = true
    Fault.at(.beforeDeleted)
    do {
      try await services.events.submit([entry], retriesUntilDurable: false).valueWhateverHappens
    } catch {
      isDeleted = false
      throw AgentError(.internal, "the journal cannot be written: \(error)")
    }
    Fault.at(.afterDeleted)
  }

  /// Allows no further attempt and ends a pause before one, because the node accepts no launches.
  func drain() {
    isDraining = true
    endPause()
  }

  func undrain() {
    isDraining = false
    decideAgain()
  }

  /// Makes `runAttempts` decide again what follows the last attempt: a deletion or a drain is over, or there was a stop.
  func decideAgain() {
    let kept = decision
    decision = Promise()
    kept.fulfil(.success(()))
  }

  // --------------------------------------------------------------- supervisor

  /// Sets the connection over which the supervisor is reached from now on.
  func use(_ connection: any SandboxLink) { link = connection }

  /// Returns the record of a workspace whose tool runs; throws otherwise. `rule`: why the call requires that.
  @discardableResult
  nonisolated func requireUp(_ rule: String) throws -> WorkspaceRecord {
    let record = record
    guard record.state.isUp else {
      throw AgentError(reason: .workspaceNotRunning, "workspace \(id) is \(record.state.rawValue); \(rule)")
    }
    return record
  }

  /// Sends a request to the supervisor and returns the descriptors in its reply.
  @discardableResult
  package func request(_ request: ShimRequest, passing: [Handle] = []) async throws -> [Handle] {
    let link = try requireLink()
    do throws(SupervisorError) {
      return try await link.request(request, passing: passing)
    } catch {
      throw Workspace.callError(error, id)
    }
  }

  /// Returns the connection to the supervisor; throws if there is none.
  func requireLink() throws -> any SandboxLink {
    if let link { return link }
    throw AgentError(reason: .supervisorUnreachable, "workspace \(id): cannot reach its supervisor; retry later")
  }

  static func callError(_ error: SupervisorError, _ id: String) -> AgentError {
    let message = "workspace \(id): \(error)"
    switch error {
    case .disconnected, .noReply, .cancelled: return AgentError(reason: .supervisorUnreachable, message, cause: error)
    case .tooManyExecs: return AgentError(reason: .callsExhausted, message, cause: error)
    case .refused(.messageTooLong): return AgentError(.invalidArgument, message, cause: error)
    case .failed: return AgentError(.failedPrecondition, message, cause: error)
    case .unsupported: return AgentError(.unimplemented, message, cause: error)
    case .refused, .malformed: return AgentError(.internal, message, cause: error)
    }
  }

  /// Returns the tool's token, from memory or from the supervisor.
  func token() async -> String? {
    let record = record
    guard record.state.isUp || record.state == .preparing, let name = services.tool(of: record.spec)?.tokenFile else { return nil }
    if let token = secrets.token { return token.content }
    guard record.state.isUp, let link, let content = try? await LaunchSecrets.read(link, .getSecret(name: name)) else { return nil }
    let token = String(decoding: content, as: UTF8.self)
    secrets.token = (name, token)
    return token
  }

  // ------------------------------------------------------------------ draft

  nonisolated func draft(_ record: WorkspaceRecord, _ tool: Tool, _ image: StoredImage) -> AttemptDraft {
    var draft = AttemptDraft(record, tool, image)
    for feature in features { feature.contribute(to: &draft, of: record) }
    return draft
  }
}

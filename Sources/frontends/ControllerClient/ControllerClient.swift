// SPDX-License-Identifier: Apache-2.0

package import Configuration
package import API
package import Agent
internal import Concurrency
internal import Credentials
internal import Errors
internal import Foundation
internal import GRPCCore
internal import GRPCNIOTransportHTTP2
internal import Journal
internal import Linux
package import Logging
internal import SwiftProtobuf
internal import Synchronization
internal import Workspaces
internal import WireMapping

/// The call to one controller (proto/carrel/controller/v1). It is made again whenever it ends, for as long as the agent runs.
package final class ControllerClient: Sendable {
  private let node: Node
  private let controller: Configuration.Controller
  private let version: String
  private let logger: Logger
  private let state = Mutex((connected: false, problem: "no connection attempted yet"))

  package init(node: Node, controller: Configuration.Controller, version: String, logger: Logger) {
    self.node = node
    self.controller = controller
    self.version = version
    self.logger = logger
  }

  package func status() async throws -> Carrel_V1_ControllerStatus {
    let acknowledged = try await node.journal.acknowledged(by: controller.name) ?? 0
    let (connected, problem) = state.withLock { $0 }
    return .with {
      $0.name = controller.name
      $0.socket = controller.socket
      $0.owner = controller.owner
      $0.connected = connected
      $0.acknowledged = UInt64(acknowledged)
      $0.problem = problem
    }
  }

  /// Runs until the task is cancelled.
  package func run() async {
    var wait = Duration.milliseconds(100)
    while !Task.isCancelled {
      let begun = ContinuousClock.now
      var problem = "the controller closed the call"
      do { try await call() } catch { problem = (error as? RPCError)?.message ?? "\(error)" }
      if state.withLock({ $0.problem }) != problem {
        logger.notice("controller not connected", metadata: ["controller": "\(controller.name)", "why": "\(problem)"])
      }
      state.withLock { $0 = (false, problem) }
      // The backoff doubles up to 30 s and has jitter, so that agents do not retry at once; a call that lasted 30 s resets it.
      if begun.duration(to: .now) > .seconds(30) { wait = .milliseconds(100) }
      do { try await Task.sleep(for: wait * Double.random(in: 0.5...1)) } catch { return }
      wait = min(wait * 2, .seconds(30))
    }
  }

  private func call() async throws {
    // This connection fails at once if nothing listens, where the call would wait.
    let path = controller.socket
    try await node.services.lanes.controllers.run(within: .seconds(5)) {
      do throws(Errno) { _ = try Socket.connect(path: path) } catch {
        throw RPCError(code: .unavailable, message: "\(path): \(error.sentence)")
      }
    }
    var config = HTTP2ClientTransport.Posix.Config.defaults
    config.connection.flushCoalescing = nil
    config.connection.keepalive = .init(time: .seconds(20), timeout: .seconds(10), allowWithoutCalls: true)
    let transport = try HTTP2ClientTransport.Posix(
      target: .unixDomainSocket(path: controller.socket), transportSecurity: .plaintext, config: config)
    let hello = try await hello()
    let conversation = ControllerCall(node: node, controller: controller.name) { [self] in
      state.withLock { $0 = (true, "") }
      logger.notice("controller connected", metadata: ["controller": "\(controller.name)"])
    }
    defer { node.controllers.close(controller.name) }
    try await withGRPCClient(transport: transport) { client in
      try await Carrel_Controller_V1_Controller.Client(wrapping: client).connect { writer in
        try await writer.write(.with { $0.hello = hello })
        try await conversation.send { try await writer.write($0) }
      } onResponse: { response in
        defer { conversation.end() }
        try await withThrowingDiscardingTaskGroup { group in
          group.addTask { try await conversation.keepAcknowledgements() }
          for try await message in response.messages { try await conversation.handle(message, &group) }
          group.cancelAll()
        }
      }
    }
  }

  private func hello() async throws -> Carrel_Controller_V1_Hello {
    let extent = try await node.journal.extent()
    let acknowledged = try await node.journal.acknowledged(by: controller.name) ?? 0
    let draining = await node.drain != nil
    return .with {
      $0.node = node.facts.name
      $0.streamID = node.journal.streamID
      $0.bootID = node.facts.bootID
      $0.version = version
      $0.capabilities = ["commands", "snapshot", "credentials"]
      $0.oldest = UInt64(extent.oldest)
      $0.head = UInt64(extent.head)
      $0.acknowledged = UInt64(acknowledged)
      $0.draining = draining
    }
  }
}

/// One call: what the controller has sent so far, and what is to be sent to it.
private final class ControllerCall: Sendable {
  private struct State {
    /// The last event sent, nil until `welcome` has set where to begin; and below the last one acknowledged.
    var sent: Int64?
    var acknowledged: Int64 = 0
    var window: Int64 = 256
    /// Replies, which are sent before the next event.
    var answers: [Carrel_Controller_V1_NodeMessage] = []
    var commands = 0
    var hasEnded = false
  }

  private let node: Node
  private let controller: String
  private let welcomed: @Sendable () -> Void
  private let state = Mutex(State())
  private let wakes: AsyncStream<Void>
  private let wake: AsyncStream<Void>.Continuation
  private let acknowledgements: AsyncStream<Void>
  private let acknowledging: AsyncStream<Void>.Continuation

  /// The number of commands that may be in progress; more are refused.
  private static let commandLimit = 64
  /// The number of replies that may wait; the call of a controller that does not read them is closed.
  private static let answerLimit = 256

  init(node: Node, controller: String, welcomed: @escaping @Sendable () -> Void) {
    self.node = node
    self.controller = controller
    self.welcomed = welcomed
    (wakes, wake) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
    (acknowledgements, acknowledging) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
  }

  func end() {
    state.withLock { $0.hasEnded = true }
    wake.finish()
  }

  private func answer(_ message: Carrel_Controller_V1_NodeMessage) {
    state.withLock { if $0.answers.count < ControllerCall.answerLimit { $0.answers.append(message) } }
    wake.yield()
  }

  // ----------------------------------------------------------------- receiving

  func handle(_ message: Carrel_Controller_V1_ControllerMessage, _ group: inout ThrowingDiscardingTaskGroup<any Error>) async throws {
    guard state.withLock({ $0.answers.count }) < ControllerCall.answerLimit else {
      throw RPCError(code: .resourceExhausted, message: "\(ControllerCall.answerLimit) unread replies, the limit")
    }
    switch message.message {
    case .welcome(let welcome): try await begin(welcome)
    case .acknowledge(let acknowledge): try take(acknowledge.sequence)
    case .snapshot: answer(try await snapshot())
    case .command(let command): execute(command, &group)
    case .given(let given): take(given)
    case nil: refuse(.invalidArgument, "message: expected a kind that this agent knows")
    }
  }

  private func refuse(_ code: RPCError.Code, _ message: String) {
    answer(
      .with {
        $0.refusal = .with {
          $0.code = Int32(code.rawValue)
          $0.message = message
        }
      })
  }

  private func begin(_ welcome: Carrel_Controller_V1_Welcome) async throws {
    guard state.withLock({ $0.sent == nil }) else { return refuse(.invalidArgument, "welcome: already received; expected once") }
    guard welcome.window <= 4096 else { return refuse(.invalidArgument, "welcome.window: expected 1 to 4096, or 0") }
    let journal = node.journal
    let extent = try await journal.extent()
    var cursor = Int64(clamping: welcome.cursor)
    if !welcome.streamID.isEmpty, welcome.streamID != journal.streamID {
      let why = journal.loss ?? "the controller knows another stream of this node"
      cursor = try await sendGap(from: welcome.cursor &+ 1, to: 0, why)
    } else if cursor > extent.head {
      return refuse(.outOfRange, "welcome.cursor: \(welcome.cursor) is above the head, \(extent.head)")
    } else if cursor < extent.oldest - 1 {
      cursor = try await sendGap(from: UInt64(cursor + 1), to: UInt64(extent.oldest - 1), "trimmed")
    }
    state.withLock {
      $0.sent = cursor
      $0.acknowledged = cursor
      if welcome.window > 0 { $0.window = Int64(welcome.window) }
    }
    welcomed()
    node.controllers.open(controller) { [weak self] question in self?.answer(.with { $0.wanted = .init(question) }) }
    wake.yield()
  }

  /// Sends a gap, and a snapshot in its place. Returns the sequence after which events continue.
  private func sendGap(from: UInt64, to: UInt64, _ reason: String) async throws -> Int64 {
    answer(.with { $0.gap = Carrel_V1_Gap(from: from, to: to, reason: reason) })
    let snapshot = try await snapshot()
    answer(snapshot)
    return Int64(snapshot.snapshot.sequence)
  }

  private func snapshot() async throws -> Carrel_Controller_V1_NodeMessage {
    let snapshot = try await Carrel_V1_SnapshotResponse(node.journal)
    return .with { $0.snapshot = snapshot }
  }

  private func take(_ sequence: UInt64) throws {
    guard let sent = state.withLock({ $0.sent }), let number = Int64(exactly: sequence), number <= sent else {
      return refuse(.outOfRange, "acknowledge: \(sequence) was not sent yet")
    }
    state.withLock { $0.acknowledged = max($0.acknowledged, number) }
    wake.yield()
    acknowledging.yield()
  }

  /// Makes acknowledgements durable, many at a time: they are cumulative, and events without a stored one are only sent again.
  func keepAcknowledgements() async throws {
    for await _ in acknowledgements {
      // Each one costs an fsync, which the next event would wait for.
      try await Task.sleep(for: .milliseconds(50))
      // An acknowledgement that cannot be stored now is covered by the next one.
      try? await node.acknowledge(state.withLock { $0.acknowledged }, by: controller)
    }
  }

  private func take(_ given: Carrel_Controller_V1_CredentialsGiven) {
    let result: Result<Data, DriverError> =
      if !given.error.isEmpty {
        .failure(DriverError(.failed, "controller \(controller): \(printable(given.error, limit: 200))"))
      } else if given.content.count > CredentialProvider.sizeLimit {
        .failure(
          DriverError(.failed, "controller \(controller): \(given.content.count) bytes; expected at most \(CredentialProvider.sizeLimit)"))
      } else {
        .success(given.content)
      }
    node.controllers.answer(controller, given.id, result)
  }

  private func execute(_ command: Carrel_Controller_V1_Command, _ group: inout ThrowingDiscardingTaskGroup<any Error>) {
    let isRoom = state.withLock { state in
      guard state.commands < ControllerCall.commandLimit else { return false }
      state.commands += 1
      return true
    }
    guard isRoom else {
      return answer(
        ControllerCall.result(
          command.id, RPCError(code: .resourceExhausted, message: "\(ControllerCall.commandLimit) commands in progress (limit); retry"), nil
        ))
    }
    group.addTask { [self] in
      var failure: RPCError?
      var workspace: Carrel_V1_Workspace?
      do {
        // The work belongs to the node, so that it continues if this call ends first.
        workspace = try await node.answer("command", within: CallLimit.stop) { [node] in
          try await ControllerCall.execute(command, RequestHandler(node: node))
        }
      } catch {
        failure = RPCError(error)
      }
      state.withLock { $0.commands -= 1 }
      answer(ControllerCall.result(command.id, failure, workspace))
    }
  }

  private static func execute(_ command: Carrel_Controller_V1_Command, _ handler: RequestHandler) async throws -> Carrel_V1_Workspace? {
    switch command.command {
    case .launch(let request): return try await handler.handle(request).workspace
    case .stop(let request): return try await handler.handle(request).workspace
    case .delete(let request): _ = try await handler.handle(request)
    case .updateCredentials(let request): _ = try await handler.handle(request)
    case .revokeCredentials(let request): _ = try await handler.handle(request)
    case .removeCredentials(let request): _ = try await handler.handle(request)
    case .attachDataset(let request): return try await handler.handle(request).workspace
    case .detachDataset(let request): _ = try await handler.handle(request)
    case .drain(let request): _ = try await handler.handle(request)
    case .uncordon(let request): _ = try await handler.handle(request)
    case .resume(let request): _ = try await handler.handle(request)
    case nil: throw AgentError(field: "command", "expected a kind that this agent knows")
    }
    return nil
  }

  private static func result(
    _ id: String, _ failure: RPCError?, _ workspace: Carrel_V1_Workspace?
  ) -> Carrel_Controller_V1_NodeMessage {
    .with {
      $0.result = .with {
        $0.id = id
        if let failure {
          $0.code = Int32(failure.code.rawValue)
          $0.message = failure.message
        }
        if let workspace { $0.workspace = workspace }
      }
    }
  }

  // ------------------------------------------------------------------- sending

  /// Sends replies as they come, and events as far as the window allows, until the call ends.
  func send(_ write: @Sendable (Carrel_Controller_V1_NodeMessage) async throws -> Void) async throws {
    // The subscription precedes the first read, so that no event is missed between read and wait.
    let changes = node.feed.changes()
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask { [wake] in for await _ in changes { wake.yield() } }
      defer { group.cancelAll() }
      try await speakUntilEnd(write)
    }
  }

  private func speakUntilEnd(_ write: @Sendable (Carrel_Controller_V1_NodeMessage) async throws -> Void) async throws {
    var iterator = wakes.makeAsyncIterator()
    while !state.withLock({ $0.hasEnded }) {
      let answers = state.withLock { state in
        defer { state.answers = [] }
        return state.answers
      }
      for message in answers {
        try await write(message)
        if case .refusal? = message.message { return }
      }
      if try await sendEvents(write) { continue }
      guard await iterator.next() != nil else { return }
    }
  }

  /// Sends the next events. Returns false if there are none, or if the window is full.
  private func sendEvents(_ write: @Sendable (Carrel_Controller_V1_NodeMessage) async throws -> Void) async throws -> Bool {
    let (sent, room) = state.withLock { ($0.sent, $0.window - (($0.sent ?? 0) - $0.acknowledged)) }
    guard let sent, room > 0 else { return false }
    let events = try await node.journal.page(after: sent, limit: Int(min(room, 256))).events
    guard let first = events.first else { return false }
    if first.sequence != sent + 1 {
      // The events were trimmed in the meantime, because another reader acknowledged them or the journal reached its limit.
      let cursor = try await sendGap(from: UInt64(sent + 1), to: UInt64(first.sequence - 1), "trimmed")
      state.withLock {
        $0.sent = cursor
        $0.acknowledged = cursor
      }
      return true
    }
    for event in events {
      // This precedes the write, because the acknowledgement may arrive before the write returns.
      state.withLock { $0.sent = event.sequence }
      try await write(.with { $0.event = Carrel_V1_Event(event, stream: node.journal.streamID) })
    }
    return true
  }
}

extension Carrel_Controller_V1_CredentialsWanted {
  init(_ question: ControllerProvider.CredentialRequest) {
    self.init()
    id = question.id
    workspace = question.workspace
    owner = question.owner
    switch question.wanted {
    case .role(let role): awsRole = role
    case .webIdentity(let role): webIdentityRole = role
    case .git(let host, let organisation):
      git = .with {
        $0.host = host
        $0.name = organisation
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
package import Linux
package import ShimProtocol
internal import Synchronization

/// A connection to a supervisor that supports `ShimProtocol`; it carries all requests and reports.
package final class ShimConnection: SandboxLink {
  private struct Reply: Sendable {
    let reply: ShimReply
    let descriptors: [Handle]
  }

  private struct State {
    var next: UInt32 = 1
    var waiting: [UInt32: Promise<Reply>] = [:]
    /// The outcomes of further programs, keyed by the request that started each.
    var execs: [UInt32: Promise<ExecSession.Outcome>] = [:]
    var process: SandboxProcess?
    var isClosed = false
  }

  package let status: SupervisorHello
  package let reports: AsyncStream<ShimReport>
  private let socket: SupervisorSocket
  private let supervisor: Handle?
  private let state: Mutex<State>

  /// Takes over a connection on which the supervisor's hello has been received.
  private init(_ socket: SupervisorSocket, _ hello: SupervisorHello, _ descriptors: [Handle]) throws(Errno) {
    self.socket = socket
    status = hello
    supervisor = descriptors.first
    var first = State()
    if let pid = hello.state.pid, descriptors.count > 1 { first.process = SandboxProcess(pid: pid, process: descriptors[1]) }
    state = Mutex(first)
    let (stream, continuation) = AsyncStream<ShimReport>.makeStream()
    reports = stream
    try socket.send(.hello(version: ShimProtocol.version, capabilities: ShimProtocol.capabilities), wait: false)
    try Readiness.shared.watch(socket.handle) { [weak self] in
      guard let self else {
        continuation.finish()
        return false
      }
      if self.receive(continuation) { return true }
      self.disconnect()
      continuation.finish()
      return false
    }
  }

  deinit { close() }

  /// The first message of a supervisor on a new connection.
  package enum Greeting: Sendable {
    case hello(ShimConnection)
    /// The first message of a supervisor of commit 7ede341.
    case legacy([UInt8])
  }

  /// Waits for the supervisor's first message.
  package static func greet(_ connection: Handle, within limit: Duration) async throws(SupervisorError) -> Greeting {
    let first = Promise<Socket.Message?>()
    do throws(Errno) {
      try Readiness.shared.receive(connection) { message in
        first.fulfil(.success(message))
        return false
      }
    } catch {
      throw .refused(error)
    }
    let message: Socket.Message?
    do throws(SupervisorError) { message = try await first.reply(within: limit) } catch {
      connection.descriptor.shutDown()
      throw error
    }
    guard let message, let code = message.bytes.first else { throw .disconnected }
    if LegacyShimConnection.isLegacy(code) { return .legacy(message.bytes) }
    do {
      guard case .hello(let hello) = try SupervisorMessage(decoding: message.bytes) else { throw SupervisorError.malformed }
      // In a later release a message may have another meaning.
      guard hello.version <= ShimProtocol.version else { throw SupervisorError.unsupported }
      return .hello(try ShimConnection(SupervisorSocket(connection), hello, message.descriptors))
    } catch {
      connection.descriptor.shutDown()
      throw error as? SupervisorError ?? .malformed
    }
  }

  package var process: SandboxProcess? { state.withLock { $0.process } }

  // ---------------------------------------------------------------- receiving

  /// Receives one message, on the thread of `Readiness`, which must not block. Returns false when the connection has closed.
  private func receive(_ continuation: AsyncStream<ShimReport>.Continuation) -> Bool {
    do throws(Errno) {
      guard let received = try socket.receive(wait: false) else { return false }
      switch received.message {
      case .hello, .unknown: break
      case .reply(let id, let reply):
        let waiting = state.withLock { $0.waiting.removeValue(forKey: id) }
        waiting?.fulfil(.success(Reply(reply: reply, descriptors: received.descriptors)))
      case .report(.execEnded(let session, let status)):
        state.withLock { $0.execs.removeValue(forKey: session) }?.fulfil(.success(.ended(status)))
      case .report(let report):
        if case .state(.created(let pid)) = report, let process = received.descriptors.first {
          state.withLock { $0.process = SandboxProcess(pid: pid, process: process) }
        }
        continuation.yield(report)
      }
      return true
    } catch {
      // A datagram that does not decode is from a later release; the connection stays open.
      return error == .again || error == .invalid
    }
  }

  private func disconnect() {
    let (waiting, execs) = state.withLock { state in
      state.isClosed = true
      defer { (state.waiting, state.execs) = ([:], [:]) }
      return (state.waiting.values, state.execs.values)
    }
    for promise in waiting { promise.fulfil(.failure(SupervisorError.disconnected)) }
    for promise in execs { promise.fulfil(.success(.lost)) }
  }

  package func killSupervisor() { if let supervisor { try? Process.signal(supervisor.descriptor, Signals.kill) } }

  package func close() {
    socket.handle.descriptor.shutDown()
    disconnect()
  }

  // --------------------------------------------------------------- requesting

  @discardableResult
  package func request(_ request: ShimRequest, passing: [Handle], within limit: Duration) async throws(SupervisorError) -> [Handle] {
    let (id, promise) = try post(request, passing: passing)
    let reply: Reply
    do throws(SupervisorError) { reply = try await promise.reply(within: limit) } catch {
      forget(id)
      throw error
    }
    switch reply.reply {
    case .done, .started: return reply.descriptors
    case .failed(let failure): throw .failed(failure)
    case .refused(let code): throw .refused(Errno(code))
    case .unsupported: throw .unsupported
    case .malformed: throw .malformed
    }
  }

  package func send(_ request: ShimRequest) throws(SupervisorError) { _ = try post(request, passing: []) }

  private func post(
    _ request: ShimRequest, passing: [Handle], exec: Promise<ExecSession.Outcome>? = nil
  ) throws(SupervisorError) -> (id: UInt32, promise: Promise<Reply>) {
    let promise = Promise<Reply>()
    let id = state.withLock { state -> UInt32? in
      guard !state.isClosed else { return nil }
      let id = state.next
      state.next &+= 1
      state.waiting[id] = promise
      if let exec { state.execs[id] = exec }
      return id
    }
    guard let id else { throw .disconnected }
    do throws(Errno) {
      try socket.send(.request(id: id, request), passing: passing, wait: false)
    } catch {
      forget(id)
      if error == .messageTooLong { throw .refused(error) }
      // A connection with a failed send is closed: the hello on the next one shows what has to be sent again.
      close()
      throw .disconnected
    }
    return (id, promise)
  }

  private func forget(_ id: UInt32) {
    state.withLock { state in
      state.waiting[id] = nil
      state.execs[id] = nil
    }
  }

  package func exec(_ request: ExecRequest, within limit: Duration) async throws(SupervisorError) -> ExecSession {
    let outcome = Promise<ExecSession.Outcome>()
    let streams: ExecStreams
    do throws(Errno) { streams = try ExecStreams(terminal: request.terminal) } catch { throw .refused(error) }
    let (id, promise) = try post(.exec(request), passing: streams.peerEnds, exec: outcome)
    let control = ExecControl(
      signal: { [weak self] number in try? self?.send(.execSignal(session: id, signal: number)) },
      hangUp: { [weak self] in try? self?.send(.execHangUp(session: id)) })
    do throws(SupervisorError) {
      let reply = try await promise.reply(within: limit)
      switch reply.reply {
      case .started: return try streams.session(master: reply.descriptors.first, control: control, outcome: outcome)
      case .failed(let failure): throw .failed(failure)
      case .refused(let code): throw Errno(code) == .again ? .tooManyExecs : .refused(Errno(code))
      case .unsupported: throw .unsupported
      case .malformed, .done: throw .malformed
      }
    } catch {
      forget(id)
      // The program may have started after all, without a session.
      try? send(.execHangUp(session: id))
      throw error
    }
  }

  package func hasEnded(within limit: Duration) async -> Bool? {
    guard let supervisor else { return nil }
    let ended = Promise<Void>()
    let token: Readiness.Token
    do throws(Errno) {
      token = try Readiness.shared.watch(supervisor) {
        // Checked on the process itself: the event may belong to an earlier file with the same descriptor number.
        guard (try? Process.hasEnded(supervisor)) == true else { return true }
        ended.fulfil(.success(()))
        return false
      }
    } catch {
      return nil
    }
    defer { Readiness.shared.cancel(token) }
    return (try? await ended.reply(within: limit)) != nil
  }
}

extension Promise {
  /// Returns the reply of a supervisor or an injector, or throws `noReply` after `limit`.
  func reply(within limit: Duration) async throws(SupervisorError) -> T {
    do {
      return try await value(within: limit, else: SupervisorError.noReply(seconds: limit.components.seconds))
    } catch {
      throw error as? SupervisorError ?? .cancelled
    }
  }
}

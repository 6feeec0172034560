// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import LaunchPlan
package import Linux
package import ShimProtocol
internal import Synchronization

/// A connection to a supervisor of commit 7ede341, whose protocol had no version, so that workspaces of that release keep running through
/// an upgrade. It only adopts sandboxes and cannot launch.
///
/// That protocol had no request ids: each request needs a connection of its own, of which the supervisor accepts 64. Release 0.3 removes
/// this file; by then every workspace of 0.1 has been restarted.
package final class LegacyShimConnection: SandboxLink {
  package let status: SupervisorHello
  package let reports: AsyncStream<ShimReport>
  package let process: SandboxProcess?
  private let connection: Handle
  private let connect: @Sendable () throws(Errno) -> Handle
  /// The targets that it reports as attached or detached since its launch.
  package let changedMounts: [String]

  /// Returns whether the first byte of a message belongs to that protocol.
  package static func isLegacy(_ code: UInt8) -> Bool { (20...36).contains(code) }

  /// Adopts a sandbox. `first`: the first message of the supervisor on `connection`. `findInit` returns the host pid of PID 1 in the
  /// sandbox, which this protocol does not report once the tool runs.
  package static func adopt(
    _ connection: Handle, first: [UInt8], connect: @escaping @Sendable () throws(Errno) -> Handle, findInit: () -> Int32?
  ) async throws(SupervisorError) -> LegacyShimConnection {
    guard let message = Message(decoding: first), let found = message.state(findInit()) else { throw .malformed }
    var changed: [String] = []
    if case .mounts(let attached, let detached) = try await exchange(.listMounts, over: connect, within: .seconds(10)) {
      changed = attached + detached
    }
    var process: SandboxProcess?
    if let pid = found.pid, let file = try? Process.open(pid: pid) { process = SandboxProcess(pid: pid, process: Handle(file)) }
    do throws(Errno) {
      return try LegacyShimConnection(connection, found, process, changed, connect)
    } catch {
      throw .refused(error)
    }
  }

  private init(
    _ connection: Handle, _ state: SandboxState, _ process: SandboxProcess?, _ changed: [String],
    _ connect: @escaping @Sendable () throws(Errno) -> Handle
  ) throws(Errno) {
    self.connection = connection
    self.connect = connect
    self.process = process
    changedMounts = changed
    status = SupervisorHello(state: state, servesCredentials: true)
    let (stream, continuation) = AsyncStream<ShimReport>.makeStream()
    reports = stream
    let pid = process?.pid
    try Readiness.shared.receive(connection) { raw in
      guard let raw else {
        continuation.finish()
        return false
      }
      if let report = Message(decoding: raw.bytes)?.report(pid) { continuation.yield(report) }
      return true
    }
  }

  deinit { connection.descriptor.shutDown() }
  /// Does nothing: that protocol does not report the process of the supervisor.
  package func killSupervisor() {}
  package func close() { connection.descriptor.shutDown() }

  @discardableResult
  package func request(_ request: ShimRequest, passing: [Handle], within limit: Duration) async throws(SupervisorError) -> [Handle] {
    switch request {
    case .signal, .kill, .start, .issuesRecorded:
      try send(request)
      return []
    case .release: return []
    case .launch, .hold, .getHeld, .exec, .execSignal, .execHangUp: throw .unsupported
    case .putSecret(let name, var content):
      if let file = passing.first {
        do throws(Errno) { content = try file.descriptor.read(at: 0, upTo: ShimProtocol.heldLimit) } catch { throw .refused(error) }
      }
      return try await exchange(.putSecret(name: name, content: content), within: limit)
    case .getSecret(let name):
      guard case .secret(let content) = try await LegacyShimConnection.exchange(.getSecret(name: name), over: connect, within: limit) else {
        throw .malformed
      }
      do throws(Errno) { return [Handle(try Descriptor.memory("carrel-secret", content))] } catch { throw .refused(error) }
    case .removeSecret(let name): return try await exchange(.removeSecret(name: name), within: limit)
    case .serveCredentials(let token): return try await exchange(.serveCredentials(token: token), passing: passing, within: limit)
    case .putRole(let name, let body, let expires):
      return try await exchange(.putRole(name: name, body: body, expires: expires), within: limit)
    }
  }

  private func exchange(_ message: Message, passing: [Handle] = [], within limit: Duration) async throws(SupervisorError) -> [Handle] {
    _ = try await LegacyShimConnection.exchange(message, over: connect, passing: passing, within: limit)
    return []
  }

  package func send(_ request: ShimRequest) throws(SupervisorError) {
    let message: Message
    switch request {
    case .start: message = .start
    case .signal(let number): message = .signal(number)
    case .kill: message = .kill
    case .issuesRecorded(let role, let count): message = .noted(role: role, count: count)
    default: throw .unsupported
    }
    do throws(Errno) {
      try Socket.send(connection.descriptor, message.encoded(), wait: false)
    } catch {
      throw error == .again ? .noReply(seconds: 0) : .disconnected
    }
  }

  /// Returns whether the supervisor has exited. Its process has no descriptor here, but its socket refuses connections once it has exited.
  package func hasEnded(within limit: Duration) async -> Bool? {
    let until = ContinuousClock.now + limit
    repeat {
      do throws(Errno) { try connect().descriptor.shutDown() } catch { if error == .connectionRefused || error == .noEntry { return true } }
      try? await Task.sleep(for: .milliseconds(20))
    } while ContinuousClock.now < until && !Task.isCancelled
    return false
  }

  // --------------------------------------------------------------------- exec

  package func exec(_ request: ExecRequest, within limit: Duration) async throws(SupervisorError) -> ExecSession {
    let streams: ExecStreams
    let socket: Handle
    do throws(Errno) {
      streams = try ExecStreams(terminal: request.terminal)
      socket = try connect()
      try Socket.send(socket.descriptor, Message.exec(request).encoded(), passing: streams.peerEnds, wait: false)
    } catch {
      throw error == .again ? .tooManyExecs : .refused(error)
    }
    let started = Promise<Handle?>()
    let outcome = Promise<ExecSession.Outcome>()
    do throws(Errno) {
      try Readiness.shared.receive(socket) { raw in
        guard let raw else {
          started.fulfil(.failure(SupervisorError.disconnected))
          outcome.fulfil(.success(.lost))
          return false
        }
        switch Message(decoding: raw.bytes) {
        case .execStarted: started.fulfil(.success(raw.descriptors.first))
        case .execFailed(let failure):
          started.fulfil(.failure(SupervisorError.failed(failure)))
          outcome.fulfil(.failure(SupervisorError.failed(failure)))
          return false
        case .execExited(let status):
          outcome.fulfil(.success(.ended(status)))
          return false
        default: break
        }
        return true
      }
    } catch {
      throw .refused(error)
    }
    let control = ExecControl(
      signal: { number in try? Socket.send(socket.descriptor, Message.execSignal(number).encoded(), wait: false) },
      // That supervisor kills the program when the program's connection closes.
      hangUp: { socket.descriptor.shutDown() })
    do throws(SupervisorError) {
      return try streams.session(master: try await started.reply(within: limit), control: control, outcome: outcome)
    } catch {
      socket.descriptor.shutDown()
      throw error
    }
  }

  // ----------------------------------------------------------------- messages

  /// Sends one request over a connection of its own, and returns the reply.
  private static func exchange(
    _ message: Message, over connect: @Sendable () throws(Errno) -> Handle, passing: [Handle] = [], within limit: Duration
  ) async throws(SupervisorError) -> Message {
    let answer = Promise<Message>()
    let socket: Handle
    do throws(Errno) {
      socket = try connect()
      try Socket.send(socket.descriptor, message.encoded(), passing: passing, wait: false)
      try Readiness.shared.receive(socket) { raw in
        guard let raw else {
          answer.fulfil(.failure(SupervisorError.disconnected))
          return false
        }
        guard let message = Message(decoding: raw.bytes) else { return true }
        switch message {
        case .done, .secret, .mounts: answer.fulfil(.success(message))
        case .refused(let code): answer.fulfil(.failure(SupervisorError.refused(Errno(code))))
        default: return true  // its state, which it sends on each new connection
        }
        return false
      }
    } catch {
      throw error == .again ? .noReply(seconds: 0) : .disconnected
    }
    defer { socket.descriptor.shutDown() }
    return try await answer.reply(within: limit)
  }

  /// The messages of commit 7ede341 that are still needed.
  private enum Message: Sendable {
    case start
    case signal(Int32)
    case kill
    case putSecret(name: String, content: [UInt8])
    case getSecret(name: String)
    case exec(ExecRequest)
    case execSignal(Int32)
    case serveCredentials(token: [UInt8])
    case putRole(name: String, body: [UInt8], expires: Int64)
    case noted(role: String, count: UInt32)
    case removeSecret(name: String)
    case listMounts
    case preparing
    case created(pid: Int32)
    case waiting(pid: Int32)
    /// The message carries the tool's pid inside the sandbox, which is not used.
    case started
    case failed(StepFailure)
    case exited(ExitStatus)
    case secret([UInt8])
    case done
    case refused(Int32)
    case execStarted
    case execFailed(StepFailure)
    case execExited(ExitStatus)
    case issued(role: String, count: UInt32)
    case outOfMemory(kills: UInt64)
    case mounts(attached: [String], detached: [String])

    func state(_ pid: Int32?) -> SandboxState? {
      switch self {
      case .preparing: .preparing
      case .created(let pid): .created(pid: pid)
      case .waiting(let pid): .waiting(pid: pid)
      case .started: .started(pid: pid ?? 0)
      case .failed(let failure): .failed(failure)
      case .exited(let status): .ended(status)
      default: nil
      }
    }

    func report(_ pid: Int32?) -> ShimReport? {
      switch self {
      case .issued(let role, let count): .issued(role: role, count: count)
      case .outOfMemory(let kills): .outOfMemory(kills: kills)
      default: state(pid).map { .state($0) }
      }
    }

    func encoded() -> [UInt8] {
      var writer = MessageWriter()
      switch self {
      case .start: writer.code(2)
      case .signal(let number):
        writer.code(3)
        writer.number(number)
      case .kill: writer.code(4)
      case .putSecret(let name, let content):
        writer.code(5)
        writer.text(name)
        writer.content(content)
      case .getSecret(let name):
        writer.code(6)
        writer.text(name)
      case .exec(let request):
        writer.code(7)
        writer.number(UInt32(0))
        writer.texts(request.arguments)
        writer.texts(request.environment)
        writer.text(request.directory)
        writer.number(UInt32(request.terminal ? 1 : 0))
        writer.number(UInt32(request.rows))
        writer.number(UInt32(request.columns))
      case .execSignal(let number):
        writer.code(8)
        writer.number(UInt32(0))
        writer.number(number)
      case .serveCredentials(let token):
        writer.code(9)
        writer.content(token)
      case .putRole(let name, let body, let expires):
        writer.code(10)
        writer.text(name)
        writer.content(body)
        writer.number(expires)
      case .noted(let role, let count):
        writer.code(11)
        writer.text(role)
        writer.number(count)
      case .removeSecret(let name):
        writer.code(12)
        writer.text(name)
      case .listMounts: writer.code(17)
      default: break
      }
      return writer.bytes
    }

    init?(decoding bytes: [UInt8]) {
      guard let message = try? Message.read(bytes) else { return nil }
      self = message
    }

    private static func failure(_ reader: inout Reader) throws(PlanError) -> StepFailure {
      let step = try reader.string()
      return StepFailure(legacy: step, Errno(try reader.int32()))
    }

    private static func read(_ bytes: [UInt8]) throws(PlanError) -> Message? {
      var reader = Reader(bytes)
      switch try reader.byte() {
      case 20: return .preparing
      case 21: return .created(pid: try reader.int32())
      case 22: return .waiting(pid: try reader.int32())
      case 23: return .started
      case 24: return .failed(try failure(&reader))
      case 25: return .exited(try reader.status())
      case 26: return .secret(try reader.counted())
      case 27: return .done
      case 28: return .refused(try reader.int32())
      case 29: return .execStarted
      case 30:
        _ = try reader.uint32()
        return .execFailed(try failure(&reader))
      case 31:
        _ = try reader.uint32()
        return .execExited(try reader.status())
      case 33: return .issued(role: try reader.string(), count: try reader.uint32())
      case 34: return .outOfMemory(kills: try reader.number(width: 8))
      case 36: return .mounts(attached: try reader.strings(), detached: try reader.strings())
      default: return nil
      }
    }
  }
}

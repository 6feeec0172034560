// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// What travels between agent and supervisor, and between supervisor and PID 1: one message a datagram.
///
/// Descriptors ride beside `exec` (its standard streams) and `execStarted` (a terminal's master).
package enum Message: Equatable, Sendable {
  // Requests.
  /// The child's pid as the host numbers it.
  case proceed(pid: Int32)
  /// The plan is in its place.
  case launch
  case start
  case signal(Int32)
  case kill
  case putSecret(name: String, content: [UInt8])
  case getSecret(name: String)
  case exec(
    session: UInt32, arguments: [String], environment: [String], directory: String, terminal: Bool, rows: UInt16,
    columns: UInt16)
  case execSignal(session: UInt32, signal: Int32)

  /// Begins to serve credentials at the listening socket that rides beside it.
  case serveCredentials(token: [UInt8])
  /// `expires` in seconds since 1970; an empty body revokes.
  case putRole(name: String, body: [UInt8], expires: Int64)
  /// So many of `issued` are on the agent's record.
  case noted(role: String, count: UInt32)
  case removeSecret(name: String)

  /// A plan of one `bind`: mounted in the workspace that runs.
  case attach(plan: [UInt8])
  case detach(target: String, mount: UInt64)
  case change(target: String, mount: UInt64, readOnly: Bool)
  case findMount(target: String)
  /// What was attached and detached since the launch.
  case listMounts

  // Answers and reports.
  case preparing
  case created(pid: Int32)
  /// The child's namespaces and mounts stand, and it waits for `proceed`.
  case ready
  /// The child stands before `start`; its pid again, for who connects only now.
  case waiting(pid: Int32)
  case started(pid: Int32)
  case failed(StepFailure)
  case exited(ExitStatus)
  case secret([UInt8])
  case done
  case refused(Int32)
  case execStarted(session: UInt32)
  case execFailed(session: UInt32, failure: StepFailure)
  case execExited(session: UInt32, status: ExitStatus)
  /// Credentials of this role were given to programs so many times that are not noted yet.
  case issued(role: String, count: UInt32)
  case mount(id: UInt64)
  case mounts(attached: [String], detached: [String])
  /// So many processes of the workspace were ended for want of memory since it was launched.
  case outOfMemory(kills: UInt64)
}

/// The step of a launch that failed, with its error number.
package struct StepFailure: Error, Equatable, Sendable {
  /// The operation's name, with its path where it has one.
  package let step: String
  package let errno: Int32

  package init(_ step: String, _ error: Errno) {
    self.step = step
    errno = error.code
  }
}

extension Message {
  package func encoded() -> [UInt8] {
    var bytes: [UInt8] = []
    func head(_ code: UInt8) { bytes.append(code) }
    func number(_ value: Int64) { bytes.append(number: UInt64(bitPattern: value), width: 8) }
    func text(_ value: String) { bytes.append(counted: Array(value.utf8)) }
    func texts(_ values: [String]) {
      number(Int64(values.count))
      for value in values { text(value) }
    }
    func status(_ value: ExitStatus) {
      switch value {
      case .exited(let code): bytes.append(0); number(Int64(code))
      case .signalled(let signal): bytes.append(1); number(Int64(signal))
      }
    }
    func failure(_ value: StepFailure) {
      text(value.step)
      number(Int64(value.errno))
    }
    switch self {
    case .proceed(let pid): head(1); number(Int64(pid))
    case .start: head(2)
    case .signal(let signal): head(3); number(Int64(signal))
    case .kill: head(4)
    case .putSecret(let name, let content): head(5); text(name); bytes.append(counted: content)
    case .getSecret(let name): head(6); text(name)
    case .exec(let session, let arguments, let environment, let directory, let terminal, let rows, let columns):
      head(7); number(Int64(session)); texts(arguments); texts(environment); text(directory)
      number(terminal ? 1 : 0); number(Int64(rows)); number(Int64(columns))
    case .execSignal(let session, let signal): head(8); number(Int64(session)); number(Int64(signal))
    case .serveCredentials(let token): head(9); bytes.append(counted: token)
    case .putRole(let name, let body, let expires): head(10); text(name); bytes.append(counted: body); number(expires)
    case .noted(let role, let count): head(11); text(role); number(Int64(count))
    case .removeSecret(let name): head(12); text(name)
    case .attach(let plan): head(13); bytes.append(counted: plan)
    case .detach(let target, let mount): head(14); text(target); number(Int64(bitPattern: mount))
    case .change(let target, let mount, let readOnly):
      head(15); text(target); number(Int64(bitPattern: mount)); number(readOnly ? 1 : 0)
    case .findMount(let target): head(16); text(target)
    case .listMounts: head(17)
    case .launch: head(18)
    case .preparing: head(20)
    case .created(let pid): head(21); number(Int64(pid))
    case .waiting(let pid): head(22); number(Int64(pid))
    case .started(let pid): head(23); number(Int64(pid))
    case .failed(let value): head(24); failure(value)
    case .exited(let value): head(25); status(value)
    case .secret(let content): head(26); bytes.append(counted: content)
    case .done: head(27)
    case .refused(let code): head(28); number(Int64(code))
    case .execStarted(let session): head(29); number(Int64(session))
    case .execFailed(let session, let value): head(30); number(Int64(session)); failure(value)
    case .ready: head(32)
    case .execExited(let session, let value): head(31); number(Int64(session)); status(value)
    case .issued(let role, let count): head(33); text(role); number(Int64(count))
    case .outOfMemory(let kills): head(34); number(Int64(bitPattern: kills))
    case .mount(let id): head(35); number(Int64(bitPattern: id))
    case .mounts(let attached, let detached): head(36); texts(attached); texts(detached)
    }
    return bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    self = try Message.read(from: &reader)
    if reader.position != bytes.count { throw reader.error(.trailingBytes) }
  }

  private static func read(from reader: inout Reader) throws(PlanError) -> Message {
    switch try reader.byte() {
    case 1: return .proceed(pid: try reader.int32())
    case 2: return .start
    case 3: return .signal(try reader.int32())
    case 4: return .kill
    case 5: return .putSecret(name: try reader.string(), content: try reader.counted())
    case 6: return .getSecret(name: try reader.string())
    case 7:
      return .exec(
        session: try reader.uint32(), arguments: try reader.strings(), environment: try reader.strings(),
        directory: try reader.string(), terminal: try reader.int32() != 0,
        rows: UInt16(clamping: try reader.int32()), columns: UInt16(clamping: try reader.int32()))
    case 8: return .execSignal(session: try reader.uint32(), signal: try reader.int32())
    case 9: return .serveCredentials(token: try reader.counted())
    case 10:
      return .putRole(
        name: try reader.string(), body: try reader.counted(), expires: Int64(bitPattern: try reader.number(width: 8)))
    case 11: return .noted(role: try reader.string(), count: try reader.uint32())
    case 12: return .removeSecret(name: try reader.string())
    case 13: return .attach(plan: try reader.counted())
    case 14: return .detach(target: try reader.string(), mount: try reader.number(width: 8))
    case 15: return .change(target: try reader.string(), mount: try reader.number(width: 8), readOnly: try reader.number(width: 8) != 0)
    case 16: return .findMount(target: try reader.string())
    case 17: return .listMounts
    case 18: return .launch
    case 20: return .preparing
    case 21: return .created(pid: try reader.int32())
    case 22: return .waiting(pid: try reader.int32())
    case 23: return .started(pid: try reader.int32())
    case 24: return .failed(try reader.failure())
    case 25: return .exited(try reader.status())
    case 26: return .secret(try reader.counted())
    case 27: return .done
    case 28: return .refused(try reader.int32())
    case 29: return .execStarted(session: try reader.uint32())
    case 30: return .execFailed(session: try reader.uint32(), failure: try reader.failure())
    case 31: return .execExited(session: try reader.uint32(), status: try reader.status())
    case 32: return .ready
    case 33: return .issued(role: try reader.string(), count: try reader.uint32())
    case 34: return .outOfMemory(kills: try reader.number(width: 8))
    case 35: return .mount(id: try reader.number(width: 8))
    case 36: return .mounts(attached: try reader.strings(), detached: try reader.strings())
    default: throw reader.error(.unknownOperation)
    }
  }
}

extension Reader {
  fileprivate mutating func int32() throws(PlanError) -> Int32 {
    guard let value = Int32(exactly: Int64(bitPattern: try number(width: 8))) else { throw error(.numberOutOfRange) }
    return value
  }
  fileprivate mutating func uint32() throws(PlanError) -> UInt32 {
    guard let value = UInt32(exactly: try number(width: 8)) else { throw error(.numberOutOfRange) }
    return value
  }
  fileprivate mutating func string() throws(PlanError) -> String {
    let raw = try counted()
    for byte in raw where byte == 0 { throw error(.textHoldsNUL) }
    return String(decoding: raw, as: UTF8.self)
  }
  fileprivate mutating func strings() throws(PlanError) -> [String] {
    let count = try number(width: 8)
    var all: [String] = []
    for _ in 0..<count { all.append(try string()) }
    return all
  }
  fileprivate mutating func status() throws(PlanError) -> ExitStatus {
    try byte() == 0 ? .exited(try int32()) : .signalled(try int32())
  }
  fileprivate mutating func failure() throws(PlanError) -> StepFailure {
    StepFailure(try string(), Errno(try int32()))
  }
}

/// A socket that carries messages.
package struct MessageSocket: Sendable {
  package let handle: Handle
  package init(_ handle: Handle) { self.handle = handle }

  package func send(_ message: Message, passing: [Handle] = [], wait: Bool = true) throws(Errno) {
    try Socket.send(handle.descriptor, message.encoded(), passing: passing, wait: wait)
  }

  package struct Received {
    package let message: Message
    package let descriptors: [Handle]
  }

  /// The next message; nil when the other side has closed. What does not decode counts as `invalid`.
  package func receive(wait: Bool = true) throws(Errno) -> Received? {
    guard let raw = try Socket.receive(handle.descriptor, wait: wait) else { return nil }
    do throws(PlanError) {
      return Received(message: try Message(decoding: raw.bytes), descriptors: raw.descriptors)
    } catch {
      throw Errno.invalid
    }
  }
}

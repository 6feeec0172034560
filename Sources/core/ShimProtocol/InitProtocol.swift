// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// A request of a parent to the child that it cloned: a supervisor to its PID 1, the OCI runtime to its container. Both ends are
/// the same program, so this protocol needs no version.
package enum InitRequest: WireMessage {
  /// Continue; with the child's host pid.
  case proceed(pid: Int32)
  /// Run the program.
  case start
  /// Signal the tool.
  case signal(Int32)
  /// Start a further program. Its standard streams are passed with the message, unless it has a terminal.
  case exec(session: UInt32, ExecRequest)
  /// Signal the process group of a further program.
  case execSignal(session: UInt32, signal: Int32)
  /// The client of a further program has disconnected: send SIGHUP now, and SIGKILL to the rest of its group when its leader exits.
  case execHangUp(session: UInt32)

  package func encoded() -> [UInt8] {
    var writer = MessageWriter()
    switch self {
    case .proceed(let pid):
      writer.code(1)
      writer.number(pid)
    case .start: writer.code(2)
    case .signal(let number):
      writer.code(3)
      writer.number(number)
    case .exec(let session, let request):
      writer.code(4)
      writer.number(session)
      writer.exec(request)
    case .execSignal(let session, let number):
      writer.code(5)
      writer.number(session)
      writer.number(number)
    case .execHangUp(let session):
      writer.code(6)
      writer.number(session)
    }
    return writer.bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case 1: self = .proceed(pid: try reader.int32())
    case 2: self = .start
    case 3: self = .signal(try reader.int32())
    case 4: self = .exec(session: try reader.uint32(), try reader.exec())
    case 5: self = .execSignal(session: try reader.uint32(), signal: try reader.int32())
    case 6: self = .execHangUp(session: try reader.uint32())
    default: throw reader.error(.unknownOperation)
    }
    try reader.end()
  }
}

/// A report of the child to its parent.
package enum InitReport: WireMessage {
  /// The namespaces and mounts exist, and the child waits for `proceed` (the plan's `rendezvous`).
  case ready
  /// The child waits for `start`.
  case waiting
  /// The tool runs.
  case started
  case failed(StepFailure)
  /// The tool has exited; PID 1 exits next, and the kernel kills all other processes.
  case exited(ExitStatus)
  /// The further program runs; the master of its terminal, if any, is passed with the message.
  case execStarted(session: UInt32)
  case execFailed(session: UInt32, StepFailure)
  case execExited(session: UInt32, ExitStatus)
  /// The container's terminal is open; its master is passed with the message.
  case terminal

  package func encoded() -> [UInt8] {
    var writer = MessageWriter()
    switch self {
    case .ready: writer.code(1)
    case .waiting: writer.code(2)
    case .started: writer.code(3)
    case .failed(let failure):
      writer.code(4)
      writer.failure(failure)
    case .exited(let status):
      writer.code(5)
      writer.status(status)
    case .execStarted(let session):
      writer.code(6)
      writer.number(session)
    case .execFailed(let session, let failure):
      writer.code(7)
      writer.number(session)
      writer.failure(failure)
    case .execExited(let session, let status):
      writer.code(8)
      writer.number(session)
      writer.status(status)
    case .terminal: writer.code(9)
    }
    return writer.bytes
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case 1: self = .ready
    case 2: self = .waiting
    case 3: self = .started
    case 4: self = .failed(try reader.failure())
    case 5: self = .exited(try reader.status())
    case 6: self = .execStarted(session: try reader.uint32())
    case 7: self = .execFailed(session: try reader.uint32(), try reader.failure())
    case 8: self = .execExited(session: try reader.uint32(), try reader.status())
    case 9: self = .terminal
    default: throw reader.error(.unknownOperation)
    }
    try reader.end()
  }
}

/// The parent's end.
package typealias InitSocket = MessageSocket<InitRequest, InitReport>
/// The child's end.
package typealias ParentSocket = MessageSocket<InitReport, InitRequest>

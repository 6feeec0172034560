// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// What a parent asks of the child that it cloned: a supervisor of its PID 1, the OCI runtime of its container. Both ends are the
/// same program, so that this protocol needs no version.
package enum InitRequest: WireMessage {
  /// Go on; with the child's pid as the host numbers it.
  case proceed(pid: Int32)
  /// Run the program.
  case start
  /// Send the tool a signal.
  case signal(Int32)
  /// Start a further program. Its standard streams ride beside it, unless it wants a terminal.
  case exec(session: UInt32, ExecRequest)
  /// Send the process group of a further program a signal.
  case execSignal(session: UInt32, signal: Int32)
  /// The client of a further program has gone: SIGHUP now, and SIGKILL to what is left of its group when its leader ends.
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

/// What the child reports to its parent.
package enum InitReport: WireMessage {
  /// The namespaces and mounts stand, and the child waits for `proceed` (the plan's `rendezvous`).
  case ready
  /// The child stands before `start`.
  case waiting
  /// The tool runs.
  case started
  case failed(StepFailure)
  /// The tool has ended; PID 1 ends next, and all that runs with it.
  case exited(ExitStatus)
  /// The master of the terminal rides beside it, where there is one.
  case execStarted(session: UInt32)
  case execFailed(session: UInt32, StepFailure)
  case execExited(session: UInt32, ExitStatus)
  /// The master of the container's terminal rides beside it.
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

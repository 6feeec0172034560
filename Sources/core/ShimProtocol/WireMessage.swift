// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// A message of one of the supervisor's two protocols, encoded as one datagram.
package protocol WireMessage: Equatable, Sendable {
  func encoded() -> [UInt8]
  init(decoding bytes: [UInt8]) throws(PlanError)
}

/// A socket (SOCK_SEQPACKET) on which one side sends `Outgoing` and receives `Incoming`.
package struct MessageSocket<Outgoing: WireMessage, Incoming: WireMessage>: Sendable {
  package let handle: Handle

  package init(_ handle: Handle) { self.handle = handle }

  package struct Received: Sendable {
    package let message: Incoming
    package let descriptors: [Handle]
  }

  /// Sends a message; throws `messageTooLong` if the other side would receive it truncated. With `wait` it retries while the kernel
  /// has no memory for it, without a time limit.
  package func send(_ message: Outgoing, passing: [Handle] = [], wait: Bool = true) throws(Errno) {
    let bytes = message.encoded()
    guard bytes.count <= Socket.messageLimit else { throw .messageTooLong }
    guard wait else { return try Socket.send(handle.descriptor, bytes, passing: passing, wait: false) }
    try persisting { () throws(Errno) in try Socket.send(handle.descriptor, bytes, passing: passing) }
  }

  /// Receives the next message; returns nil when the other side has closed, throws `invalid` if a datagram does not decode.
  package func receive(wait: Bool = true) throws(Errno) -> Received? {
    let raw =
      wait
      ? try persisting { () throws(Errno) in try Socket.receive(handle.descriptor) }
      : try Socket.receive(handle.descriptor, wait: false)
    guard let raw else { return nil }
    do throws(PlanError) {
      return Received(message: try Incoming(decoding: raw.bytes), descriptors: raw.descriptors)
    } catch {
      throw Errno.invalid
    }
  }
}

/// The step of a launch that failed, and its error number.
package struct StepFailure: Error, Equatable, Sendable {
  /// What failed, as far as someone decides by it. Codes on the wire.
  package enum Kind: UInt8, Sendable {
    /// An operation of the plan, or the work of the supervisor.
    case isolation = 0
    /// The execution of a program.
    case execution = 1
    /// The look-up of the interpreter that a program names.
    case interpreter = 2
    /// A mount of a directory of the host, which is the subject.
    case bind = 3

    package var isProgram: Bool { self == .execution || self == .interpreter }
  }

  package let kind: Kind
  /// The path on the host that the step is about; empty if nobody decides by it.
  package let subject: String
  /// The step for people: the operation's name, and its path if it has one.
  package let step: String
  package let errno: Int32

  package init(_ step: String, _ error: Errno, kind: Kind = .isolation, subject: String = "") {
    self.kind = kind
    self.subject = subject
    self.step = step
    errno = error.code
  }
}

/// A program that PID 1 of a sandbox starts in addition to the tool.
package struct ExecRequest: Equatable, Sendable {
  package let arguments: [String]
  package let environment: [String]
  package let directory: String
  /// True if it runs in a terminal, whose master PID 1 passes back; otherwise its three streams are passed with the request.
  package let terminal: Bool
  package let rows: UInt16
  package let columns: UInt16

  package init(arguments: [String], environment: [String], directory: String, terminal: Bool, rows: UInt16, columns: UInt16) {
    self.arguments = arguments
    self.environment = environment
    self.directory = directory
    self.terminal = terminal
    self.rows = rows
    self.columns = columns
  }
}

/// A writer that appends the fields of a message. Numbers are 64 bits wide and little-endian; texts and bytes have a length prefix.
package struct MessageWriter {
  package private(set) var bytes: [UInt8]

  package init(_ codes: UInt8...) { bytes = codes }

  package mutating func code(_ value: UInt8) { bytes.append(value) }
  package mutating func number(_ value: Int64) { bytes.append(number: UInt64(bitPattern: value), width: 8) }
  package mutating func number(_ value: UInt64) { bytes.append(number: value, width: 8) }
  package mutating func number(_ value: Int32) { number(Int64(value)) }
  package mutating func number(_ value: UInt32) { number(UInt64(value)) }
  package mutating func flag(_ value: Bool) { bytes.append(value ? 1 : 0) }
  package mutating func text(_ value: String) { bytes.append(counted: Array(value.utf8)) }
  package mutating func content(_ value: [UInt8]) { bytes.append(counted: value) }

  package mutating func texts(_ values: [String]) {
    number(UInt64(values.count))
    for value in values { text(value) }
  }

  package mutating func status(_ value: ExitStatus) {
    switch value {
    case .exited(let code):
      self.code(0)
      number(code)
    case .signalled(let signal):
      self.code(1)
      number(signal)
    }
  }

  package mutating func failure(_ value: StepFailure) {
    number(UInt64(value.kind.rawValue))
    text(value.step)
    text(value.subject)
    number(value.errno)
  }

  package mutating func exec(_ value: ExecRequest) {
    texts(value.arguments)
    texts(value.environment)
    text(value.directory)
    flag(value.terminal)
    number(UInt64(value.rows))
    number(UInt64(value.columns))
  }
}

extension Reader {
  package mutating func int32() throws(PlanError) -> Int32 {
    guard let value = Int32(exactly: Int64(bitPattern: try number(width: 8))) else { throw error(.numberOutOfRange) }
    return value
  }

  package mutating func uint32() throws(PlanError) -> UInt32 {
    guard let value = UInt32(exactly: try number(width: 8)) else { throw error(.numberOutOfRange) }
    return value
  }

  package mutating func uint16() throws(PlanError) -> UInt16 {
    guard let value = UInt16(exactly: try number(width: 8)) else { throw error(.numberOutOfRange) }
    return value
  }

  package mutating func flag() throws(PlanError) -> Bool {
    switch try byte() {
    case 0: return false
    case 1: return true
    default: throw error(.numberOutOfRange)
    }
  }

  package mutating func string() throws(PlanError) -> String {
    let raw = try counted()
    for byte in raw where byte == 0 { throw error(.textHoldsNUL) }
    return String(decoding: raw, as: UTF8.self)
  }

  package mutating func strings() throws(PlanError) -> [String] {
    let count = try number(width: 8)
    // Each text has at least the four bytes of its length, so a count that exceeds the datagram ends in `truncated`.
    var all: [String] = []
    for _ in 0..<count { all.append(try string()) }
    return all
  }

  package mutating func status() throws(PlanError) -> ExitStatus {
    switch try byte() {
    case 0: return .exited(try int32())
    case 1: return .signalled(try int32())
    default: throw error(.numberOutOfRange)
    }
  }

  package mutating func failure() throws(PlanError) -> StepFailure {
    guard let code = UInt8(exactly: try number(width: 8)), let kind = StepFailure.Kind(rawValue: code) else {
      throw error(.numberOutOfRange)
    }
    let (step, subject) = (try string(), try string())
    return StepFailure(step, Errno(try int32()), kind: kind, subject: subject)
  }

  package mutating func exec() throws(PlanError) -> ExecRequest {
    ExecRequest(
      arguments: try strings(), environment: try strings(), directory: try string(), terminal: try flag(), rows: try uint16(),
      columns: try uint16())
  }

  package func end() throws(PlanError) { if !isAtEnd { throw error(.trailingBytes) } }
}

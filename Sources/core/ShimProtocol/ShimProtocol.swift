// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// The protocol between agent and supervisor. Supervisors outlive agents and may be from another release, so it has a version: each
/// side sends hello first, requests have ids, and replies come in any order on one connection. A side replies `unsupported` to a
/// request that it does not know, and ignores an unknown report.
///
/// The first byte of each datagram is `H` (hello), `Q` (request), `A` (reply) or `R` (report). Messages of supervisors of commit
/// 7ede341, whose protocol had no version, begin with a number from 20 to 36.
package enum ShimProtocol {
  /// The version, incremented when a message of an earlier version changes its meaning; additions get a capability instead.
  package static let version: UInt64 = 1
  /// The capabilities of this release's supervisors beyond the first version.
  package static let capabilities: [String] = ["hold", "exec-hangup"]
  /// The size limit of a secret, in bytes.
  package static let heldLimit = 1 << 20
  /// The limit of further programs that run in a sandbox at a time.
  package static let execLimit = 64

  static let hello = UInt8(ascii: "H")
  static let request = UInt8(ascii: "Q")
  static let reply = UInt8(ascii: "A")
  static let report = UInt8(ascii: "R")
}

/// The state of a sandbox, as its supervisor reports it.
package enum SandboxState: Equatable, Sendable {
  /// The supervisor waits for a plan; nothing runs.
  case awaitingPlan
  /// The supervisor executes the host part of the plan.
  case preparing
  /// PID 1 exists, with its namespaces; its host pid.
  case created(pid: Int32)
  /// PID 1 has executed the plan except for the tool itself, and waits for `start`.
  case waiting(pid: Int32)
  /// The tool runs.
  case started(pid: Int32)
  /// A step of the launch failed; the exit record contains the same failure.
  case failed(StepFailure)
  /// The tool has ended; the exit record contains the same status.
  case ended(ExitStatus)

  package var isOver: Bool {
    switch self {
    case .failed, .ended: true
    default: false
    }
  }

  /// True if the tool runs or has run.
  package var isStarted: Bool {
    switch self {
    case .started, .ended: true
    default: false
    }
  }

  /// The host pid of PID 1; nil if it does not exist.
  package var pid: Int32? {
    switch self {
    case .created(let pid), .waiting(let pid), .started(let pid): pid
    default: nil
    }
  }

  func encode(_ writer: inout MessageWriter) {
    switch self {
    case .awaitingPlan: writer.code(0)
    case .preparing: writer.code(1)
    case .created(let pid):
      writer.code(2)
      writer.number(pid)
    case .waiting(let pid):
      writer.code(3)
      writer.number(pid)
    case .started(let pid):
      writer.code(4)
      writer.number(pid)
    case .failed(let failure):
      writer.code(5)
      writer.failure(failure)
    case .ended(let status):
      writer.code(6)
      writer.status(status)
    }
  }

  init(_ reader: inout Reader) throws(PlanError) {
    switch try reader.byte() {
    case 0: self = .awaitingPlan
    case 1: self = .preparing
    case 2: self = .created(pid: try reader.int32())
    case 3: self = .waiting(pid: try reader.int32())
    case 4: self = .started(pid: try reader.int32())
    case 5: self = .failed(try reader.failure())
    case 6: self = .ended(try reader.status())
    default: throw reader.error(.unknownOperation)
    }
  }
}

/// The first message of a supervisor on each connection: itself and its sandbox. Pidfds (pidfd_open(2)) are passed with it: its own
/// and, if it exists, that of PID 1.
package struct SupervisorHello: Equatable, Sendable {
  package let version: UInt64
  package let capabilities: [String]
  package let state: SandboxState
  /// The names of the secrets that it holds for the agent.
  package let held: [String]
  /// The names of the credential files that it has.
  package let secrets: [String]
  package let servesCredentials: Bool

  /// `version` 0 is a supervisor of commit 7ede341, which reports only its state.
  package init(
    version: UInt64 = 0, capabilities: [String] = [], state: SandboxState, held: [String] = [], secrets: [String] = [],
    servesCredentials: Bool = false
  ) {
    self.version = version
    self.capabilities = capabilities
    self.state = state
    self.held = held
    self.secrets = secrets
    self.servesCredentials = servesCredentials
  }
}

/// A request of an agent to a supervisor.
package enum ShimRequest: Equatable, Sendable {
  /// Launch the plan, which is in the sandbox directory.
  case launch
  /// Let the tool run.
  case start
  case signal(Int32)
  /// Kill all processes; a supervisor that waits for its plan exits.
  case kill
  /// Store a credential file. Its content is either a descriptor of a file in memory, passed with the request and required before
  /// the launch (`SecretStore`), or in `content`.
  case putSecret(name: String, content: [UInt8])
  /// Pass a descriptor of the file with the reply.
  case getSecret(name: String)
  case removeSecret(name: String)
  /// Hold a secret of the agent, invisible to the sandbox, for another agent that may have to continue: a descriptor of a file in
  /// memory is passed with the request. A supervisor with secrets from before its launch outlives its tool until they are released.
  case hold(name: String)
  /// Pass the held secret's descriptor with the reply.
  case getHeld(name: String)
  /// Release the held secrets, since there will be no other attempt, and exit after the tool.
  case release
  /// Start a further program; the request's id identifies it from then on.
  case exec(ExecRequest)
  case execSignal(session: UInt32, signal: Int32)
  /// Hang the program up: SIGHUP to its process group, and SIGKILL two seconds later.
  case execHangUp(session: UInt32)
  /// Serve credentials on the listening socket that is passed with the request.
  case serveCredentials(token: [UInt8])
  /// Set a role's credentials; `expires` is in seconds since 1970, and an empty body revokes the role.
  case putRole(name: String, body: [UInt8], expires: Int64)
  /// The agent has recorded this number of the reported issues.
  case issuesRecorded(role: String, count: UInt32)

  func encode(_ writer: inout MessageWriter) {
    switch self {
    case .launch: writer.code(1)
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
    case .removeSecret(let name):
      writer.code(7)
      writer.text(name)
    case .hold(let name):
      writer.code(8)
      writer.text(name)
    case .getHeld(let name):
      writer.code(9)
      writer.text(name)
    case .release: writer.code(10)
    case .exec(let request):
      writer.code(11)
      writer.exec(request)
    case .execSignal(let session, let number):
      writer.code(12)
      writer.number(session)
      writer.number(number)
    case .serveCredentials(let token):
      writer.code(13)
      writer.content(token)
    case .putRole(let name, let body, let expires):
      writer.code(14)
      writer.text(name)
      writer.content(body)
      writer.number(expires)
    case .execHangUp(let session):
      writer.code(16)
      writer.number(session)
    case .issuesRecorded(let role, let count):
      writer.code(15)
      writer.text(role)
      writer.number(count)
    }
  }

  /// Returns nil if the code is from a later release.
  init?(_ reader: inout Reader) throws(PlanError) {
    switch try reader.byte() {
    case 1: self = .launch
    case 2: self = .start
    case 3: self = .signal(try reader.int32())
    case 4: self = .kill
    case 5: self = .putSecret(name: try reader.string(), content: try reader.counted())
    case 6: self = .getSecret(name: try reader.string())
    case 7: self = .removeSecret(name: try reader.string())
    case 8: self = .hold(name: try reader.string())
    case 9: self = .getHeld(name: try reader.string())
    case 10: self = .release
    case 11: self = .exec(try reader.exec())
    case 12: self = .execSignal(session: try reader.uint32(), signal: try reader.int32())
    case 13: self = .serveCredentials(token: try reader.counted())
    case 14:
      self = .putRole(
        name: try reader.string(), body: try reader.counted(), expires: Int64(bitPattern: try reader.number(width: 8)))
    case 15: self = .issuesRecorded(role: try reader.string(), count: try reader.uint32())
    case 16: self = .execHangUp(session: try reader.uint32())
    default: return nil
    }
    try reader.end()
  }
}

/// The reply of a supervisor to a request.
package enum ShimReply: Equatable, Sendable {
  /// The request was executed; a requested descriptor is passed with the reply.
  case done
  /// The `exec` program runs; the master of its terminal is passed with the reply.
  case started
  case failed(StepFailure)
  /// The request was refused, with an error number (errno(3)).
  case refused(Int32)
  /// The request is from a later release.
  case unsupported
  /// The request's fields do not decode.
  case malformed

  func encode(_ writer: inout MessageWriter) {
    switch self {
    case .done: writer.code(1)
    case .started: writer.code(3)
    case .failed(let failure):
      writer.code(4)
      writer.failure(failure)
    case .refused(let code):
      writer.code(5)
      writer.number(code)
    case .unsupported: writer.code(6)
    case .malformed: writer.code(7)
    }
  }

  init(_ reader: inout Reader) throws(PlanError) {
    switch try reader.byte() {
    case 1: self = .done
    case 3: self = .started
    case 4: self = .failed(try reader.failure())
    case 5: self = .refused(try reader.int32())
    case 6: self = .unsupported
    case 7: self = .malformed
    default: throw reader.error(.unknownOperation)
    }
    try reader.end()
  }
}

/// A message of a supervisor that was not requested.
package enum ShimReport: Equatable, Sendable {
  /// The new state; PID 1's pidfd is passed with it when the state is `created`.
  case state(SandboxState)
  /// The number of times that credentials of this role were issued to programs and not yet recorded.
  case issued(role: String, count: UInt32)
  /// The number of processes of the sandbox that were OOM-killed since its launch.
  case outOfMemory(kills: UInt64)
  /// A further program has exited.
  case execEnded(session: UInt32, ExitStatus)

  func encode(_ writer: inout MessageWriter) {
    switch self {
    case .state(let state):
      writer.code(1)
      state.encode(&writer)
    case .issued(let role, let count):
      writer.code(2)
      writer.text(role)
      writer.number(count)
    case .outOfMemory(let kills):
      writer.code(3)
      writer.number(kills)
    case .execEnded(let session, let status):
      writer.code(4)
      writer.number(session)
      writer.status(status)
    }
  }

  init?(_ reader: inout Reader) throws(PlanError) {
    switch try reader.byte() {
    case 1: self = .state(try SandboxState(&reader))
    case 2: self = .issued(role: try reader.string(), count: try reader.uint32())
    case 3: self = .outOfMemory(kills: try reader.number(width: 8))
    case 4: self = .execEnded(session: try reader.uint32(), try reader.status())
    default: return nil
    }
    try reader.end()
  }
}

/// A message from the agent to the supervisor.
package enum AgentMessage: WireMessage {
  case hello(version: UInt64, capabilities: [String])
  case request(id: UInt32, ShimRequest)
  case unsupported(id: UInt32)
  case malformed(id: UInt32)

  package func encoded() -> [UInt8] {
    switch self {
    case .hello(let version, let capabilities):
      var writer = MessageWriter(ShimProtocol.hello)
      writer.number(version)
      writer.texts(capabilities)
      return writer.bytes
    case .request(let id, let request):
      var writer = MessageWriter(ShimProtocol.request)
      writer.number(id)
      request.encode(&writer)
      return writer.bytes
    case .unsupported(let id), .malformed(let id):
      var writer = MessageWriter(ShimProtocol.request)
      writer.number(id)
      writer.code(.max)
      return writer.bytes
    }
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case ShimProtocol.hello:
      // Fields that a later version appends are ignored.
      self = .hello(version: try reader.number(width: 8), capabilities: try reader.strings())
    case ShimProtocol.request:
      let id = try reader.uint32()
      do throws(PlanError) {
        if let request = try ShimRequest(&reader) { self = .request(id: id, request) } else { self = .unsupported(id: id) }
      } catch {
        self = .malformed(id: id)
      }
    default: throw reader.error(.unknownOperation)
    }
  }
}

/// A message from the supervisor to the agent.
package enum SupervisorMessage: WireMessage {
  case hello(SupervisorHello)
  case reply(id: UInt32, ShimReply)
  case report(ShimReport)
  /// A report from a later release, to be ignored.
  case unknown

  package func encoded() -> [UInt8] {
    switch self {
    case .hello(let hello):
      var writer = MessageWriter(ShimProtocol.hello)
      writer.number(hello.version)
      writer.texts(hello.capabilities)
      hello.state.encode(&writer)
      writer.texts(hello.held)
      writer.texts(hello.secrets)
      writer.flag(hello.servesCredentials)
      return writer.bytes
    case .reply(let id, let reply):
      var writer = MessageWriter(ShimProtocol.reply)
      writer.number(id)
      reply.encode(&writer)
      return writer.bytes
    case .report(let report):
      var writer = MessageWriter(ShimProtocol.report)
      report.encode(&writer)
      return writer.bytes
    case .unknown: return [ShimProtocol.report, .max]
    }
  }

  package init(decoding bytes: [UInt8]) throws(PlanError) {
    var reader = Reader(bytes)
    switch try reader.byte() {
    case ShimProtocol.hello:
      self = .hello(
        SupervisorHello(
          version: try reader.number(width: 8), capabilities: try reader.strings(), state: try SandboxState(&reader),
          held: try reader.strings(), secrets: try reader.strings(), servesCredentials: try reader.flag()))
    case ShimProtocol.reply: self = .reply(id: try reader.uint32(), try ShimReply(&reader))
    case ShimProtocol.report: if let report = try ShimReport(&reader) { self = .report(report) } else { self = .unknown }
    default: throw reader.error(.unknownOperation)
    }
  }
}

/// The supervisor's end of a connection.
package typealias AgentSocket = MessageSocket<SupervisorMessage, AgentMessage>
/// The agent's end.
package typealias SupervisorSocket = MessageSocket<AgentMessage, SupervisorMessage>

// SPDX-License-Identifier: Apache-2.0

import LaunchPlan
import Linux
import Testing

@testable import Executor

@testable import ShimProtocol

@Suite("The protocols of a supervisor") struct ProtocolTests {
  static let exec = ExecRequest(arguments: ["a", ""], environment: ["A=1"], directory: "/", terminal: true, rows: 24, columns: 80)

  static let requests: [ShimRequest] = [
    .launch, .start, .signal(15), .kill, .putSecret(name: "a", content: [0, 1]), .getSecret(name: "a"), .removeSecret(name: "a"),
    .hold(name: "k"), .getHeld(name: "k"), .release, .exec(exec), .execSignal(session: 7, signal: 9), .execHangUp(session: 7),
    .serveCredentials(token: [7]), .putRole(name: "a", body: [], expires: -1), .issuesRecorded(role: "a", count: 3),
  ]
  static let states: [SandboxState] = [
    .awaitingPlan, .preparing, .created(pid: 12), .waiting(pid: 12), .started(pid: 2), .failed(StepFailure("mask /x", .noEntry)),
    .ended(.exited(3)), .ended(.signalled(9)),
  ]
  static let replies: [ShimReply] = [
    .done, .started, .failed(StepFailure("x", .access, kind: .execution, subject: "/s")), .refused(2), .unsupported, .malformed,
  ]
  static let reports: [ShimReport] =
    states.map { .state($0) } + [.issued(role: "a", count: 9), .outOfMemory(kills: 4), .execEnded(session: 7, .signalled(15))]

  /// The number of cases of each type, which the compiler checks: a case that is added has to be added here, and above.
  static func number(_ request: ShimRequest) -> Int {
    switch request {
    case .launch: 0
    case .start: 1
    case .signal: 2
    case .kill: 3
    case .putSecret: 4
    case .getSecret: 5
    case .removeSecret: 6
    case .hold: 7
    case .getHeld: 8
    case .release: 9
    case .exec: 10
    case .execSignal: 11
    case .execHangUp: 12
    case .serveCredentials: 13
    case .putRole: 14
    case .issuesRecorded: 15
    }
  }

  @Test("every request is among those that are tested") func complete() { #expect(Set(Self.requests.map(Self.number)) == Set(0...15)) }

  private func survives<M: WireMessage>(_ message: M) throws {
    let bytes = message.encoded()
    #expect(try M(decoding: bytes) == message)
    for length in 0..<bytes.count {
      // Cut off, it is refused, or answered as malformed where its id could be read.
      guard let read = try? M(decoding: Array(bytes[..<length])) else { continue }
      if let read = read as? AgentMessage {
        switch read {
        case .malformed, .unsupported: continue
        default: break
        }
      }
      Issue.record("\(message) was read from \(length) of \(bytes.count) bytes")
    }
  }

  @Test("requests survive encoding", arguments: requests) func coding(request: ShimRequest) throws {
    try survives(AgentMessage.request(id: 3, request))
  }

  @Test("replies and reports survive encoding") func repliesAndReports() throws {
    for reply in Self.replies { try survives(SupervisorMessage.reply(id: .max, reply)) }
    for report in Self.reports { try survives(SupervisorMessage.report(report)) }
  }

  @Test("what PID 1 is asked and reports survives encoding") func initProtocol() throws {
    for request: InitRequest in [
      .proceed(pid: 7), .start, .signal(15), .exec(session: 7, Self.exec), .execSignal(session: 7, signal: 9), .execHangUp(session: 7),
    ] { try survives(request) }
    for report: InitReport in [
      .ready, .waiting, .started, .failed(StepFailure("mask /x", .noEntry)), .exited(.exited(3)), .exited(.signalled(9)),
      .execStarted(session: 7), .execFailed(session: 7, StepFailure("x", .access)), .execExited(session: 7, .signalled(15)), .terminal,
    ] { try survives(report) }
  }

  @Test("what an injector is asked and reports survives encoding") func injector() throws {
    for request: InjectorRequest in [
      .attach(plan: [1, 2]), .detach(target: "/a", mount: .max), .change(target: "/a", mount: 7, readOnly: true), .find(target: "/a"),
      .proceed,
    ] { try survives(request) }
    for report: InjectorReport in [.ready, .done(mount: 7), .failed(StepFailure("x", .busy))] { try survives(report) }
  }

  @Test("a hello names the version and the state, and what a later version adds is passed over") func hello() throws {
    for state in Self.states {
      let hello = SupervisorHello(
        version: 1, capabilities: ["hold"], state: state, held: ["home-key"], secrets: ["token"], servesCredentials: true)
      let bytes = SupervisorMessage.hello(hello).encoded()
      #expect(bytes.first == UInt8(ascii: "H"))
      #expect(try SupervisorMessage(decoding: bytes) == .hello(hello))
      #expect(try SupervisorMessage(decoding: bytes + [1, 2, 3]) == .hello(hello))
    }
    let agent = AgentMessage.hello(version: 9, capabilities: ["x"]).encoded()
    #expect(try AgentMessage(decoding: agent + [0]) == .hello(version: 9, capabilities: ["x"]))
  }

  @Test("a request of a later release is known as such by its id, and one whose fields do not decode too") func unknown() throws {
    var later = MessageWriter(UInt8(ascii: "Q"))
    later.number(UInt32(41))
    later.code(200)
    #expect(try AgentMessage(decoding: later.bytes) == .unsupported(id: 41))
    let kill = AgentMessage.request(id: 42, .kill).encoded()
    #expect(try AgentMessage(decoding: kill + [0]) == .malformed(id: 42))
    let secret = AgentMessage.request(id: 43, .putSecret(name: "a\0b", content: [])).encoded()
    #expect(try AgentMessage(decoding: secret) == .malformed(id: 43))
    #expect(try SupervisorMessage(decoding: [UInt8(ascii: "R"), 200, 1, 2]) == .unknown)
  }

  @Test("a list that claims more than it has is refused") func lists() {
    var writer = MessageWriter(UInt8(ascii: "H"))
    writer.number(UInt64(1))
    writer.number(UInt64.max)
    #expect(throws: PlanError.self) { try AgentMessage(decoding: writer.bytes) }
  }
}

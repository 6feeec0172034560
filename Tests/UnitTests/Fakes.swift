// SPDX-License-Identifier: Apache-2.0

@testable import Configuration
import Concurrency
import Foundation
import Journal
import LaunchPlan
import Cgroups
import Linux
import Logging
import Synchronization

@testable import Agent
@testable import Images
@testable import ShimProtocol
@testable import ShimClient
@testable import Workspaces

/// A stand-in for a supervisor: it records what it is asked, and reports what a test has it report.
final class FakeLink: SandboxLink {
  let status: SupervisorHello
  let reports: AsyncStream<ShimReport>
  let process: SandboxProcess?
  private let continuation: AsyncStream<ShimReport>.Continuation
  private let state = Mutex<(asked: [ShimRequest], secrets: [String: Handle], waiters: [Promise<Void>])>(([], [:], []))
  private let ended = Promise<Void>()
  private let closed = Promise<Void>()

  init(_ state: SandboxState = .awaitingPlan, secrets: [String: Handle] = [:]) {
    status = SupervisorHello(state: state, secrets: Array(secrets.keys))
    (reports, continuation) = AsyncStream<ShimReport>.makeStream()
    if let own = try? Linux.Process.open(pid: getpid()) {
      process = SandboxProcess(pid: getpid(), process: Handle(own))
    } else {
      process = nil
    }
    self.state.withLock { $0.secrets = secrets }
  }

  var asked: [ShimRequest] { state.withLock { $0.asked } }
  var secrets: [String: Handle] { state.withLock { $0.secrets } }

  func report(_ next: SandboxState) { continuation.yield(.state(next)) }

  /// Its process ends, and with it the connection.
  func end() {
    ended.fulfil(.success(()))
    continuation.finish()
  }

  /// Waits until it was asked for something.
  func wait(for request: ShimRequest) async throws {
    for _ in 0..<5000 {
      if asked.contains(request) { return }
      try await Task.sleep(for: .milliseconds(1))
    }
    throw TestFailure("the supervisor was not asked to \(request); it was: \(asked)")
  }

  func request(_ request: ShimRequest, passing: [Handle], within limit: Duration) async throws(SupervisorError) -> [Handle] {
    try send(request, passing)
    switch request {
    case .getSecret(let name), .getHeld(let name):
      guard let file = state.withLock({ $0.secrets[name] }) else { throw .refused(.noEntry) }
      return [file]
    default: return []
    }
  }

  func send(_ request: ShimRequest) throws(SupervisorError) { try send(request, []) }

  private func send(_ request: ShimRequest, _ passing: [Handle]) throws(SupervisorError) {
    if ended.isFulfilled || closed.isFulfilled { throw .disconnected }
    state.withLock { state in
      state.asked.append(request)
      switch request {
      case .putSecret(let name, _), .hold(let name): state.secrets[name] = passing.first
      default: break
      }
    }
    if request == .kill { end() }
  }

  /// A program that neither runs nor ends.
  func exec(_ request: ExecRequest, within limit: Duration) async throws(SupervisorError) -> ExecSession {
    do {
      let control = ExecControl(signal: { _ in }, hangUp: {})
      return try ExecStreams(terminal: false).session(master: nil, control: control, outcome: Promise())
    } catch { throw error as? SupervisorError ?? .malformed }
  }
  func hasEnded(within limit: Duration) async -> Bool? { ended.isFulfilled }
  func killSupervisor() { end() }
  func close() {
    closed.fulfil(.success(()))
    continuation.finish()
  }
}

struct TestFailure: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

/// A stand-in for the host's sandboxes.
final class FakeSandboxes: SandboxDriver {
  struct State {
    var links: [FakeLink] = []
    var living: [String: FakeLink] = [:]
    var exits: [String: ExitRecord] = [:]
    var plans: Set<String> = []
    /// Places at which nothing was created.
    var absent: Set<String> = []
    var removed: [String] = []
    var killed: [String] = []
    var failsToCreate = false
    /// Supervisors do not reply to those that connect, until they are killed.
    var isSilent = false
    /// What `create` and `connect` wait for.
    var gate: Promise<Void>?
  }
  let state = Mutex(State())

  var links: [FakeLink] { state.withLock { $0.links } }
  var removed: [String] { state.withLock { $0.removed } }

  /// The supervisor of the attempt with this number, once it is there.
  func link(_ number: Int) async throws -> FakeLink {
    for _ in 0..<5000 {
      if links.count > number { return links[number] }
      try await Task.sleep(for: .milliseconds(1))
    }
    throw TestFailure("there is no sandbox \(number)")
  }

  func put(_ exit: ExitRecord, of place: SandboxPlace?) { state.withLock { $0.exits[place?.id ?? ""] = exit } }

  func create(_ place: SandboxPlace, for workspace: String) async throws -> any SandboxLink {
    try await passGate()
    return try state.withLock { state in
      if state.failsToCreate { throw TestFailure("no more processes") }
      let link = FakeLink()
      state.links.append(link)
      state.living[place.id] = link
      return link
    }
  }

  func connect(_ place: SandboxPlace) async throws -> (any SandboxLink)? {
    try await passGate()
    if state.withLock({ $0.isSilent }) { throw SupervisorError.noReply(seconds: 10) }
    return state.withLock { $0.living[place.id] }
  }
  private func passGate() async throws {
    let gate = state.withLock { $0.gate }
    if let gate { _ = try await gate.value }
  }

  func hasPlan(_ place: SandboxPlace) async throws -> Bool? {
    state.withLock { $0.absent.contains(place.id) ? nil : $0.plans.contains(place.id) }
  }
  func write(_ plan: Plan, record: String, to place: SandboxPlace) async throws { state.withLock { _ = $0.plans.insert(place.id) } }
  func exitRecord(_ place: SandboxPlace) async throws -> ExitRecord? { state.withLock { $0.exits[place.id] } }
  func keep(_ record: String, of workspace: String) async {}
  func usage(_ place: SandboxPlace) async -> Usage { Usage() }
  func kill(_ place: SandboxPlace) async -> Bool {
    state.withLock { $0.killed.append(place.id) }
    return true
  }
  func killSupervisor(_ place: SandboxPlace) async {
    state.withLock { state in
      state.isSilent = false
      state.living[place.id] = nil
    }
  }
  func removeCgroup(_ place: SandboxPlace) async {}
  func remove(_ place: SandboxPlace) async { state.withLock { $0.removed.append(place.id) } }
}

/// A stand-in for the journal: it keeps what is submitted, and can refuse or take its time.
final class FakeEvents: EventSink {
  enum Mood { case takes, refuses, hangs }
  private let state = Mutex<(mood: Mood, entries: [Journal.Entry], waiting: [Promise<Void>])>((.takes, [], []))

  var types: [EventType] { state.withLock { $0.entries.map { EventType(rawValue: $0.event.type)! } } }
  var attributes: [[String: String]] {
    state.withLock { $0.entries.map { (try? JSONDecoder().decode([String: String].self, from: Data($0.event.attributes.utf8))) ?? [:] } }
  }
  var last: WorkspaceRecord? {
    state.withLock { $0.entries.last }.flatMap { if case .record(let record) = $0.change { try? WorkspaceRecord(record) } else { nil } }
  }

  /// A disk that hangs keeps its promises when it takes entries again.
  func become(_ mood: Mood) {
    let waiting = state.withLock { state in
      state.mood = mood
      defer { if mood == .takes { state.waiting = [] } }
      return mood == .takes ? state.waiting : []
    }
    for promise in waiting { promise.fulfil(.success(())) }
  }

  func submit(_ entries: [Journal.Entry], retriesUntilDurable: Bool) -> Promise<Void> {
    let promise = Promise<Void>()
    let mood = state.withLock { state in
      if state.mood != .refuses || retriesUntilDurable { state.entries += entries }
      if state.mood == .hangs { state.waiting.append(promise) }
      return state.mood
    }
    switch mood {
    case .takes: promise.fulfil(.success(()))
    case .refuses: retriesUntilDurable ? () : promise.fulfil(.failure(TestFailure("database or disk is full")))
    case .hangs: break
    }
    return promise
  }
}

struct FakeImages: ImageLookup {
  static let image = StoredImage(
    name: "i:latest", digest: "sha256:" + String(repeating: "a", count: 64), layers: [], sizeBytes: 1, created: "", environment: ["LANG=C"],
    configJSON: "{}")
  func find(_ reference: String) async throws -> StoredImage { FakeImages.image }
  func layerPaths(_ image: StoredImage) -> [String] { ["/layer"] }
}

/// Secrets in memory that needs no mount.
struct FakeVault: SecretFiles {
  func file(_ content: [UInt8]) throws(Errno) -> Handle { Handle(try Descriptor.memory("test", content)) }
}

/// A feature that records which of its hooks were called, and can hold up or refuse a start.
final class FakeFeature: RunningFeature, ExpiringFeature {
  static let name = "fake"
  private let state = Mutex<[String]>([])
  let gate: Promise<Void>?
  let connection: Promise<Void>?
  /// What `prepare` and `connect` refuse with.
  let refusal: Refusal?
  let connectionRefusal: Refusal?
  /// When something of it expires, and what `expire` waits for.
  let expiry = Mutex<Double?>(nil)
  let expiryGate = Promise<Void>()

  init(gate: Promise<Void>? = nil, connection: Promise<Void>? = nil, refusal: Refusal? = nil, connectionRefusal: Refusal? = nil) {
    self.gate = gate
    self.connection = connection
    self.refusal = refusal
    self.connectionRefusal = connectionRefusal
  }

  var calls: [String] { state.withLock { $0 } }
  private func record(_ call: String) { state.withLock { $0.append(call) } }

  func wait(for call: String) async throws {
    for _ in 0..<5000 {
      if calls.contains(call) { return }
      try await Task.sleep(for: .milliseconds(1))
    }
    throw TestFailure("\(call) was not called; called were: \(calls)")
  }

  func prepare(_ workspace: Workspace) async throws(Refusal) {
    record("prepare")
    if let gate {
      do { try await gate.value } catch { throw Refusal(.internal, "cancelled") }
    }
    if let refusal { throw refusal }
  }
  func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {
    record("connect")
    if let connectionRefusal { throw connectionRefusal }
    guard let connection else { return }
    do { try await connection.value } catch { throw Refusal(.internal, "cancelled") }
  }
  func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { true }
  func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    record(isAdopted ? "run adopted" : "run")
    if !isAdopted { await workspace.becameReady() }
    _ = try? await Task.sleep(for: .seconds(1000))
    record("run ended")
  }
  func nextExpiry(in record: WorkspaceRecord) -> Double? { expiry.withLock { $0 } }
  func expire(_ workspace: Workspace) async -> Bool {
    record("expire")
    do { try await expiryGate.value } catch { record("expiry cancelled") }
    return true
  }
  func ended(_ reason: Reason, _ workspace: Workspace) async { record("ended \(reason.code.rawValue)") }
  func release(_ workspace: Workspace) async { record("release") }
}

/// A workspace over stand-ins.
struct Bench {
  let sandboxes = FakeSandboxes()
  let events = FakeEvents()
  let feature: FakeFeature
  let services: NodeServices
  let workspace: Workspace

  static let tool = """
    name: command
    home: /home/user
    gracePeriodSeconds: 1
    """

  static func spec(_ id: String = "a", _ change: (inout WorkspaceSpec) -> Void = { _ in }) -> WorkspaceSpec {
    var spec = WorkspaceSpec(id: id, owner: .init(name: "ada", uid: 2001, gid: 2001), tool: "command", image: "i")
    spec.command = ["/bin/true"]
    change(&spec)
    return spec
  }

  static func services(
    _ sandboxes: FakeSandboxes, _ events: any EventSink, state: String = "/nonexistent", _ change: (inout Configuration) -> Void = { _ in }
  ) throws -> NodeServices {
    var configuration = Configuration()
    configuration.state = state
    configuration.homes = state + "/owners"
    change(&configuration)
    return NodeServices(
      configuration: configuration, facts: try NodeFacts(name: "test"), logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() },
      tools: ["command": try Tool(yaml: tool)], lanes: Lanes(), events: events, sandboxes: sandboxes, images: FakeImages(),
      helper: "/nonexistent/carrel-shim", seccomp: [], vault: FakeVault())
  }

  init(
    _ spec: WorkspaceSpec = Bench.spec(), _ feature: FakeFeature = FakeFeature(), isOnRecord: Bool = false,
    _ change: (inout WorkspaceRecord, FakeSandboxes) -> Void = { _, _ in }
  ) throws {
    self.feature = feature
    services = try Bench.services(sandboxes, events)
    let amounts = ResourceLimits(memoryBytes: 1 << 20, milliCPUs: 100, pids: 10, shmBytes: 1 << 16, scratchBytes: 1 << 20)
    var record = WorkspaceRecord(spec: spec, amounts: amounts, slot: 3, address: "10.0.0.5", firstID: 1_048_576, created: "t")
    record.bootID = services.facts.bootID
    change(&record, sandboxes)
    workspace = Workspace(record, services, [feature], isOnRecord: isOnRecord)
  }

  /// Accepts it, and runs its life.
  func launch(_ secrets: LaunchSecrets = LaunchSecrets()) async throws -> Task<Void, Never> {
    let origin = try await workspace.accept(secrets)
    let workspace = workspace
    let life = Task { await workspace.runAttempts(origin) }
    try await workspace.untilAccepted(origin)
    return life
  }

  /// Brings the attempt with this number to its tool.
  @discardableResult
  func start(_ number: Int = 0) async throws -> FakeLink {
    let link = try await sandboxes.link(number)
    try await link.wait(for: .launch)
    link.report(.created(pid: getpid()))
    link.report(.waiting(pid: getpid()))
    try await link.wait(for: .start)
    link.report(.started(pid: getpid()))
    try await until(.ready)
    return link
  }

  /// The tool of the attempt that is under way ends with this status, as its supervisor records and reports it.
  func finish(_ link: FakeLink, _ status: Int32) {
    sandboxes.put(.ended(.exited(status)), of: workspace.record.sandbox)
    link.report(.ended(.exited(status)))
    link.end()
  }

  func until(_ state: WorkspaceState) async throws {
    for _ in 0..<5000 {
      if workspace.record.state == state { return }
      try await Task.sleep(for: .milliseconds(1))
    }
    throw TestFailure("state is \(workspace.record.state), expected \(state)")
  }
}

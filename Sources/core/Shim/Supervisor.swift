// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Broker
  internal import Executor
  internal import ShimProtocol
  internal import LaunchPlan
  package import Linux
#endif

/// The supervisor, `carrel-shim`: one for each sandbox, single-threaded. It waits for a plan, executes it, stores the tool's
/// output, serves agents through the sandbox's socket, and makes the exit record durable. It outlives the agent: a new agent
/// connects to the same socket, in any state, and continues from there (`ShimProtocol`).
///
/// It does nothing that can hang on storage once the tool runs: a separate process changes mounts (`MountInjector`).
package final class Supervisor {
  private let folder: Handle
  private let listener: Handle
  private let logs: Handle
  /// This process's pidfd, with which agents detect its exit (pidfd_open(2)).
  private let own: Handle
  /// The user whose agents are served.
  private let user = Process.effectiveUser
  private var connections: [Connection] = []
  private var nextConnection = 0
  private var state = SandboxState.awaitingPlan
  private var launched: Launched?
  private var secrets = SecretStore()
  /// True from the first held secret, or credential before the launch, until an agent releases them; meanwhile the supervisor
  /// outlives its tool.
  private var isEntrusted = false
  private var execs = ExecTable()
  private var broker: CredentialBroker?
  /// True when there is nothing left to do.
  private var isDone = false

  private struct Connection {
    let socket: AgentSocket
    let id: Int
  }

  /// A sandbox whose PID 1 exists.
  private struct Launched {
    let control: InitSocket
    let process: Handle
    let pid: Int32
    /// The tool's user, as the host sees it.
    let owner: (uid: UInt32, gid: UInt32)
    var outputs: [(handle: Handle, stream: OutputLog.Stream)]
    let log: OutputLog
    var memory: MemoryWatch?
    /// The last report of PID 1, or that it exited without one; nil while it lives.
    var ending: Ending?
  }

  private enum Ending {
    case reported(ExitRecord, SandboxState)
    case unreported
  }

  /// More connections than agents need, which have one each; it bounds what a faulty agent can use.
  private static let connectionLimit = 16

  package init(folder: Handle, listener: Handle, logs: Handle) {
    self.folder = folder
    self.listener = listener
    self.logs = logs
    // Without it agents could not distinguish its exit from a broken connection.
    do throws(Errno) { own = Handle(try Process.open(pid: Process.id)) } catch { Process.exit(1) }
  }

  /// Serves until the sandbox has ended and its exit record is on disk, or until it was killed before its launch.
  package func run() {
    var poller = Poller()
    while !isDone {
      poller.removeAll()
      let fromListener = poller.add(listener)
      let fromConnections = connections.map { (id: $0.id, index: poller.add($0.socket.handle)) }
      let rest = broker?.pause() ?? 0
      let fromBroker = rest == 0 ? broker?.watch(&poller) : nil
      // Once PID 1 has reported its end, wait for its process: it exits after the last process of its namespace, which storage may
      // block.
      let fromChild = launched.map { poller.add($0.ending == nil ? $0.control.handle : $0.process) }
      let fromMemory = launched?.memory?.watch(&poller)
      let pause = launched?.log.pause() ?? 0
      let fromOutputs = pause == 0 ? (launched?.outputs ?? []).map { poller.add($0.handle) } : []
      let isAlone = launched == nil && connections.isEmpty
      let longest = Supervisor.shortest(pause, rest, launched?.memory?.pause() ?? 0, execs.pause(), isAlone ? 60_000 : 0)
      do throws(Errno) { try poller.wait(milliseconds: longest) } catch { continue }
      for (index, slot) in fromOutputs.enumerated().reversed() where poller.isReady(slot) { readOutput(index) }
      if poller.isReady(fromListener) { accept() }
      for entry in fromConnections where poller.isReady(entry.index) { serve(entry.id) }
      if let fromBroker { report(issues: broker?.serve(poller, fromBroker) ?? []) }
      if let fromMemory { lookAtMemory(isReady: poller.isReady(fromMemory)) }
      for session in execs.overdue() { request(.execSignal(session: session, signal: Signals.kill)) }
      if let fromChild, poller.isReady(fromChild) { if launched?.ending == nil { handleReport() } else { finish() } }
      // Its directory was removed, so no agent can connect again.
      if isAlone, connections.isEmpty, !folder.descriptor.exists(Supervisor.socketName) { isDone = true }
    }
  }

  /// Returns the shortest of these times as poll(2)'s timeout; 0 means no limit.
  private static func shortest(_ pauses: Int32...) -> Int32 { pauses.filter { $0 > 0 }.min() ?? -1 }

  // -------------------------------------------------------------- connections

  private func accept() {
    do throws(Errno) {
      let socket = try Socket.accept(listener.descriptor)
      // The socket is in a 0700 directory; this check is a second protection.
      guard try Socket.peer(socket).uid == user, connections.count < Supervisor.connectionLimit else { return }
      let connection = Connection(socket: AgentSocket(Handle(socket)), id: nextConnection)
      nextConnection += 1
      try greet(connection.socket)
      connections.append(connection)
    } catch {}
  }

  private func greet(_ socket: AgentSocket) throws(Errno) {
    let hello = SupervisorHello(
      version: ShimProtocol.version, capabilities: ShimProtocol.capabilities, state: state, held: secrets.heldNames,
      secrets: secrets.names, servesCredentials: broker != nil)
    var processes = [own]
    if let launched { processes.append(launched.process) }
    try socket.send(.hello(hello), passing: processes, wait: false)
    for issue in broker?.issues ?? [] { try socket.send(.report(.issued(role: issue.role, count: issue.count)), wait: false) }
    if let kills = launched?.memory?.kills, kills > 0 { try socket.send(.report(.outOfMemory(kills: kills)), wait: false) }
  }

  private func serve(_ id: Int) {
    guard let index = connections.firstIndex(where: { $0.id == id }) else { return }
    let socket = connections[index].socket
    let received: AgentSocket.Received?
    do throws(Errno) {
      received = try socket.receive(wait: false)
    } catch {
      if error == .again { return }
      // A datagram that does not decode or is too long gets a reply, and the connection stays.
      if error == .invalid || error == .messageTooLong { return reply(.malformed, to: 0, on: id) }
      return close(id)
    }
    guard let received else { return close(id) }
    switch received.message {
    case .hello: break
    case .request(let number, let request): handle(request, number, received.descriptors, id)
    case .unsupported(let number): reply(.unsupported, to: number, on: id)
    case .malformed(let number): reply(.malformed, to: number, on: id)
    }
  }

  private func reply(_ reply: ShimReply, to request: UInt32, on id: Int, passing: [Handle] = []) {
    guard let connection = connections.first(where: { $0.id == id }) else { return }
    // A client that does not read is disconnected: it receives the state when it connects again.
    do throws(Errno) { try connection.socket.send(.reply(id: request, reply), passing: passing, wait: false) } catch { close(id) }
  }

  private func broadcast(_ report: ShimReport, passing: [Handle] = []) {
    for connection in connections { send(report, to: connection, passing: passing) }
  }

  private func send(_ report: ShimReport, to connection: Connection, passing: [Handle] = []) {
    do throws(Errno) { try connection.socket.send(.report(report), passing: passing, wait: false) } catch { close(connection.id) }
  }

  private func close(_ id: Int) {
    // The client of these programs has disconnected: they end, as a terminal's programs do when it is closed.
    for session in execs.leave(connection: id) { request(.execHangUp(session: session)) }
    connections.removeAll { $0.id == id }
  }

  private func report(issues: [CredentialBroker.Issue]) {
    for issue in issues { broadcast(.issued(role: issue.role, count: issue.count)) }
  }

  private func lookAtMemory(isReady: Bool) {
    guard launched?.memory?.hasNewKills(isReady: isReady) ?? false, let kills = launched?.memory?.kills else { return }
    broadcast(.outOfMemory(kills: kills))
  }

  // ----------------------------------------------------------------- requests

  private func handle(_ message: ShimRequest, _ number: UInt32, _ descriptors: [Handle], _ id: Int) {
    switch message {
    case .exec(let exec): startExec(exec, number, descriptors, id)
    case .execSignal(let session, let signal):
      if let running = execs.number(of: session, on: id) { request(.execSignal(session: running, signal: signal)) }
      reply(.done, to: number, on: id)
    case .execHangUp(let session):
      if let running = execs.number(of: session, on: id) {
        execs.hangUp(running)
        request(.execHangUp(session: running))
      }
      reply(.done, to: number, on: id)
    case .launch:
      reply(state == .awaitingPlan ? .done : .refused(Errno.exists.code), to: number, on: id)
      if state == .awaitingPlan { launch() }
    default:
      let file: Handle?
      do throws(Errno) { file = try perform(message, descriptors) } catch {
        return reply(.refused(error.code), to: number, on: id)
      }
      reply(.done, to: number, on: id, passing: file.map { [$0] } ?? [])
      if isDone { broadcast(.state(state)) }
    }
  }

  /// Executes a request that needs no waiting; returns the descriptor to pass with the reply, if any.
  private func perform(_ message: ShimRequest, _ descriptors: [Handle]) throws(Errno) -> Handle? {
    switch message {
    case .start: request(.start)
    case .signal(let number):
      guard launched != nil else { throw .noSuchProcess }
      request(.signal(number))
    case .kill: try kill()
    case .putSecret(let name, let content):
      try secrets.put(name, content, descriptors.first)
      if launched == nil { isEntrusted = true }
    case .removeSecret(let name): try secrets.remove(name)
    case .getSecret(let name): return try secrets.file(name)
    case .hold(let name):
      try secrets.hold(name, descriptors.first)
      isEntrusted = true
    case .getHeld(let name): return try secrets.held(name)
    case .release:
      secrets.release()
      isEntrusted = false
      if state.isOver { isDone = true }
    case .serveCredentials(let token):
      guard let listener = descriptors.first else { throw .invalid }
      guard broker == nil else { throw .exists }
      broker = CredentialBroker(listener: listener, token: token)
    case .putRole(let name, let body, let expires):
      guard broker != nil else { throw .notSupported }
      broker?.put(name, body, expires: expires)
    case .issuesRecorded(let role, let count):
      if let rest = broker?.note(role, count) { report(issues: [rest]) }
    case .launch, .exec, .execSignal, .execHangUp: throw .invalid
    }
    return nil
  }

  private func kill() throws(Errno) {
    if let launched { return try Process.signal(launched.process.descriptor, Signals.kill) }
    // Nothing runs yet, and nothing will be launched.
    isDone = true
  }

  private func startExec(_ exec: ExecRequest, _ number: UInt32, _ descriptors: [Handle], _ id: Int) {
    guard case .started = state, launched != nil else { return reply(.refused(Errno.noSuchProcess.code), to: number, on: id) }
    guard let session = execs.begin(request: number, connection: id) else {
      return reply(.refused(Errno.again.code), to: number, on: id)
    }
    if let launched { for pipe in descriptors.dropFirst() { Supervisor.give(pipe, to: launched.owner) } }
    guard request(.exec(session: session, exec), passing: descriptors) else {
      _ = execs.end(session)
      return reply(.refused(Errno.again.code), to: number, on: id)
    }
  }

  /// Sends a request to PID 1, waiting at most 100 ms. If PID 1 has exited, its end is reported next. Returns false if the request
  /// could not be sent.
  @discardableResult
  private func request(_ message: InitRequest, passing: [Handle] = []) -> Bool {
    for _ in 0..<20 {
      do throws(Errno) {
        try launched?.control.send(message, passing: passing, wait: false)
        return true
      } catch {
        if error == .brokenPipe || error == .connectionReset { return true }
        // The kernel has no memory at the moment, or PID 1 does not read.
        Clock.sleep(milliseconds: 5)
      }
    }
    switch message {
    case .proceed, .start:
      // Without this message the child would wait forever.
      do throws(Errno) { if let launched { try Process.signal(launched.process.descriptor, Signals.kill) } } catch {}
    default: break
    }
    return false
  }

  // ---------------------------------------------------------------- launching

  private func launch() {
    enter(.preparing)
    let place: SecretStore.Place
    do throws(StepFailure) { place = try execute(try readPlan()) } catch {
      write(.failed(error))
      return finish(.failed(error))
    }
    guard let launched else { return }
    // The plan has been freed, and there may be hundreds of supervisors: return its memory now, because locked memory cannot be
    // returned.
    Process.trimMemory()
    // From here on this process holds secrets.
    Process.keepSecrets()
    do throws(StepFailure) { try secrets.open(place) } catch {
      return awaitEnd(.reported(.failed(error), .failed(error)))
    }
    Fault.at(.cloned)
    // Report this before the child continues, so that the agent connects the network while the child mounts.
    enter(.created(pid: launched.pid), passing: [launched.process])
    request(.proceed(pid: launched.pid))
  }

  private func readPlan() throws(StepFailure) -> Plan {
    let bytes: [UInt8]
    do throws(Errno) {
      bytes = try folder.descriptor.open(Supervisor.planName, [.readOnly, .noFollow]).readAll(limit: Plan.sizeLimit)
    } catch {
      throw StepFailure("read the plan", error)
    }
    do throws(PlanError) { return try Plan(decoding: bytes) } catch { throw StepFailure("decode the plan", .invalid) }
  }

  package static let planName = "plan"
  package static let socketName = "shim.sock"

  /// Executes the plan up to a child that waits for `proceed`. It is a separate function so that its memory for the plan is free
  /// when it returns.
  private func execute(_ plan: Plan) throws(StepFailure) -> SecretStore.Place {
    do throws(Errno) { try ExitRecord.reserve(in: folder.descriptor) } catch {
      throw StepFailure("reserve room for the exit record", error)
    }
    let host = HostPart(plan)
    try host.prepare()
    let memory = MemoryWatch(
      cgroups: plan.operations.compactMap { operation in
        if case .cgroup(let path) = operation { path } else { nil }
      })
    Fault.at(.prepared)
    let control: (Handle, Handle)
    let output: Pipe
    let errors: Pipe
    do throws(Errno) {
      control = try Socket.pair()
      output = try Pipe()
      errors = try Pipe()
      // The tool may have passed a descriptor of a pipe to a process outside, where it outlives the sandbox: never wait for EOF.
      try output.reading.descriptor.makeNonBlocking()
      try errors.reading.descriptor.makeNonBlocking()
      // Block signals here, so that none is lost between the clone and PID 1's signal descriptor.
      try Signals.blockAll()
    } catch {
      throw StepFailure("make pipes", error)
    }
    let owner = SecretStore.owner(plan)
    if let pipe = output.writing { Supervisor.give(pipe, to: owner) }
    if let pipe = errors.writing { Supervisor.give(pipe, to: owner) }
    guard let process = try host.clone() else {
      becomeInit(plan, host, ParentSocket(control.1), output: output.writing, errors: errors.writing)
    }
    let socket = InitSocket(control.0)
    // On a failure the child would wait for `proceed` forever: kill it.
    do throws(StepFailure) {
      try host.complete(child: process)
    } catch {
      do throws(Errno) {
        try process.signal(Signals.kill)
        _ = try Process.reap(process.pid, wait: true)
      } catch {}
      throw error
    }
    launched = Launched(
      control: socket, process: process.handle, pid: process.pid, owner: owner,
      outputs: [(output.reading, .stdout), (errors.reading, .stderr)],
      log: Supervisor.log(plan, logs), memory: memory)
    output.closeWriting()
    errors.closeWriting()
    host.closeMounts()
    return SecretStore.Place(folder: host.secrets, owner: owner)
  }

  /// Gives a pipe to the tool's user, who opens it again as /dev/stdout or /dev/stderr.
  private static func give(_ pipe: Handle, to owner: (uid: UInt32, gid: UInt32)) {
    do throws(Errno) {
      if try pipe.descriptor.status().kind == .fifo { try pipe.descriptor.setOwner(owner.uid, owner.gid) }
    } catch {
      // The tool can then only use the descriptor that it has.
    }
  }

  private static func log(_ plan: Plan, _ folder: Handle) -> OutputLog {
    var bounds: (UInt64, UInt32, UInt64) = (1 << 20, 8, 16 << 20)
    for operation in plan.operations {
      if case .log(let bytes, let segments, let rate) = operation { bounds = (bytes, segments, rate) }
    }
    return OutputLog(in: folder, segmentBytes: bounds.0, segments: bounds.1, bytesPerSecond: bounds.2)
  }

  private func enter(_ next: SandboxState, passing: [Handle] = []) {
    state = next
    broadcast(.state(next), passing: passing)
  }

  /// Runs the child's side of the clone until it exits.
  private func becomeInit(_ plan: Plan, _ host: HostPart, _ control: ParentSocket, output: Handle?, errors: Handle?) -> Never {
    do throws(StepFailure) {
      try Supervisor.enterSandbox(plan, host, control, keeping: [output, errors])
      var payload: Program?
      for operation in plan.operations {
        if case .execute(let arguments, let environment, let directory) = operation {
          payload = Program(arguments: arguments, environment: environment, directory: directory)
        }
      }
      guard let payload, let output, let errors else { throw StepFailure("execute", .invalid, kind: .execution) }
      // From here on, PID 1 has its socket, its signals and the tool's output, and no descriptor of the host. The objects that
      // owned the closed numbers live as long as this process, because this function never returns.
      do throws(Errno) {
        try Process.closeAll(except: [control.handle, output, errors])
      } catch {
        throw StepFailure("close descriptors", error)
      }
      var process = try Init(control, payload, output: output, errors: errors)
      process.run()
    } catch {
      do throws(Errno) { try control.send(.failed(error)) } catch {}
      Process.exit(1)
    }
  }

  /// Executes the child's part. It is a separate function so that its descriptors are closed before their numbers are used again.
  private static func enterSandbox(
    _ plan: Plan, _ host: HostPart, _ control: ParentSocket, keeping outputs: [Handle?]
  ) throws(StepFailure) {
    var part = ChildPart(plan, host, control, keeping: outputs, becomesProgram: false)
    try part.enter()
  }

  // ----------------------------------------------------------------- the child

  private func readOutput(_ index: Int) {
    guard let (handle, stream) = launched?.outputs[index] else { return }
    do throws(Errno) {
      let bytes = try handle.descriptor.read(upTo: 65_536)
      if bytes.isEmpty { launched?.outputs.remove(at: index) } else { launched?.log.append(bytes, to: stream) }
    } catch {
      if error != .again { launched?.outputs.remove(at: index) }
    }
  }

  /// Handles a report of PID 1.
  private func handleReport() {
    guard let child = launched else { return }
    let received: InitSocket.Received?
    do throws(Errno) {
      received = try child.control.receive(wait: false)
    } catch {
      // A transient error, such as no memory: PID 1's report can still be read. The sleep prevents a busy loop.
      guard error == .connectionReset else { return Clock.sleep(milliseconds: 1) }
      received = nil
    }
    // PID 1 exited without a report: it was killed from outside, with all processes of the sandbox.
    guard let received else { return awaitEnd(.unreported) }
    switch received.message {
    case .waiting: enter(.waiting(pid: child.pid))
    case .started:
      enter(.started(pid: child.pid))
    case .failed(let failure): awaitEnd(.reported(.failed(failure), .failed(failure)))
    case .exited(let ended): awaitEnd(.reported(.ended(ended), .ended(ended)))
    case .execStarted(let session):
      guard let exec = execs.client(of: session) else {
        request(.execHangUp(session: session))
        return
      }
      reply(.started, to: exec.request, on: exec.connection, passing: received.descriptors)
    case .execFailed(let session, let failure):
      if let exec = execs.end(session) { reply(.failed(failure), to: exec.request, on: exec.connection) }
    case .execExited(let session, let status):
      guard let exec = execs.end(session), let connection = connections.first(where: { $0.id == exec.connection }) else { return }
      send(.execEnded(session: exec.request, status), to: connection)
    case .ready, .terminal: break
    }
  }

  /// Kills PID 1 and with it all processes of the sandbox, for whose exit the loop waits. If the exit status is known, it is
  /// written to disk first.
  private func awaitEnd(_ ending: Ending) {
    guard let child = launched else { return }
    if case .reported(let record, _) = ending { write(record) }
    do throws(Errno) { try Process.signal(child.process.descriptor, Signals.kill) } catch {}
    launched?.ending = ending
  }

  private func finish() {
    guard let child = launched, let ending = child.ending else { return }
    var ended = ExitStatus.signalled(Signals.kill)
    // PID 1's own exit code is not the tool's: the tool was then killed by the SIGKILL that the kernel sends when PID 1 exits.
    do throws(Errno) { if let reaped = try Process.reap(child.pid), case .signalled = reaped.status { ended = reaped.status } } catch {}
    // The namespace is empty, so no process inside can write any more: the pipes have all there will be.
    for (handle, stream) in child.outputs { Supervisor.drain(handle, stream, child.log) }
    switch ending {
    case .reported(_, let next): finish(next)
    case .unreported:
      write(.ended(ended))
      finish(.ended(ended))
    }
  }

  /// Reads at most 1 MiB, the most that a pipe holds; anything further was written by a process outside.
  private static func drain(_ handle: Handle, _ stream: OutputLog.Stream, _ log: OutputLog) {
    var rest = 1 << 20
    do throws(Errno) {
      while rest > 0 {
        let bytes = try handle.descriptor.read(upTo: 65_536)
        if bytes.isEmpty { return }
        log.append(bytes, to: stream)
        rest -= bytes.count
      }
    } catch {}
  }

  private func write(_ record: ExitRecord) {
    Fault.at(.beforeRecord)
    do throws(Errno) { try record.write(in: folder.descriptor) } catch {}
    Fault.at(.afterRecord)
  }

  /// Reports the end, after its record is on disk.
  private func finish(_ next: SandboxState) {
    launched = nil
    broker.map { report(issues: $0.issues) }
    enter(next)
    // The secrets may be needed for another attempt, and there may be no agent at the moment.
    guard !isEntrusted else { return }
    isDone = true
    // Clients that connected before the end still receive it.
    do throws(Errno) {
      while true { try greet(AgentSocket(Handle(try Socket.accept(listener.descriptor)))) }
    } catch {}
  }
}

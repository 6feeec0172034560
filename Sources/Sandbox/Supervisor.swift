// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  package import Linux
#endif

/// The body of `carrel-shim`: one for each workspace, single-threaded. It launches by a plan, keeps the tool's
/// output, serves the agent through the workspace's socket, and makes the exit durable. It outlives the agent:
/// a new agent connects to the same socket, and being accepted there is the proof that this process lives.
package final class Supervisor {
  private let folder: Handle
  private let listener: Handle
  private let plan: Plan
  private let host: HostPart
  private var connections: [Connection] = []
  private var nextSession: UInt32 = 1
  private var status: Message = .preparing
  private var child: ChildHandle?
  private var outputs: [(handle: Handle, stream: OutputLog.Stream)] = []
  private let log: OutputLog
  private var broker: CredentialBroker?
  private var memory: MemoryWatch?
  /// Targets whose mounts came and went since the launch.
  private var attached: [String] = []
  private var detached: [String] = []

  private struct Connection {
    let socket: MessageSocket
    var session: UInt32?
    let id: Int
  }

  private struct ChildHandle {
    let control: MessageSocket
    let process: Handle
    let pid: Int32
  }

  /// More than an agent needs; a bound on what a faulty one can take.
  private static let connectionLimit = 64

  /// `agent`: the connection of whoever started it.
  package init(folder: Handle, listener: Handle, agent: MessageSocket, logs: Handle, plan: Plan) {
    self.folder = folder
    self.listener = listener
    self.plan = plan
    connections = [Connection(socket: agent, id: 0)]
    host = HostPart(plan)
    var bounds: (UInt64, UInt32, UInt64) = (1 << 20, 8, 16 << 20)
    for operation in plan.operations {
      if case .log(let bytes, let segments, let rate) = operation { bounds = (bytes, segments, rate) }
    }
    log = OutputLog(in: logs, segmentBytes: bounds.0, segments: bounds.1, bytesPerSecond: bounds.2)
  }

  /// Launches, supervises, and returns when the workspace has ended and its end is on disk.
  package func run() {
    do throws(StepFailure) {
      try launch()
      supervise()
    } catch {
      finish(.failed(error), report: .failed(error))
    }
  }

  // ---------------------------------------------------------------- launching

  private func launch() throws(StepFailure) {
    do throws(Errno) { try ExitRecord.reserve(in: folder.descriptor) } catch {
      throw StepFailure("reserve room for the exit record", error)
    }
    try host.prepare()
    memory = MemoryWatch(
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
      // Blocked here, so that none is lost between the clone and the signal descriptor of PID 1.
      try Signals.blockAll()
    } catch {
      throw StepFailure("make pipes", error)
    }
    guard let process = try host.clone() else {
      becomeInit(MessageSocket(control.1), output: output.writing, errors: errors.writing)
    }
    let pid = process.pid
    let socket = MessageSocket(control.0)
    Process.keepSecrets()
    // A child that waits for `proceed` for ever must not be left behind.
    do throws(StepFailure) {
      try host.complete(child: process)
    } catch {
      do throws(Errno) { try process.signal(Signals.kill) } catch {}
      throw error
    }
    child = ChildHandle(control: socket, process: process.handle, pid: pid)
    outputs = [(output.reading, .stdout), (errors.reading, .stderr)]
    output.closeWriting()
    errors.closeWriting()
    host.closeMounts()
    Fault.at(.cloned)
    // Before the child goes on, so that the agent connects the network while it makes its mounts.
    status = .created(pid: pid)
    broadcast(status)
    do throws(Errno) { try socket.send(.proceed(pid: pid)) } catch { throw StepFailure("enter namespaces", error) }
  }

  /// The child's side of the clone, up to its end.
  private func becomeInit(_ control: MessageSocket, output: Handle?, errors: Handle?) -> Never {
    do throws(StepFailure) {
      try host.keepOnly([control.handle, output, errors], from: 3)
      try enter(control)
      var payload: Payload?
      for operation in plan.operations {
        if case .execute(let arguments, let environment, let directory) = operation {
          payload = Payload(arguments: arguments, environment: environment, directory: directory)
        }
      }
      guard let payload, let output, let errors else { throw StepFailure("execute", .invalid) }
      // From here on, PID 1 holds its socket, its signals and the tool's output, nothing of the host. The
      // objects that owned the closed numbers live as long as this process: this never returns.
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

  /// Apart, so that what it opened is closed before the numbers are used again.
  private func enter(_ control: MessageSocket) throws(StepFailure) {
    var part = ChildPart(plan, host, control)
    try part.enter()
  }

  // -------------------------------------------------------------- supervising

  private func supervise() {
    var poller = Poller()
    while let child {
      poller.removeAll()
      let fromChild = poller.add(child.control.handle)
      let fromListener = connections.count < Supervisor.connectionLimit ? poller.add(listener) : nil
      let fromConnections = connections.map { (id: $0.id, index: poller.add($0.socket.handle)) }
      let rest = broker?.pause() ?? 0
      let fromBroker = rest == 0 ? broker?.watch(&poller) : nil
      let fromMemory = memory?.watch(&poller)
      let pause = log.pause()
      let fromOutputs = pause == 0 ? outputs.map { poller.add($0.handle) } : []
      let longest = Supervisor.shortest(pause, rest, memory?.pause() ?? 0)
      do throws(Errno) { try poller.wait(milliseconds: longest) } catch { continue }
      for (index, slot) in fromOutputs.enumerated().reversed() where poller.isReady(slot) { readOutput(index) }
      if let fromListener, poller.isReady(fromListener) { accept() }
      for entry in fromConnections where poller.isReady(entry.index) { serve(entry.id) }
      if let fromBroker {
        tell(issues: broker?.serve(poller, fromBroker) ?? [])
      }
      if let fromMemory, memory?.hasRisen(isRung: poller.isReady(fromMemory)) ?? false { tellOfMemory() }
      if poller.isReady(fromChild) { hear(child) }
    }
  }

  /// The time to wait for poll(2), where 0 is for ever.
  private static func shortest(_ pauses: Int32...) -> Int32 { pauses.filter { $0 > 0 }.min() ?? -1 }

  private func readOutput(_ index: Int) {
    let (handle, stream) = outputs[index]
    do throws(Errno) {
      let bytes = try handle.descriptor.read(upTo: 65_536)
      if bytes.isEmpty { outputs.remove(at: index) } else { log.append(bytes, to: stream) }
    } catch {
      outputs.remove(at: index)
    }
  }

  private func accept() {
    do throws(Errno) {
      let socket = try Socket.accept(listener.descriptor)
      // The socket lies in a 0700 directory; this is the second lock on the same door.
      guard try Socket.peer(socket).uid == Process.effectiveUser else { return }
      let connection = Connection(socket: MessageSocket(Handle(socket)), id: Int(nextSession))
      nextSession += 1
      try connection.socket.send(status, wait: false)
      for issue in broker?.issues ?? [] { try connection.socket.send(.issued(role: issue.role, count: issue.count), wait: false) }
      if let kills = memory?.kills, kills > 0 { try connection.socket.send(.outOfMemory(kills: kills), wait: false) }
      connections.append(connection)
    } catch {}
  }

  private func tellOfMemory() { if let kills = memory?.kills { broadcast(.outOfMemory(kills: kills)) } }

  private func tell(issues: [CredentialBroker.Issue]) {
    for issue in issues { broadcast(.issued(role: issue.role, count: issue.count)) }
  }

  /// Reports of PID 1.
  private func hear(_ child: ChildHandle) {
    let received: MessageSocket.Received?
    do throws(Errno) { received = try child.control.receive() } catch { received = nil }
    guard let received else {
      // PID 1 is gone without a word: killed from outside, with all that ran in the workspace.
      var ended = ExitStatus.signalled(Signals.kill)
      do throws(Errno) { if let reaped = try Process.reap(child.pid, wait: true) { ended = reaped.status } } catch {}
      conclude(child, .ended(ended), .exited(ended), reaped: true)
      return
    }
    switch received.message {
    case .waiting:
      // The child knows its pid inside only; the agent needs the one outside.
      status = .waiting(pid: child.pid)
      broadcast(status)
    case .started:
      status = received.message
      broadcast(status)
    case .failed(let failure): conclude(child, .failed(failure), received.message, reaped: false)
    case .exited(let ended): conclude(child, .ended(ended), received.message, reaped: false)
    case .execStarted(let session), .execFailed(let session, _), .execExited(let session, _):
      for connection in connections where connection.session == session {
        do throws(Errno) {
          try connection.socket.send(received.message, passing: received.descriptors, wait: false)
        } catch {}
      }
    default: break
    }
  }

  private func broadcast(_ message: Message) {
    for connection in connections { do throws(Errno) { try connection.socket.send(message, wait: false) } catch {} }
  }

  private func conclude(_ child: ChildHandle, _ record: ExitRecord, _ report: Message, reaped: Bool) {
    if !reaped {
      do throws(Errno) {
        // PID 1 ends right after its report; the kill is for the case that it does not.
        try Process.signal(child.process.descriptor, Signals.kill)
        _ = try Process.reap(child.pid, wait: true)
      } catch {}
    }
    // The namespace is empty now, so nothing writes any more: what is in the pipes is all there will be.
    for (handle, stream) in outputs { drain(handle, stream) }
    outputs = []
    finish(record, report: report)
    self.child = nil
  }

  private func drain(_ handle: Handle, _ stream: OutputLog.Stream) {
    do throws(Errno) {
      while true {
        let bytes = try handle.descriptor.read(upTo: 65_536)
        if bytes.isEmpty { return }
        log.append(bytes, to: stream)
      }
    } catch {}
  }

  /// First on disk, then told.
  private func finish(_ record: ExitRecord, report: Message) {
    Fault.at(.beforeRecord)
    do throws(Errno) { try record.write(in: folder.descriptor) } catch {}
    Fault.at(.afterRecord)
    status = report
    do throws(Errno) { while true { acceptLate(try Socket.accept(listener.descriptor)) } } catch {}
    tell(issues: broker?.issues ?? [])
    broadcast(report)
  }

  /// Someone who connected before the end and was not accepted yet still hears it.
  private func acceptLate(_ socket: consuming Descriptor) {
    connections.append(Connection(socket: MessageSocket(Handle(socket)), id: Int(nextSession)))
    nextSession += 1
  }

  // ------------------------------------------------------------------ serving

  private func serve(_ id: Int) {
    guard let index = connections.firstIndex(where: { $0.id == id }) else { return }
    let socket = connections[index].socket
    do throws(Errno) {
      guard let received = try socket.receive(wait: false) else { return close(index) }
      switch received.message {
      case .start: tell(.start)
      case .signal(let number): tell(.signal(number))
      case .kill:
        if let child { do throws(Errno) { try Process.signal(child.process.descriptor, Signals.kill) } catch {} }
      case .putSecret(let name, let content):
        try answer(socket) { () throws(Errno) in
          try putSecret(name, content); return .done
        }
      case .serveCredentials(let token):
        guard let listener = received.descriptors.first else { throw .invalid }
        broker = CredentialBroker(listener: listener, token: token)
        try socket.send(.done, wait: false)
      case .putRole(let name, let body, let expires):
        broker?.put(name, body, expires: expires)
        try socket.send(broker == nil ? .refused(Errno.notSupported.code) : .done, wait: false)
      case .noted(let role, let count):
        if let rest = broker?.note(role, count) { tell(issues: [rest]) }
      case .getSecret(let name): try answer(socket) { () throws(Errno) in .secret(try getSecret(name)) }
      case .removeSecret(let name):
        try answer(socket) { () throws(Errno) in
          try host.secrets?.descriptor.remove(name); return .done
        }
      case .attach, .detach, .change, .findMount, .listMounts:
        try answer(socket) { () throws(Errno) in try inject(received.message) }
      case .exec(_, let arguments, let environment, let directory, let terminal, let rows, let columns):
        let session = nextSession
        nextSession += 1
        connections[index].session = session
        tell(
          .exec(
            session: session, arguments: arguments, environment: environment, directory: directory,
            terminal: terminal, rows: rows, columns: columns), passing: received.descriptors)
      case .execSignal(_, let number):
        if let session = connections[index].session {
          tell(.execSignal(session: session, signal: number))
        }
      default: break
      }
    } catch {
      if error != .again { close(index) }
    }
  }

  /// To PID 1. If it is gone already, its end is told to everyone next; the asker's connection must live until then.
  private func tell(_ message: Message, passing: [Handle] = []) {
    do throws(Errno) { try child?.control.send(message, passing: passing) } catch {}
  }

  private func close(_ index: Int) {
    // Whoever asked for the program is gone: it ends, as a terminal's programs do when it is closed.
    if let session = connections[index].session {
      tell(.execSignal(session: session, signal: Signals.kill))
    }
    // Not only closed: the first one has a second owner, who started this supervisor's run.
    connections[index].socket.handle.descriptor.shutDown()
    connections.remove(at: index)
  }

  private func answer(_ socket: MessageSocket, _ body: () throws(Errno) -> Message) throws(Errno) {
    let reply: Message
    do throws(Errno) { reply = try body() } catch { reply = .refused(error.code) }
    try socket.send(reply, wait: false)
  }

  // ------------------------------------------------------------------- mounts

  private func inject(_ message: Message) throws(Errno) -> Message {
    guard let child else { throw .noSuchProcess }
    let injection = Injection(pid: child.pid)
    switch message {
    case .attach(let bytes):
      let plan: Plan
      do throws(PlanError) { plan = try Plan(decoding: bytes) } catch { throw .invalid }
      guard let first = plan.operations.first, plan.operations.count == 1, case .bind(_, let target, _) = first else { throw .invalid }
      let id = try injection.attach(first)
      attached.append(target)
      detached.removeAll { $0 == target }
      return .mount(id: id)
    case .detach(let target, let id):
      try injection.detach(target, id)
      detached.append(target)
      attached.removeAll { $0 == target }
      return .done
    case .change(let target, let id, let readOnly):
      try injection.change(target, id, readOnly: readOnly)
      return .done
    case .findMount(let target): return .mount(id: try injection.find(target))
    default: return .mounts(attached: attached, detached: detached)
    }
  }

  // ------------------------------------------------------------------ secrets

  /// The workspace's user, as the host sees it.
  private var secretsOwner: (uid: UInt32, gid: UInt32) {
    var maps: (uids: [IDRange], gids: [IDRange]) = ([], [])
    for operation in plan.operations {
      if case .userNamespace(_, let uids, let gids) = operation { maps = (uids, gids) }
      if case .user(let uid, let gid, _, _, _) = operation {
        return (maps.uids.outside(uid) ?? uid, maps.gids.outside(gid) ?? gid)
      }
    }
    return (0, 0)
  }

  /// Replaced by rename: a reader finds the old content or the new one, never a part.
  private func putSecret(_ name: String, _ content: [UInt8]) throws(Errno) {
    guard let folder = host.secrets else { throw .notSupported }
    if name.isEmpty || name.utf8.first == UInt8(ascii: ".") || name.utf8.contains(UInt8(ascii: "/")) { throw .invalid }
    let temporary = ".new"
    do throws(Errno) { try folder.descriptor.remove(temporary) } catch {}
    do throws(Errno) {
      let file = try folder.descriptor.open(temporary, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o400)
      try file.write(content)
      let owner = secretsOwner
      try file.setOwner(owner.uid, owner.gid)
      try folder.descriptor.rename(temporary, to: name)
    } catch {
      do throws(Errno) { try folder.descriptor.remove(temporary) } catch {}
      throw error
    }
  }

  private func getSecret(_ name: String) throws(Errno) -> [UInt8] {
    guard let folder = host.secrets else { throw .notSupported }
    return try folder.descriptor.open(name, [.readOnly, .noFollow]).readAll(limit: Socket.messageLimit)
  }
}

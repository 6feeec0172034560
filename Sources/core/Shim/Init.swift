// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Executor
  internal import ShimProtocol
  internal import LaunchPlan
  internal import Linux
#endif

/// PID 1 of a workspace: it starts the tool, reaps, forwards signals, and starts further programs on request.
///
/// It runs under the workspace's own user, filter and limits, has no capability and no descriptor of the host, and cannot be
/// traced. An `exec` program is its child, so no process ever joins a workspace from outside (CVE-2016-9962 has no counterpart
/// here).
struct Init {
  private let supervisor: ParentSocket
  private let signals: Handle
  private let main: Int32
  private var sessions: [Session] = []

  /// A further program, which leads its own process group.
  private struct Session {
    let pid: Int32
    let number: UInt32
    /// True after its client has disconnected.
    var isHungUp = false
    /// Set until the result of its execution is known: it may hang on the storage of its directory, and PID 1 must not wait for
    /// that.
    var starting: Program.Forked?
    /// The master of its terminal, until its start is reported.
    var master: Handle?
  }

  /// Starts the tool.
  init(_ supervisor: ParentSocket, _ payload: Program, output: Handle, errors: Handle) throws(StepFailure) {
    self.supervisor = supervisor
    let input: Handle
    do throws(Errno) {
      signals = Handle(try Signals.descriptor())
      input = Handle(try Descriptor.open("/dev/null", [.readOnly]))
    } catch {
      throw StepFailure("open /dev/null", error)
    }
    Process.setName("carrel-init")
    main = try payload.start(Program.Streams(input: input, output: output, errors: errors))
  }

  /// Runs until the tool or the supervisor has exited; the kernel then kills all other processes of the pid namespace.
  mutating func run() -> Never {
    do throws(Errno) {
      try supervisor.send(.started)
      var poller = Poller()
      while true {
        poller.removeAll()
        let fromSignals = poller.add(signals)
        let fromSupervisor = poller.add(supervisor.handle)
        var fromStarting: [(number: UInt32, slot: Int)] = []
        for session in sessions {
          if let starting = session.starting { fromStarting.append((session.number, poller.add(starting.report))) }
        }
        do throws(Errno) { try poller.wait() } catch {
          // The kernel has no memory for poll(2) at the moment; PID 1 must not exit because of that.
          Clock.sleep(milliseconds: 5)
          continue
        }
        for entry in fromStarting where poller.isReady(entry.slot) { try reportStart(entry.number) }
        if poller.isReady(fromSignals) { try handleSignals() }
        if poller.isReady(fromSupervisor) { try handleRequest() }
      }
    } catch {
      Process.exit(1)
    }
  }

  private mutating func handleSignals() throws(Errno) {
    while let number = Signals.next(signals.descriptor) {
      if number == Signals.child { continue }
      do throws(Errno) { try Process.kill(main, number) } catch {}
    }
    try reap()
  }

  private mutating func reap() throws(Errno) {
    while true {
      let ended: (pid: Int32, status: ExitStatus)?
      do throws(Errno) { ended = try persisting { () throws(Errno) in try Process.reap() } } catch {
        if error == .noChild { return }
        throw error
      }
      guard let ended else { return }
      if ended.pid == main {
        try supervisor.send(.exited(ended.status))
        Process.exit(0)
      }
      if let index = sessions.firstIndex(where: { $0.pid == ended.pid }) {
        // A program that could not be executed has reported that before it exited.
        if sessions[index].starting != nil, try !reportStart(sessions[index].number) { continue }
        let session = sessions.remove(at: index)
        // Kill the processes that ignored SIGHUP and outlived their leader. The group's number stays in use as long as it has
        // members.
        if session.isHungUp { signal(group: session.pid, Signals.kill) }
        try supervisor.send(.execExited(session: session.number, ended.status))
      }
    }
  }

  /// Reports whether a further program runs; returns false if it does not.
  @discardableResult
  private mutating func reportStart(_ number: UInt32) throws(Errno) -> Bool {
    guard let index = sessions.firstIndex(where: { $0.number == number }), let starting = sessions[index].starting else { return true }
    sessions[index].starting = nil
    if let failure = starting.outcome() {
      sessions.remove(at: index)
      try supervisor.send(.execFailed(session: number, failure))
      return false
    }
    let master = sessions[index].master
    sessions[index].master = nil
    try supervisor.send(.execStarted(session: number), passing: master.map { [$0] } ?? [])
    return true
  }

  private func signal(group: Int32, _ number: Int32) { do throws(Errno) { try Process.kill(-group, number) } catch {} }

  private mutating func handleRequest() throws(Errno) {
    guard let received = try supervisor.receive() else { Process.exit(1) }
    switch received.message {
    case .signal(let number):
      do throws(Errno) { try Process.kill(main, number) } catch {}
    case .execSignal(let number, let signal):
      // Signal the leader's whole group, which includes a shell's children.
      for session in sessions where session.number == number { self.signal(group: session.pid, signal) }
    case .execHangUp(let number):
      for index in sessions.indices where sessions[index].number == number {
        sessions[index].isHungUp = true
        signal(group: sessions[index].pid, Signals.hangUp)
        // A stopped group handles only SIGKILL until SIGCONT continues it.
        signal(group: sessions[index].pid, Signals.goOn)
      }
    case .exec(let number, let request):
      let payload = Program(arguments: request.arguments, environment: request.environment, directory: request.directory)
      do throws(StepFailure) {
        let begun = try start(payload, received.descriptors, request)
        sessions.append(Session(pid: begun.forked.pid, number: number, starting: begun.forked, master: begun.master))
      } catch {
        try supervisor.send(.execFailed(session: number, error))
      }
    case .proceed, .start: break
    }
  }

  private func start(
    _ payload: Program, _ descriptors: [Handle], _ request: ExecRequest
  ) throws(StepFailure) -> (forked: Program.Forked, master: Handle?) {
    if request.terminal {
      let pair: (master: Handle, slave: Handle)
      do throws(Errno) {
        pair = try Terminal.open("/dev/ptmx")
        try Terminal.resize(pair.master.descriptor, rows: request.rows, columns: request.columns)
      } catch {
        throw StepFailure("open a terminal", error)
      }
      return (try payload.fork(Program.Streams(terminal: pair.slave)), pair.master)
    }
    guard descriptors.count == 3 else { throw StepFailure("receive standard streams", .invalid) }
    let streams = Program.Streams(input: descriptors[0], output: descriptors[1], errors: descriptors[2])
    return (try payload.fork(streams), nil)
  }
}

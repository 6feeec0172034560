// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Executor
  internal import ShimProtocol
  internal import LaunchPlan
  internal import Linux
#endif

/// PID 1 of a workspace: starts the tool, reaps, forwards signals, starts further programs on request.
///
/// It runs under the workspace's own user, filter and limits, holds no capability and no descriptor of the
/// host, and cannot be traced. A program of `exec` is its child, so nothing ever joins a workspace from
/// outside (CVE-2016-9962 has no counterpart here).
struct Init {
  private let supervisor: ParentSocket
  private let signals: Handle
  private let main: Int32
  private var sessions: [Session] = []

  /// A further program: the leader of a process group of its own.
  private struct Session {
    let pid: Int32
    let number: UInt32
    /// Its client has gone.
    var isHungUp = false
    /// While it is not known whether it could be executed: it may hang on the storage of its directory, and nobody waits for that.
    var starting: Program.Forked?
    /// Of its terminal, until its start is reported.
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

  /// Runs until the tool ends or the supervisor is gone; the kernel then ends whatever else runs.
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
          // The kernel has no memory for poll(2) just now, and PID 1 must not end for that.
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
        // One that could not be executed has said so before it ended.
        if sessions[index].starting != nil, try !reportStart(sessions[index].number) { continue }
        let session = sessions.remove(at: index)
        // What ignored the hang-up and outlives its leader. The group keeps the number as long as it has members.
        if session.isHungUp { signal(group: session.pid, Signals.kill) }
        try supervisor.send(.execExited(session: session.number, ended.status))
      }
    }
  }

  /// Reports whether a further program runs. False where it does not.
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
      // The session leader's whole group: a shell's children too.
      for session in sessions where session.number == number { self.signal(group: session.pid, signal) }
    case .execHangUp(let number):
      for index in sessions.indices where sessions[index].number == number {
        sessions[index].isHungUp = true
        signal(group: sessions[index].pid, Signals.hangUp)
        // A stopped group hears nothing but SIGKILL until it goes on.
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

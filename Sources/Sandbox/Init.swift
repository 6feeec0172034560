// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// PID 1 of a workspace: starts the tool, reaps, forwards signals, starts further programs on request.
///
/// It runs under the workspace's own user, filter and limits, holds no capability and no descriptor of the
/// host, and cannot be traced. A program of `exec` is its child, so nothing ever joins a workspace from
/// outside (CVE-2016-9962 has no counterpart here).
struct Init {
  private let supervisor: MessageSocket
  private let signals: Handle
  private let main: Int32
  private var sessions: [(pid: Int32, session: UInt32)] = []

  /// Starts the tool.
  init(_ supervisor: MessageSocket, _ payload: Payload, output: Handle, errors: Handle) throws(StepFailure) {
    self.supervisor = supervisor
    let input: Handle
    do throws(Errno) {
      signals = Handle(try Signals.descriptor())
      input = Handle(try Descriptor.open("/dev/null", [.readOnly]))
    } catch {
      throw StepFailure("open /dev/null", error)
    }
    Process.setName("carrel-init")
    main = try payload.start(Payload.Streams(input: input, output: output, errors: errors))
  }

  /// Runs until the tool ends or the supervisor is gone; the kernel then ends whatever else runs.
  mutating func run() -> Never {
    do throws(Errno) {
      try supervisor.send(.started(pid: main))
      var poller = Poller()
      while true {
        poller.removeAll()
        let fromSignals = poller.add(signals)
        let fromSupervisor = poller.add(supervisor.handle)
        try poller.wait()
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
      do throws(Errno) { ended = try Process.reap() } catch { if error == .noChild { return } else { throw error } }
      guard let ended else { return }
      if ended.pid == main {
        try supervisor.send(.exited(ended.status))
        Process.exit(0)
      }
      if let index = sessions.firstIndex(where: { $0.pid == ended.pid }) {
        try supervisor.send(.execExited(session: sessions.remove(at: index).session, status: ended.status))
      }
    }
  }

  private mutating func handleRequest() throws(Errno) {
    guard let received = try supervisor.receive() else { Process.exit(1) }
    switch received.message {
    case .signal(let number):
      do throws(Errno) { try Process.kill(main, number) } catch {}
    case .execSignal(let session, let number):
      for entry in sessions where entry.session == session {
        // The session leader's whole group: a shell's children too.
        do throws(Errno) { try Process.kill(-entry.pid, number) } catch {}
      }
    case .exec(let session, let arguments, let environment, let directory, let terminal, let rows, let columns):
      let payload = Payload(arguments: arguments, environment: environment, directory: directory)
      do throws(StepFailure) {
        let started = try start(payload, received.descriptors, terminal: terminal, rows: rows, columns: columns)
        sessions.append((started.pid, session))
        try tell(.execStarted(session: session), passing: started.master.map { [$0] } ?? [])
      } catch {
        try supervisor.send(.execFailed(session: session, failure: error))
      }
    default: break
    }
  }

  private func tell(_ message: Message, passing: [Handle]) throws(StepFailure) {
    do throws(Errno) { try supervisor.send(message, passing: passing) } catch { throw StepFailure("report", error) }
  }

  private func start(
    _ payload: Payload, _ descriptors: [Handle], terminal: Bool, rows: UInt16, columns: UInt16
  ) throws(StepFailure) -> (pid: Int32, master: Handle?) {
    if terminal {
      let pair: (master: Handle, slave: Handle)
      do throws(Errno) {
        pair = try Terminal.open("/dev/ptmx")
        try Terminal.resize(pair.master.descriptor, rows: rows, columns: columns)
      } catch {
        throw StepFailure("open a terminal", error)
      }
      return (try payload.start(Payload.Streams(terminal: pair.slave)), pair.master)
    }
    guard descriptors.count == 3 else { throw StepFailure("receive standard streams", .invalid) }
    let streams = Payload.Streams(input: descriptors[0], output: descriptors[1], errors: descriptors[2])
    return (try payload.start(streams), nil)
  }
}

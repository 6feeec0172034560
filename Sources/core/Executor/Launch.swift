// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import ShimProtocol
  package import LaunchPlan
  package import Linux
#endif

/// A launch without a supervisor: the child becomes the program itself, with the caller's standard streams. The OCI runtime uses
/// it; workspaces use `Supervisor`.
package struct Launch {
  private let plan: Plan
  /// The event for which the child waits at the plan's `awaitStart`.
  package enum Gate {
    /// A call of `Started.release`.
    case caller
    /// A connection to this socket.
    case listener(Handle)
  }
  /// Nil for a plan without `awaitStart`, whose program runs at once.
  private let gate: Gate?

  package init(_ plan: Plan, gate: Gate? = nil) {
    self.plan = plan
    self.gate = gate
  }

  package struct Started {
    package let child: Child
    /// The master of the terminal, if the plan names no socket for it.
    package let terminal: Handle?
    fileprivate let control: InitSocket

    /// Opens the gate `caller`; throws the reason if the program cannot run.
    package func release() throws(StepFailure) {
      let report: InitReport?
      do throws(Errno) {
        try control.send(.start)
        report = try control.receive()?.message
      } catch {
        throw StepFailure("start", error)
      }
      // EOF without a message: the socket was closed on execve, so the program runs.
      if case .failed(let failure)? = report { throw failure }
    }
  }

  /// Starts the child; returns when it waits at the gate or, without a gate, when the program runs. `atRendezvous` is called with
  /// the child's pid once namespaces and mounts exist, if the plan requests it. On an error the child has been killed and reaped.
  package func start(_ atRendezvous: (Int32) throws(StepFailure) -> Void = { _ in }) throws(StepFailure) -> Started {
    let host = HostPart(plan)
    try host.prepare()
    let control: SocketPair
    do throws(Errno) { control = try SocketPair() } catch { throw StepFailure("make a socket pair", error) }
    guard let child = try host.clone() else { become(host, ParentSocket(control.takePeerEnd())) }
    // The child's EOF arrives only after this process has closed its copy of the child's end.
    _ = control.takePeerEnd()
    Fault.at(.cloned)
    let localEnd = InitSocket(control.localEnd)
    do throws(StepFailure) {
      try host.complete(child: child)
      let terminal = try follow(localEnd, child.pid, atRendezvous)
      return Started(child: child, terminal: terminal, control: localEnd)
    } catch {
      do throws(Errno) {
        try child.signal(Signals.kill)
        _ = try Process.reap(child.pid, wait: true)
      } catch {}
      throw error
    }
  }

  private func follow(
    _ localEnd: InitSocket, _ pid: Int32, _ atRendezvous: (Int32) throws(StepFailure) -> Void
  ) throws(StepFailure) -> Handle? {
    var terminal: Handle?
    do throws(Errno) { try localEnd.send(.proceed(pid: pid)) } catch { throw StepFailure("enter namespaces", error) }
    while true {
      let received: InitSocket.Received?
      do throws(Errno) { received = try localEnd.receive() } catch { throw StepFailure("wait for the child", error) }
      switch received?.message {
      case .ready:
        try atRendezvous(pid)
        do throws(Errno) { try localEnd.send(.proceed(pid: pid)) } catch { throw StepFailure("enter namespaces", error) }
      case .terminal: terminal = received?.descriptors.first
      case .waiting: return terminal
      case .failed(let failure): throw failure
      case nil:
        if gate != nil { throw StepFailure("wait for the child", .noSuchProcess) }
        return terminal
      default: throw StepFailure("wait for the child", .invalid)
      }
    }
  }

  /// Runs the child's side of the launch.
  private func become(_ host: HostPart, _ supervisor: ParentSocket) -> Never {
    var listener: Handle?
    if case .listener(let socket)? = gate { listener = socket }
    var part = ChildPart(plan, host, supervisor, gate: listener, becomesProgram: true)
    var failure: StepFailure
    do throws(StepFailure) {
      try part.enter()
      failure = part.execute()
    } catch {
      failure = error
    }
    do throws(Errno) { try (part.starter ?? supervisor).send(.failed(failure)) } catch {}
    Process.exit(1)
  }
}

/// A socket pair of which one end is handed to the child.
private final class SocketPair {
  let localEnd: Handle
  private var peerEnd: Handle?

  init() throws(Errno) {
    let ends = try Socket.pair()
    localEnd = ends.0
    peerEnd = ends.1
  }

  func takePeerEnd() -> Handle {
    defer { peerEnd = nil }
    return peerEnd ?? localEnd
  }
}

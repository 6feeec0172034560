// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
package import Linux
internal import Synchronization

/// A further program in a sandbox. Its streams are pipes, or the master of a terminal, held here; the supervisor reports its end. If the
/// session is released before the program ends, the program gets SIGHUP and is then killed.
package final class ExecSession: Sendable {
  package enum Outcome: Equatable, Sendable {
    case ended(ExitStatus)
    /// The sandbox ended first, or the connection to its supervisor was lost.
    case lost
  }

  private let control: ExecControl
  private let input: Mutex<Handle?>
  package let output: Handle
  /// Standard error; nil with a terminal, where it is part of `output`.
  package let errors: Handle?
  private let terminal: Handle?
  private let end: Promise<Outcome>
  private let isHungUp = Mutex(false)

  init(control: ExecControl, input: Handle?, output: Handle, errors: Handle?, terminal: Handle?, end: Promise<Outcome>) {
    self.control = control
    self.input = Mutex(input)
    self.output = output
    self.errors = errors
    self.terminal = terminal
    self.end = end
  }

  deinit { hangUp() }

  package var hasEnded: Bool { end.isFulfilled }

  /// Waits until a stream can be read, or the program has ended.
  package func waitForOutput(_ handle: Handle) async {
    await withTaskGroup(of: Void.self) { group in
      group.addTask { await Readiness.wait(handle, writing: false) }
      group.addTask { _ = try? await self.end.value }
      await group.next()
      group.cancelAll()
    }
  }

  package func outcome() async throws -> Outcome { try await end.value }

  /// Sends SIGHUP to the process group of the program, and SIGKILL two seconds later. Idempotent; does nothing if it has ended.
  package func hangUp() {
    guard !end.isFulfilled,
      isHungUp.withLock({ isHungUp in
        defer { isHungUp = true }; return !isHungUp
      })
    else { return }
    control.hangUp()
  }

  /// Hangs up on the program and reads its output until it has ended: without a reader, SIGPIPE would end its handler of SIGHUP. Returns
  /// how it ended, or nil after 4 s, by when SIGKILL should have ended it.
  package func abandon() async -> Outcome? {
    hangUp()
    for _ in 0..<200 {
      for stream in [output, errors].compactMap({ $0 }) {
        while case .bytes = ExecSession.readNow(stream) {}
      }
      if hasEnded { return try? await end.value }
      try? await Task.sleep(for: .milliseconds(20))
    }
    return nil
  }

  /// Writes input at the pace of the program. Errors mean that the program no longer reads, and are ignored, as in a shell.
  package func write(_ bytes: [UInt8]) async {
    guard let input = input.withLock({ $0 }) else { return }
    var rest = bytes[...]
    while !rest.isEmpty, !Task.isCancelled {
      do throws(Errno) {
        rest = rest.dropFirst(try input.descriptor.writeSome(rest))
      } catch {
        guard error == .again else { return }
        await Readiness.wait(input, writing: true)
      }
    }
  }

  /// Closes the input: the program reads EOF. Does nothing with a terminal, where Ctrl-D is the end of input.
  package func closeInput() { if terminal == nil { input.withLock { $0 = nil } } }

  package func resize(rows: UInt16, columns: UInt16) throws(Errno) {
    if let terminal { try Terminal.resize(terminal.descriptor, rows: rows, columns: columns) }
  }

  package func signal(_ number: Int32) { control.signal(number) }

  package enum Available: Sendable {
    case bytes([UInt8])
    case nothing
    case end
  }

  /// Reads what is available without blocking.
  package static func readNow(_ handle: Handle) -> Available {
    do throws(Errno) {
      let bytes = try handle.descriptor.read(upTo: 32_768)
      return bytes.isEmpty ? .end : .bytes(bytes)
    } catch {
      // A terminal master reads EIO when its last program has exited.
      return error == .again ? .nothing : .end
    }
  }
}

/// The functions that signal a further program.
struct ExecControl: Sendable {
  // Neither blocks.
  let signal: @Sendable (Int32) -> Void
  let hangUp: @Sendable () -> Void
}

/// The streams of a further program before its start.
struct ExecStreams {
  private let input: Handle?
  private let output: Handle?
  private let errors: Handle?
  /// The ends of the pipes that are passed to the program.
  let peerEnds: [Handle]

  init(terminal: Bool) throws(Errno) {
    guard !terminal else {
      (input, output, errors, peerEnds) = (nil, nil, nil, [])
      return
    }
    let (first, second, third) = (try Pipe(), try Pipe(), try Pipe())
    guard let near = first.writing, let out = second.writing, let err = third.writing else { throw .invalid }
    try near.descriptor.makeNonBlocking()
    try second.reading.descriptor.makeNonBlocking()
    try third.reading.descriptor.makeNonBlocking()
    (input, output, errors, peerEnds) = (near, second.reading, third.reading, [first.reading, out, err])
  }

  func session(master: Handle?, control: ExecControl, outcome: Promise<ExecSession.Outcome>) throws(SupervisorError) -> ExecSession {
    if let output, let errors {
      return ExecSession(control: control, input: input, output: output, errors: errors, terminal: nil, end: outcome)
    }
    guard let master else { throw .malformed }
    do throws(Errno) { try master.descriptor.makeNonBlocking() } catch { throw .refused(error) }
    return ExecSession(control: control, input: master, output: master, errors: nil, terminal: master, end: outcome)
  }
}

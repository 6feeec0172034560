// SPDX-License-Identifier: Apache-2.0

package import Linux
package import Sandbox
internal import Synchronization

/// A further program in a workspace: its streams are pipes or a terminal's master held here; its supervisor reports
/// the end. When this goes away before the program, the program is killed.
package final class ExecSession: Sendable {
  package enum Outcome: Sendable {
    case ended(ExitStatus)
    case failed(StepFailure)
    /// The workspace ended first.
    case lost
  }

  private let link: SupervisorLink
  private let input: Mutex<Handle?>
  package let output: Handle
  /// Nil with a terminal, where both are one.
  package let errors: Handle?
  private let terminal: Handle?
  private let end: Task<Outcome, Never>

  private init(link: SupervisorLink, input: Handle?, output: Handle, errors: Handle?, terminal: Handle?, end: Task<Outcome, Never>) {
    self.link = link
    self.input = Mutex(input)
    self.output = output
    self.errors = errors
    self.terminal = terminal
    self.end = end
  }

  deinit { link.close() }

  package static func start(_ link: SupervisorLink, _ request: Message) async throws(Errno) -> ExecSession {
    guard case .exec(_, _, _, _, let terminal, _, _) = request else { throw .invalid }
    return terminal ? try await startTerminal(link, request) : try startPipes(link, request)
  }

  private static func startPipes(_ link: SupervisorLink, _ request: Message) throws(Errno) -> ExecSession {
    let (input, output, errors) = (try Pipe(), try Pipe(), try Pipe())
    guard let near = input.writing, let out = output.writing, let err = errors.writing else { throw .invalid }
    try near.descriptor.makeNonBlocking()
    try link.send(request, passing: [input.reading, out, err])
    return ExecSession(
      link: link, input: near, output: output.reading, errors: errors.reading, terminal: nil, end: Task { await outcome(link) })
  }

  private static func startTerminal(_ link: SupervisorLink, _ request: Message) async throws(Errno) -> ExecSession {
    try link.send(request)
    for await received in link.messages {
      switch received.message {
      case .execStarted:
        guard let master = received.descriptors.first else { throw .invalid }
        try master.descriptor.makeNonBlocking()
        return ExecSession(
          link: link, input: master, output: master, errors: nil, terminal: master, end: Task { await outcome(link) })
      case .execFailed(_, let failure):
        let pipe = try Pipe()
        return ExecSession(
          link: link, input: nil, output: pipe.reading, errors: nil, terminal: nil, end: Task { .failed(failure) })
      default: continue
      }
    }
    throw .noSuchProcess
  }

  private static func outcome(_ link: SupervisorLink) async -> Outcome {
    for await received in link.messages {
      switch received.message {
      case .execExited(_, let status): return .ended(status)
      case .execFailed(_, let failure): return .failed(failure)
      default: continue
      }
    }
    return .lost
  }

  package func outcome() async -> Outcome { await end.value }

  /// Writes input as the program takes it. Errors mean that it does not read any more, and are ignored as a shell
  /// ignores them.
  package func write(_ bytes: [UInt8]) async {
    guard let input = input.withLock({ $0 }) else { return }
    var rest = bytes[...]
    while !rest.isEmpty {
      do throws(Errno) {
        rest = rest.dropFirst(try input.descriptor.writeSome(rest))
      } catch {
        guard error == .again else { return }
        await Readiness.wait(input, writing: true)
      }
    }
  }

  /// No more input: the program reads the end of its file. A terminal has no such end; its programs know Ctrl-D.
  package func closeInput() { if terminal == nil { input.withLock { $0 = nil } } }

  package func resize(rows: UInt16, columns: UInt16) throws(Errno) {
    if let terminal { try Terminal.resize(terminal.descriptor, rows: rows, columns: columns) }
  }

  package func signal(_ number: Int32) throws(Errno) { try link.send(.execSignal(session: 0, signal: number)) }

  /// The next bytes of a stream; nil at its end. Reading only when asked is the flow control.
  package static func read(_ handle: Handle) async -> [UInt8]? {
    while true {
      await Readiness.wait(handle, writing: false)
      do throws(Errno) {
        let bytes = try handle.descriptor.read(upTo: 32_768)
        return bytes.isEmpty ? nil : bytes
      } catch {
        // A terminal whose last program has gone answers EIO: its end.
        guard error == .again else { return nil }
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import Concurrency
internal import GRPCCore
internal import Linux
internal import ShimClient
internal import Synchronization
internal import SwiftProtobuf
internal import Workspaces
internal import WireMapping

/// One `Exec` call, which forwards the client's messages to the program and its output to the client. It returns when the program ends;
/// when the client disconnects, the program is hung up.
struct ExecStream: Sendable {
  let node: Node
  let response: RPCWriter<Carrel_V1_ExecResponse>
  /// The caller, as the kernel reports it (SO_PEERCRED).
  let by: String

  func run(_ request: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>) async throws {
    let start = Promise<Carrel_V1_ExecRequest.Start>()
    let session = Promise<ExecSession>()
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask { await forward(request, start, session) }
      defer { group.cancelAll() }
      let first = try await start.value(
        within: CallLimit.execStart, else: AgentError(field: "message", "`start`, the first message, did not arrive in time"))
      let program = try await begin(first)
      session.fulfil(.success(program.session))
      let outcome: ExecSession.Outcome
      do {
        try await response.write(.with { $0.started = true })
        try await pump(program.session)
        outcome = try await program.session.outcome()
      } catch {
        await program.abandon()
        throw error
      }
      await program.ended(outcome)
      try await report(outcome, first.id)
    }
  }

  private func begin(_ start: Carrel_V1_ExecRequest.Start) async throws -> RunningProgram {
    let request = ExecAsked(
      command: start.command, environment: start.environment, directory: start.workingDirectory,
      terminal: start.terminal, rows: start.hasSize ? start.size.rows : 24, columns: start.hasSize ? start.size.columns : 80)
    let handover = Handover()
    do {
      return try await node.calls.run("Exec", within: CallLimit.execStart) {
        let program = try await node.exec(start.id, request, by: by)
        // The call has already failed, and no longer waits for the program.
        if !handover.offer(program) { await program.abandon() }
        return program
      }
    } catch {
      await handover.giveUp()?.abandon()
      throw error
    }
  }

  /// The handover of a started program to the call that requested it and may have given up.
  private final class Handover: Sendable {
    private let state = Mutex<(program: RunningProgram?, isGivenUp: Bool)>((nil, false))

    /// Returns false if the call has given up.
    func offer(_ program: RunningProgram) -> Bool {
      state.withLock { state in
        if state.isGivenUp { return false }
        state.program = program
        return true
      }
    }

    func giveUp() -> RunningProgram? {
      state.withLock { state in
        state.isGivenUp = true
        return state.program
      }
    }
  }

  // -------------------------------------------------------------------- output

  /// Forwards output until the program has ended and all that it wrote is read. It does not wait for the end of the pipes, because a
  /// child left behind may hold them open for ever.
  private func pump(_ session: ExecSession) async throws {
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask {
        try await pump(session, session.output) { bytes in try await response.write(.with { $0.stdout = .init(bytes) }) }
      }
      if let errors = session.errors {
        group.addTask { try await pump(session, errors) { bytes in try await response.write(.with { $0.stderr = .init(bytes) }) } }
      }
      try await group.waitForAll()
    }
  }

  /// Output of at least this many bytes is passed on without a pause.
  private static let batch = 16_384

  private func pump(_ session: ExecSession, _ stream: Handle, _ write: ([UInt8]) async throws -> Void) async throws {
    // A child left behind may write for ever. Of what is read after the end, only as much as a pipe holds can be the program's own.
    var rest = 1 << 20
    while rest > 0 {
      // The end is checked before the read, so that everything written before the end is read.
      let hasEnded = session.hasEnded
      switch ExecSession.readNow(stream) {
      case .bytes(let bytes):
        try await write(bytes)
        if hasEnded {
          rest -= bytes.count
        } else if bytes.count < ExecStream.batch {
          // A program that writes a line at a time would otherwise keep an event loop busy with messages, and every other
          // connection of that loop waiting.
          try await Task.sleep(for: .milliseconds(5))
        }
      case .end: return
      case .nothing:
        if hasEnded { return }
        await session.waitForOutput(stream)
        try Task.checkCancellation()
      }
    }
  }

  private func report(_ outcome: ExecSession.Outcome, _ id: String) async throws {
    switch outcome {
    case .ended(.exited(let code)): try await response.write(.with { $0.exit = .with { $0.code = code } })
    case .ended(.signalled(let number)):
      try await response.write(
        .with {
          $0.exit = .with {
            $0.code = 128 + number
            $0.signal = number
          }
        })
    case .lost: throw AgentError(.unavailable, "workspace \(id) ended before the program")
    }
  }

  // --------------------------------------------------------------------- input

  private func forward(
    _ messages: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>, _ start: Promise<Carrel_V1_ExecRequest.Start>,
    _ promised: Promise<ExecSession>
  ) async {
    do {
      for try await message in messages {
        if !start.isFulfilled {
          guard case .start(let first)? = message.message else {
            throw AgentError(field: "message", "the first must be `start`")
          }
          start.fulfil(.success(first))
          continue
        }
        await pass(message, to: try await promised.value)
      }
      start.fulfil(.failure(AgentError(field: "message", "the first must be `start`")))
      try await promised.value.closeInput()
    } catch {
      start.fulfil(.failure(error))
    }
  }

  private func pass(_ message: Carrel_V1_ExecRequest, to session: ExecSession) async {
    switch message.message {
    case .stdin(let bytes): await session.write([UInt8](bytes))
    case .closeStdin: session.closeInput()
    case .resize(let size):
      if (1...4096).contains(size.rows), (1...4096).contains(size.columns) {
        try? session.resize(rows: UInt16(size.rows), columns: UInt16(size.columns))
      }
    case .signal(let number): if (1...64).contains(number) { session.signal(number) }
    case .start, nil: break
    }
  }
}

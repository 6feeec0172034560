// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import GRPCCore
internal import Journal
internal import Linux
internal import Supervision
internal import Storage
internal import SwiftProtobuf
internal import Workspaces

/// `carrel.v1.WorkspaceService`, as a thin layer over `NodeAgent`.
struct WorkspaceService: Carrel_V1_WorkspaceService.SimpleServiceProtocol {
  let agent: NodeAgent

  func launch(request: Carrel_V1_LaunchRequest, context: ServerContext) async throws -> Carrel_V1_LaunchResponse {
    try await answering { try await agent.answer(request) }
  }

  func get(request: Carrel_V1_GetRequest, context: ServerContext) async throws -> Carrel_V1_GetResponse {
    try await answering {
      let (record, token, tool) = try await agent.get(request.id)
      return .with { $0.workspace = Carrel_V1_Workspace(record, tool: tool, token: token) }
    }
  }

  func list(request: Carrel_V1_ListRequest, context: ServerContext) async throws -> Carrel_V1_ListResponse {
    try await answering {
      let states = Set(try request.states.map { try $0.domain() })
      let records = await agent.list(
        labels: request.labels, owner: request.owner.isEmpty ? nil : request.owner, states: states)
      return .with { $0.workspaces = records.map { Carrel_V1_Workspace($0, tool: nil, token: nil) } }
    }
  }

  func stop(request: Carrel_V1_StopRequest, context: ServerContext) async throws -> Carrel_V1_StopResponse {
    try await answering(within: .seconds(3660)) { try await agent.answer(request) }
  }

  func delete(request: Carrel_V1_DeleteRequest, context: ServerContext) async throws -> Carrel_V1_DeleteResponse {
    try await answering { try await agent.answer(request) }
  }

  func snapshot(request: Carrel_V1_SnapshotRequest, context: ServerContext) async throws -> Carrel_V1_SnapshotResponse {
    try await answering { try await Carrel_V1_SnapshotResponse(agent.journal) }
  }

  func acknowledge(request: Carrel_V1_AcknowledgeRequest, context: ServerContext) async throws -> Carrel_V1_AcknowledgeResponse {
    try await answering {
      guard request.streamID == agent.journal.streamID else {
        throw AgentError(.outOfRange, "stream_id: this agent's stream is \(agent.journal.streamID)")
      }
      guard let sequence = Int64(exactly: request.sequence) else { throw AgentError(.outOfRange, "sequence: is above the head") }
      try await agent.acknowledge(sequence)
      return Carrel_V1_AcknowledgeResponse()
    }
  }

  func stats(request: Carrel_V1_StatsRequest, context: ServerContext) async throws -> Carrel_V1_StatsResponse {
    try await answering {
      let all = try await agent.usage(request.ids)
      return .with {
        $0.stats = all.map { id, usage in
          .with {
            $0.id = id
            $0.memoryBytes = usage.memoryBytes
            $0.memoryPeakBytes = usage.memoryPeakBytes
            $0.memoryLimitBytes = usage.memoryLimitBytes
            $0.cpuNanoseconds = usage.cpuNanoseconds
            $0.cpuLimit = Double(usage.milliCPUs) / 1000
            $0.pids = usage.pids
            $0.pidsLimit = usage.pidsLimit
            $0.oomKills = usage.outOfMemoryKills
            if let home = usage.home {
              $0.home = .with {
                $0.usedBytes = home.usedBytes
                $0.limitBytes = home.limitBytes
                $0.usedInodes = home.usedInodes
                $0.limitInodes = home.limitInodes
              }
            }
          }
        }
      }
    }
  }

  func updateCredentials(
    request: Carrel_V1_UpdateCredentialsRequest, context: ServerContext
  ) async throws -> Carrel_V1_UpdateCredentialsResponse {
    try await answering { try await agent.answer(request) }
  }

  func revokeCredentials(
    request: Carrel_V1_RevokeCredentialsRequest, context: ServerContext
  ) async throws -> Carrel_V1_RevokeCredentialsResponse {
    try await answering { try await agent.answer(request) }
  }

  func removeCredentials(
    request: Carrel_V1_RemoveCredentialsRequest, context: ServerContext
  ) async throws -> Carrel_V1_RemoveCredentialsResponse {
    try await answering { try await agent.answer(request) }
  }

  func plan(request: Carrel_V1_PlanRequest, context: ServerContext) async throws -> Carrel_V1_PlanResponse {
    try await answering {
      let spec: WorkspaceSpec
      switch request.source {
      case .spec(let wire): spec = try WorkspaceSpec(wire)
      case .manifest(let text): spec = try WorkspaceSpec(yaml: text)
      case nil: throw AgentError(.invalidArgument, "source: expected a spec or a manifest")
      }
      let operations = try await agent.plan(spec)
      return .with { $0.operations = operations }
    }
  }

  // ------------------------------------------------------------------ streams

  func watch(
    request: Carrel_V1_WatchRequest, response: RPCWriter<Carrel_V1_WatchResponse>, context: ServerContext
  ) async throws {
    let journal = agent.journal
    let head = try await journal.head()
    if !request.streamID.isEmpty, request.streamID != journal.streamID {
      throw RPCError(
        code: .outOfRange, message: "stream_id: this agent's stream is \(journal.streamID), head \(head); begin again at 0")
    }
    guard request.cursor <= UInt64(head) else {
      throw RPCError(code: .outOfRange, message: "cursor: \(request.cursor) is above the head, \(head)")
    }
    var cursor = Int64(request.cursor)
    // Before the first read, so that nothing falls between reading and waiting.
    let changes = agent.feed.changes()
    var iterator = changes.makeAsyncIterator()
    let workspace = request.workspace.isEmpty ? nil : request.workspace
    while !Task.isCancelled {
      while true {
        let page = try await journal.page(after: cursor, workspace: workspace, limit: 256)
        // What goes while a slow watcher reads is as much a gap as what went before.
        if cursor < page.oldest - 1 {
          try await response.write(
            .with {
              $0.gap = Carrel_V1_Gap(from: UInt64(cursor + 1), to: UInt64(page.oldest - 1), reason: "trimmed")
              $0.streamID = journal.streamID
            })
        }
        for event in page.events {
          try await response.write(
            .with {
              $0.event = Carrel_V1_Event(event, stream: journal.streamID)
              $0.streamID = journal.streamID
            })
        }
        cursor = page.through
        if page.events.count < 256 { break }
      }
      if request.untilHead { return }
      guard await iterator.next() != nil else { return }
    }
  }

  func logs(
    request: Carrel_V1_LogsRequest, response: RPCWriter<Carrel_V1_LogsResponse>, context: ServerContext
  ) async throws {
    do {
      let reader = try await agent.log(request.id)
      var offset = request.offset
      while !Task.isCancelled {
        // Asked before reading: what was written before the end is then read after it.
        let ended = await agent.state(request.id)?.isTerminal ?? true
        while let chunk = try reader.read(from: offset) {
          try await response.write(
            .with {
              $0.offset = chunk.offset
              $0.lines = .init(chunk.bytes)
            })
          offset = chunk.offset + UInt64(chunk.bytes.count)
        }
        if !request.follow || ended { return }
        try await Task.sleep(for: .milliseconds(100))
      }
    } catch {
      throw RPCError(error)
    }
  }

  func exec(
    request: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>, response: RPCWriter<Carrel_V1_ExecResponse>,
    context: ServerContext
  ) async throws {
    do {
      try await ExecStream(agent: agent, response: response).run(request)
    } catch {
      throw RPCError(error)
    }
  }
}

/// One `Exec` call: the client's messages to the program, its output to the client.
private struct ExecStream {
  let agent: NodeAgent
  let response: RPCWriter<Carrel_V1_ExecResponse>

  func run(_ request: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>) async throws {
    var iterator = request.makeAsyncIterator()
    guard let first = try await iterator.next(), case .start(let start)? = first.message else {
      throw AgentError(.invalidArgument, "message: the first must be `start`")
    }
    let session = try await agent.exec(
      start.id,
      NodeAgent.ExecRequest(
        command: start.command, environment: start.environment, directory: start.workingDirectory,
        terminal: start.terminal, rows: start.hasSize ? start.size.rows : 24, columns: start.hasSize ? start.size.columns : 80))
    try await response.write(.with { $0.started = true })
    let rest = UncheckedIterator(iterator)
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask { await forward(rest, to: session) }
      let outputs = OutputTasks(session: session, response: response)
      try await outputs.run()
      let outcome = await session.outcome()
      group.cancelAll()
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
      case .failed(let failure): throw AgentError(.failedPrecondition, "\(start.id): \(NodeAgent.explain(failure))")
      case .lost: throw AgentError(.unavailable, "workspace \(start.id) ended before the program")
      }
    }
  }

  /// SAFETY: the iterator is used by one task only, the one it is handed to.
  private final class UncheckedIterator: @unchecked Sendable {
    var value: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>.AsyncIterator
    init(_ value: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>.AsyncIterator) { self.value = value }
  }

  private func forward(_ messages: UncheckedIterator, to session: ExecSession) async {
    while let message = try? await messages.value.next() {
      switch message.message {
      case .stdin(let bytes): await session.write([UInt8](bytes))
      case .closeStdin: session.closeInput()
      case .resize(let size):
        if (1...4096).contains(size.rows), (1...4096).contains(size.columns) {
          try? session.resize(rows: UInt16(size.rows), columns: UInt16(size.columns))
        }
      case .signal(let number): if (1...64).contains(number) { try? session.signal(number) }
      case .start, nil: break
      }
    }
    session.closeInput()
  }

  private struct OutputTasks {
    let session: ExecSession
    let response: RPCWriter<Carrel_V1_ExecResponse>

    func run() async throws {
      try await withThrowingTaskGroup(of: Void.self) { group in
        group.addTask {
          while let bytes = await ExecSession.read(session.output) {
            try await response.write(.with { $0.stdout = .init(bytes) })
          }
        }
        if let errors = session.errors {
          group.addTask {
            while let bytes = await ExecSession.read(errors) {
              try await response.write(.with { $0.stderr = .init(bytes) })
            }
          }
        }
        try await group.waitForAll()
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import GRPCCore
internal import Journal
internal import Linux
internal import ShimClient
internal import Volumes
internal import SwiftProtobuf
internal import Workspaces
internal import WireMapping

/// `carrel.v1.WorkspaceService`, as a thin layer over `Node`.
struct WorkspaceService: Carrel_V1_WorkspaceService.SimpleServiceProtocol {
  let node: Node

  func launch(request: Carrel_V1_LaunchRequest, context: ServerContext) async throws -> Carrel_V1_LaunchResponse {
    try await node.answer("Launch") { try await RequestHandler(node: node).handle(request) }
  }

  func get(request: Carrel_V1_GetRequest, context: ServerContext) async throws -> Carrel_V1_GetResponse {
    try await node.answer("Get") {
      let (record, token, tool) = try await node.get(request.id)
      return .with { $0.workspace = Carrel_V1_Workspace(record, tool: tool, token: token) }
    }
  }

  func list(request: Carrel_V1_ListRequest, context: ServerContext) async throws -> Carrel_V1_ListResponse {
    try await node.answer("List") {
      let states = Set(try request.states.map { try $0.domain() })
      let records = await node.list(
        labels: request.labels, owner: request.owner.isEmpty ? nil : request.owner, states: states)
      return .with { $0.workspaces = records.map { Carrel_V1_Workspace($0, tool: nil, token: nil) } }
    }
  }

  func stop(request: Carrel_V1_StopRequest, context: ServerContext) async throws -> Carrel_V1_StopResponse {
    // A stop goes on without its client, and then there is no call: the clients of long grace periods would use up the calls of a node.
    try await untilCancelled(context) {
      try await node.answer("Stop", within: CallLimit.stop) { try await RequestHandler(node: node).handle(request) }
    }
  }

  func delete(request: Carrel_V1_DeleteRequest, context: ServerContext) async throws -> Carrel_V1_DeleteResponse {
    try await node.answer("Delete") { try await RequestHandler(node: node).handle(request) }
  }

  func snapshot(request: Carrel_V1_SnapshotRequest, context: ServerContext) async throws -> Carrel_V1_SnapshotResponse {
    try await node.answer("Snapshot") { try await Carrel_V1_SnapshotResponse(node.journal) }
  }

  func acknowledge(request: Carrel_V1_AcknowledgeRequest, context: ServerContext) async throws -> Carrel_V1_AcknowledgeResponse {
    try await node.answer("Acknowledge") {
      guard request.streamID == node.journal.streamID else {
        throw AgentError(.outOfRange, "stream_id: this agent's stream is \(node.journal.streamID)")
      }
      guard let sequence = Int64(exactly: request.sequence) else { throw AgentError(.outOfRange, "sequence: is above the head") }
      try await node.acknowledge(sequence)
      return Carrel_V1_AcknowledgeResponse()
    }
  }

  func stats(request: Carrel_V1_StatsRequest, context: ServerContext) async throws -> Carrel_V1_StatsResponse {
    try await node.answer("Stats") {
      let all = try await node.usage(request.ids)
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
    try await node.answer("UpdateCredentials") { try await RequestHandler(node: node).handle(request) }
  }

  func revokeCredentials(
    request: Carrel_V1_RevokeCredentialsRequest, context: ServerContext
  ) async throws -> Carrel_V1_RevokeCredentialsResponse {
    try await node.answer("RevokeCredentials") { try await RequestHandler(node: node).handle(request) }
  }

  func removeCredentials(
    request: Carrel_V1_RemoveCredentialsRequest, context: ServerContext
  ) async throws -> Carrel_V1_RemoveCredentialsResponse {
    try await node.answer("RemoveCredentials") { try await RequestHandler(node: node).handle(request) }
  }

  func plan(request: Carrel_V1_PlanRequest, context: ServerContext) async throws -> Carrel_V1_PlanResponse {
    try await node.answer("Plan") {
      let spec: WorkspaceSpec
      switch request.source {
      case .spec(let wire): spec = try WorkspaceSpec(wire)
      case .manifest(let text): spec = try WorkspaceSpec(yaml: text)
      case nil: throw AgentError(field: "source", "expected a spec or a manifest")
      }
      let operations = try await node.plan(spec)
      return .with { $0.operations = operations }
    }
  }

  // ------------------------------------------------------------------ streams

  func watch(
    request: Carrel_V1_WatchRequest, response: RPCWriter<Carrel_V1_WatchResponse>, context: ServerContext
  ) async throws {
    try await untilCancelled(context) { try await watch(request, response) }
  }

  private func watch(_ request: Carrel_V1_WatchRequest, _ response: RPCWriter<Carrel_V1_WatchResponse>) async throws {
    let journal = node.journal
    let head = try await journal.head()
    if !request.streamID.isEmpty, request.streamID != journal.streamID {
      throw RPCError(
        code: .outOfRange, message: "stream_id: this agent's stream is \(journal.streamID), head \(head); begin again at 0")
    }
    guard request.cursor <= UInt64(head) else {
      throw RPCError(code: .outOfRange, message: "cursor: \(request.cursor) is above the head, \(head)")
    }
    var cursor = Int64(request.cursor)
    // The subscription precedes the first read, so that no event is missed between read and wait.
    let changes = node.feed.changes()
    var iterator = changes.makeAsyncIterator()
    let workspace = request.workspace.isEmpty ? nil : request.workspace
    while !Task.isCancelled {
      while true {
        let page = try await journal.page(after: cursor, workspace: workspace, limit: 256)
        // Events that are trimmed while a slow watcher reads are a gap, as are those trimmed before.
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
      try await untilCancelled(context) { try await logs(request, response) }
    } catch {
      throw RPCError(error)
    }
  }

  private func logs(_ request: Carrel_V1_LogsRequest, _ response: RPCWriter<Carrel_V1_LogsResponse>) async throws {
    let reader = try await node.log(request.id)
    var offset = request.offset
    while !Task.isCancelled {
      // The end is checked before the read, so that everything written before the end is read.
      let ended = await node.state(request.id)?.isTerminal ?? true
      while let chunk = try await node.read(reader, from: offset) {
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
  }

  func exec(
    request: RPCAsyncSequence<Carrel_V1_ExecRequest, any Error>, response: RPCWriter<Carrel_V1_ExecResponse>,
    context: ServerContext
  ) async throws {
    do {
      let by = PeerInterceptor.caller ?? "unknown"
      try await untilCancelled(context) { try await ExecStream(node: node, response: response, by: by).run(request) }
    } catch {
      throw RPCError(error)
    }
  }
}

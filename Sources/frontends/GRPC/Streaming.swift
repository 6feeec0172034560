// SPDX-License-Identifier: Apache-2.0

internal import Agent
internal import Concurrency
internal import GRPCCore
internal import WireMapping

/// Runs `body`, and cancels it when its client disconnects or the server begins to shut down, of which gRPC notifies a handler without
/// cancelling its task.
func untilCancelled<Reply: Sendable>(_ context: ServerContext, _ body: @escaping @Sendable () async throws -> Reply) async throws -> Reply {
  try await withThrowingTaskGroup(of: Reply.self) { group in
    group.addTask { try await body() }
    group.addTask {
      try await context.cancellation.cancelled
      throw shutdown
    }
    defer { group.cancelAll() }
    guard let reply = try await group.next() else { throw shutdown }
    return reply
  }
}

/// A client that is still connected may retry, and the next agent replies.
private let shutdown = RPCError(code: .unavailable, message: "the agent shuts down; retry")

extension Node {
  /// Runs a call that reports progress: sends each report to `write` and the result to `finish`. The work belongs to the node's
  /// `CallRegistry`, and continues as far as it must after its client has disconnected.
  nonisolated func relay<Progress: Sendable, Result: Sendable>(
    _ call: String, _ context: ServerContext, _ write: @escaping @Sendable (Progress) async throws -> Void,
    _ body: @escaping @Sendable (@escaping @Sendable (Progress) -> Void) async throws -> Result,
    finish: @escaping @Sendable (Result) async throws -> Void
  ) async throws {
    do {
      try await untilCancelled(context) {
        // Reports that a slow client does not read are dropped, the oldest first.
        let (progress, continuation) = AsyncStream<Progress>.makeStream(bufferingPolicy: .bufferingNewest(64))
        let result = try await withThrowingTaskGroup(of: Void.self) { group in
          group.addTask { for await step in progress { try await write(step) } }
          defer { continuation.finish() }
          let result = try await self.calls.run(call, within: CallLimit.copy) { try await body { continuation.yield($0) } }
          continuation.finish()
          try await group.waitForAll()
          return result
        }
        try await finish(result)
      }
    } catch {
      throw RPCError(error)
    }
  }
}

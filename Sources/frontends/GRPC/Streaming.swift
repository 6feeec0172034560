// SPDX-License-Identifier: Apache-2.0

internal import Agent
internal import Concurrency
internal import GRPCCore
internal import WireMapping

/// Runs `body` until it ends, or until its client has gone or the server begins to shut down: gRPC tells a handler of that and does not
/// cancel its task. `body` is then cancelled.
func untilCancelled(_ context: ServerContext, _ body: @escaping @Sendable () async throws -> Void) async throws {
  try await withThrowingTaskGroup(of: Void.self) { group in
    group.addTask { try await body() }
    group.addTask {
      try await context.cancellation.cancelled
      // A client that is still there may try again: the next agent answers it.
      throw RPCError(code: .unavailable, message: "the agent ends; retry")
    }
    defer { group.cancelAll() }
    try await group.next()
  }
}

extension Node {
  /// Runs a call that says how far it has come: what it reports goes to `write`, its result is returned. The work belongs to the node's
  /// calls, and goes on as far as it has to where its client leaves.
  nonisolated func relay<Progress: Sendable, Result: Sendable>(
    _ call: String, _ context: ServerContext, _ write: @escaping @Sendable (Progress) async throws -> Void,
    _ body: @escaping @Sendable (@escaping @Sendable (Progress) -> Void) async throws -> Result,
    finish: @escaping @Sendable (Result) async throws -> Void
  ) async throws {
    do {
      try await untilCancelled(context) {
        // What a slow client does not read is passed over.
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

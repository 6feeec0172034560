// SPDX-License-Identifier: Apache-2.0

package import Agent
internal import Concurrency
internal import GRPCCore
internal import Logging

/// The limits of calls. The caller has a reply at the limit even if the work does not end; that work belongs to the node's
/// `CallRegistry`, which counts it, and `carrel node` shows it.
package enum CallLimit {
  package static let standard = Duration.seconds(30)
  /// A stop takes as long as its grace period, which is at most an hour.
  package static let stop = Duration.seconds(3660)
  /// Reads that walk over homes or the whole journal, and growth of a file system.
  package static let long = Duration.seconds(600)
  /// Copies of packages, homes and images.
  package static let copy = Duration.seconds(24 * 3600)
  /// The time from the request to the start of a program. Its run time is not limited.
  package static let execStart = Duration.seconds(15)
}

extension Node {
  /// Runs a call within its limit, and converts its errors to gRPC's. Errors of the agent itself are logged, with where they came from.
  package nonisolated func answer<T: Sendable>(
    _ call: String, within limit: Duration = CallLimit.standard, _ body: @escaping @Sendable () async throws -> T
  ) async throws -> T {
    do { return try await calls.run(call, within: limit, body) } catch {
      if let error = error as? AgentError, error.code == .internal {
        services.logger.error(
          "a call failed",
          metadata: [
            "call": "\(call)", "error": "\(error)", "at": "\(error.location)", "cause": "\(error.cause.map { "\($0)" } ?? "")",
          ])
      }
      throw RPCError(error)
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Agent
internal import Concurrency
internal import GRPCCore

/// How long calls may take, on one page. A call is answered at its limit even where what is below does not end; what goes on belongs to
/// the node's `CallRegistry`, is counted there, and is shown by `carrel node`.
package enum CallLimit {
  package static let standard = Duration.seconds(30)
  /// A grace period has at most an hour.
  package static let stop = Duration.seconds(3660)
  /// Reads that walk over homes or the whole journal, and growth of a file system.
  package static let long = Duration.seconds(600)
  /// Copies of packages, homes and images.
  package static let copy = Duration.seconds(24 * 3600)
  /// From the request to the start of a further program; how long it runs is its own affair.
  package static let execStart = Duration.seconds(15)
}

extension Node {
  /// Runs a call within its limit, and turns its errors into gRPC's.
  package nonisolated func answer<T: Sendable>(
    _ call: String, within limit: Duration = CallLimit.standard, _ body: @escaping @Sendable () async throws -> T
  ) async throws -> T {
    do { return try await calls.run(call, within: limit, body) } catch { throw RPCError(error) }
  }
}

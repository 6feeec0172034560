// SPDX-License-Identifier: Apache-2.0

/// Runs `body` to its end even if the calling task is cancelled, and then returns: for work that must not be left incomplete.
package func uncancelled<T: Sendable, E: Error>(_ body: @escaping @Sendable () async throws(E) -> T) async throws(E) -> T {
  let task = Task { () async -> Result<T, E> in
    do throws(E) { return .success(try await body()) } catch { return .failure(error) }
  }
  return try await task.value.get()
}

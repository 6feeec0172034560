// SPDX-License-Identifier: Apache-2.0

/// Runs `body` to its end also where the calling task is cancelled, and returns when it has ended: for what must not be left half done.
package func uncancelled<T: Sendable, E: Error>(_ body: @escaping @Sendable () async throws(E) -> T) async throws(E) -> T {
  let task = Task { () async -> Result<T, E> in
    do throws(E) { return .success(try await body()) } catch { return .failure(error) }
  }
  return try await task.value.get()
}

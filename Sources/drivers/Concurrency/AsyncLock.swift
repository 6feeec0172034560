// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// Mutual exclusion between tasks, in FIFO order. A cancelled task stops waiting.
package final class AsyncLock: Sendable {
  private struct State {
    var isHeld = false
    var waiting: [Promise<Void>] = []
  }
  private let state = Mutex(State())

  package init() {}

  /// Runs `body` while it holds the lock; throws `late` if the lock is not acquired within `limit`.
  package func whileHeld<T: Sendable>(
    within limit: Duration, else late: @autoclosure @escaping @Sendable () -> any Error, _ body: () async throws -> T
  ) async throws -> T {
    let turn = Promise<Void>()
    let isFirst = state.withLock { state in
      if !state.isHeld {
        state.isHeld = true
        return true
      }
      state.waiting.append(turn)
      return false
    }
    if !isFirst {
      do {
        try await turn.value(within: limit, else: late())
      } catch {
        // The lock may have been handed to this task in the meantime: it is released to the next one.
        let wasHandedOver = state.withLock { state in
          guard let index = state.waiting.firstIndex(where: { $0 === turn }) else { return true }
          state.waiting.remove(at: index)
          return false
        }
        if wasHandedOver { release() }
        throw error
      }
    }
    defer { release() }
    return try await body()
  }

  private func release() {
    let next = state.withLock { state -> Promise<Void>? in
      guard !state.waiting.isEmpty else {
        state.isHeld = false
        return nil
      }
      return state.waiting.removeFirst()
    }
    next?.fulfil(.success(()))
  }
}

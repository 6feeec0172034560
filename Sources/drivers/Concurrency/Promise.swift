// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// A result that is set once; later ones are ignored. Several tasks may await it, and a cancelled one stops waiting.
package final class Promise<T: Sendable>: Sendable {
  private struct State {
    var result: Result<T, any Error>?
    var waiting: [UInt64: CheckedContinuation<Result<T, any Error>, Never>] = [:]
    var next: UInt64 = 0
    /// The numbers of the waiters that were cancelled before they began to wait.
    var cancelled: Set<UInt64> = []
  }

  private let state: Mutex<State>

  package init() { state = Mutex(State()) }

  /// Creates a promise that is fulfilled already.
  package init(_ value: T) { state = Mutex(State(result: .success(value))) }

  package var isFulfilled: Bool { state.withLock { $0.result != nil } }

  package func fulfil(_ result: Result<T, any Error>) {
    let waiting = state.withLock { state -> [CheckedContinuation<Result<T, any Error>, Never>] in
      guard state.result == nil else { return [] }
      state.result = result
      defer { state.waiting = [:] }
      return Array(state.waiting.values)
    }
    for continuation in waiting { continuation.resume(returning: result) }
  }

  /// The result, once it is set. Throws `CancellationError` when the waiting task is cancelled.
  package var value: T {
    get async throws {
      let number = state.withLock { state in
        state.next += 1
        return state.next
      }
      let result = await withTaskCancellationHandler {
        await withCheckedContinuation { (continuation: CheckedContinuation<Result<T, any Error>, Never>) in
          let now = state.withLock { state -> Result<T, any Error>? in
            if let result = state.result { return result }
            if state.cancelled.remove(number) != nil { return .failure(CancellationError()) }
            state.waiting[number] = continuation
            return nil
          }
          if let now { continuation.resume(returning: now) }
        }
      } onCancel: {
        let waiter = state.withLock { state -> CheckedContinuation<Result<T, any Error>, Never>? in
          guard state.result == nil else { return nil }
          guard let waiter = state.waiting.removeValue(forKey: number) else {
            state.cancelled.insert(number)
            return nil
          }
          return waiter
        }
        waiter?.resume(returning: .failure(CancellationError()))
      }
      return try result.get()
    }
  }

  /// The result, once it is set, even in a cancelled task: for a result that the caller needs before it can continue.
  package var valueWhateverHappens: T {
    get async throws {
      let result = await withCheckedContinuation { (continuation: CheckedContinuation<Result<T, any Error>, Never>) in
        let now = state.withLock { state -> Result<T, any Error>? in
          if let result = state.result { return result }
          state.next += 1
          state.waiting[state.next] = continuation
          return nil
        }
        if let now { continuation.resume(returning: now) }
      }
      return try result.get()
    }
  }

  /// Waits up to `limit` for the result, and then throws `late`.
  package func value(within limit: Duration, else late: @autoclosure @escaping @Sendable () -> any Error) async throws -> T {
    if let result = state.withLock({ $0.result }) { return try result.get() }
    return try await withThrowingTaskGroup(of: T.self) { group in
      // Both children end on cancellation, so that this returns in time.
      group.addTask { try await self.value }
      group.addTask {
        try await Task.sleep(for: limit)
        throw late()
      }
      defer { group.cancelAll() }
      guard let first = try await group.next() else { throw late() }
      return first
    }
  }
}

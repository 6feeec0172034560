// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// A call that had no result by its deadline.
package struct DeadlineExceeded: Error, Equatable, Sendable, CustomStringConvertible {
  package let call: String
  package let limit: Duration
  package var description: String {
    "\(call): no result within \(limit.components.seconds) s, the limit of this call; its work may still complete"
  }
}

/// The limit of calls in progress is reached.
package struct TooManyCalls: Error, Equatable, Sendable, CustomStringConvertible {
  package let limit: Int
  package var description: String { "\(limit) calls in progress (limit \(limit)); retry later" }
}

/// Owns the work of calls, so that each has a reply at its deadline even if the work does not honour cancellation. Work that outlives its
/// deadline is counted, bounded and named here.
package final class CallRegistry: Sendable {
  private struct Call {
    let name: String
    var isOverdue = false
    var task: Task<Void, Never>?
  }

  private struct State {
    var calls: [UInt64: Call] = [:]
    var next: UInt64 = 0
  }

  package struct Gauge: Sendable {
    package let running: Int
    /// The names of the calls whose deadline has passed.
    package let overdue: [String]
  }

  private let limit: Int
  private let state = Mutex(State())

  package init(limit: Int) { self.limit = limit }

  package var gauge: Gauge {
    state.withLock { state in
      Gauge(running: state.calls.count, overdue: state.calls.values.filter(\.isOverdue).map(\.name).sorted())
    }
  }

  /// Runs `body` and returns its result. Throws `DeadlineExceeded` after `limit`, or `CancellationError` if the caller is cancelled; in
  /// both cases the body is cancelled, and continues if it does not honour cancellation.
  package func run<T: Sendable>(
    _ name: String, within limit: Duration, _ body: @escaping @Sendable () async throws -> T
  ) async throws -> T {
    let promise = Promise<T>()
    let number = try begin(name)
    let task = Task {
      let result: Result<T, any Error>
      do { result = .success(try await body()) } catch { result = .failure(error) }
      // The call is removed from the count before its caller continues.
      end(number)
      promise.fulfil(result)
    }
    state.withLock { $0.calls[number]?.task = task }
    do {
      return try await promise.value(within: limit, else: DeadlineExceeded(call: name, limit: limit))
    } catch {
      if !promise.isFulfilled {
        state.withLock { $0.calls[number]?.isOverdue = true }
        task.cancel()
      }
      throw error
    }
  }

  private func begin(_ name: String) throws(TooManyCalls) -> UInt64 {
    let number = state.withLock { state -> UInt64? in
      guard state.calls.count < limit else { return nil }
      state.next += 1
      state.calls[state.next] = Call(name: name)
      return state.next
    }
    guard let number else { throw TooManyCalls(limit: limit) }
    return number
  }

  private func end(_ number: UInt64) { state.withLock { _ = $0.calls.removeValue(forKey: number) } }

  /// Cancels all calls, when the agent exits.
  package func cancelAll() { for task in state.withLock({ $0.calls.values.map(\.task) }) { task?.cancel() } }
}

// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// The first answer that is given; those after it are not heard.
final class Answer<T: Sendable>: Sendable {
  private enum State {
    case asked
    case awaited(CheckedContinuation<Result<T, any Error>, Never>)
    case given(Result<T, any Error>)
  }
  private let state = Mutex(State.asked)

  func give(_ result: Result<T, any Error>) {
    let waiting: CheckedContinuation<Result<T, any Error>, Never>? = state.withLock { state in
      switch state {
      case .given: return nil
      case .asked:
        state = .given(result)
        return nil
      case .awaited(let continuation):
        state = .given(result)
        return continuation
      }
    }
    waiting?.resume(returning: result)
  }

  /// For one who waits; `late` is the answer where none is given within `limit`.
  func value(within limit: Duration?, late: @autoclosure @escaping @Sendable () -> any Error) async throws -> T {
    let timer = limit.map { limit in
      Task {
        try await Task.sleep(for: limit)
        give(.failure(late()))
      }
    }
    defer { timer?.cancel() }
    return try await value
  }

  /// For one who waits.
  var value: T {
    get async throws { try await result.get() }
  }

  private var result: Result<T, any Error> {
    get async {
      await withCheckedContinuation { continuation in
        let given: Result<T, any Error>? = state.withLock { state in
          if case .given(let result) = state { return result }
          state = .awaited(continuation)
          return nil
        }
        if let given { continuation.resume(returning: given) }
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// Notifies watchers that the journal has grown. They read the events themselves: the disk is the queue, so a slow watcher costs no memory
/// and delays no other.
package final class EventFeed: Sendable {
  private struct State {
    var next = 0
    var watchers: [Int: AsyncStream<Void>.Continuation] = [:]
  }
  private let state = Mutex(State())

  func announce() {
    for watcher in state.withLock({ Array($0.watchers.values) }) { watcher.yield() }
  }

  /// Returns a stream with an element whenever there may be something new; several notifications merge into one.
  package func changes() -> AsyncStream<Void> {
    let (stream, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
    let id = state.withLock { state in
      state.next += 1
      state.watchers[state.next] = continuation
      return state.next
    }
    continuation.onTermination = { [weak self] _ in self?.state.withLock { $0.watchers[id] = nil } }
    return stream
  }
}

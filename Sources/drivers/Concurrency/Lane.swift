// SPDX-License-Identifier: Apache-2.0

internal import Dispatch
internal import Synchronization

/// The reason why a lane refused work or did not finish it.
package enum LaneError: Error, Equatable, Sendable, CustomStringConvertible {
  /// The queue is full.
  case full(lane: String, queued: Int)
  /// All threads have been in the same calls for longer than the lane's patience.
  case stuck(lane: String, threads: Int, seconds: Int64)
  /// The work did not finish within the caller's limit.
  case slow(lane: String, seconds: Int64)

  package var description: String {
    switch self {
    case .full(let lane, let queued): "\(lane): \(queued) requests are waiting, which is the limit; retry later"
    case .stuck(let lane, _, _), .slow(let lane, _): "\(lane) \(problem)"
    }
  }

  /// The description without the lane's name, to follow the name of the lane's object in a message.
  package var problem: String {
    switch self {
    case .full(_, let queued): "is busy: \(queued) requests are waiting, which is the limit; retry later"
    case .stuck(_, let threads, let seconds): "does not respond: \(threads) operations have been waiting for it for up to \(seconds) s"
    case .slow(_, let seconds): "does not respond within \(seconds) s"
    }
  }
}

/// A bounded pool of threads, with a bounded queue, for one kind of blocking work. Work in one lane never waits for work in another.
package final class Lane: Sendable {
  /// The current load of a lane.
  package struct Gauge: Sendable {
    package let name: String
    package let width: Int
    package let running: Int
    package let queued: Int
    /// The time that the oldest work has been running, in seconds.
    package let oldestSeconds: Double
    /// Whether that is longer than any work of this lane should take.
    package let isOverdue: Bool
  }

  private struct State {
    /// The FIFO queue; `head` is the index of the next to run.
    var queue: [@Sendable () -> Void] = []
    var head = 0
    var idle: [DispatchQueue]
    /// The start time of each running work, keyed by its number.
    var running: [UInt64: ContinuousClock.Instant] = [:]
    var next: UInt64 = 0
    var queued: Int { queue.count - head }

    /// Returns the amount of queued work for which no thread is available; a thread that is starting up will run one queued item.
    func waiting(_ width: Int) -> Int { max(0, queued - (width - idle.count - running.count)) }
  }

  package let name: String
  package let width: Int
  private let queueLimit: Int
  /// The time that all threads may be in the same calls before more work is refused as stuck; nil: no limit.
  private let patience: Duration?
  private let state: Mutex<State>

  package init(_ name: String, width: Int, queue queueLimit: Int, patience: Duration? = nil) {
    self.name = name
    self.width = width
    self.queueLimit = queueLimit
    self.patience = patience
    // A serial queue has a thread of its own while it has work, and waits for one if the kernel refuses it; a Foundation Thread reports no
    // error then and never runs.
    state = Mutex(State(idle: (0..<width).map { DispatchQueue(label: "carrel.\(name).\($0)") }))
  }

  package var gauge: Gauge {
    state.withLock { state in
      let oldest = state.running.values.min().map { $0.duration(to: .now) } ?? .zero
      return Gauge(
        name: name, width: width, running: state.running.count, queued: state.waiting(width), oldestSeconds: Lane.seconds(oldest),
        isOverdue: patience.map { oldest > $0 } ?? false)
    }
  }

  package var isIdle: Bool { state.withLock { $0.running.isEmpty && $0.queued == 0 } }

  private static func seconds(_ duration: Duration) -> Double {
    Double(duration.components.seconds) + Double(duration.components.attoseconds) / 1e18
  }

  /// Runs `body` on one of the lane's threads. A cancelled task stops waiting; its body continues and still occupies the thread. Throws
  /// `LaneError` if the lane refuses the work.
  package func run<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
    let promise = Promise<T>()
    try start { promise.fulfil(Result { try body() }) }
    return try await promise.value
  }

  /// Runs `body` in the same way, and throws `LaneError.slow` after `limit`.
  package func run<T: Sendable>(within limit: Duration, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    let promise = Promise<T>()
    try start { promise.fulfil(Result { try body() }) }
    return try await promise.value(
      within: limit, else: LaneError.slow(lane: self.name, seconds: limit.components.seconds))
  }

  private func start(_ body: @escaping @Sendable () -> Void) throws(LaneError) {
    let outcome = state.withLock { state -> Result<DispatchQueue?, LaneError> in
      if state.idle.isEmpty {
        if let patience, let youngest = state.running.values.max(), let oldest = state.running.values.min(),
          youngest.duration(to: .now) > patience
        {
          return .failure(.stuck(lane: name, threads: state.running.count, seconds: oldest.duration(to: .now).components.seconds))
        }
        let waiting = state.waiting(width)
        guard waiting < queueLimit else { return .failure(.full(lane: name, queued: waiting)) }
      }
      state.queue.append(body)
      return .success(state.idle.popLast())
    }
    if let worker = try outcome.get() { worker.async { [self] in drain(worker) } }
  }

  private func drain(_ worker: DispatchQueue) {
    while true {
      let work = state.withLock { state -> (@Sendable () -> Void, UInt64)? in
        guard state.queued > 0 else {
          state.queue = []
          state.head = 0
          state.idle.append(worker)
          return nil
        }
        let work = state.queue[state.head]
        state.head += 1
        if state.head > 64, state.head * 2 > state.queue.count {
          state.queue.removeFirst(state.head)
          state.head = 0
        }
        state.next += 1
        state.running[state.next] = .now
        return (work, state.next)
      }
      guard let (body, number) = work else { return }
      body()
      state.withLock { _ = $0.running.removeValue(forKey: number) }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

import Foundation
import Synchronization
import Testing

@testable import Concurrency

/// Blocks a thread until it is opened.
final class Gate: Sendable {
  private let semaphore = DispatchSemaphore(value: 0)
  func wait() { semaphore.wait() }
  func open(_ count: Int = 1) { for _ in 0..<count { semaphore.signal() } }
}

@Suite("Lanes, calls and promises") struct ConcurrencyTests {
  @Test("a promise keeps its first result, for all who wait") func promise() async throws {
    let promise = Promise<Int>()
    async let first = promise.value
    async let second = promise.value
    promise.fulfil(.success(7))
    promise.fulfil(.success(8))
    #expect(try await first == 7)
    #expect(try await second == 7)
    #expect(try await promise.value(within: .zero, else: CancellationError()) == 7)
  }

  @Test("who is cancelled waits no longer, and who waits whatever happens does") func cancelled() async throws {
    let promise = Promise<Int>()
    let patient = Task { try await promise.valueWhateverHappens }
    let waiting = Task { try await promise.value }
    patient.cancel()
    waiting.cancel()
    await #expect(throws: CancellationError.self) { try await waiting.value }
    promise.fulfil(.success(1))
    #expect(try await patient.value == 1)
  }

  @Test("a lane runs as much at once as it is wide, and refuses what its queue does not hold") func bounds() async throws {
    let lane = Lane("test", width: 2, queue: 1)
    let gate = Gate()
    let running = (0..<3).map { _ in Task { try await lane.run { gate.wait() } } }
    while lane.gauge.running < 2 || lane.gauge.queued < 1 { try await Task.sleep(for: .milliseconds(1)) }
    await #expect(throws: LaneError.full(lane: "test", queued: 1)) { try await lane.run {} }
    gate.open(3)
    for task in running { try await task.value }
    try await lane.run {}
    #expect(lane.gauge.queued == 0)
  }

  @Test("a lane whose threads are all stuck refuses at once") func stuck() async throws {
    let lane = Lane("dead", width: 1, queue: 10, patience: .milliseconds(20))
    let gate = Gate()
    let hanging = Task { try await lane.run { gate.wait() } }
    while lane.gauge.running < 1 { try await Task.sleep(for: .milliseconds(1)) }
    try await Task.sleep(for: .milliseconds(40))
    await #expect(throws: LaneError.self) { try await lane.run {} }
    gate.open()
    try await hanging.value
  }

  @Test("one file system that hangs takes nothing from another") func fileSystems() async throws {
    let lanes = FileSystemLanes("storage", width: 1, queue: 4, patience: nil)
    func lane(for path: String) -> Lane { lanes.lane(for: path, among: ["/", "/homes", "/homes/dead"]) }
    let gate = Gate()
    let dead = lane(for: "/homes/dead/ada")
    let hanging = Task { try await dead.run { gate.wait() } }
    #expect(lane(for: "/homes/grace") !== dead)
    #expect(lane(for: "/homes/deadly") === lane(for: "/homes"))
    #expect(try await lane(for: "/homes/grace").run { 3 } == 3)
    gate.open()
    try await hanging.value
  }

  @Test("a call is answered at its limit, and what goes on is counted until it ends") func deadline() async throws {
    let calls = CallRegistry(limit: 2)
    let lane = Lane("slow", width: 1, queue: 4)
    let gate = Gate()
    await #expect(throws: DeadlineExceeded.self) {
      // The thread does not honour the cancellation.
      try await calls.run("Slow", within: .milliseconds(20)) { try await lane.run { gate.wait() } }
    }
    let stubborn = Promise<Void>()
    await #expect(throws: DeadlineExceeded.self) {
      try await calls.run("Stubborn", within: .milliseconds(20)) { try await stubborn.valueWhateverHappens }
    }
    #expect(calls.gauge.overdue == ["Stubborn"])
    #expect(try await calls.run("Quick", within: .seconds(5)) { 5 } == 5)
    stubborn.fulfil(.success(()))
    while calls.gauge.running > 0 { try await Task.sleep(for: .milliseconds(1)) }
    gate.open()
  }

  @Test("as many calls run as may, and no more") func calls() async throws {
    let calls = CallRegistry(limit: 1)
    let hold = Promise<Void>()
    let first = Task { try await calls.run("First", within: .seconds(10)) { try await hold.value } }
    while calls.gauge.running < 1 { try await Task.sleep(for: .milliseconds(1)) }
    await #expect(throws: TooManyCalls.self) { try await calls.run("Second", within: .seconds(1)) {} }
    hold.fulfil(.success(()))
    try await first.value
  }

  @Test("a lock is held by one at a time, in order, and a waiter that gives up does not take it along") func lock() async throws {
    let lock = AsyncLock()
    let hold = Promise<Void>()
    let entered = Promise<Void>()
    let first = Task {
      try await lock.whileHeld(within: .seconds(1), else: CancellationError()) {
        entered.fulfil(.success(()))
        try await hold.value
      }
    }
    try await entered.value
    await #expect(throws: DeadlineExceeded.self) {
      try await lock.whileHeld(within: .milliseconds(10), else: DeadlineExceeded(call: "x", limit: .zero)) {}
    }
    hold.fulfil(.success(()))
    try await first.value
    #expect(try await lock.whileHeld(within: .seconds(1), else: CancellationError()) { 4 } == 4)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux
internal import Synchronization

/// Waits for descriptors on one thread of its own, so that no task blocks a thread while it waits.
///
/// Dispatch is not used: its epoll back end sometimes misses the EOF of a Unix socket that follows immediately after a message (seen with
/// Swift 6.3.1 in one of four cases), and after a missed EOF a workspace never stops.
final class Readiness: Sendable {
  static let shared = Readiness()

  private struct Watch {
    let file: Handle
    let serial: UInt64
    /// The function that the thread calls when the descriptor is ready. It returns false to end the watch.
    let ready: @Sendable () -> Bool
  }

  /// The identity of one watch, unique even after its descriptor number is reused.
  struct Token: Sendable {
    fileprivate let number: Int32
    fileprivate let serial: UInt64
  }

  private let queue: ReadinessQueue
  private let watches = Mutex<(all: [Int32: Watch], serial: UInt64)>(([:], 0))

  private init() {
    do throws(Errno) { queue = try ReadinessQueue() } catch { fatalError("epoll: \(error.sentence)") }
    // A queue, because a Foundation Thread that the kernel refuses reports no error and never runs.
    DispatchQueue(label: "carrel.ready").async { [self] in while true { turn() } }
  }

  private func turn() {
    guard let ready = try? queue.wait() else { return }
    for number in ready {
      guard let watch = watches.withLock({ $0.all[number] }) else { continue }
      if !watch.ready() { cancel(Token(number: number, serial: watch.serial)) }
    }
  }

  /// Ends a watch.
  func cancel(_ token: Token) {
    let watch = watches.withLock { watches -> Watch? in
      guard watches.all[token.number]?.serial == token.serial else { return nil }
      return watches.all.removeValue(forKey: token.number)
    }
    if let watch { queue.remove(watch.file.descriptor) }
  }

  /// Watches until `ready` returns false. The descriptor is duplicated, so that a file can have several watches and stays open while it
  /// is watched.
  @discardableResult
  func watch(_ handle: Handle, writing: Bool = false, _ ready: @escaping @Sendable () -> Bool) throws(Errno) -> Token {
    let file = Handle(try handle.descriptor.duplicate())
    let number = file.descriptor.number
    let serial = watches.withLock { watches in
      watches.serial += 1
      watches.all[number] = Watch(file: file, serial: watches.serial, ready: ready)
      return watches.serial
    }
    do throws(Errno) {
      try queue.add(file.descriptor, writing: writing)
    } catch {
      _ = watches.withLock { $0.all.removeValue(forKey: number) }
      throw error
    }
    return Token(number: number, serial: serial)
  }

  /// Receives messages until `received` returns false. A nil message, passed once, means that the connection has closed or failed.
  func receive(_ connection: Handle, _ received: @escaping @Sendable (Socket.Message?) -> Bool) throws(Errno) {
    try watch(connection) {
      do throws(Errno) {
        guard let message = try Socket.receive(connection.descriptor, wait: false) else {
          _ = received(nil)
          return false
        }
        return received(message)
      } catch {
        if error == .again { return true }
        _ = received(nil)
        return false
      }
    }
  }

  /// Waits until the descriptor is ready, or the task is cancelled.
  static func wait(_ handle: Handle, writing: Bool) async {
    let turn = Turn()
    let cannotWatch = Mutex(false)
    await withTaskCancellationHandler {
      await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
        guard turn.wait(continuation) else { return continuation.resume() }
        do throws(Errno) {
          turn.use(
            try shared.watch(handle, writing: writing) {
              turn.end()
              return false
            })
        } catch {
          // EPERM: a regular file, which never blocks. Any other error is a shortage, for example of descriptors.
          cannotWatch.withLock { $0 = error != .perm }
          turn.end()
        }
      }
    } onCancel: {
      turn.end()
    }
    if cannotWatch.withLock({ $0 }) { try? await Task.sleep(for: .milliseconds(20)) }
  }

  /// One wait, which ends once and ends its watch.
  private final class Turn: Sendable {
    private struct State {
      var continuation: CheckedContinuation<Void, Never>?
      var token: Token?
      var hasEnded = false
    }
    private let state = Mutex(State())

    /// Stores the continuation; returns false if the wait has ended already.
    func wait(_ continuation: CheckedContinuation<Void, Never>) -> Bool {
      state.withLock { state in
        if state.hasEnded { return false }
        state.continuation = continuation
        return true
      }
    }

    func use(_ token: Token) {
      let hasEnded = state.withLock { state in
        state.token = token
        return state.hasEnded
      }
      if hasEnded { shared.cancel(token) }
    }

    func end() {
      let (continuation, token) = state.withLock { state in
        state.hasEnded = true
        defer { state.continuation = nil }
        return (state.continuation, state.token)
      }
      if let token { shared.cancel(token) }
      continuation?.resume()
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux
internal import Synchronization

/// Waits for descriptors on one thread of its own, so that no task holds a thread while it waits.
///
/// Not Dispatch: its epoll back end sometimes misses the end of a Unix socket that follows right on a message (seen
/// with Swift 6.3.1 in one of four cases), and an end that is missed is a workspace that never stops.
final class Readiness: Sendable {
  static let shared = Readiness()

  private struct Watch {
    let file: Handle
    let serial: UInt64
    /// Called on the thread when the descriptor is ready; false ends the watch.
    let ready: @Sendable () -> Bool
  }

  /// One watch, also when its descriptor's number has become another's.
  struct Token: Sendable {
    fileprivate let number: Int32
    fileprivate let serial: UInt64
  }

  private let queue: ReadinessQueue
  private let watches = Mutex<(all: [Int32: Watch], serial: UInt64)>(([:], 0))

  private init() {
    do throws(Errno) { queue = try ReadinessQueue() } catch { fatalError("epoll: \(error.sentence)") }
    // A queue and no Thread, which says nothing where the kernel refuses one, and never runs.
    DispatchQueue(label: "carrel.ready").async { [self] in while true { turn() } }
  }

  private func turn() {
    guard let ready = try? queue.wait() else { return }
    for number in ready {
      guard let watch = watches.withLock({ $0.all[number] }) else { continue }
      if !watch.ready() { cancel(Token(number: number, serial: watch.serial)) }
    }
  }

  /// Ends a watch from this side.
  func cancel(_ token: Token) {
    let watch = watches.withLock { watches -> Watch? in
      guard watches.all[token.number]?.serial == token.serial else { return nil }
      return watches.all.removeValue(forKey: token.number)
    }
    if let watch { queue.remove(watch.file.descriptor) }
  }

  /// Watches until `ready` answers false. The descriptor is duplicated: one file can be watched by several, and stays
  /// open for as long as it is watched.
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

  /// Receives messages until `received` answers false. Nil: the connection has ended, or failed; it is called once with that.
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
          // Cannot be watched (a regular file): it never blocks.
          turn.end()
        }
      }
    } onCancel: {
      turn.end()
    }
  }

  /// One wait, which ends once, and its watch with it.
  private final class Turn: Sendable {
    private struct State {
      var continuation: CheckedContinuation<Void, Never>?
      var token: Token?
      var hasEnded = false
    }
    private let state = Mutex(State())

    /// False where it has ended already.
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

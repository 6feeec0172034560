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
    /// Called on the thread when the descriptor is ready; false ends the watch.
    let ready: @Sendable () -> Bool
  }

  private let queue: ReadinessQueue
  private let watches = Mutex<[Int32: Watch]>([:])

  private init() {
    do throws(Errno) { queue = try ReadinessQueue() } catch { fatalError("epoll: \(error.sentence)") }
    // A queue and no Thread, which says nothing where the kernel refuses one, and never runs.
    DispatchQueue(label: "carrel.ready").async { [self] in while true { turn() } }
  }

  private func turn() {
    guard let ready = try? queue.wait() else { return }
    for number in ready {
      guard let watch = watches.withLock({ $0[number] }) else { continue }
      if !watch.ready() { end(number) }
    }
  }

  private func end(_ number: Int32) {
    guard let watch = watches.withLock({ $0.removeValue(forKey: number) }) else { return }
    queue.remove(watch.file.descriptor)
  }

  /// Watches until `ready` answers false. The descriptor is duplicated: one file can be watched by several, and stays
  /// open for as long as it is watched.
  func watch(_ handle: Handle, writing: Bool = false, _ ready: @escaping @Sendable () -> Bool) throws(Errno) {
    let file = Handle(try handle.descriptor.duplicate())
    watches.withLock { $0[file.descriptor.number] = Watch(file: file, ready: ready) }
    do throws(Errno) {
      try queue.add(file.descriptor, writing: writing)
    } catch {
      _ = watches.withLock { $0.removeValue(forKey: file.descriptor.number) }
      throw error
    }
  }

  static func wait(_ handle: Handle, writing: Bool) async {
    await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
      do throws(Errno) {
        try shared.watch(handle, writing: writing) {
          continuation.resume()
          return false
        }
      } catch {
        // Cannot be watched (a regular file): it never blocks.
        continuation.resume()
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization

/// The mount points of this process, which are read again only after the kernel has reported a change (proc_pid_mountinfo(5): POLLPRI).
package final class MountPoints: Sendable {
  private struct State {
    /// Nil after a change, until they are read again.
    var points: [String]?
    /// The number of changes that were reported.
    var changes = 0
  }

  private let changes: Handle?
  private let state = Mutex(State())

  package init() {
    do throws(Errno) { changes = Handle(try Descriptor.open("/proc/self/mountinfo", [.readOnly])) } catch { changes = nil }
  }

  /// The mount points as they are now; nil if they have to be read again. Never blocks.
  package var unchanged: [String]? { look().points }

  /// Reads the mount points if they have changed; waits for a mount or an unmount that is in progress.
  package func current() -> [String] {
    let before = look()
    if let points = before.points { return points }
    let read = MountTable()?.points ?? []
    // A change during this read may have been reported to another caller already: what was read is not kept then.
    state.withLock { if $0.changes == before.changes { $0.points = read } }
    return read
  }

  private func look() -> State {
    state.withLock { state in
      if hasChanged { state = State(points: nil, changes: state.changes + 1) }
      return state
    }
  }

  private var hasChanged: Bool {
    guard let changes else { return true }
    var poller = Poller()
    let index = poller.add(changes, changes: true)
    do throws(Errno) { try poller.wait(milliseconds: 0) } catch { return true }
    return poller.isReady(index)
  }
}

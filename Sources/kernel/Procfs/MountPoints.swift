// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization

/// The mount points of this process, which are read again only after the kernel has reported a change (proc_pid_mountinfo(5): POLLPRI).
package final class MountPoints: Sendable {
  private let changes: Handle?
  /// Nil after a change, until they are read again.
  private let points = Mutex<[String]?>(nil)

  package init() {
    do throws(Errno) { changes = Handle(try Descriptor.open("/proc/self/mountinfo", [.readOnly])) } catch { changes = nil }
  }

  /// The mount points as they are now; nil if they have to be read again. Never blocks.
  package var unchanged: [String]? {
    points.withLock { points in
      if hasChanged { points = nil }
      return points
    }
  }

  /// Reads the mount points if they have changed; waits for a mount or an unmount that is in progress.
  package func current() -> [String] {
    if let points = unchanged { return points }
    // A change during this read is reported after it, so that the next call reads again.
    let read = MountTable()?.points ?? []
    points.withLock { $0 = read }
    return read
  }

  private var hasChanged: Bool {
    guard let changes else { return true }
    var poller = Poller()
    let index = poller.add(changes, changes: true)
    do throws(Errno) { try poller.wait(milliseconds: 0) } catch { return true }
    return poller.isReady(index)
  }
}

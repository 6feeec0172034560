// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// A watch for OOM-killed processes of a workspace.
///
/// On v2, poll(2) reports changes of `memory.events`. On v1, the kernel signals an eventfd that is registered with
/// `memory.oom_control`, but before it kills the process, so the counter is read again for a while.
struct MemoryWatch {
  private let counter: Handle
  /// The eventfd, on v1.
  private let eventDescriptor: Handle?
  /// The time until which the counter is read again, in nanoseconds since boot.
  private var lookUntil: Int64 = 0
  /// The number of processes OOM-killed so far.
  private(set) var kills: UInt64 = 0

  private static let again: (pause: Int32, nanoseconds: Int64) = (20, 500_000_000)

  /// Returns nil if none of the workspace's cgroups has the memory controller.
  init?(cgroups: [String]) {
    for folder in cgroups {
      do throws(Errno) {
        counter = Handle(try Descriptor.open(folder + "/memory.events", [.readOnly]))
        eventDescriptor = nil
        _ = look()
        return
      } catch {}
      do throws(Errno) {
        let control = try Descriptor.open(folder + "/memory.oom_control", [.readOnly])
        let event = try Descriptor.counter()
        try Descriptor.open(folder + "/cgroup.event_control", [.writeOnly]).write(Array("\(event.number) \(control.number)".utf8))
        counter = Handle(control)
        eventDescriptor = Handle(event)
        _ = look()
        return
      } catch {}
    }
    return nil
  }

  func watch(_ poller: inout Poller) -> Int {
    guard let eventDescriptor else { return poller.add(counter, changes: true) }
    return poller.add(eventDescriptor)
  }

  /// Returns the longest time to wait, in milliseconds; 0: no limit.
  func pause() -> Int32 { lookUntil > Clock.boottime ? MemoryWatch.again.pause : 0 }

  /// Returns whether more processes were OOM-killed since the last call. `isReady`: the descriptor that `watch` added is ready.
  mutating func hasNewKills(isReady: Bool) -> Bool {
    if isReady, let eventDescriptor {
      do throws(Errno) { _ = try eventDescriptor.descriptor.read(upTo: 8) } catch {}
      lookUntil = Clock.boottime + MemoryWatch.again.nanoseconds
    }
    guard isReady || lookUntil != 0, look() else {
      if lookUntil <= Clock.boottime { lookUntil = 0 }
      return false
    }
    lookUntil = 0
    return true
  }

  private mutating func look() -> Bool {
    var found = kills
    do throws(Errno) {
      for line in String(decoding: try counter.descriptor.read(at: 0, upTo: 4096), as: UTF8.self).split(separator: "\n") {
        let words = line.split(separator: " ")
        if words.count == 2, words[0] == "oom_kill", let number = UInt64(words[1]) { found = number }
      }
    } catch {}
    defer { kills = found }
    return found > kills
  }
}

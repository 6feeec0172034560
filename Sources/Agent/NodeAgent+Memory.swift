// SPDX-License-Identifier: Apache-2.0

internal import Limits
internal import Workspaces

/// Processes that the kernel ended for want of memory.
extension NodeAgent {
  /// One of a workspace that lives on, such as a notebook's kernel: an event. Where it was the tool itself, or one that takes the
  /// tool with it, the certificate of the end says so; half a second tells the two apart.
  func hear(_ managed: Managed, outOfMemory kills: UInt64) {
    // What follows within the half second is told with it.
    let isWaiting = managed.outOfMemory != nil
    managed.outOfMemory = kills
    guard !isWaiting else { return }
    let attempt = managed.record.attempt
    Task {
      try? await Task.sleep(for: .milliseconds(500))
      let kills = managed.outOfMemory ?? kills
      managed.outOfMemory = nil
      guard managed.record.attempt == attempt, managed.record.state.isUp,
        kills > managed.record.outOfMemoryKills
      else { return }
      managed.record.outOfMemoryKills = kills
      let usage = cgroup(of: managed.record).usage()
      var attributes = ["kills": "\(kills)", "limitBytes": "\(usage.memoryLimitBytes)", "peakBytes": "\(usage.memoryPeakBytes)"]
      if let killed = await killed(managed) {
        attributes["process"] = killed.name
        attributes["pid"] = "\(killed.pid)"
        attributes["residentBytes"] = "\(killed.residentBytes)"
      }
      try? await commit(managed, .outOfMemory, attributes)
    }
  }

  /// A reason with what is known beside it.
  func complete(_ reason: Reason, _ managed: Managed) async -> Reason {
    let killed = reason.code == .outOfMemory ? await killed(managed) : nil
    return StopCertificate.complete(reason, of: managed.record, folder: managed.folder, killed: killed)
  }

  /// The last process of the workspace that the kernel's log names.
  private func killed(_ managed: Managed) async -> Reason.KilledProcess? {
    guard !managed.record.cgroup.isEmpty else { return nil }
    let (path, read) = (cgroup(of: managed.record).path, managed.kernelLogRead)
    guard let found = try? await blocking({ KernelLog.killed(in: path, after: read) }) else { return nil }
    managed.kernelLogRead = found.record
    return found.process
  }
}

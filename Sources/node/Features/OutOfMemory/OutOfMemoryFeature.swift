// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Cgroups
package import ShimProtocol
internal import Procfs
internal import ShimClient
internal import Workspaces

package struct OutOfMemoryState: FeatureState {
  /// The number of the last record of the kernel's log that was read for an OOM kill.
  var kernelLogRead: UInt64 = 0

  package init() {}
}

/// Reports OOM-killed processes of a workspace that continues to run, such as a notebook's kernel. If the tool itself was killed, or ends
/// with the process, the end of the workspace reports it; a delay of half a second distinguishes the two.
package struct OutOfMemoryFeature: RunningFeature {
  package typealias State = OutOfMemoryState
  package static let name = "outOfMemory"
  package static let readsReports = true

  let services: NodeServices

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { true }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    for await case .outOfMemory(let kills) in reports where kills > workspace.record.outOfMemoryKills {
      guard (try? await Task.sleep(for: .milliseconds(500))) != nil else { return }
      await apart { await report(workspace, kills) }
    }
  }

  /// Reports all kills until now: those within the half second are reported together.
  private func report(_ workspace: Workspace, _ reported: UInt64) async {
    let record = workspace.record
    guard record.state.isUp, let place = record.sandbox else { return }
    let usage = await services.sandboxes.usage(place)
    // The cgroup may not be readable in time.
    let kills = max(usage.outOfMemoryKills, reported)
    guard kills > record.outOfMemoryKills else { return }
    await workspace.update { $0.outOfMemoryKills = kills }
    var attributes = ["kills": "\(kills)", "limitBytes": "\(usage.memoryLimitBytes)", "peakBytes": "\(usage.memoryPeakBytes)"]
    if let found = await OutOfMemoryFeature.lastKill(record, services) {
      await workspace.update { $0[OutOfMemoryFeature.self].kernelLogRead = found.record }
      attributes["process"] = found.process.name
      attributes["pid"] = "\(found.process.pid)"
      attributes["residentBytes"] = "\(found.process.residentBytes)"
    }
    try? await workspace.commit(.outOfMemory, attributes)
  }
}

extension OutOfMemoryFeature {
  /// Returns the kernel's record of the last OOM-killed process of the sandbox that was not reported; nil if there is none.
  static func lastKill(_ record: WorkspaceRecord, _ services: NodeServices) async -> (process: Reason.KilledProcess, record: UInt64)? {
    guard let place = record.sandbox else { return nil }
    let path = place.cgroupPath(below: services.configuration.cgroupParent)
    let seen = record[OutOfMemoryFeature.self].kernelLogRead
    guard let kill = (try? await services.lanes.inspect.run { KernelLog.lastKill(in: path, after: seen) }) ?? nil else { return nil }
    return (Reason.KilledProcess(pid: kill.pid, name: printable(kill.name), residentBytes: kill.residentBytes), kill.record)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Cgroups
package import ShimProtocol
internal import Procfs
internal import ShimClient
internal import Synchronization
internal import Workspaces

package struct OutOfMemoryState: FeatureState {
  /// The number of the last record of the kernel's log that was read for an OOM kill.
  var kernelLogRead: UInt64 = 0

  package init() {}
}

/// Reports OOM-killed processes of a workspace that continues to run, such as a notebook's kernel. If the tool itself was killed, or ends
/// with the process, the end of the workspace reports it; a delay of half a second distinguishes the two.
package struct OutOfMemoryFeature: WorkspaceFeature {
  package typealias State = OutOfMemoryState
  package static let name = "outOfMemory"
  package static let readsReports = true

  let services: NodeServices

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    // Kills within the half second are reported together.
    let latest = KillCount()
    let (wakes, wake) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
    await withTaskGroup(of: Void.self) { group in
      group.addTask {
        for await _ in wakes {
          guard (try? await Task.sleep(for: .milliseconds(500))) != nil else { return }
          await report(workspace, latest.value)
        }
      }
      for await case .outOfMemory(let kills) in reports {
        latest.raise(to: kills)
        wake.yield()
      }
      group.cancelAll()
    }
  }

  private func report(_ workspace: Workspace, _ kills: UInt64) async {
    let record = workspace.record
    guard record.state.isUp, kills > record.outOfMemoryKills, let place = record.sandbox else { return }
    await workspace.update { $0.outOfMemoryKills = kills }
    let usage = await services.sandboxes.usage(place)
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

private final class KillCount: Sendable {
  private let count = Mutex<UInt64>(0)
  var value: UInt64 { count.withLock { $0 } }
  func raise(to kills: UInt64) { count.withLock { $0 = max($0, kills) } }
}

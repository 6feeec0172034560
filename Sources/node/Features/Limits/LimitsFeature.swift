// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Isolation
internal import Cgroups
internal import Linux
internal import ShimClient
internal import Workspaces

/// The cgroup of the sandbox, with the limits of its memory, CPU and processes.
package struct LimitsFeature: WorkspaceFeature {
  package static let name = "limits"
  package static let phase: String? = "limits"

  let services: NodeServices

  func cgroup(_ record: WorkspaceRecord) -> Cgroup {
    let place = record.sandbox ?? SandboxPlace(id: "example")
    return Cgroup(layout: services.facts.layout, path: place.cgroupPath(below: services.configuration.cgroupParent))
  }

  package func prepare(_ workspace: Workspace) async throws(Refusal) {
    let (cgroup, amounts) = (cgroup(workspace.record), workspace.record.amounts)
    do {
      try await services.lanes.launch.run {
        try cgroup.create()
        try cgroup.apply(
          Resources(memoryBytes: amounts.memoryBytes, milliCPUs: amounts.milliCPUs, pids: amounts.pids).values(cgroup.layout))
      }
    } catch {
      throw Refusal(.limits, "\(error)")
    }
    Fault.at(.limited)
  }

  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    draft.sandbox.cgroupHierarchies = services.facts.shownHierarchies
    draft.sandbox.cgroups = cgroup(record).paths
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux
package import ShimProtocol
internal import Workspaces

/// Stops a workspace after its maximum lifetime.
package struct LifetimeFeature: WorkspaceFeature {
  package static let name = "lifetime"

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    let record = workspace.record
    guard let seconds = record.spec.lifecycle.maxLifetimeSeconds else { return }
    // The lifetime counts from the start of the tool, not of this agent.
    let end = (record.startedNanoseconds ?? Clock.boottime) + Int64(clamping: seconds) * 1_000_000_000
    guard (try? await Task.sleep(for: .nanoseconds(max(0, end - Clock.boottime)))) != nil else { return }
    _ = try? await workspace.stop(
      grace: nil, by: "the agent: maximum lifetime", reason: Reason(.lifetime, "maximum lifetime of \(seconds) s exceeded"))
  }
}

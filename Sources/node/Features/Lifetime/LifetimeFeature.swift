// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux
internal import Workspaces

/// Stops a workspace after its maximum lifetime.
package struct LifetimeFeature: ExpiringFeature {
  package static let name = "lifetime"

  /// The lifetime counts from the start of the tool, not of this agent.
  package func nextExpiry(in record: WorkspaceRecord) -> Double? {
    guard let seconds = record.spec.lifecycle.maxLifetimeSeconds, let started = record.startedNanoseconds else { return nil }
    return Date.now.timeIntervalSince1970 + Double(seconds) - Double(Clock.boottime - started) / 1e9
  }

  package func expire(_ workspace: Workspace) async -> Bool {
    let seconds = workspace.spec.lifecycle.maxLifetimeSeconds ?? 0
    _ = try? await workspace.stop(
      grace: nil, by: "the agent: maximum lifetime", reason: Reason(.lifetime, "maximum lifetime of \(seconds) s exceeded"))
    return true
  }
}

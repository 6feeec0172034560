// SPDX-License-Identifier: Apache-2.0

package import ShimProtocol
internal import Workspaces

/// Probes the tool until it serves, and kills it if it does not in time.
package struct ReadinessFeature: RunningFeature {
  package static let name = "readiness"

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { record.state == .starting }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    let record = workspace.record
    guard let tool = workspace.services.tool(of: record.spec) else { return }
    if let port = tool.port, let readiness = tool.readiness {
      do {
        try await ReadinessProbe.wait(host: record.address, port: port, probe: readiness)
      } catch {
        // If this agent ends here, the next one probes.
        guard !Task.isCancelled else { return }
        return await workspace.kill(for: Reason(.readinessTimeout, "\(error)"))
      }
    }
    guard !Task.isCancelled else { return }
    await workspace.becameReady()
  }
}

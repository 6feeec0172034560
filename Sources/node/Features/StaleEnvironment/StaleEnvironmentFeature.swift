// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Procfs
internal import Cgroups
package import ShimProtocol
internal import Workspaces

/// Detects variables that hide what the broker renews: every SDK prefers them, and nothing renews them. They come from a session that was
/// resumed, or from a profile in the home.
package struct StaleEnvironmentFeature: RunningFeature {
  package static let name = "staleEnvironment"

  let services: NodeServices

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { !record.spec.roles.isEmpty }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    while (try? await Task.sleep(for: .seconds(10))) != nil { await check(workspace) }
  }

  private func check(_ workspace: Workspace) async {
    let cgroup = LimitsFeature(services: services).cgroup(workspace.record)
    guard let found = try? await services.lanes.inspect.run({ StaleVariables.find(among: cgroup.processes()) }) else { return }
    guard let first = found.first else { return await workspace.setCondition(.staleCredentials, nil) }
    let record = workspace.record
    guard record.condition(.staleCredentials) == nil, record.state.isUp else { return }
    let names = first.variables.joined(separator: ", ")
    await workspace.setCondition(
      .staleCredentials,
      "\(first.name) (pid \(first.pid)) has \(names) in its environment: it uses those, and not the credentials that are renewed")
    try? await workspace.commit(
      .staleCredentials,
      ["pid": "\(first.pid)", "process": first.name, "variables": first.variables.joined(separator: " "), "processes": "\(found.count)"])
  }
}

/// A process with such variables. Their values are never stored.
struct StaleVariables {
  let pid: Int32
  let name: String
  let variables: [String]

  static func find(among pids: [Int32]) -> [StaleVariables] {
    pids.compactMap { pid in
      let process = ProcessDirectory(pid)
      guard let names = process.environmentNames else { return nil }
      let stale = WorkspaceSpec.staticAWSVariables.filter(names.contains)
      return stale.isEmpty ? nil : StaleVariables(pid: pid, name: printable(process.name ?? "?"), variables: stale)
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Limits
internal import Workspaces

/// Variables that hide what the broker renews: in every SDK they come first, and nothing renews them. They come with a session that was
/// resumed, or from a profile in the home.
extension NodeAgent {
  /// Looks at the workspaces that have roles, every ten seconds.
  func watchEnvironments() async {
    while !Task.isCancelled {
      try? await Task.sleep(for: .seconds(10))
      for managed in workspaces.values where managed.record.state.isUp && !managed.record.spec.roles.isEmpty {
        await lookAtEnvironments(managed)
      }
    }
  }

  private func lookAtEnvironments(_ managed: Managed) async {
    let cgroup = cgroup(of: managed.record)
    guard let found = try? await blocking({ StaleVariables.find(among: cgroup.processes()) }) else { return }
    let isTold = managed.record.conditions?["StaleCredentials"] != nil
    guard let first = found.first else { return show(managed, "StaleCredentials", nil) }
    guard !isTold, managed.record.state.isUp else { return }
    let names = first.variables.joined(separator: ", ")
    show(
      managed, "StaleCredentials",
      "\(first.name) (pid \(first.pid)) has \(names) in its environment: it uses those, and not the credentials that are renewed")
    try? await commit(
      managed, .staleCredentials,
      ["pid": "\(first.pid)", "process": first.name, "variables": first.variables.joined(separator: " "), "processes": "\(found.count)"])
  }
}

/// A process with such variables. Their values are never kept.
struct StaleVariables {
  let pid: Int32
  let name: String
  let variables: [String]

  static func find(among pids: [Int32]) -> [StaleVariables] {
    pids.compactMap { pid in
      guard let data = FileManager.default.contents(atPath: "/proc/\(pid)/environ") else { return nil }
      let names = data.split(separator: 0).compactMap { entry in
        entry.firstIndex(of: UInt8(ascii: "=")).map { String(decoding: entry[..<$0], as: UTF8.self) }
      }
      let stale = WorkspaceSpec.staticAWSVariables.filter(names.contains)
      guard !stale.isEmpty else { return nil }
      let comm = (try? String(contentsOfFile: "/proc/\(pid)/comm", encoding: .utf8)) ?? "?"
      return StaleVariables(pid: pid, name: printable(comm.trimmingCharacters(in: .newlines)), variables: stale)
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Logging
internal import Volumes
package import Workspaces

package struct RescueState: FeatureState {
  /// Whether the tool has had its second start, without the files that were suspected.
  package var isRescued = false
  /// Whether a second start follows.
  package var isPending = false

  package init() {}
}

/// Restarts, once, a tool that did not come up, without the files in its home that may be the cause.
package struct RescueFeature: WorkspaceFeature {
  package typealias State = RescueState
  package static let name = "rescue"

  let services: NodeServices
  let home: HomeFeature

  /// Sets saved sessions above a size aside before a start: restoring them would take too long, or too much memory.
  package func prepare(_ workspace: Workspace) async throws(Refusal) {
    let record = workspace.record
    guard let rescue = services.tool(of: record.spec)?.rescue, !rescue.sessions.isEmpty else { return }
    let path = home.path(record)
    guard
      let large = try? await services.lanes.onStorage(
        path, within: HomeFeature.limit, { HomeRescue(home: path).larger(rescue.sessions, than: rescue.sessionBytes) }),
      !large.isEmpty
    else { return }
    await setAside(workspace, large, "the saved session is larger than \(Quantity.describe(bytes: rescue.sessionBytes))")
  }

  package func ended(_ reason: Reason, _ workspace: Workspace) async {
    let record = workspace.record
    guard let rescue = services.tool(of: record.spec)?.rescue, await mayRescue(record, reason, workspace) else { return }
    let packages = "\(HomePackages.folder)/\(HomePackages.key(record.imageDigest))"
    let paths = (rescue.suspects + rescue.sessions).map { Tool.fill($0, ["packages": packages]) }
    let path = home.path(record)
    guard
      let suspects = try? await services.lanes.onStorage(path, within: HomeFeature.limit, { HomeRescue(home: path).present(paths) }),
      !suspects.isEmpty
    else { return }
    // The flag becomes durable with the event that lists what was set aside.
    await workspace.update { $0[RescueFeature.self].isPending = true }
    await setAside(workspace, suspects, "the tool did not come up (\(reason.message)), and these may be why")
  }

  /// Returns whether the home may be the cause of an end: the tool ran and was never ready.
  private func mayRescue(_ record: WorkspaceRecord, _ reason: Reason, _ workspace: Workspace) async -> Bool {
    guard await !workspace.isDraining else { return false }
    return !record[RescueFeature.self].isRescued && record.stop == nil && record.startedNanoseconds != nil && !record.isReadied
      && [.exited, .signalled, .readinessTimeout, .outOfMemory].contains(reason.code)
  }

  private func setAside(_ workspace: Workspace, _ paths: [String], _ why: String) async {
    let path = home.path(workspace.record)
    do {
      guard
        let done = try await services.lanes.onStorage(
          path, within: HomeFeature.limit, { try HomeRescue(home: path).setAside(paths, why: "Carrel: \(why).") })
      else { return }
      let names = done.moved.map(\.from).joined(separator: ", ")
      await RescueFeature.report(
        workspace, "\(why); set aside: \(names). See ~/\(done.note)",
        ["setAside": done.moved.map { "\($0.from) to \($0.to)" }.joined(separator: "; "), "note": done.note])
    } catch {
      services.logger.warning("cannot set files aside", metadata: ["workspace": "\(workspace.id)", "error": "\(error)"])
    }
  }

  static func report(_ workspace: Workspace, _ why: String, _ attributes: [String: String]) async {
    await workspace.setCondition(.rescue, why)
    workspace.logger.notice("rescue", metadata: ["workspace": "\(workspace.id)", "why": "\(why)"])
    try? await workspace.commit(.rescue, attributes.merging(["why": why]) { first, _ in first })
  }
}

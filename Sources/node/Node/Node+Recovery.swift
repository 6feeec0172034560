// SPDX-License-Identifier: Apache-2.0

internal import ShimProtocol
internal import Configuration
internal import Concurrency
internal import Foundation
internal import Journal
internal import Cgroups
internal import Linux
internal import Logging
internal import Networking
internal import Volumes
internal import ShimClient
internal import Workspaces

/// What a new agent does first: reconciles the journal, the sandbox directories and the cgroup tree. Each workspace then goes on by
/// itself (`Workspace.live`).
extension Node {
  func recover() async throws {
    if let text = try await journal.setting(Node.drainSetting) { drain = try? JSONDecoder().decode(Drain.self, from: Data(text.utf8)) }
    if let loss = journal.loss { logger.critical("history was lost", metadata: ["why": "\(loss)", "stream": "\(journal.streamID)"]) }
    let (layout, parent) = (facts.layout, configuration.cgroupParent)
    try await services.lanes.launch.run { try Cgroup(layout: layout, path: parent).prepare() }
    for var record in try await journal.records().map({ try WorkspaceRecord($0) }) {
      if record.sandbox == nil, !record.state.isTerminal, let copy = await legacyCopy(record) {
        record.sandbox = copy.sandbox
        record.bootID = copy.bootID
      }
      let workspace = Workspace(record, services, features.list, isOnRecord: true)
      if drain != nil { await workspace.drain() }
      insert(workspace)
    }
    try await recoverLost()
    for workspace in workspaces.values where workspace.record.state.mayRun {
      await features.home.adopt(workspace.record)
      await features.datasets.adopt(workspace)
    }
    try await sweep()
    // The firewall rules are loaded first: a sandbox that runs is never unfiltered, and keeps its connections.
    let attachments = workspaces.values.map(\.record).filter(\.state.mayRun).map { features.network.attachment($0) }
    let network = features.network.driver
    try await services.lanes.launch.run { try network.prepare(running: attachments) }
    for workspace in workspaces.values.sorted(by: { $0.id < $1.id }) { begin { await workspace.live(.recovered) } }
    evict()
  }

  /// Where a start that an agent of commit 7ede341 was in the middle of stands: only the folder's copy of the record says.
  private func legacyCopy(_ record: WorkspaceRecord) async -> WorkspaceRecord? {
    let path = HostSandboxes.folder(configuration.state, record.spec.id)
    return WorkspaceRecord(copy: (try? await services.lanes.launch.run { (try? SandboxDirectory(path: path))?.record }) ?? nil)
  }

  // --------------------------------------------------------------- what is lost

  /// Sandboxes whose workspaces the journal does not know. What runs, and after the loss of a journal all, is brought back by its own
  /// copy of the record; what has none is set aside untouched.
  private func recoverLost() async throws {
    // Only until it has been done once: what a folder says later may have been deleted in the meantime.
    let done = try await journal.setting(Node.recoveredSetting) != nil
    let afterLoss = journal.loss != nil && !done
    // One that has ended needs its sandbox only for another start after a rescue.
    let known = Set(
      workspaces.values.map(\.record).filter { !$0.state.isTerminal || $0[RescueFeature.self].isPending }.compactMap(\.sandbox?.folder))
    let state = configuration.state
    let legacy = Set(workspaces.keys)
    let found = try await services.lanes.launch.run {
      try Node.folders(state, "sandboxes").filter { !known.contains($0) }
        + Node.folders(state, "workspaces").filter {
          !known.contains($0) && !legacy.contains(String($0.dropFirst("workspaces/".count)))
            && FileManager.default.fileExists(atPath: "\(state)/\($0)/shim.sock")
        }
    }
    for folder in found.sorted() { try await recover(folder, afterLoss: afterLoss) }
    if afterLoss { try await recoverEnded() }
    if afterLoss { try await journal.set(Node.recoveredSetting, to: wallTime()) }
  }

  /// After the loss of a journal: workspaces that had ended, by the copies of their records beside their output.
  private func recoverEnded() async throws {
    let state = configuration.state
    let copies = try await services.lanes.launch.run {
      try Node.folders(state, "workspaces").compactMap { (try? WorkspaceDirectory(path: "\(state)/\($0)"))?.record }
    }
    for copy in copies {
      guard let record = WorkspaceRecord(copy: copy), record.state.isTerminal,
        workspaces[record.spec.id] == nil, !workspaces.values.contains(where: { $0.record.slot == record.slot })
      else { continue }
      let workspace = Workspace(record, services, features.list, isOnRecord: false)
      insert(workspace)
      try await workspace.commit(.recovered, ["running": "false"])
    }
  }

  private static func folders(_ state: String, _ kind: String) throws -> [String] {
    try FileManager.default.contentsOfDirectory(atPath: "\(state)/\(kind)").map { "\(kind)/\($0)" }
  }

  /// What `quarantine` has set aside.
  private static func setAside(_ state: String) -> [String] {
    (try? FileManager.default.contentsOfDirectory(atPath: state + "/quarantine")) ?? []
  }

  private static let recoveredSetting = "recovered"

  private func recover(_ folder: String, afterLoss: Bool) async throws {
    let path = "\(configuration.state)/\(folder)"
    let name = String(folder.split(separator: "/")[1])
    let record = WorkspaceRecord(copy: try await services.lanes.launch.run { (try? SandboxDirectory(path: path))?.record })
    let place =
      record?.sandbox
      ?? (folder.hasPrefix("workspaces/") ? SandboxPlace(legacyWorkspace: name, cgroup: name) : SandboxPlace(id: name))
    let link = try? await services.sandboxes.connect(place)
    let runs = link != nil
    let launched = link.map { $0.status.state != .awaitingPlan && !$0.status.state.isOver } ?? false
    if let record, place.folder == folder, afterLoss || launched, workspaces[record.spec.id] == nil,
      !workspaces.values.contains(where: { $0.record.slot == record.slot })
    {
      let workspace = Workspace(record, services, features.list, isOnRecord: false)
      insert(workspace)
      try await workspace.commit(.recovered, ["running": "\(runs)"])
    } else if launched && record.map({ workspaces[$0.spec.id] == nil }) ?? true || afterLoss && record == nil {
      try await quarantine(folder, name, runs)
    } else {
      // Its launch was not accepted, or its workspace has ended, has another sandbox or was deleted: only this was left.
      logger.notice("removing a sandbox that no workspace occupies", metadata: ["sandbox": "\(name)"])
      try? link?.send(.kill)
      try? link?.send(.release)
      if link != nil { _ = await services.sandboxes.kill(place) }
      link?.close()
      await services.sandboxes.removeCgroup(place)
      await services.sandboxes.remove(place)
      try await services.record(.swept, ["folder": name])
    }
  }

  private func quarantine(_ folder: String, _ name: String, _ runs: Bool) async throws {
    let (path, place) = ("\(configuration.state)/\(folder)", "\(configuration.state)/quarantine")
    try await services.lanes.launch.run {
      try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
      try FileManager.default.moveItem(atPath: path, toPath: "\(place)/\(name)-\(Int(Date.now.timeIntervalSince1970))")
    }
    logger.error(
      "a folder that no record knows is set aside", metadata: ["folder": "\(name)", "running": "\(runs)", "in": "\(place)"])
    try await services.record(.quarantined, ["folder": name, "running": "\(runs)"])
  }

  // ------------------------------------------------------------------ sweeping

  /// What is left of workspaces and sandboxes that are no more: output, mounts of homes and datasets, cgroups.
  private func sweep() async throws {
    let state = configuration.state
    let known = Set(workspaces.keys)
    let outputs = try await services.lanes.launch.run { () -> [String] in
      // A sandbox that was set aside still writes its output, and whose it is no record says.
      let isAside = !Node.setAside(state).isEmpty
      for name in known { try? WorkspaceDirectory(path: HostSandboxes.folder(state, name)).removeTemporaries() }
      return try Node.folders(state, "workspaces").map { String($0.split(separator: "/")[1]) }.filter { name in
        let output = (try? FileManager.default.contentsOfDirectory(atPath: HostSandboxes.logs(state, name))) ?? []
        return !known.contains(name) && (!isAside || output.isEmpty)
      }
    }
    for name in outputs.sorted() {
      logger.notice("removing the rest of a workspace", metadata: ["folder": "\(name)"])
      _ = try? await services.lanes.cleanup.run { try FileManager.default.removeItem(atPath: HostSandboxes.folder(state, name)) }
      try await services.record(.swept, ["folder": name])
    }
    let (volumes, datasets) = (features.home.volumes, features.datasets.images)
    let mounts = try await services.lanes.cleanup.run { volumes.sweep() + datasets.sweep() }
    for name in mounts { try await services.record(.swept, ["mount": name]) }
    try await sweepCgroups()
  }

  private func sweepCgroups() async throws {
    let occupied = Set(workspaces.values.map(\.record).filter { !$0.state.isTerminal }.compactMap(\.sandbox?.cgroup))
    let (layout, parent, state) = (facts.layout, configuration.cgroupParent, configuration.state)
    let swept = try await services.lanes.cleanup.run {
      // As it was named there: id, dash, seconds.
      let aside = Node.setAside(state).compactMap { name in
        name.lastIndex(of: "-").map { String(name[..<$0]) }
      }
      return Cgroup(layout: layout, path: parent).sweep { name in
        // A sandbox's cgroup is called after it; those of commit 7ede341 after the workspace, with a number.
        occupied.contains(name) || aside.contains { name == $0 || name.hasPrefix($0 + "-") }
      }
    }
    for name in swept.sorted() { try await services.record(.swept, ["cgroup": name]) }
  }

  /// The orderly end of an agent. What runs goes on; where nothing runs, its firewall table and its cgroups go too.
  package func retire() async {
    guard !workspaces.values.contains(where: { $0.record.state.mayRun }) else { return }
    let (layout, parent, network) = (facts.layout, configuration.cgroupParent, features.network.driver)
    try? await services.lanes.launch.run {
      Cgroup(layout: layout, path: parent).removeIfEmpty()
      try network.destroy()
    }
  }
}

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

/// Reconciles the journal, the sandbox directories and the cgroup tree when a new agent starts. Each workspace then continues by itself
/// (`Workspace.live`).
extension Node {
  func recover() async throws {
    if let text = try await journal.setting(Node.drainSetting) { drain = try? JSONDecoder().decode(Drain.self, from: Data(text.utf8)) }
    if let loss = journal.loss { logger.critical("history was lost", metadata: ["why": "\(loss)", "stream": "\(journal.streamID)"]) }
    let (layout, parent) = (facts.layout, configuration.cgroupParent)
    try await services.lanes.launch.run { try Cgroup(layout: layout, path: parent).prepare() }
    for record in try await Node.decoded(try await journal.records()) {
      let workspace = Workspace(record, services, features.list, isOnRecord: true)
      if record.sandbox == nil, !record.state.isTerminal, let copy = await legacyCopy(record) {
        await workspace.update {
          $0.sandbox = copy.sandbox
          $0.bootID = copy.bootID
        }
      }
      if drain != nil { await workspace.drain() }
      insert(workspace)
    }
    try await recoverLost()
    for workspace in workspaces.values where workspace.record.state.mayRun {
      await features.home.adopt(workspace.record)
      await features.datasets.adopt(workspace)
    }
    try await sweep()
    // The firewall rules are loaded first: a running sandbox is never unfiltered, and keeps its connections.
    let attachments = workspaces.values.map(\.record).filter(\.state.mayRun).map { features.network.attachment($0) }
    let network = features.network.driver
    try await services.lanes.launch.run { try network.prepare(running: attachments) }
    for workspace in workspaces.values.sorted(by: { $0.id < $1.id }) { begin { await workspace.runAttempts(.recovered) } }
    evict()
  }

  /// Decodes records on all processors, because nothing can be adopted before that.
  private static func decoded(_ stored: [JournalRecord]) async throws -> [WorkspaceRecord] {
    let size = 64
    return try await withThrowingTaskGroup(of: (Int, [WorkspaceRecord]).self) { group in
      for start in stride(from: 0, to: stored.count, by: size) {
        group.addTask { (start, try stored[start..<min(start + size, stored.count)].map { try WorkspaceRecord($0) }) }
      }
      var parts: [(start: Int, records: [WorkspaceRecord])] = []
      for try await part in group { parts.append(part) }
      return parts.sorted { $0.start < $1.start }.flatMap(\.records)
    }
  }

  /// Returns the copy of the record in the workspace's folder, which alone says how far a start of commit 7ede341 had come.
  private func legacyCopy(_ record: WorkspaceRecord) async -> WorkspaceRecord? {
    let path = HostSandboxes.folder(configuration.state, record.spec.id)
    return WorkspaceRecord(copy: (try? await services.lanes.launch.run { (try? SandboxDirectory(path: path))?.record }) ?? nil)
  }

  // --------------------------------------------------------------- what is lost

  /// Recovers sandboxes whose workspaces the journal does not know. Running ones, and after the loss of a journal all, are restored from
  /// their own copies of the record; those without one are quarantined.
  private func recoverLost() async throws {
    // The loss of a journal is handled only once: what a folder says later may have been deleted in the meantime.
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

  /// Recovers, after the loss of a journal, workspaces that had ended, from the copies of their records beside their output.
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

  /// Returns the names of what `quarantine` has moved.
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
      // Its launch was not accepted, or its workspace has ended, has another sandbox or was deleted: only this is left.
      logger.notice("removing a sandbox that no workspace occupies", metadata: ["sandbox": "\(name)"])
      try? link?.send(.kill)
      try? link?.send(.release)
      if link != nil { _ = await services.sandboxes.kill(place) }
      link?.close()
      await services.sandboxes.removeCgroup(place)
      await services.sandboxes.remove(place)
      await recordSwept(["folder": name])
    }
  }

  private func quarantine(_ folder: String, _ name: String, _ runs: Bool) async throws {
    let (path, place) = ("\(configuration.state)/\(folder)", "\(configuration.state)/quarantine")
    try await services.lanes.launch.run {
      try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
      try FileManager.default.moveItem(atPath: path, toPath: "\(place)/\(name)-\(Int(Date.now.timeIntervalSince1970))")
    }
    logger.error(
      "quarantined a folder that has no record", metadata: ["folder": "\(name)", "running": "\(runs)", "in": "\(place)"])
    try await services.record(.quarantined, ["folder": name, "running": "\(runs)"])
  }

  // ------------------------------------------------------------------ sweeping

  /// Removes what is left of workspaces and sandboxes that no longer exist: output, mounts of homes and datasets, cgroups.
  private func sweep() async throws {
    let state = configuration.state
    let known = Set(workspaces.keys)
    let outputs = try await services.lanes.launch.run { () -> [String] in
      // A quarantined sandbox still writes its output, and no record says which output that is.
      let isAside = !Node.setAside(state).isEmpty
      for name in known { try? WorkspaceDirectory(path: HostSandboxes.folder(state, name)).removeTemporaries() }
      return try Node.folders(state, "workspaces").map { String($0.split(separator: "/")[1]) }.filter { name in
        let output = (try? FileManager.default.contentsOfDirectory(atPath: HostSandboxes.logs(state, name))) ?? []
        return !known.contains(name) && (!isAside || output.isEmpty)
      }
    }
    for name in outputs.sorted() {
      logger.notice("removing what is left of a workspace", metadata: ["folder": "\(name)"])
      _ = try? await services.lanes.cleanup.run { try FileManager.default.removeItem(atPath: HostSandboxes.folder(state, name)) }
      await recordSwept(["folder": name])
    }
    let datasets = features.datasets.images
    for name in try await services.lanes.cleanup.run({ datasets.sweep() }) { await recordSwept(["mount": name]) }
    try await sweepHomes()
    try await sweepCgroups()
  }

  /// Unmounts unused homes and thaws the others, each in the lane of its file system: storage that hangs delays neither the start of the
  /// agent nor another home. A launch that needs the home waits for this.
  private func sweepHomes() async throws {
    let (services, volumes) = (services, features.home.volumes)
    for (name, home) in try await services.lanes.cleanup.run({ try volumes.unusedMounts() }) {
      begin {
        guard (try? await services.lanes.onVolume(home + ".img") { volumes.unmountUnused(home) }) != nil else { return }
        await self.recordSwept(["mount": name])
      }
    }
    for workspace in workspaces.values where workspace.record.state.mayRun && workspace.record[HomeFeature.self].kind.isVolume {
      let home = features.home.home(workspace.record.spec)
      begin { _ = try? await services.lanes.onVolume(home + ".img") { volumes.thaw(home: home) } }
    }
  }

  /// Records what was swept if the journal has capacity for it; the agent starts without the event too.
  private func recordSwept(_ attributes: [String: String]) async {
    do { try await services.record(.swept, attributes) } catch {
      logger.error("an event of a sweep cannot be recorded", metadata: ["swept": "\(attributes)", "error": "\(error)"])
    }
  }

  private func sweepCgroups() async throws {
    let occupied = Set(workspaces.values.map(\.record).filter { !$0.state.isTerminal }.compactMap(\.sandbox?.cgroup))
    let (layout, parent, state) = (facts.layout, configuration.cgroupParent, configuration.state)
    let swept = try await services.lanes.cleanup.run {
      // Names in the quarantine are an id, a dash and seconds.
      let aside = Node.setAside(state).compactMap { name in
        name.lastIndex(of: "-").map { String(name[..<$0]) }
      }
      return Cgroup(layout: layout, path: parent).sweep { name in
        // The cgroup of a sandbox has the sandbox's name; at commit 7ede341 it had the workspace's, with a number.
        occupied.contains(name) || aside.contains { name == $0 || name.hasPrefix($0 + "-") }
      }
    }
    for name in swept.sorted() { await recordSwept(["cgroup": name]) }
  }

  /// Ends the agent in an orderly way. Running workspaces continue; if none runs, the firewall table and the cgroups are removed too.
  package func retire() async {
    guard !workspaces.values.contains(where: { $0.record.state.mayRun }) else { return }
    let (layout, parent, network) = (facts.layout, configuration.cgroupParent, features.network.driver)
    try? await services.lanes.launch.run {
      Cgroup(layout: layout, path: parent).removeIfEmpty()
      try network.destroy()
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Journal
internal import Limits
internal import Linux
internal import Logging
internal import Networking
internal import Sandbox
internal import Storage
internal import Supervision
internal import Workspaces

/// What a new agent does first: reconciles the journal, the workspace directories and the cgroup tree.
extension NodeAgent {
  package func recover() async throws {
    if let text = try await journal.setting(NodeAgent.drainSetting) { drain = try? JSONDecoder().decode(Drain.self, from: Data(text.utf8)) }
    if let loss = journal.loss { logger.critical("history was lost", metadata: ["why": "\(loss)", "stream": "\(journal.streamID)"]) }
    let records = try await journal.records().map { try WorkspaceRecord($0) }
    let layout = facts.layout
    let parent = configuration.cgroupParent
    try await blocking { try Cgroup(layout: layout, path: parent).prepare() }
    for record in records {
      let folder: WorkspaceFolder
      do throws(Errno) {
        folder = try WorkspaceFolder(path: folderPath(record.spec.id), create: true)
      } catch {
        throw AgentError(.internal, "cannot open \(folderPath(record.spec.id)): \(error.sentence)")
      }
      let managed = Managed(record: record, folder: folder)
      managed.told = record.state
      workspaces[record.spec.id] = managed
    }
    try await recoverFolders()
    let running = workspaces.values.map(\.record).filter(\.state.mayRun)
    for record in running { adoptStorage(record) }
    for name in try await blocking({ [homes, datasetImages] in homes.sweep() + datasetImages.sweep() }) {
      try await tell(.swept, ["mount": name])
    }
    // The rules first: whoever runs must not run unfiltered, and keeps its connections.
    let attachments = running.map(attachment)
    try await blocking { [network] in try network.prepare(running: attachments) }
    for managed in workspaces.values.sorted(by: { $0.record.spec.id < $1.record.spec.id }) {
      if !managed.record.state.isTerminal {
        await resume(managed)
      } else if shouldRestart(managed.record) {
        begin(managed, with: .ended)
      }
    }
    try await sweep()
    evict()
    Task { [weak self] in await self?.watchHomes() }
    Task { [weak self] in await self?.purgeHomes() }
    Task { [weak self] in await self?.watchEnvironments() }
  }

  /// One workspace that the journal says has not ended.
  private func resume(_ managed: Managed) async {
    let id = managed.record.spec.id
    if managed.record.state == .pending { return await start(managed, with: .attempt) }
    if managed.record.state == .preparing, !managed.folder.hasPlan {
      // It has not come to a supervisor that could have started anything.
      let told = Answer<Void>()
      told.give(.success(()))
      return await start(managed, with: .preparation(Step(event: .preparing, done: told)))
    }
    do throws(Errno) {
      let link = try managed.folder.connect()
      managed.link = link
      // Until what an earlier agent began is settled.
      managed.isInjecting = true
      begin(managed, with: .adopt(link))
    } catch {
      // No supervisor: what it left behind decides, here and nowhere else.
      logger.notice("no supervisor", metadata: ["workspace": "\(id)", "record": "\(managed.folder.exitRecord.map { "\($0)" } ?? "none")"])
      if !managed.record.cgroup.isEmpty { cgroup(of: managed.record).signal(Signals.kill) }
      begin(managed, with: .settle(managed.record.state == .preparing ? interrupted : nil))
    }
  }

  /// A start that an earlier agent accepted and did not come to.
  private func start(_ managed: Managed, with beginning: Beginning) async {
    guard !managed.record.spec.needsSecrets else {
      logger.warning("workspace cannot be started after a restart", metadata: ["workspace": "\(managed.record.spec.id)"])
      await transition(
        managed,
        .preparationFailed(
          Reason(.internal, "the agent was restarted before the start, and credentials are not kept; launch it again")))
      return
    }
    if tool(managed.record.spec.tool)?.tokenFile != nil { managed.token = NodeAgent.freshToken() }
    begin(managed, with: beginning)
  }

  private var interrupted: Reason { Reason(.internal, "the agent was restarted during the start; launch it again") }

  func adopt(_ managed: Managed, _ link: SupervisorLink) async {
    let messages = link.messages
    var probe: Task<Void, Never>?
    var failure: Reason?
    for await received in messages {
      switch received.message {
      case .started(let pid):
        logger.notice("adopted", metadata: ["workspace": "\(managed.record.spec.id)", "pid": "\(pid)"])
        try? await commit(managed, .adopted, ["pid": "\(pid)"])
        if managed.record.state == .preparing {
          managed.record.startedNanoseconds = Clock.boottime
          await transition(managed, .launched)
        }
        if managed.record.state == .starting { probe = startProbe(managed, PhaseClock()) }
        if managed.record.state == .stopping {
          let (id, by) = (managed.record.spec.id, managed.record.stopRequestedBy ?? "an earlier request")
          Task { _ = try? await stop(id, grace: nil, by: by) }
        }
        watchLifetime(managed)
        keepCredentials(managed)
        watchCredentials(managed)
        Task { await reconcileDatasets(managed) }
      case .issued(let role, let count): hear(managed, issued: role, count)
      case .outOfMemory(let kills): hear(managed, outOfMemory: kills)
      case .preparing, .created, .waiting:
        // Half-way: its secrets were in the old agent's memory. It ends, and says why.
        failure = interrupted
        try? link.send(.kill)
      default: break
      }
    }
    probe?.cancel()
    await settle(managed, failure: failure ?? (managed.record.state == .preparing ? interrupted : nil))
  }

  /// The orderly end of an agent. What runs goes on; where nothing runs, its firewall table and its cgroups go too.
  package func retire() async {
    guard !workspaces.values.contains(where: { $0.record.state.mayRun }) else { return }
    let (layout, parent) = (facts.layout, configuration.cgroupParent)
    try? await blocking { [network] in
      Cgroup(layout: layout, path: parent).removeIfEmpty()
      try network.destroy()
    }
  }

  /// Folders that the journal does not know. What runs, and after the loss of a journal all, is brought back by its own copy of
  /// the record; what has none is set aside untouched. Of a workspace whose deletion was cut off, the rest goes.
  private func recoverFolders() async throws {
    let root = configuration.state + "/workspaces"
    for aside in (try? FileManager.default.contentsOfDirectory(atPath: configuration.state + "/quarantine")) ?? [] {
      // As it was named there: id, dash, seconds.
      if let dash = aside.lastIndex(of: "-") { quarantined.insert(String(aside[..<dash])) }
    }
    // Only until it has been done once: what a folder says later may have been deleted in the meantime.
    let done = try await journal.setting(NodeAgent.recoveredSetting) != nil
    let afterLoss = journal.loss != nil && !done
    for name in try FileManager.default.contentsOfDirectory(atPath: root).sorted() where workspaces[name] == nil {
      guard let folder = try? WorkspaceFolder(path: "\(root)/\(name)") else { continue }
      let record = folder.record.flatMap { try? JSONDecoder().decode(WorkspaceRecord.self, from: Data($0)) }
      let runs = (try? folder.connect()) != nil
      if let record, record.spec.id == name, afterLoss || runs, !workspaces.values.contains(where: { $0.record.slot == record.slot }) {
        let managed = Managed(record: record, folder: folder)
        workspaces[name] = managed
        try await commit(managed, .recovered, ["running": "\(runs)"])
      } else if afterLoss || runs {
        let place = "\(configuration.state)/quarantine"
        try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        try FileManager.default.moveItem(atPath: folder.path, toPath: "\(place)/\(name)-\(Int(Date.now.timeIntervalSince1970))")
        logger.error("a folder that no record knows is set aside", metadata: ["folder": "\(name)", "running": "\(runs)", "in": "\(place)"])
        try await tell(.quarantined, ["folder": name, "running": "\(runs)"])
        if runs { quarantined.insert(name) }
      } else {
        // Never accepted, or deleted: its event says so, and only the folder was left.
        logger.notice("removing the rest of a workspace", metadata: ["folder": "\(name)"])
        try? FileManager.default.removeItem(atPath: folder.path)
        try await tell(.swept, ["folder": name])
      }
    }
    if afterLoss { try await journal.set(NodeAgent.recoveredSetting, to: wallTime()) }
  }

  private static let recoveredSetting = "recovered"

  /// Cgroups of workspaces that were being made or removed.
  private func sweep() async throws {
    let known = Set(workspaces.values.filter { !$0.record.state.isTerminal }.map(\.record.cgroup))
    let aside = quarantined
    let (layout, parent) = (facts.layout, configuration.cgroupParent)
    let swept = try await blocking {
      // A workspace's cgroup is called after it, with a number.
      Cgroup(layout: layout, path: parent).sweep { name in known.contains(name) || aside.contains { name.hasPrefix($0 + "-") } }
    }
    for name in swept.sorted() { try await tell(.swept, ["cgroup": name]) }
  }
}

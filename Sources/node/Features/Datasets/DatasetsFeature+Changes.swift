// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Isolation
internal import LaunchPlan
internal import Cgroups
internal import Linux
internal import Logging
internal import Executor
package import ShimProtocol
internal import Volumes
internal import Procfs
internal import ShimClient
internal import Workspaces

/// Attaches datasets to a running workspace, and detaches them.
extension DatasetsFeature {
  /// The time limit of an injector, which includes storage that does not respond.
  private static let injectionLimit = Duration.seconds(20)

  // ----------------------------------------------------------------- attaching

  /// Mounts a dataset in a running workspace. If it is at that target already, its mode and its expiry are changed.
  func attach(_ workspace: Workspace, _ asked: WorkspaceSpec.Dataset, seconds: UInt64?) async throws -> WorkspaceRecord {
    let record = try workspace.requireUp("datasets can only be attached to a running workspace")
    let expires = seconds.map { Date.now.timeIntervalSince1970 + Double($0) }
    let dataset: MountedDataset
    do {
      try asked.validate(path: "dataset")
      dataset = try await resolve(
        asked, try await readRegistry(), record.spec.owner.name, field: "dataset", isAttached: true, expires: expires)
    } catch let error as InvalidField {
      throw AgentError(error)
    }
    guard let tool = services.tool(of: record.spec) else {
      throw AgentError(.failedPrecondition, "workspace \(workspace.id): its tool no longer exists")
    }
    guard dataset.target != tool.home else { throw AgentError(field: "dataset.target", "\(tool.home) is the home") }
    return try await changing(workspace) {
      if let present = workspace.record[DatasetsFeature.self].mounted.first(where: { $0.target == dataset.target }) {
        guard present.source == dataset.source, present.path == dataset.path else {
          throw AgentError(
            .failedPrecondition, "dataset.target: \(dataset.target) has \(present.reference ?? present.source); detach that first")
        }
        return try await change(workspace, present, to: dataset)
      }
      return try await mount(workspace, dataset, tool)
    }
  }

  private func mount(_ workspace: Workspace, _ dataset: MountedDataset, _ tool: Tool) async throws -> WorkspaceRecord {
    let record = workspace.record
    let bytes = Plan([PlanCompiler.operation(bind(dataset, of: record, tool), first: record.firstID)]).encoded()
    do {
      try await open(dataset, by: record.spec.id)
    } catch {
      await releaseImages(workspace)
      throw AgentError(.failedPrecondition, "\(error)", cause: error)
    }
    do {
      _ = try await inject(.attach(plan: bytes), target: dataset.target, workspace)
    } catch {
      await releaseImages(workspace)
      throw AgentError(.failedPrecondition, "dataset.target: \(dataset.target) cannot be mounted on: \(error)", cause: error)
    }
    Fault.at(.datasetMounted)
    await workspace.update { $0[DatasetsFeature.self].mounted.append(dataset) }
    try await workspace.commit(.datasetAttached, dataset.attributes)
    return workspace.record
  }

  private func change(_ workspace: Workspace, _ present: MountedDataset, to asked: MountedDataset) async throws -> WorkspaceRecord {
    guard present.writable != asked.writable || present.expires != asked.expires else { return workspace.record }
    if present.writable != asked.writable { try await setMode(workspace, asked.target, writable: asked.writable) }
    await workspace.update { record in
      guard let index = record[DatasetsFeature.self].mounted.firstIndex(where: { $0.target == asked.target }) else { return }
      record[DatasetsFeature.self].mounted[index].writable = asked.writable
      record[DatasetsFeature.self].mounted[index].expires = asked.expires
    }
    let now = workspace.record[DatasetsFeature.self].mounted.first { $0.target == asked.target }
    try await workspace.commit(.datasetChanged, (now ?? asked).attributes)
    return workspace.record
  }

  private func setMode(_ workspace: Workspace, _ target: String, writable: Bool) async throws {
    let mount = try await inject(.find(target: target), target: nil, workspace)
    do {
      _ = try await inject(.change(target: target, mount: mount, readOnly: !writable), target: nil, workspace)
    } catch {
      let users = await users(workspace, mount)
      throw AgentError(
        .failedPrecondition,
        "\(target) cannot become \(writable ? "writable" : "read-only") (\(error)); open in it: \(DatasetsFeature.list(users))")
    }
  }

  // ----------------------------------------------------------------- detaching

  package enum UsePolicy: Sendable { case refuse, lazy, stop }

  /// Detaches a dataset. Returns the processes that had files of it open.
  func detach(_ workspace: Workspace, _ target: String, _ policy: UsePolicy) async throws -> [OpenFileUser] {
    let record = try workspace.requireUp("datasets can only be detached from a running workspace")
    let mounted = record[DatasetsFeature.self].mounted
    guard mounted.contains(where: { $0.target == target }) else {
      let there = mounted.map(\.target).sorted().joined(separator: ", ")
      throw AgentError(
        .notFound, "target: workspace \(workspace.id) has no dataset at \(printable(target)); it has: \(there.isEmpty ? "none" : there)")
    }
    return try await changing(workspace) { try await detach(workspace, target, policy, why: "asked") }
  }

  private func detach(_ workspace: Workspace, _ target: String, _ policy: UsePolicy, why: String) async throws -> [OpenFileUser] {
    let mount = try await inject(.find(target: target), target: nil, workspace)
    let found = await users(workspace, mount)
    switch policy {
    case .refuse:
      guard found.isEmpty else {
        throw AgentError(
          .failedPrecondition, "\(target) is in use: \(DatasetsFeature.list(found)); close the files, or detach with lazy or stop")
      }
    case .lazy: break
    case .stop: await stop(found, workspace, mount)
    }
    _ = try await inject(.detach(target: target, mount: mount), target: target, workspace)
    Fault.at(.datasetUnmounted)
    try await forget(workspace, target, found, why)
    return found
  }

  private func forget(_ workspace: Workspace, _ target: String, _ users: [OpenFileUser], _ why: String) async throws {
    guard let dataset = workspace.record[DatasetsFeature.self].mounted.first(where: { $0.target == target }) else { return }
    await workspace.update { $0[DatasetsFeature.self].mounted.removeAll { $0.target == target } }
    var attributes = dataset.attributes
    attributes["why"] = why
    if !users.isEmpty { attributes["holders"] = DatasetsFeature.list(users) }
    try await workspace.commit(.datasetDetached, attributes)
    await releaseImages(workspace)
  }

  private func releaseImages(_ workspace: Workspace) async {
    await releaseImages(of: workspace.id, except: workspace.record[DatasetsFeature.self].mounted.filter(\.isImage).map(\.source))
  }

  private static func list(_ users: [OpenFileUser]) -> String {
    let shown = users.prefix(8).map { "\(printable($0.name)) (pid \($0.pid)): \(printable($0.what, limit: 200))" }
    return users.isEmpty ? "nothing" : shown.joined(separator: "; ") + (users.count > 8 ? "; …" : "")
  }

  private func users(_ workspace: Workspace, _ mount: UInt64) async -> [OpenFileUser] {
    let cgroup = LimitsFeature(services: services).cgroup(workspace.record)
    return (try? await services.lanes.inspect.run { OpenFileUser.find(mount, among: cgroup.processes()) }) ?? []
  }

  /// Ends the processes that use a mount, with SIGTERM and then SIGKILL.
  private func stop(_ found: [OpenFileUser], _ workspace: Workspace, _ mount: UInt64) async {
    var left = found
    for signal in [Signals.terminate, Signals.kill] where !left.isEmpty {
      let signalled = left
      _ = try? await services.lanes.inspect.run { for user in signalled { user.signal(signal) } }
      for _ in 0..<20 where !left.isEmpty {
        try? await Task.sleep(for: .milliseconds(100))
        left = await users(workspace, mount)
      }
    }
  }

  // ---------------------------------------------------------------- injecting

  /// Serializes the changes of a workspace's mounts.
  private func changing<T: Sendable>(_ workspace: Workspace, _ body: () async throws -> T) async throws -> T {
    let id = workspace.id
    return try await changes.lock(id).whileHeld(
      within: .seconds(10),
      else: AgentError(.unavailable, "workspace \(id): another call is changing its mounts; retry later"), body)
  }

  /// Requests a mount change from an injector. `target`: recorded first, for the next agent; nil if no mount is added or removed.
  private func inject(_ request: InjectorRequest, target: String?, _ workspace: Workspace) async throws -> UInt64 {
    let id = workspace.id
    guard let process = await workspace.link?.process, let place = workspace.record.sandbox else {
      throw AgentError(reason: .supervisorUnreachable, "workspace \(id): cannot reach its supervisor; retry later")
    }
    let injection = MountInjection(helper: services.helper, process: process)
    let folder = place.path(in: services.configuration.state)
    let injector = try await services.lanes.launch.run {
      if let target {
        do throws(Errno) { try SandboxDirectory(path: folder).willChange(mount: target) } catch {
          throw AgentError(.internal, "cannot write to \(folder): \(error.sentence)")
        }
      }
      do throws(StepFailure) { return try injection.start() } catch { throw AgentError(.internal, explain(error)) }
    }
    do throws(SupervisorError) {
      return try await MountInjection.perform(request, by: injector, within: DatasetsFeature.injectionLimit)
    } catch {
      if case .failed(let failure) = error { throw AgentError(.internal, explain(failure)) }
      if case .noReply(let seconds) = error {
        throw AgentError(.deadlineExceeded, "workspace \(id): the storage did not respond within \(seconds) s")
      }
      throw AgentError(.internal, "workspace \(id): the injector failed: \(error)")
    }
  }

  // ---------------------------------------------------------------- over time

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { isAdopted }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async { await reconcile(workspace) }

  package func nextExpiry(in record: WorkspaceRecord) -> Double? { record[DatasetsFeature.self].mounted.compactMap(\.expires).min() }

  /// Detaches the datasets that have expired.
  package func expire(_ workspace: Workspace) async -> Bool {
    var isDone = true
    for dataset in workspace.record[DatasetsFeature.self].mounted where dataset.isOver {
      do {
        _ = try await changing(workspace) {
          let now = workspace.record[DatasetsFeature.self].mounted.first { $0.target == dataset.target }
          // Another call may have extended or detached it.
          guard let now, now.isOver else { return [OpenFileUser]() }
          return try await detach(workspace, dataset.target, .lazy, why: "its time was over")
        }
      } catch {
        guard !Task.isCancelled else { return false }
        services.logger.error(
          "cannot detach a dataset; retrying",
          metadata: ["workspace": "\(workspace.id)", "target": "\(dataset.target)", "error": "\(error)"])
        isDone = false
      }
    }
    return isDone
  }

  /// Reconciles the mounts with the record after a restart of the agent. A mount that is not on record is detached; one that is on record
  /// and was detached is reported; modes are set as recorded.
  private func reconcile(_ workspace: Workspace) async {
    _ = try? await changing(workspace) {
      let recorded = workspace.record[DatasetsFeature.self].mounted
      for target in await changed(workspace) {
        let mount = try? await inject(.find(target: target), target: nil, workspace)
        let isMounted = await isMounted(target, workspace)
        if recorded.contains(where: { $0.target == target }) {
          if isMounted == false { try? await forget(workspace, target, [], "the agent was restarted meanwhile") }
        } else if isMounted == true, let mount {
          _ = try? await inject(.detach(target: target, mount: mount), target: nil, workspace)
        }
      }
      for dataset in workspace.record[DatasetsFeature.self].mounted where dataset.isAttached {
        try? await setMode(workspace, dataset.target, writable: dataset.writable)
      }
      await releaseImages(workspace)
    }
  }

  /// Returns the targets that a previous agent was about to change.
  private func changed(_ workspace: Workspace) async -> [String] {
    guard let place = workspace.record.sandbox else { return [] }
    let folder = place.path(in: services.configuration.state)
    let noted = (try? await services.lanes.inspect.run { (try? SandboxDirectory(path: folder))?.changedMounts ?? [] }) ?? []
    return Set(noted + ((await workspace.link as? LegacyShimConnection)?.changedMounts ?? [])).sorted()
  }

  /// Returns whether something is mounted exactly at a target, by PID 1's mount table; nil if that cannot be read.
  private func isMounted(_ target: String, _ workspace: Workspace) async -> Bool? {
    guard let process = await workspace.link?.process else { return nil }
    return try? await services.lanes.inspect.run {
      MountTable(of: process.pid)?.points.contains(target)
    }
  }
}

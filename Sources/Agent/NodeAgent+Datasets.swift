// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Isolation
internal import LaunchPlan
internal import Limits
internal import Linux
internal import Logging
internal import Sandbox
internal import Storage
package import Workspaces

/// Datasets and project folders: who may have what, and how a workspace that runs is given one, or loses it.
extension NodeAgent {
  package nonisolated func registry() -> DatasetRegistry { DatasetRegistry(folder: configuration.datasets) }

  // ------------------------------------------------------------------ deciding

  /// What a spec asks for, as it is now.
  func resolve(_ spec: WorkspaceSpec) throws(InvalidField) -> [MountedDataset] {
    guard !spec.storage.datasets.isEmpty else { return [] }
    let registry = registry()
    var found: [MountedDataset] = []
    for (index, dataset) in spec.storage.datasets.enumerated() {
      found.append(try resolve(dataset, registry, spec.owner.name, field: "storage.datasets[\(index)]", isAttached: false))
    }
    return found
  }

  private func resolve(
    _ dataset: WorkspaceSpec.Dataset, _ registry: DatasetRegistry, _ owner: String, field: String, isAttached: Bool, expires: Double? = nil
  ) throws(InvalidField) -> MountedDataset {
    guard let name = dataset.name else {
      return MountedDataset(
        target: dataset.target, source: dataset.source, reference: nil, path: nil, writable: dataset.writable, executable: false, gid: nil,
        members: nil, expires: expires, isAttached: isAttached)
    }
    let known = try registry.find(name, for: owner, writing: dataset.writable, field: field + ".dataset")
    guard !dataset.writable || !DatasetImages.isImage(known.path) else {
      throw InvalidField(field + ".writable", "\(known.reference) is an image, which is read-only")
    }
    return MountedDataset(
      target: dataset.target, source: known.path, reference: known.reference, path: dataset.path, writable: dataset.writable,
      executable: known.executable, gid: known.gid, members: known.isProject ? known.members.values.sorted() : nil, expires: expires,
      isAttached: isAttached)
  }

  func isGranted(_ dataset: MountedDataset, to owner: String) -> Bool {
    guard let reference = dataset.reference else { return true }
    return (try? registry().find(reference, for: owner, writing: dataset.writable, field: "")) != nil
  }

  /// Looks at what is to be mounted, and makes ready what has to be.
  nonisolated static func open(_ dataset: MountedDataset, _ images: DatasetImages, by workspace: String) throws {
    let base: String
    if dataset.isImage {
      try images.acquire(dataset.source, by: workspace)
      base = images.path(dataset.source)
    } else {
      base = dataset.source
    }
    if let gid = dataset.gid { try HostFolder.prepareProject(base, gid: gid, members: dataset.members ?? []) }
    try HostFolder.checkDataset(base + (dataset.path.map { "/" + $0 } ?? ""))
  }

  // ----------------------------------------------------------------- attaching

  /// Mounts a dataset in a workspace that runs. Where it is at that target already, its mode and its end are changed.
  package func attach(_ id: String, _ asked: WorkspaceSpec.Dataset, seconds: UInt64?) async throws -> WorkspaceRecord {
    let managed = try requireUp(id, "datasets are attached to one that runs")
    let expires = seconds.map { Date.now.timeIntervalSince1970 + Double($0) }
    let dataset: MountedDataset
    do throws(InvalidField) {
      try asked.validate(path: "dataset")
      dataset = try resolve(asked, registry(), managed.record.spec.owner.name, field: "dataset", isAttached: true, expires: expires)
    } catch {
      throw AgentError(error)
    }
    guard let tool = tool(managed.record.spec.tool) else { throw AgentError(.failedPrecondition, "workspace \(id): its tool is gone") }
    guard dataset.target != tool.home else { throw AgentError(.invalidArgument, "dataset.target: \(tool.home) is the home") }
    return try await injecting(managed) {
      if let present = managed.record.datasets?.first(where: { $0.target == dataset.target }) {
        guard present.source == dataset.source, present.path == dataset.path else {
          throw AgentError(
            .failedPrecondition, "dataset.target: \(dataset.target) has \(present.reference ?? present.source); detach that first")
        }
        return try await change(managed, present, to: dataset)
      }
      let bytes = Plan([PlanCompiler.operation(bind(dataset, of: managed.record, tool), first: managed.record.firstID)]).encoded()
      do {
        try await blocking { [datasetImages] in try NodeAgent.open(dataset, datasetImages, by: id) }
      } catch {
        await releaseImages(managed)
        throw AgentError(.failedPrecondition, "\(error)")
      }
      do {
        _ = try await ask(managed, .attach(plan: bytes))
      } catch {
        await releaseImages(managed)
        throw AgentError(.failedPrecondition, "dataset.target: \(dataset.target) cannot be mounted on: \(error)")
      }
      Fault.at(.datasetMounted)
      managed.record.datasets = (managed.record.datasets ?? []) + [dataset]
      try await commit(managed, .datasetAttached, dataset.attributes)
      watchDatasets(managed)
      return managed.record
    }
  }

  private func change(_ managed: Managed, _ present: MountedDataset, to asked: MountedDataset) async throws -> WorkspaceRecord {
    if present.writable != asked.writable { try await setMode(managed, asked.target, writable: asked.writable) }
    guard let index = managed.record.datasets?.firstIndex(where: { $0.target == asked.target }) else { return managed.record }
    guard present.writable != asked.writable || present.expires != asked.expires else { return managed.record }
    managed.record.datasets?[index].writable = asked.writable
    managed.record.datasets?[index].expires = asked.expires
    try await commit(managed, .datasetChanged, (managed.record.datasets?[index] ?? asked).attributes)
    watchDatasets(managed)
    return managed.record
  }

  private func setMode(_ managed: Managed, _ target: String, writable: Bool) async throws {
    let mount = try await mount(managed, target)
    do {
      _ = try await ask(managed, .change(target: target, mount: mount, readOnly: !writable))
    } catch {
      let holders = await holders(managed, mount)
      throw AgentError(
        .failedPrecondition,
        "\(target) cannot become \(writable ? "writable" : "read-only") (\(error)); open in it: \(Holder.list(holders))")
    }
  }

  // ----------------------------------------------------------------- detaching

  package enum HolderPolicy: Sendable { case refuse, lazy, stop }

  /// Takes a dataset away. Returns who had files of it open.
  package func detach(_ id: String, _ target: String, _ policy: HolderPolicy) async throws -> [Holder] {
    let managed = try requireUp(id, "datasets are detached from one that runs")
    guard managed.record.datasets?.contains(where: { $0.target == target }) ?? false else {
      let there = (managed.record.datasets ?? []).map(\.target).sorted().joined(separator: ", ")
      throw AgentError(
        .notFound, "target: workspace \(id) has no dataset at \(printable(target)); it has: \(there.isEmpty ? "none" : there)")
    }
    return try await injecting(managed) { try await detach(managed, target, policy, why: "asked") }
  }

  private func detach(_ managed: Managed, _ target: String, _ policy: HolderPolicy, why: String) async throws -> [Holder] {
    let mount = try await mount(managed, target)
    let found = await holders(managed, mount)
    switch policy {
    case .refuse:
      guard found.isEmpty else {
        throw AgentError(.failedPrecondition, "\(target) is in use: \(Holder.list(found)); ask for lazy or stop, or have them close it")
      }
    case .lazy: break
    case .stop: await stop(found, managed, mount)
    }
    _ = try await ask(managed, .detach(target: target, mount: mount))
    Fault.at(.datasetUnmounted)
    try await forget(managed, target, found, why)
    return found
  }

  private func forget(_ managed: Managed, _ target: String, _ holders: [Holder], _ why: String) async throws {
    guard let dataset = managed.record.datasets?.first(where: { $0.target == target }) else { return }
    managed.record.datasets?.removeAll { $0.target == target }
    var attributes = dataset.attributes
    attributes["why"] = why
    if !holders.isEmpty { attributes["holders"] = Holder.list(holders) }
    try await commit(managed, .datasetDetached, attributes)
    await releaseImages(managed)
  }

  private func releaseImages(_ managed: Managed) async {
    let (id, kept) = (managed.record.spec.id, (managed.record.datasets ?? []).filter(\.isImage).map(\.source))
    try? await blocking { [datasetImages] in datasetImages.release(by: id, except: kept) }
  }

  private func mount(_ managed: Managed, _ target: String) async throws -> UInt64 {
    guard case .mount(let id) = try await ask(managed, .findMount(target: target)) else {
      throw AgentError(.internal, "the supervisor gave no answer")
    }
    return id
  }

  private func holders(_ managed: Managed, _ mount: UInt64) async -> [Holder] {
    let cgroup = cgroup(of: managed.record)
    return (try? await blocking { Holder.find(mount, among: cgroup.processes()) }) ?? []
  }

  /// SIGTERM, two seconds, SIGKILL: to those that are there, and to what comes after them.
  private func stop(_ found: [Holder], _ managed: Managed, _ mount: UInt64) async {
    var left = found
    for signal in [Signals.terminate, Signals.kill] where !left.isEmpty {
      for holder in left { holder.signal(signal) }
      for _ in 0..<20 where !left.isEmpty {
        try? await Task.sleep(for: .milliseconds(100))
        left = await holders(managed, mount)
      }
    }
  }

  // ---------------------------------------------------------------- over time

  /// One change of a workspace's mounts at a time.
  private func injecting<T>(_ managed: Managed, _ body: () async throws -> T) async throws -> T {
    let begun = ContinuousClock.now
    while managed.isInjecting {
      guard begun.duration(to: .now) < .seconds(10) else {
        throw AgentError(.unavailable, "the mounts of workspace \(managed.record.spec.id) are being changed by another call; try again")
      }
      try await Task.sleep(for: .milliseconds(10))
    }
    managed.isInjecting = true
    defer { managed.isInjecting = false }
    return try await body()
  }

  /// Ends what is given for a time, when that is over.
  func watchDatasets(_ managed: Managed) {
    for dataset in managed.record.datasets ?? [] {
      guard let expires = dataset.expires else { continue }
      Task {
        try? await Task.sleep(for: .seconds(max(0, expires - Date.now.timeIntervalSince1970)))
        guard managed.record.state.isUp,
          managed.record.datasets?.contains(where: { $0.target == dataset.target && $0.expires == expires }) ?? false
        else { return }
        do {
          _ = try await injecting(managed) { try await detach(managed, dataset.target, .lazy, why: "its time was over") }
        } catch {
          logger.error(
            "a dataset cannot be detached",
            metadata: ["workspace": "\(managed.record.spec.id)", "target": "\(dataset.target)", "error": "\(error)"])
        }
      }
    }
  }

  /// After a restart: what is on record holds. A mount that is not on record goes; what was detached and is still on record is told;
  /// and modes are as they are recorded.
  func reconcileDatasets(_ managed: Managed) async {
    defer { managed.isInjecting = false }
    guard case .mounts(let attached, let detached)? = try? await ask(managed, .listMounts) else { return watchDatasets(managed) }
    let recorded = Set((managed.record.datasets ?? []).map(\.target))
    for target in attached where !recorded.contains(target) {
      guard let mount = try? await mount(managed, target) else { continue }
      _ = try? await ask(managed, .detach(target: target, mount: mount))
    }
    for target in detached where recorded.contains(target) { try? await forget(managed, target, [], "the agent was restarted meanwhile") }
    for dataset in managed.record.datasets ?? [] where attached.contains(dataset.target) {
      try? await setMode(managed, dataset.target, writable: dataset.writable)
    }
    await releaseImages(managed)
    watchDatasets(managed)
  }
}

extension MountedDataset {
  var isImage: Bool { DatasetImages.isImage(source) }
  var isOver: Bool { expires.map { $0 <= Date.now.timeIntervalSince1970 } ?? false }

  /// As an event tells of it.
  fileprivate var attributes: [String: String] {
    var all = ["target": target, "dataset": reference ?? source, "mode": writable ? "rw" : "ro"]
    if let path { all["path"] = path }
    if let expires { all["expires"] = wallTime(Date(timeIntervalSince1970: expires)) }
    return all
  }
}

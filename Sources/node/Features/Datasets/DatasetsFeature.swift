// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Errors
internal import Foundation
internal import Isolation
internal import LaunchPlan
internal import Linux
internal import Logging
internal import Volumes
internal import ShimClient
internal import Synchronization
package import Workspaces

package struct DatasetsState: FeatureState {
  /// The datasets and project folders that the workspace has.
  package var mounted: [MountedDataset] = []

  package init() {}
}

/// Datasets and project folders: who may use them, and what a workspace gets at its start. `DatasetsFeature+Changes.swift` attaches and
/// detaches them while it runs.
package struct DatasetsFeature: RunningFeature, ExpiringFeature {
  package typealias State = DatasetsState
  package static let name = "datasets"

  let services: NodeServices
  let images: DatasetVolumes
  let changes = MountChanges()

  /// The registered datasets. Reads the disk: call it in a lane.
  package var registry: @Sendable () -> DatasetRegistry { { [services] in DatasetRegistry(folder: services.configuration.datasets) } }

  func readRegistry() async throws -> DatasetRegistry { try await services.lanes.inspect.run(registry) }

  // ------------------------------------------------------------------ deciding

  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws { _ = try await resolve(spec) }

  /// Sets the datasets of a spec in a record, without opening them.
  func describe(_ record: inout WorkspaceRecord) async throws { record[DatasetsFeature.self].mounted = try await resolve(record.spec) }

  /// Resolves the datasets of a spec with the registry as it is now.
  private func resolve(_ spec: WorkspaceSpec) async throws -> [MountedDataset] {
    guard !spec.storage.datasets.isEmpty else { return [] }
    let registry = try await readRegistry()
    var found: [MountedDataset] = []
    for (index, dataset) in spec.storage.datasets.enumerated() {
      found.append(
        try await resolve(dataset, registry, spec.owner.name, field: "storage.datasets[\(index)]", isAttached: false, expires: nil))
    }
    return found
  }

  func resolve(
    _ dataset: WorkspaceSpec.Dataset, _ registry: DatasetRegistry, _ owner: String, field: String, isAttached: Bool, expires: Double?
  ) async throws -> MountedDataset {
    guard let name = dataset.name else {
      return MountedDataset(
        target: dataset.target, source: dataset.source, reference: nil, path: nil, writable: dataset.writable, executable: false, gid: nil,
        members: nil, expires: expires, isAttached: isAttached, isVolume: await isImage(dataset.source))
    }
    let known = try registry.find(name, for: owner, writing: dataset.writable, field: field + ".dataset")
    let isVolume = await isImage(known.path)
    guard !dataset.writable || !isVolume else {
      throw InvalidField(field + ".writable", "\(known.reference) is a volume file, which is read-only")
    }
    return MountedDataset(
      target: dataset.target, source: known.path, reference: known.reference, path: dataset.path, writable: dataset.writable,
      executable: known.executable, gid: known.gid, members: known.isProject ? known.members.values.sorted() : nil, expires: expires,
      isAttached: isAttached, isVolume: isVolume)
  }

  /// Returns whether a source is a volume file; false if its storage does not respond, which is found when the source is opened.
  private func isImage(_ source: String) async -> Bool {
    (try? await services.lanes.onStorage(source, within: HomeFeature.limit) { DatasetVolumes.isImage(source) }) ?? false
  }

  private func isGranted(_ dataset: MountedDataset, to owner: String, _ registry: DatasetRegistry) -> Bool {
    guard let reference = dataset.reference else { return true }
    return (try? registry.find(reference, for: owner, writing: dataset.writable, field: "")) != nil
  }

  // ------------------------------------------------------------------- opening

  package func prepare(_ workspace: Workspace) async throws(Refusal) {
    let record = workspace.record
    let spec = record.spec
    let before = record[DatasetsFeature.self].mounted
    guard !spec.storage.datasets.isEmpty || !before.isEmpty else { return }
    do {
      let registry = try await readRegistry()
      // An attached dataset stays attached in another attempt, until it expires or is no longer permitted.
      let kept = before.filter { $0.isAttached && !$0.isOver && isGranted($0, to: spec.owner.name, registry) }
      let all = try await resolve(spec) + kept
      await workspace.update { $0[DatasetsFeature.self].mounted = all }
      for dataset in all { try await open(dataset, by: spec.id) }
    } catch {
      throw Refusal(.storage, "\(error)")
    }
  }

  /// Opens a volume file, prepares a project folder, and checks the directory that is to be mounted.
  func open(_ dataset: MountedDataset, by workspace: String) async throws {
    let images = images
    do {
      try await services.lanes.onStorage(dataset.source, within: HomeFeature.limit) {
        if dataset.isImage { try images.acquire(dataset.source, by: workspace) }
        if let gid = dataset.gid { try HostDirectory.prepareProject(dataset.base(images), gid: gid, members: dataset.members ?? []) }
        try HostDirectory.checkDataset(dataset.folder(images))
      }
    } catch let error as LaneError {
      throw DriverError(.failedPrecondition, "dataset \(dataset.reference ?? dataset.source): its file system \(error.problem)")
    }
  }

  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    draft.sandbox.binds += record[DatasetsFeature.self].mounted.map { bind($0, of: record, draft.tool) }
  }

  func bind(_ dataset: MountedDataset, of record: WorkspaceRecord, _ tool: Tool) -> SandboxSpec.Bind {
    let owner = record.spec.owner
    // A volume file has no id map, because not every kernel supports one for it: it is read with the rights that everybody has.
    let ids = IDMapping(
      fromUID: owner.uid, fromGID: dataset.gid ?? owner.gid, toUID: tool.uid, toGID: tool.gid,
      others: (dataset.members ?? []).filter { $0 != owner.uid })
    return SandboxSpec.Bind(
      source: dataset.folder(images), target: dataset.target, writable: dataset.writable,
      executable: dataset.executable, ids: dataset.isImage ? nil : ids)
  }

  package func release(_ workspace: Workspace) async {
    changes.forget(workspace.id)
    guard workspace.record[DatasetsFeature.self].mounted.contains(where: \.isImage) else { return }
    await releaseImages(of: workspace.id, except: [])
  }

  /// Releases the volume files of a workspace, except those that it retains.
  func releaseImages(of id: String, except kept: [String]) async {
    let images = images
    _ = try? await services.lanes.cleanup.run { images.release(by: id, except: kept) }
  }

  /// Adopts the volume files that a previous agent opened.
  func adopt(_ workspace: Workspace) async {
    for (index, dataset) in workspace.record[DatasetsFeature.self].mounted.enumerated() {
      if dataset.isVolume == nil {
        let isVolume = await isImage(dataset.source)
        await workspace.update { $0[DatasetsFeature.self].mounted[index].isVolume = isVolume }
      }
    }
    for dataset in workspace.record[DatasetsFeature.self].mounted where dataset.isImage { images.adopt(dataset.source, by: workspace.id) }
  }
}

/// The locks that serialize the changes of each workspace's mounts.
final class MountChanges: Sendable {
  private let locks = Mutex<[String: AsyncLock]>([:])

  func lock(_ workspace: String) -> AsyncLock {
    locks.withLock { locks in
      if let lock = locks[workspace] { return lock }
      let lock = AsyncLock()
      locks[workspace] = lock
      return lock
    }
  }

  func forget(_ workspace: String) { locks.withLock { $0[workspace] = nil } }
}

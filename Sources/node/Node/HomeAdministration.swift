// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Errors
internal import Foundation
internal import Images
internal import Linux
package import Volumes
package import Workspaces

/// The administration of homes, and of the packages in them, for platform engineers.
package struct HomeAdministration: Sendable {
  let services: NodeServices
  let store: HomeStore
  let volumes: HomeVolumes
  let registry: HomeRegistry
  let images: @Sendable () async throws -> [StoredImage]
  /// All workspaces of the node.
  let workspaces: @Sendable () async -> [Workspace]

  package struct HomeEntry: Sendable {
    package let owner: String
    package let isImage: Bool?
    package let bytes: UInt64
    package let isInUse: Bool
    package let snapshots: [HomeStore.Snapshot]
    package let removed: [HomeStore.Snapshot]
  }

  package func list(_ owner: String?) async throws -> [HomeEntry] {
    if let owner { try validate(owner: owner, "owner") }
    let inUse = Set(await workspaces().map(\.record).filter { !$0.state.isTerminal }.map { registry.home($0.spec) })
    return try await onCopies { [store] in
      store.owners().filter { owner == nil || $0 == owner }.map { name in
        HomeEntry(
          owner: name, isImage: store.isImage(name), bytes: store.bytes(name), isInUse: inUse.contains(store.path(name)),
          snapshots: store.snapshots(name), removed: store.removed(name))
      }
    }
  }

  package func snapshot(_ owner: String, label: String, _ progress: @escaping HomeStore.Progress) async throws -> HomeStore.Snapshot {
    try validate(owner: owner, "owner")
    guard label.isEmpty || WorkspaceSpec.isID(label) else { throw AgentError(field: "label", "expected \(WorkspaceSpec.idRule)") }
    return try await onCopies { [store] in try store.snapshot(owner, label: label, progress) }
  }

  package func restore(_ owner: String, _ snapshot: String, _ progress: @escaping HomeStore.Progress) async throws -> HomeStore
    .Snapshot?
  {
    try await withClosedHome(owner) { [store] in try store.restore(owner, snapshot, progress) }
  }

  package func clone(_ owner: String, _ snapshot: String, to other: WorkspaceSpec.Owner, _ progress: @escaping HomeStore.Progress)
    async throws
  {
    try validate(owner: owner, "owner")
    guard other.uid >= 1000, other.gid >= 1000, other.uid <= UInt32(Int32.max), other.gid <= UInt32(Int32.max) else {
      throw AgentError(field: "to", "expected a uid and a gid between 1000 and 2147483647")
    }
    try await withClosedHome(other.name) { [store] in
      try store.clone(owner, snapshot, to: other.name, uid: other.uid, gid: other.gid, progress)
    }
  }

  /// Removes a home. Returns what it is called now, and until when it can be recovered.
  package func remove(_ owner: String, again: String) async throws -> (HomeStore.Snapshot, until: String) {
    guard owner == again else { throw AgentError(field: "again", "expected the owner's name once more, \(printable(owner))") }
    let removed = try await withClosedHome(owner) { [store] in try store.remove(owner) }
    return (removed, wallTime(Date.now.addingTimeInterval(Double(services.configuration.removedHomesDays) * 86_400)))
  }

  package func recover(_ owner: String, _ name: String?) async throws {
    try await withClosedHome(owner) { [store] in try store.recover(owner, name) }
  }

  /// Grows a home volume. Returns its new size in bytes.
  package func grow(_ owner: String, to size: String) async throws -> UInt64 {
    try validate(owner: owner, "owner")
    guard let bytes = Quantity.whole(size), Configuration.homeSizes.contains(bytes) else {
      throw AgentError(field: "size", "\(printable(size)) is not a quantity such as 20Gi")
    }
    let whole = bytes / 4096 * 4096
    return try await onCopies { [store, volumes] in
      guard store.isImage(owner) == true else {
        throw DriverError(
          .failedPrecondition, "there is no home \(store.path(owner)).img; a directory has the limit that a launch asks for")
      }
      try volumes.grow(store.path(owner), to: whole)
      return whole
    }
  }

  /// Deletes, once an hour, homes that were removed more than `removedHomesDays` days ago.
  func purge() async {
    while !Task.isCancelled {
      let moment = Date.now.addingTimeInterval(-Double(services.configuration.removedHomesDays) * 86_400)
      let owners = (try? await onCopies { [store] in store.purge(before: moment) }) ?? []
      for owner in owners { try? await services.record(.swept, ["removedHome": owner]) }
      try? await Task.sleep(for: .seconds(3600))
    }
  }

  // ----------------------------------------------------------------- packages

  package func listPackages(_ owner: String) async throws -> [(entry: HomePackages.Entry, image: String)] {
    let entries = try await withPackages(owner, isClosed: false) { $0.list() }
    let names = ((try? await images()) ?? []).reduce(into: [String: String]()) {
      $0[HomePackages.key($1.digest)] = $1.name
    }
    return entries.map { ($0, names[$0.key] ?? "") }
  }

  package enum PackagesChange: Sendable {
    case snapshot, reset
    case restore(String)
  }

  /// Changes the packages of one image. Returns the name of the snapshot that was made.
  package func changePackages(_ owner: String, _ image: String, _ change: PackagesChange) async throws -> String {
    let all = try await listPackages(owner)
    let chosen = all.filter { image.isEmpty || $0.entry.key == image || $0.image == image || HomePackages.key(image) == $0.entry.key }
    guard chosen.count == 1, let key = chosen.first?.entry.key else {
      let there = all.map { $0.image.isEmpty ? $0.entry.key : "\($0.entry.key) (\($0.image))" }.joined(separator: ", ")
      throw AgentError(.notFound, "image: expected one of those that \(owner) has packages for: \(there.isEmpty ? "none" : there)")
    }
    switch change {
    case .snapshot: return try await withPackages(owner, isClosed: false) { try $0.snapshot(key) }
    case .reset: return try await withPackages(owner, isClosed: true) { try $0.reset(key) }
    case .restore(let name): return try await withPackages(owner, isClosed: true) { try $0.reset(key, to: name) }
    }
  }

  private func withPackages<T: Sendable>(_ owner: String, isClosed: Bool, _ body: @escaping @Sendable (HomePackages) throws -> T)
    async throws
    -> T
  {
    try validate(owner: owner, "owner")
    let work: @Sendable () throws -> T = { [store, volumes] in
      switch store.isImage(owner) {
      case nil: throw DriverError(.failedPrecondition, "there is no home \(store.path(owner))")
      case false?: return try body(HomePackages(home: store.path(owner)))
      case true?: return try volumes.withMountedHome(store.path(owner)) { try body(HomePackages(home: $0)) }
      }
    }
    return isClosed ? try await withClosedHome(owner, work) : try await onCopies(work)
  }

  // -------------------------------------------------------------------- rules

  private func validate(owner: String, _ field: String) throws {
    guard WorkspaceSpec.isOwner(owner) else {
      throw AgentError(field: field, "\(printable(owner)) is not \(WorkspaceSpec.ownerRule)")
    }
  }

  /// Runs work on a home that no workspace may use in the meantime.
  private func withClosedHome<T: Sendable>(_ owner: String, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try validate(owner: owner, "owner")
    let path = store.path(owner)
    guard registry.close(path) else { throw AgentError(.unavailable, "home \(path): another call is changing it; retry later") }
    do {
      try await ensureUnused(path)
    } catch {
      registry.open(path)
      throw error
    }
    do {
      // The home is opened again when the work has ended, which it does even if its caller has left.
      return try await onCopies { [registry] in
        defer { registry.open(path) }
        return try body()
      }
    } catch let error as LaneError {
      // The lane did not begin the work.
      registry.open(path)
      throw error
    }
  }

  private func ensureUnused(_ path: String) async throws {
    // The home is closed before this check, so that no workspace begins to use it between the check and the work.
    for workspace in await workspaces() where registry.home(workspace.spec) == path {
      guard workspace.record.state.isTerminal else {
        throw AgentError(
          reason: .workspaceRunning, "home \(path) is in use by workspace \(workspace.id); stop it first")
      }
      // A workspace that has ended may not have released its home yet.
      try await workspace.released.value
    }
  }

  private func onCopies<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
    do {
      return try await services.lanes.onCopies(services.configuration.homes, body)
    } catch let error as DriverError {
      throw AgentError(error)
    }
  }
}

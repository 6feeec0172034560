// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Isolation
internal import Logging
package import ShimProtocol
internal import Volumes
package import Workspaces

/// The kind of a workspace's home.
package enum HomeKind: Codable, Equatable, Sendable {
  /// A directory of the host, with a limit in bytes if its file system can enforce one.
  case directory(limit: UInt64?)
  /// A file system in a volume file of this size.
  case volume(bytes: UInt64)

  package var isVolume: Bool { if case .volume = self { true } else { false } }

  /// The hard limit in bytes; nil if there is none.
  package var limit: UInt64? {
    switch self {
    case .directory(let limit): limit
    case .volume(let bytes): bytes
    }
  }
}

package struct HomeState: FeatureState {
  package var kind = HomeKind.directory(limit: nil)
  /// The highest threshold of 80, 95 and 100 % that was reported and still holds; 0: none.
  package var filled: UInt64 = 0

  package init() {}

  init(kind: HomeKind, filled: UInt64 = 0) {
    self.kind = kind
    self.filled = filled
  }
}

/// The owner's home: a directory of the host, or a file system in a file with a hard limit, mounted while a workspace runs.
package struct HomeFeature: RunningFeature {
  package typealias State = HomeState
  package static let name = "home"

  let services: NodeServices
  let volumes: HomeVolumes
  let registry: HomeRegistry

  private var configuration: Configuration { services.configuration }

  // ------------------------------------------------------------------ deciding

  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws { _ = try kind(spec) }

  package func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws {
    record[HomeFeature.self].kind = try kind(request.spec)
  }

  /// Returns the path of a workspace's home on the host while it runs.
  func path(_ record: WorkspaceRecord) -> String {
    let home = home(record.spec)
    return record[HomeFeature.self].kind.isVolume ? volumes.path(home) : home
  }

  /// Returns the home's name: its directory, or its volume file without `.img`.
  func home(_ spec: WorkspaceSpec) -> String { registry.home(spec) }

  private func isVolume(_ spec: WorkspaceSpec) -> Bool { (spec.storage.driver ?? configuration.homeDriver) == .image }

  /// Returns the kind of home for a spec. A volume always has a limit, a directory only if the spec or the configuration sets one.
  private func kind(_ spec: WorkspaceSpec) throws(InvalidField) -> HomeKind {
    var sizes = Configuration.homeSizes
    if isVolume(spec) {
      sizes = (volumeFormat(spec)?.floor ?? sizes.lowerBound)...sizes.upperBound
    } else {
      let image = "is for homes kept as images (storage.driver: image)"
      guard spec.storage.fileSystem == nil else { throw InvalidField("storage.fileSystem", image) }
      guard !spec.hasEncryptedHome else { throw InvalidField("storage.encrypted", image) }
    }
    guard let text = spec.storage.size ?? configuration.homeSize ?? (isVolume(spec) ? "10Gi" : nil) else { return .directory(limit: nil) }
    guard let bytes = Quantity.whole(text), sizes.contains(bytes) else {
      throw InvalidField(
        "storage.size",
        "\(printable(text)) is not a quantity between \(Quantity.describe(bytes: sizes.lowerBound)) and \(Quantity.describe(bytes: sizes.upperBound))"
      )
    }
    // The size is rounded down to whole blocks.
    let whole = bytes / 4096 * 4096
    return isVolume(spec) ? .volume(bytes: whole) : .directory(limit: whole)
  }

  /// Returns the requested format; nil if the node decides.
  private func volumeFormat(_ spec: WorkspaceSpec) -> VolumeFormat? {
    (spec.hasEncryptedHome ? .ext4 : spec.storage.fileSystem).flatMap { VolumeFormat(rawValue: $0.rawValue) }
  }

  // ------------------------------------------------------------------- opening

  /// The time limit for a directory's file system to respond.
  static let limit = Duration.seconds(30)

  package func prepare(_ workspace: Workspace) async throws(Refusal) {
    let record = workspace.record
    let (spec, home) = (record.spec, home(record.spec))
    guard !registry.isClosed(home) else { throw Refusal(.storage, "home \(home): being restored or removed; retry later") }
    let isFull: Bool?
    do {
      switch record[HomeFeature.self].kind {
      case .volume(let bytes): isFull = try await openVolume(workspace, home, bytes)
      case .directory(let limit): isFull = try await openDirectory(spec, home, limit)
      }
    } catch let error as LaneError {
      throw Refusal(.storage, "home \(home): its file system \(error.problem)")
    } catch {
      throw Refusal(.storage, "\(error)")
    }
    if isFull == nil {
      await workspace.update { $0[HomeFeature.self].kind = .directory(limit: nil) }
      services.logger.notice("home without a limit", metadata: ["workspace": "\(spec.id)", "home": "\(home)"])
    }
    if isFull == true {
      await RescueFeature.report(
        workspace, "the home is full: its reserve was released; delete files",
        ["limitBytes": "\(record[HomeFeature.self].kind.limit ?? 0)"])
    }
  }

  /// Opens a home directory. Returns true if it is full, nil if its file system enforces no limit and the spec requested none.
  private func openDirectory(_ spec: WorkspaceSpec, _ home: String, _ limit: UInt64?) async throws -> Bool? {
    let owner = spec.owner
    return try await services.lanes.onStorage(home, within: HomeFeature.limit) {
      try HostDirectory.prepareHome(home, uid: owner.uid, gid: owner.gid)
      guard let limit else { return false }
      do { return try HomeQuota.apply(home, bytes: limit, uid: owner.uid, gid: owner.gid) } catch {
        // A default limit that the file system cannot enforce is no reason to refuse.
        guard spec.storage.size == nil else { throw error }
        return nil
      }
    }
  }

  /// Opens a home volume. It may have to be checked (fsck), for which there is no time limit.
  private func openVolume(_ workspace: Workspace, _ home: String, _ bytes: UInt64) async throws -> Bool? {
    let spec = workspace.spec
    let wish = HomeVolumes.HomeRequirements(
      bytes: bytes, isExact: spec.storage.size != nil,
      format: volumeFormat(spec) ?? VolumeFormat(rawValue: configuration.homeFileSystem.rawValue) ?? .ext4,
      isFormatExact: spec.storage.fileSystem != nil, isEncrypted: spec.hasEncryptedHome, key: await workspace.secrets.homeKey)
    let owner = spec.owner
    return try await services.lanes.onVolume(home + ".img") { [volumes] in
      try volumes.acquire(home, by: spec.id, wish, uid: owner.uid, gid: owner.gid)
    }
  }

  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    draft.sandbox.binds.append(
      SandboxSpec.Bind(
        source: path(record), target: draft.tool.home, writable: true, executable: true, ids: draft.ownerIDs(record.spec.owner)))
  }

  package func release(_ workspace: Workspace) async {
    let record = workspace.record
    guard record[HomeFeature.self].kind.isVolume else { return }
    let (home, id) = (home(record.spec), record.spec.id)
    try? await services.lanes.onVolume(home + ".img") { [volumes] in volumes.release(home, by: id) }
  }

  /// Adopts a home that a previous agent opened.
  func adopt(_ record: WorkspaceRecord) async {
    guard record[HomeFeature.self].kind.isVolume else { return }
    let (home, id) = (home(record.spec), record.spec.id)
    volumes.adopt(home, by: id)
  }

  // --------------------------------------------------------------------- usage

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { record[HomeFeature.self].kind.limit != nil }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    while (try? await Task.sleep(for: .seconds(1))) != nil { await check(workspace) }
  }

  /// Returns the usage of a home that has a limit of its own; nil if it has none, or does not respond.
  func use(_ record: WorkspaceRecord) async -> HomeVolumes.Usage? {
    guard record[HomeFeature.self].kind.limit != nil else { return nil }
    let path = path(record)
    return (try? await services.lanes.onStorage(path, within: .seconds(5)) { HomeVolumes.Usage(at: path) }) ?? nil
  }

  /// Records when a home nears its limit, and when it is below again.
  private func check(_ workspace: Workspace) async {
    let record = workspace.record
    guard let use = await use(record), !Task.isCancelled else { return }
    // A threshold is cleared only five points below it, so that a home that hovers around it does not fill the journal as well.
    let reported = record[HomeFeature.self].filled
    let reached: UInt64 = [100, 95, 80].first { use.percent >= $0 || reported >= $0 && use.percent + 5 >= $0 } ?? 0
    guard reached != reported else { return }
    await workspace.update { $0[HomeFeature.self].filled = reached }
    try? await workspace.commit(
      .homeFilling,
      [
        "percent": "\(use.percent)", "usedBytes": "\(use.usedBytes)", "limitBytes": "\(use.limitBytes)", "usedInodes": "\(use.usedInodes)",
        "limitInodes": "\(use.limitInodes)",
      ])
  }
}

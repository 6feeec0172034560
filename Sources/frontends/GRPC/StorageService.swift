// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import GRPCCore
internal import Volumes
internal import SwiftProtobuf
internal import Workspaces
internal import WireMapping

/// `carrel.v1.StorageService`.
struct StorageService: Carrel_V1_StorageService.SimpleServiceProtocol {
  let node: Node

  // ------------------------------------------------------------------ datasets

  func listDatasets(request: Carrel_V1_ListDatasetsRequest, context: ServerContext) async throws -> Carrel_V1_ListDatasetsResponse {
    try await node.answer("ListDatasets") {
      let registry = try await node.datasetRegistry()
      let owner = request.owner
      return .with {
        $0.problems = registry.problems
        $0.datasets = registry.datasets.filter { owner.isEmpty || $0.grants(owner, writing: false) }.map { dataset in
          .with {
            $0.name = dataset.name
            $0.version = dataset.version
            $0.path = dataset.path
            $0.readers = dataset.readers
            $0.writers = dataset.writers
            $0.members = dataset.members
          }
        }
      }
    }
  }

  func attachDataset(request: Carrel_V1_AttachDatasetRequest, context: ServerContext) async throws -> Carrel_V1_AttachDatasetResponse {
    try await node.answer("AttachDataset") { try await RequestHandler(node: node).handle(request) }
  }

  func detachDataset(request: Carrel_V1_DetachDatasetRequest, context: ServerContext) async throws -> Carrel_V1_DetachDatasetResponse {
    try await node.answer("DetachDataset") { try await RequestHandler(node: node).handle(request) }
  }

  // --------------------------------------------------------------------- homes

  func listHomes(request: Carrel_V1_ListHomesRequest, context: ServerContext) async throws -> Carrel_V1_ListHomesResponse {
    try await node.answer("ListHomes", within: CallLimit.long) {
      let homes = try await node.homes.list(request.owner.isEmpty ? nil : request.owner)
      return .with {
        $0.homes = homes.map { home in
          .with {
            $0.owner = home.owner
            $0.driver = home.isImage.map { $0 ? "image" : "directory" } ?? ""
            $0.bytes = home.bytes
            $0.inUse = home.isInUse
            $0.snapshots = home.snapshots.map { Carrel_V1_HomeSnapshot($0) }
            $0.removed = home.removed.map { Carrel_V1_HomeSnapshot($0) }
          }
        }
      }
    }
  }

  func snapshotHome(
    request: Carrel_V1_SnapshotHomeRequest, response: RPCWriter<Carrel_V1_HomeProgress>, context: ServerContext
  ) async throws {
    try await relaying("SnapshotHome", context, response) { try await node.homes.snapshot(request.owner, label: request.label, $0) }
  }

  func restoreHome(
    request: Carrel_V1_RestoreHomeRequest, response: RPCWriter<Carrel_V1_HomeProgress>, context: ServerContext
  ) async throws {
    try await relaying("RestoreHome", context, response) { try await node.homes.restore(request.owner, request.snapshot, $0) }
  }

  func cloneHome(
    request: Carrel_V1_CloneHomeRequest, response: RPCWriter<Carrel_V1_HomeProgress>, context: ServerContext
  ) async throws {
    let to = WorkspaceSpec.Owner(name: request.to.name, uid: request.to.uid, gid: request.to.gid)
    try await relaying("CloneHome", context, response) {
      try await node.homes.clone(request.owner, request.snapshot, to: to, $0)
      return nil
    }
  }

  /// Runs a copy: sends its progress, and at the end the snapshot that it made.
  private func relaying(
    _ call: String, _ context: ServerContext, _ response: RPCWriter<Carrel_V1_HomeProgress>,
    _ body: @escaping @Sendable (@escaping HomeStore.Progress) async throws -> HomeStore.Snapshot?
  ) async throws {
    try await node.relay(call, context, { bytes in try await response.write(.with { $0.bytes = bytes }) }, body) { done in
      try await response.write(.with { $0.done = done.map { Carrel_V1_HomeSnapshot($0) } ?? Carrel_V1_HomeSnapshot() })
    }
  }

  func removeHome(request: Carrel_V1_RemoveHomeRequest, context: ServerContext) async throws -> Carrel_V1_RemoveHomeResponse {
    try await node.answer("RemoveHome") {
      let (removed, until) = try await node.homes.remove(request.owner, again: request.again)
      return .with {
        $0.removed = Carrel_V1_HomeSnapshot(removed)
        $0.until = until
      }
    }
  }

  func recoverHome(request: Carrel_V1_RecoverHomeRequest, context: ServerContext) async throws -> Carrel_V1_RecoverHomeResponse {
    try await node.answer("RecoverHome") {
      try await node.homes.recover(request.owner, request.removed.isEmpty ? nil : request.removed)
      return Carrel_V1_RecoverHomeResponse()
    }
  }

  func growHome(request: Carrel_V1_GrowHomeRequest, context: ServerContext) async throws -> Carrel_V1_GrowHomeResponse {
    try await node.answer("GrowHome", within: CallLimit.long) {
      let bytes = try await node.homes.grow(request.owner, to: request.size)
      return .with { $0.bytes = bytes }
    }
  }

  // ------------------------------------------------------------------ packages

  func listEnvironments(
    request: Carrel_V1_ListEnvironmentsRequest, context: ServerContext
  ) async throws -> Carrel_V1_ListEnvironmentsResponse {
    try await node.answer("ListEnvironments", within: CallLimit.long) {
      let found = try await node.homes.listPackages(request.owner)
      return .with {
        $0.environments = found.map { entry, image in
          .with {
            $0.image = entry.key
            $0.name = image
            $0.bytes = entry.bytes
            $0.snapshots = entry.snapshots
          }
        }
      }
    }
  }

  func changeEnvironment(
    request: Carrel_V1_ChangeEnvironmentRequest, context: ServerContext
  ) async throws -> Carrel_V1_ChangeEnvironmentResponse {
    try await node.answer("ChangeEnvironment", within: CallLimit.copy) {
      let change: HomeAdministration.PackagesChange
      switch request.change {
      case .snapshot: change = .snapshot
      case .reset: change = .reset
      case .restore: change = .restore(request.snapshot)
      case .unspecified, .UNRECOGNIZED: throw AgentError(field: "change", "expected snapshot, restore or reset")
      }
      let name = try await node.homes.changePackages(request.owner, request.image, change)
      return .with { $0.snapshot = name }
    }
  }
}

extension Carrel_V1_HomeSnapshot {
  init(_ snapshot: HomeStore.Snapshot) {
    self.init()
    name = snapshot.name
    created = snapshot.created
    bytes = snapshot.bytes
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import GRPCCore
internal import Storage
internal import SwiftProtobuf
internal import Workspaces

/// `carrel.v1.StorageService`.
struct StorageService: Carrel_V1_StorageService.SimpleServiceProtocol {
  let agent: NodeAgent

  // ------------------------------------------------------------------ datasets

  func listDatasets(request: Carrel_V1_ListDatasetsRequest, context: ServerContext) async throws -> Carrel_V1_ListDatasetsResponse {
    try await answering {
      let registry = agent.registry()
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
    try await answering { try await agent.answer(request) }
  }

  func detachDataset(request: Carrel_V1_DetachDatasetRequest, context: ServerContext) async throws -> Carrel_V1_DetachDatasetResponse {
    try await answering { try await agent.answer(request) }
  }

  // --------------------------------------------------------------------- homes

  func listHomes(request: Carrel_V1_ListHomesRequest, context: ServerContext) async throws -> Carrel_V1_ListHomesResponse {
    try await answering(within: .seconds(600)) {
      let homes = try await agent.listHomes(request.owner.isEmpty ? nil : request.owner)
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
    try await relaying(response) { try await agent.snapshotHome(request.owner, label: request.label, $0) }
  }

  func restoreHome(
    request: Carrel_V1_RestoreHomeRequest, response: RPCWriter<Carrel_V1_HomeProgress>, context: ServerContext
  ) async throws {
    try await relaying(response) { try await agent.restoreHome(request.owner, request.snapshot, $0) }
  }

  func cloneHome(
    request: Carrel_V1_CloneHomeRequest, response: RPCWriter<Carrel_V1_HomeProgress>, context: ServerContext
  ) async throws {
    let to = WorkspaceSpec.Owner(name: request.to.name, uid: request.to.uid, gid: request.to.gid)
    try await relaying(response) {
      try await agent.cloneHome(request.owner, request.snapshot, to: to, $0)
      return nil
    }
  }

  /// How far a copy has come, and at last what it is called.
  private func relaying(
    _ response: RPCWriter<Carrel_V1_HomeProgress>,
    _ body: @escaping @Sendable (@escaping HomeStore.Progress) async throws -> HomeStore.Snapshot?
  ) async throws {
    do {
      let (progress, continuation) = AsyncStream<UInt64>.makeStream(bufferingPolicy: .bufferingNewest(1))
      let work = Task {
        defer { continuation.finish() }
        return try await body { continuation.yield($0) }
      }
      for await bytes in progress { try await response.write(.with { $0.bytes = bytes }) }
      let done = try await work.value
      try await response.write(.with { $0.done = done.map { Carrel_V1_HomeSnapshot($0) } ?? Carrel_V1_HomeSnapshot() })
    } catch {
      throw RPCError(error)
    }
  }

  func removeHome(request: Carrel_V1_RemoveHomeRequest, context: ServerContext) async throws -> Carrel_V1_RemoveHomeResponse {
    try await answering {
      let (removed, until) = try await agent.removeHome(request.owner, again: request.again)
      return .with {
        $0.removed = Carrel_V1_HomeSnapshot(removed)
        $0.until = until
      }
    }
  }

  func recoverHome(request: Carrel_V1_RecoverHomeRequest, context: ServerContext) async throws -> Carrel_V1_RecoverHomeResponse {
    try await answering {
      try await agent.recoverHome(request.owner, request.removed.isEmpty ? nil : request.removed)
      return Carrel_V1_RecoverHomeResponse()
    }
  }

  func growHome(request: Carrel_V1_GrowHomeRequest, context: ServerContext) async throws -> Carrel_V1_GrowHomeResponse {
    try await answering(within: .seconds(600)) {
      let bytes = try await agent.growHome(request.owner, to: request.size)
      return .with { $0.bytes = bytes }
    }
  }

  // ------------------------------------------------------------------ packages

  func listEnvironments(
    request: Carrel_V1_ListEnvironmentsRequest, context: ServerContext
  ) async throws -> Carrel_V1_ListEnvironmentsResponse {
    try await answering(within: .seconds(600)) {
      let found = try await agent.listPackages(request.owner)
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
    try await answering(within: .seconds(3600)) {
      let change: NodeAgent.PackagesChange
      switch request.change {
      case .snapshot: change = .snapshot
      case .reset: change = .reset
      case .restore: change = .restore(request.snapshot)
      case .unspecified, .UNRECOGNIZED: throw AgentError(.invalidArgument, "change: expected snapshot, restore or reset")
      }
      let name = try await agent.changePackages(request.owner, request.image, change)
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

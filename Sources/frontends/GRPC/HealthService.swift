// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import Foundation
internal import GRPCCore
internal import Images
internal import Journal
internal import SwiftProtobuf
internal import Workspaces
internal import WireMapping

/// `grpc.health.v1.Health`. The status is always serving, because the agent serves its socket only after recovery.
struct HealthService: Grpc_Health_V1_Health.SimpleServiceProtocol {
  private func status(_ service: String) -> Grpc_Health_V1_HealthCheckResponse.ServingStatus {
    ["", "carrel.v1.WorkspaceService", "carrel.v1.ImageService", "carrel.v1.StorageService", "carrel.v1.NodeService"].contains(service)
      ? .serving : .serviceUnknown
  }

  func check(request: Grpc_Health_V1_HealthCheckRequest, context: ServerContext) async throws -> Grpc_Health_V1_HealthCheckResponse {
    guard status(request.service) == .serving else {
      throw RPCError(code: .notFound, message: "service: \(printable(request.service)) not found")
    }
    return .with { $0.status = .serving }
  }

  func watch(
    request: Grpc_Health_V1_HealthCheckRequest, response: RPCWriter<Grpc_Health_V1_HealthCheckResponse>, context: ServerContext
  ) async throws {
    try await untilCancelled(context) {
      try await response.write(.with { $0.status = status(request.service) })
      while true { try await Task.sleep(for: .seconds(3600)) }
    }
  }
}

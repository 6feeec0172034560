// SPDX-License-Identifier: Apache-2.0

internal import Procfs
package import API
package import Agent
internal import SwiftProtobuf
internal import Workspaces

/// The requests that the agent's own socket and a controller's call have in common: wire types in and out, without decisions.
package struct RequestHandler: Sendable {
  private let node: Node

  package init(node: Node) { self.node = node }

  package func handle(_ request: Carrel_V1_LaunchRequest) async throws -> Carrel_V1_LaunchResponse {
    let spec: WorkspaceSpec
    switch request.source {
    case .spec(let wire): spec = try WorkspaceSpec(wire)
    case .manifest(let text): spec = try WorkspaceSpec(yaml: text)
    case nil: throw AgentError(field: "source", "expected a spec or a manifest")
    }
    let credentials = request.credentials.map { Credential($0) }
    let (record, created) = try await node.launch(
      spec, credentials: credentials, homeKey: request.homeKey.isEmpty ? nil : Array(request.homeKey))
    return .with {
      $0.workspace = Carrel_V1_Workspace(record, tool: nil, token: nil)
      $0.created = created
    }
  }

  package func handle(_ request: Carrel_V1_StopRequest) async throws -> Carrel_V1_StopResponse {
    let grace = request.hasGracePeriodSeconds ? request.gracePeriodSeconds : nil
    if let grace, grace > 3600 { throw AgentError(field: "grace_period_seconds", "\(grace) is not between 0 and 3600") }
    let record = try await node.stop(request.id, grace: grace, by: request.by.isEmpty ? "a controller" : printable(request.by))
    return .with { $0.workspace = Carrel_V1_Workspace(record, tool: nil, token: nil) }
  }

  package func handle(_ request: Carrel_V1_DeleteRequest) async throws -> Carrel_V1_DeleteResponse {
    try await node.delete(request.id)
    return Carrel_V1_DeleteResponse()
  }

  package func handle(_ request: Carrel_V1_UpdateCredentialsRequest) async throws -> Carrel_V1_UpdateCredentialsResponse {
    try await node.putCredentials(request.id, request.credentials.map { Credential($0) })
    return Carrel_V1_UpdateCredentialsResponse()
  }

  package func handle(_ request: Carrel_V1_RemoveCredentialsRequest) async throws -> Carrel_V1_RemoveCredentialsResponse {
    try await node.removeCredentials(request.id, request.names)
    return Carrel_V1_RemoveCredentialsResponse()
  }

  package func handle(_ request: Carrel_V1_RevokeCredentialsRequest) async throws -> Carrel_V1_RevokeCredentialsResponse {
    try await node.revokeCredentials(request.id, role: request.role.isEmpty ? nil : request.role)
    return Carrel_V1_RevokeCredentialsResponse()
  }

  package func handle(_ request: Carrel_V1_AttachDatasetRequest) async throws -> Carrel_V1_AttachDatasetResponse {
    let seconds = request.lifetimeSeconds == 0 ? nil : request.lifetimeSeconds
    if let seconds, seconds > 31_536_000 {
      throw AgentError(field: "lifetime_seconds", "\(seconds) is not between 1 and 31536000")
    }
    let record = try await node.attach(request.id, WorkspaceSpec.Dataset(request.dataset), seconds: seconds)
    return .with { $0.workspace = Carrel_V1_Workspace(record, tool: nil, token: nil) }
  }

  package func handle(_ request: Carrel_V1_DetachDatasetRequest) async throws -> Carrel_V1_DetachDatasetResponse {
    let policy: DatasetsFeature.UsePolicy =
      switch request.holders {
      case .unspecified, .refuse: .refuse
      case .lazy: .lazy
      case .stop: .stop
      case .UNRECOGNIZED(let value): throw AgentError(field: "holders", "\(value) is not a known value")
      }
    let found = try await node.detach(request.id, request.target, policy)
    return .with {
      $0.holders = found.map { holder in
        .with {
          $0.pid = holder.pid
          $0.name = holder.name
          $0.what = holder.what
        }
      }
    }
  }

  package func handle(_ request: Carrel_V1_DrainRequest) async throws -> Carrel_V1_DrainResponse {
    let seconds = request.hasDeadlineSeconds ? request.deadlineSeconds : nil
    if let seconds, seconds > 86_400 { throw AgentError(field: "deadline_seconds", "\(seconds) is not between 0 and 86400") }
    let left = try await node.drain(seconds: seconds, by: request.by.isEmpty ? "a controller" : printable(request.by))
    return .with { $0.workspaces = UInt32(left) }
  }

  package func handle(_ request: Carrel_V1_UncordonRequest) async throws -> Carrel_V1_UncordonResponse {
    try await node.uncordon(by: request.by.isEmpty ? "a controller" : printable(request.by))
    return Carrel_V1_UncordonResponse()
  }

  package func handle(_ request: Carrel_V1_ResumeRequest) async throws -> Carrel_V1_ResumeResponse {
    try await node.uncordon(by: request.by.isEmpty ? "a controller" : printable(request.by))
    return Carrel_V1_ResumeResponse()
  }
}

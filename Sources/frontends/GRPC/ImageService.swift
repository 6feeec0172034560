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

/// `carrel.v1.ImageService`.
struct ImageService: Carrel_V1_ImageService.SimpleServiceProtocol {
  let node: Node

  func listImages(request: Carrel_V1_ListImagesRequest, context: ServerContext) async throws -> Carrel_V1_ListImagesResponse {
    try await node.answer("ListImages") {
      let images = try await node.readImages { try $0.list() }
      return .with { $0.images = images.map { Carrel_V1_Image($0) } }
    }
  }

  func importImage(
    request: Carrel_V1_ImportImageRequest, response: RPCWriter<Carrel_V1_ImportImageResponse>, context: ServerContext
  ) async throws {
    do {
      guard request.path.hasPrefix("/") else {
        throw AgentError(field: "path", "expected an absolute path on the agent's host")
      }
      guard request.name.isEmpty || WorkspaceSpec.isImageName(request.name) else {
        throw AgentError(field: "name", "expected NAME or NAME:TAG")
      }
    } catch {
      throw RPCError(error)
    }
    try await node.relay("ImportImage", context, { line in try await response.write(.with { $0.progress = line }) }) { progress in
      try await node.onImages { store in
        try store.importImage(from: request.path, name: request.name.isEmpty ? nil : request.name) { progress($0) }
      }
    } finish: { image in
      try await response.write(.with { $0.image = Carrel_V1_Image(image) })
    }
  }

  func inspectImage(request: Carrel_V1_InspectImageRequest, context: ServerContext) async throws -> Carrel_V1_InspectImageResponse {
    try await node.answer("InspectImage") {
      let image = try await node.readImages { try $0.find(request.name) }
      return .with { $0.image = Carrel_V1_Image(image, withConfig: true) }
    }
  }

  func removeImage(request: Carrel_V1_RemoveImageRequest, context: ServerContext) async throws -> Carrel_V1_RemoveImageResponse {
    try await node.answer("RemoveImage") {
      try await node.removeImage(request.name)
      return Carrel_V1_RemoveImageResponse()
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import API
internal import Agent
internal import Foundation
internal import GRPCCore
internal import Images
internal import Journal
internal import SwiftProtobuf
internal import Workspaces

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
        throw AgentError(.invalidArgument, "path: expected an absolute path on the agent's host")
      }
      guard request.name.isEmpty || WorkspaceSpec.isImageName(request.name) else {
        throw AgentError(.invalidArgument, "name: expected NAME or NAME:TAG")
      }
    } catch {
      throw RPCError(error)
    }
    try await node.relay("ImportImage", context, { line in try await response.write(.with { $0.progress = line }) }) { progress in
      try await node.imageWork { store in
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

/// `carrel.v1.NodeService`.
struct NodeService: Carrel_V1_NodeService.SimpleServiceProtocol {
  let node: Node
  let version: String
  let links: [ControllerLink]

  func drain(request: Carrel_V1_DrainRequest, context: ServerContext) async throws -> Carrel_V1_DrainResponse {
    try await node.answer("Drain") { try await RequestHandler(node: node).handle(request) }
  }

  func resume(request: Carrel_V1_ResumeRequest, context: ServerContext) async throws -> Carrel_V1_ResumeResponse {
    try await node.answer("Resume") { try await RequestHandler(node: node).handle(request) }
  }

  func checkJournal(request: Carrel_V1_CheckJournalRequest, context: ServerContext) async throws -> Carrel_V1_CheckJournalResponse {
    try await node.answer("CheckJournal", within: CallLimit.long) {
      do {
        let events = try await node.journal.check()
        return .with { $0.events = UInt64(events) }
      } catch {
        throw AgentError(.dataLoss, "\(error)")
      }
    }
  }

  func info(request: Carrel_V1_InfoRequest, context: ServerContext) async throws -> Carrel_V1_InfoResponse {
    try await node.answer("Info") {
      let records = await node.list()
      let alive = records.filter { !$0.state.isTerminal }
      let extent = try await node.journal.extent()
      var controllers: [Carrel_V1_ControllerStatus] = []
      for link in links { controllers.append(try await link.status()) }
      let acknowledged = try await node.journal.acknowledged(by: node.configuration.acknowledger) ?? 0
      let draining = await node.drain != nil
      let limit = Quantity.whole(node.configuration.journalLimit) ?? 0
      let tools = node.toolNames
      let facts = node.facts
      return .with {
        $0.version = version
        $0.node = facts.name
        $0.kernel = facts.kernel
        $0.bootID = facts.bootID
        $0.cgroupLayout = facts.layoutName
        $0.memoryBytes = facts.memoryBytes
        $0.memoryReservedBytes = alive.reduce(0) { $0 + $1.amounts.memoryBytes }
        $0.cpus = Double(facts.milliCPUs) / 1000
        $0.cpusReserved = Double(alive.reduce(0) { $0 + $1.amounts.milliCPUs }) / 1000
        $0.workspaces = UInt32(records.count)
        $0.workspacesRunning = UInt32(alive.count)
        $0.streamID = node.journal.streamID
        $0.head = UInt64(extent.head)
        $0.oldest = UInt64(extent.oldest)
        $0.acknowledged = UInt64(acknowledged)
        $0.draining = draining
        $0.journalBytes = extent.bytes
        $0.journalLimitBytes = limit
        $0.controllers = controllers
        $0.degraded = facts.degraded + node.congestion
        $0.tools = tools
        $0.started = node.started
      }
    }
  }
}

/// `grpc.health.v1.Health`: serving from the moment the socket answers, since recovery comes before.
struct HealthService: Grpc_Health_V1_Health.SimpleServiceProtocol {
  private func status(_ service: String) -> Grpc_Health_V1_HealthCheckResponse.ServingStatus {
    ["", "carrel.v1.WorkspaceService", "carrel.v1.ImageService", "carrel.v1.StorageService", "carrel.v1.NodeService"].contains(service)
      ? .serving : .serviceUnknown
  }

  func check(request: Grpc_Health_V1_HealthCheckRequest, context: ServerContext) async throws -> Grpc_Health_V1_HealthCheckResponse {
    guard status(request.service) == .serving else {
      throw RPCError(code: .notFound, message: "service: there is no \(printable(request.service))")
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

/// `grpc.reflection.v1.ServerReflection`, from the descriptors that were compiled in.
struct ReflectionService: Grpc_Reflection_V1_ServerReflection.SimpleServiceProtocol {
  private let files: [Google_Protobuf_FileDescriptorProto]

  init() throws {
    let data = Data(base64Encoded: DescriptorSet.base64) ?? Data()
    files = try Google_Protobuf_FileDescriptorSet(serializedBytes: data).file
  }

  func serverReflectionInfo(
    request: RPCAsyncSequence<Grpc_Reflection_V1_ServerReflectionRequest, any Error>,
    response: RPCWriter<Grpc_Reflection_V1_ServerReflectionResponse>, context: ServerContext
  ) async throws {
    for try await question in request {
      var answer = Grpc_Reflection_V1_ServerReflectionResponse()
      answer.originalRequest = question
      answer.messageResponse = try respond(question)
      try await response.write(answer)
    }
  }

  private func respond(
    _ question: Grpc_Reflection_V1_ServerReflectionRequest
  ) throws -> Grpc_Reflection_V1_ServerReflectionResponse.OneOf_MessageResponse {
    switch question.messageRequest {
    case .listServices:
      let names = files.flatMap { file in file.service.map { "\(file.package).\($0.name)" } }
      return .listServicesResponse(.with { $0.service = names.map { name in .with { $0.name = name } } })
    case .fileByFilename(let name): return try found(files.filter { $0.name == name }, name)
    case .fileContainingSymbol(let symbol):
      let owners = files.filter { file in
        symbol.hasPrefix(file.package + ".")
          && (file.service.contains { symbol == "\(file.package).\($0.name)" || symbol.hasPrefix("\(file.package).\($0.name).") }
            || file.messageType.contains { symbol == "\(file.package).\($0.name)" || symbol.hasPrefix("\(file.package).\($0.name).") }
            || file.enumType.contains { symbol == "\(file.package).\($0.name)" })
      }
      return try found(owners, symbol)
    default:
      return .errorResponse(
        .with {
          $0.errorCode = 12
          $0.errorMessage = "there are no extensions here"
        })
    }
  }

  private func found(
    _ matching: [Google_Protobuf_FileDescriptorProto], _ what: String
  ) throws -> Grpc_Reflection_V1_ServerReflectionResponse.OneOf_MessageResponse {
    guard !matching.isEmpty else {
      return .errorResponse(
        .with {
          $0.errorCode = 5
          $0.errorMessage = "there is no \(printable(what))"
        })
    }
    let bytes = try matching.map { try $0.serializedBytes() as Data }
    return .fileDescriptorResponse(.with { $0.fileDescriptorProto = bytes })
  }
}

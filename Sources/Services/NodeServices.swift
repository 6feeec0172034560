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
  let agent: NodeAgent

  func listImages(request: Carrel_V1_ListImagesRequest, context: ServerContext) async throws -> Carrel_V1_ListImagesResponse {
    try await answering {
      let images = try await agent.imageWork { try $0.list() }
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
      let (progress, continuation) = AsyncStream<String>.makeStream()
      let work = Task {
        defer { continuation.finish() }
        return try await agent.imageWork { store in
          try store.importImage(from: request.path, name: request.name.isEmpty ? nil : request.name) { continuation.yield($0) }
        }
      }
      for await line in progress { try await response.write(.with { $0.progress = line }) }
      let image = try await work.value
      try await response.write(.with { $0.image = Carrel_V1_Image(image) })
    } catch {
      throw RPCError(error)
    }
  }

  func inspectImage(request: Carrel_V1_InspectImageRequest, context: ServerContext) async throws -> Carrel_V1_InspectImageResponse {
    try await answering {
      let image = try await agent.imageWork { try $0.find(request.name) }
      return .with { $0.image = Carrel_V1_Image(image, withConfig: true) }
    }
  }

  func removeImage(request: Carrel_V1_RemoveImageRequest, context: ServerContext) async throws -> Carrel_V1_RemoveImageResponse {
    try await answering {
      try await agent.removeImage(request.name)
      return Carrel_V1_RemoveImageResponse()
    }
  }
}

/// `carrel.v1.NodeService`.
struct NodeService: Carrel_V1_NodeService.SimpleServiceProtocol {
  let agent: NodeAgent
  let version: String
  let links: [ControllerLink]

  func drain(request: Carrel_V1_DrainRequest, context: ServerContext) async throws -> Carrel_V1_DrainResponse {
    try await answering { try await agent.answer(request) }
  }

  func resume(request: Carrel_V1_ResumeRequest, context: ServerContext) async throws -> Carrel_V1_ResumeResponse {
    try await answering { try await agent.answer(request) }
  }

  func checkJournal(request: Carrel_V1_CheckJournalRequest, context: ServerContext) async throws -> Carrel_V1_CheckJournalResponse {
    try await answering(within: .seconds(600)) {
      do {
        let events = try await agent.journal.check()
        return .with { $0.events = UInt64(events) }
      } catch {
        throw AgentError(.dataLoss, "\(error)")
      }
    }
  }

  func info(request: Carrel_V1_InfoRequest, context: ServerContext) async throws -> Carrel_V1_InfoResponse {
    try await answering {
      let records = await agent.list()
      let alive = records.filter { !$0.state.isTerminal }
      let extent = try await agent.journal.extent()
      var controllers: [Carrel_V1_ControllerStatus] = []
      for link in links { controllers.append(try await link.status()) }
      let acknowledged = try await agent.journal.acknowledged(by: agent.configuration.acknowledger) ?? 0
      let draining = await agent.drain != nil
      let limit = Quantity.whole(agent.configuration.journalLimit) ?? 0
      let tools = await agent.toolNames
      let facts = agent.facts
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
        $0.streamID = agent.journal.streamID
        $0.head = UInt64(extent.head)
        $0.oldest = UInt64(extent.oldest)
        $0.acknowledged = UInt64(acknowledged)
        $0.draining = draining
        $0.journalBytes = extent.bytes
        $0.journalLimitBytes = limit
        $0.controllers = controllers
        $0.degraded = facts.degraded
        $0.tools = tools
        $0.started = agent.started
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
    try await response.write(.with { $0.status = status(request.service) })
    while !Task.isCancelled { try await Task.sleep(for: .seconds(3600)) }
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

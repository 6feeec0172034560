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

/// `grpc.reflection.v1.ServerReflection`, from the descriptors in this binary.
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
          $0.errorMessage = "extensions are not supported"
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
          $0.errorMessage = "\(printable(what)): not found"
        })
    }
    let bytes = try matching.map { try $0.serializedBytes() as Data }
    return .fileDescriptorResponse(.with { $0.fileDescriptorProto = bytes })
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Configuration
package import API
package import Agent
internal import Foundation
internal import GRPCCore
internal import GRPCNIOTransportHTTP2
internal import Linux
package import Logging
internal import NIOCore
internal import ServiceLifecycle
internal import WireMapping

/// The agent's socket. It is bound with mode 0600 in a 0700 directory, under a lock, so that a second agent never replaces the
/// socket of a running one.
package struct Server {
  /// Returns the state of the connection to one controller.
  package typealias ControllerStatus = @Sendable () async throws -> Carrel_V1_ControllerStatus

  private let node: Node
  private let logger: Logger
  private let version: String
  private let allowed: Set<UInt32>
  private let listener: Handle
  private let lock: Handle
  private let controllers: [ControllerStatus]

  /// Binds the socket. Fails if another agent serves at the same path.
  package init(node: Node, logger: Logger, version: String, controllers: [ControllerStatus]) throws {
    self.node = node
    self.controllers = controllers
    self.logger = logger
    self.version = version
    allowed = Set(node.configuration.allowedUIDs + [0, Process.effectiveUser])
    let path = node.configuration.socket
    let folderPath = String(path[..<(path.lastIndex(of: "/") ?? path.startIndex)])
    let name = String(path[path.index(after: path.lastIndex(of: "/") ?? path.startIndex)...])
    try FileManager.default.createDirectory(
      atPath: folderPath, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
    let folder = try Descriptor.open(folderPath, [.readOnly, .directory])
    lock = Handle(try folder.open("\(name).lock", [.readWrite, .create, .noFollow], mode: 0o600))
    do throws(Errno) {
      try lock.descriptor.lock()
    } catch {
      throw AgentError(.failedPrecondition, "another agent serves at \(path)")
    }
    // The lock is held, so that a socket found here belongs to an agent that has exited.
    try? folder.remove(name)
    listener = Handle(try Socket.listen(name, in: folder, stream: true))
  }

  package func run() async throws {
    var config = HTTP2ServerTransport.Posix.Config.defaults
    config.connection.flushCoalescing = nil
    // Clients queue what is above this. Without an announced limit they know none, and the 101st call resets the connection.
    config.http2.maxConcurrentStreams = 1000
    // Without a limit, open watches would delay the shutdown for ever.
    config.connection.maxGraceTime = .seconds(2)
    config.channelDebuggingCallbacks.onAcceptHTTP2Stream = { stream in
      guard let connection = stream.parent else { return stream.eventLoop.makeSucceededVoidFuture() }
      return PeerCredentials.of(connection).flatMap { peer in
        stream.eventLoop.makeCompletedFuture {
          try stream.pipeline.syncOperations.addHandler(PeerHeaderHandler(peer), position: .first)
        }
      }
    }
    let transport = HTTP2ServerTransport.Posix(
      listeningSocketDescriptor: Int(try listener.descriptor.duplicate().release()), transportSecurity: .plaintext, config: config)
    let server = GRPCServer(
      transport: transport,
      services: [
        WorkspaceService(node: node), ImageService(node: node), StorageService(node: node),
        NodeService(node: node, version: version, controllers: controllers), HealthService(), try ReflectionService(),
      ],
      interceptors: [PeerInterceptor(allowed: allowed, logger: logger)])
    try await withGracefulShutdownHandler {
      try await server.serve()
    } onGracefulShutdown: {
      server.beginGracefulShutdown()
    }
    withExtendedLifetime(lock) {}
  }
}

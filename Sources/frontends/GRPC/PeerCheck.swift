// SPDX-License-Identifier: Apache-2.0

internal import GRPCCore
internal import Logging
internal import NIOCore
internal import NIOHPACK
internal import NIOHTTP2

/// The peer of a connection, as the kernel reports it.
struct PeerCredentials: Sendable {
  let pid: Int32
  let uid: UInt32

  static let header = "x-carrel-peer"

  /// Reads SO_PEERCRED of a connection's channel; nil if the option cannot be read.
  static func of(_ channel: any Channel) -> EventLoopFuture<PeerCredentials?> {
    guard let options = channel as? any SocketOptionProvider else {
      return channel.eventLoop.makeSucceededFuture(nil)
    }
    // SOL_SOCKET is 1, SO_PEERCRED 17 (socket(7), unix(7)); struct ucred is pid, uid, gid, 32 bits each.
    return options.unsafeGetSocketOption(level: NIOBSDSocket.OptionLevel(rawValue: 1), name: NIOBSDSocket.Option(rawValue: 17))
      .map { (raw: RawCredentials) in PeerCredentials(pid: raw.pid, uid: raw.uid) }
      .flatMapErrorThrowing { _ in nil }
  }

  private struct RawCredentials: Sendable {
    var pid: Int32 = 0
    var uid: UInt32 = .max
    var gid: UInt32 = .max
  }
}

/// The first handler in every stream's pipeline. It replaces a header that the client sent by what the kernel reports, so that a
/// client cannot forge it.
final class PeerHeaderHandler: ChannelInboundHandler, RemovableChannelHandler {
  typealias InboundIn = HTTP2Frame.FramePayload
  typealias InboundOut = HTTP2Frame.FramePayload

  private let peer: PeerCredentials?
  init(_ peer: PeerCredentials?) { self.peer = peer }

  func channelRead(context: ChannelHandlerContext, data: NIOAny) {
    guard case .headers(var payload) = unwrapInboundIn(data) else { return context.fireChannelRead(data) }
    payload.headers.remove(name: PeerCredentials.header)
    if let peer { payload.headers.add(name: PeerCredentials.header, value: "\(peer.uid) \(peer.pid)") }
    context.fireChannelRead(wrapInboundOut(.headers(payload)))
  }
}

/// Refuses peers that are not on the allow-list.
struct PeerInterceptor: ServerInterceptor {
  let allowed: Set<UInt32>
  let logger: Logger

  /// The caller of the call in progress, as the kernel reports it.
  @TaskLocal static var caller: String?

  func intercept<Input: Sendable, Output: Sendable>(
    request: StreamingServerRequest<Input>, context: ServerContext,
    next: @Sendable (StreamingServerRequest<Input>, ServerContext) async throws -> StreamingServerResponse<Output>
  ) async throws -> StreamingServerResponse<Output> {
    let said = request.metadata[stringValues: PeerCredentials.header].first { _ in true }
    let fields = (said ?? "").split(separator: " ")
    guard fields.count == 2, let uid = UInt32(fields[0]), allowed.contains(uid) else {
      logger.warning(
        "peer refused",
        metadata: [
          "uid": "\(fields.first ?? "unknown")", "pid": "\(fields.last ?? "unknown")",
          "method": "\(context.descriptor.fullyQualifiedMethod)",
        ])
      throw RPCError(code: .permissionDenied, message: "uid \(fields.first ?? "unknown") is not on this agent's allow-list (allowedUIDs)")
    }
    let caller = "uid \(fields[0]), pid \(fields[1])"
    let response = try await PeerInterceptor.$caller.withValue(caller) { try await next(request, context) }
    // A streaming call produces its response after this function has returned.
    guard case .success(var contents) = response.accepted else { return response }
    let producer = contents.producer
    contents.producer = { writer in try await PeerInterceptor.$caller.withValue(caller) { try await producer(writer) } }
    return StreamingServerResponse(accepted: .success(contents))
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import NIOCore
internal import NIOPosix
internal import Workspaces

/// Probes over HTTP whether a tool is ready.
enum ReadinessProbe {
  /// Returns when `GET path` has the expected status; throws only when cancelled or out of time.
  static func wait(host: String, port: UInt16, probe: Tool.Probe) async throws {
    let start = ContinuousClock.now
    let deadline = start + .seconds(probe.timeoutSeconds)
    while ContinuousClock.now < deadline {
      if await answersInTime(host: host, port: port, probe: probe) { return }
      // Probes are frequent at first, so that a fast tool is not delayed; a refused connection costs next to nothing.
      try await Task.sleep(for: start.duration(to: .now) < .seconds(10) ? .milliseconds(5) : .milliseconds(100))
    }
    throw AgentError(.deadlineExceeded, "port \(port): no status \(probe.status) for GET \(probe.path) within \(probe.timeoutSeconds) s")
  }

  /// Probes once, within 5 s: a tool that accepts the connection and sends nothing does not delay the next probe.
  private static func answersInTime(host: String, port: UInt16, probe: Tool.Probe) async -> Bool {
    await withTaskGroup(of: Bool.self) { group in
      group.addTask { await answers(host: host, port: port, probe: probe) }
      group.addTask {
        try? await Task.sleep(for: .seconds(5))
        return false
      }
      defer { group.cancelAll() }
      return await group.next() ?? false
    }
  }

  private static func answers(host: String, port: UInt16, probe: Tool.Probe) async -> Bool {
    do {
      let channel = try await ClientBootstrap(group: .singletonMultiThreadedEventLoopGroup)
        .connectTimeout(.seconds(2))
        .connect(host: host, port: Int(port)) { channel in
          channel.eventLoop.makeCompletedFuture {
            try NIOAsyncChannel<ByteBuffer, ByteBuffer>(wrappingChannelSynchronously: channel)
          }
        }
      return try await channel.executeThenClose { inbound, outbound in
        try await outbound.write(ByteBuffer(string: "GET \(probe.path) HTTP/1.0\r\nHost: \(host)\r\n\r\n"))
        var head = ""
        for try await part in inbound {
          head += String(buffer: part)
          if head.contains("\r\n") || head.utf8.count > 1024 { break }
        }
        let fields = head.split(separator: " ", maxSplits: 2)
        return fields.count > 1 && fields[0].hasPrefix("HTTP/1.") && fields[1] == "\(probe.status)"
      }
    } catch {
      return false
    }
  }
}

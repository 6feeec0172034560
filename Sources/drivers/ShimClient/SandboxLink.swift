// SPDX-License-Identifier: Apache-2.0

package import Linux
package import ShimProtocol

/// The reason why a request to a supervisor has no result.
package enum SupervisorError: Error, Equatable, Sendable, CustomStringConvertible {
  /// The connection closed; the sandbox may still run.
  case disconnected
  case noReply(seconds: Int64)
  case refused(Errno)
  case failed(StepFailure)
  /// The supervisor is from a release that does not support the request.
  case unsupported
  case malformed
  case tooManyExecs
  /// The task that awaited the reply was cancelled.
  case cancelled

  package var description: String {
    switch self {
    case .disconnected: "the connection to its supervisor closed"
    case .noReply(let seconds): "its supervisor did not reply within \(seconds) s"
    case .refused(let error): "its supervisor refused: \(error.sentence)"
    case .failed(let failure): "\(failure.step): \(Errno(failure.errno).sentence)"
    case .unsupported: "its supervisor is from a release that does not support this; restart the workspace"
    case .malformed: "its supervisor did not understand the request"
    case .cancelled: "the request to its supervisor was cancelled"
    case .tooManyExecs: "\(ShimProtocol.execLimit) exec sessions run in it (limit \(ShimProtocol.execLimit)); retry later"
    }
  }
}

/// A connection of the agent to one supervisor.
package protocol SandboxLink: Sendable {
  /// The supervisor's hello on this connection.
  var status: SupervisorHello { get }
  /// The reports of the supervisor, in order. The stream ends with the connection, not with the sandbox.
  var reports: AsyncStream<ShimReport> { get }
  /// PID 1 of the sandbox, or nil before it exists.
  var process: SandboxProcess? { get }
  /// Sends a request and returns the descriptors of the reply.
  @discardableResult
  func request(_ request: ShimRequest, passing: [Handle], within limit: Duration) async throws(SupervisorError) -> [Handle]
  /// Sends without awaiting the reply, for callers that must not block.
  func send(_ request: ShimRequest) throws(SupervisorError)
  func exec(_ request: ExecRequest, within limit: Duration) async throws(SupervisorError) -> ExecSession
  /// Waits up to `limit` for the supervisor's process to exit. Returns whether it has exited, or nil if that cannot be determined.
  func hasEnded(within limit: Duration) async -> Bool?
  /// Kills the supervisor itself (SIGKILL), when it no longer replies.
  func killSupervisor()
  func close()
}

extension SandboxLink {
  @discardableResult
  package func request(_ request: ShimRequest, passing: [Handle] = []) async throws(SupervisorError) -> [Handle] {
    try await self.request(request, passing: passing, within: .seconds(10))
  }
}

/// PID 1 of a sandbox, held by a descriptor that never refers to another process.
package struct SandboxProcess: Sendable {
  package let pid: Int32
  private let process: Handle

  package init(pid: Int32, process: Handle) {
    self.pid = pid
    self.process = process
  }

  /// Opens a namespace of the process: `net`, `user`, `mnt`.
  package func namespace(_ kind: String) throws(Errno) -> Descriptor {
    let file = try Descriptor.open("/proc/\(pid)/ns/\(kind)", [.readOnly])
    // If the process has not exited by now, its pid was not reused when the file was opened.
    if try Process.hasEnded(process) { throw .noSuchProcess }
    return file
  }

  package func signal(_ number: Int32) throws(Errno) { try Process.signal(process.descriptor, number) }
}

// SPDX-License-Identifier: Apache-2.0

package import Linux
package import ShimProtocol

/// Why a request to a supervisor has no result.
package enum SupervisorError: Error, Equatable, Sendable, CustomStringConvertible {
  /// The connection ended; the sandbox may live on.
  case disconnected
  case noReply(seconds: Int64)
  case refused(Errno)
  case failed(StepFailure)
  /// It is of a release that does not know this.
  case unsupported
  case malformed
  case tooManyExecs
  /// The task that waited was cancelled.
  case cancelled

  package var description: String {
    switch self {
    case .disconnected: "the connection to its supervisor ended"
    case .noReply(let seconds): "its supervisor did not reply within \(seconds) s"
    case .refused(let error): "its supervisor refused: \(error.sentence)"
    case .failed(let failure): "\(failure.step): \(Errno(failure.errno).sentence)"
    case .unsupported: "its supervisor is of a release that cannot do this; restart the workspace"
    case .malformed: "its supervisor did not understand the request"
    case .cancelled: "nobody waits for its supervisor any more"
    case .tooManyExecs: "\(ShimProtocol.execLimit) further programs run in it, which is the limit"
    }
  }
}

/// A connection of the agent to one supervisor.
package protocol SandboxLink: Sendable {
  /// What the supervisor said of itself when it was connected to.
  var status: SupervisorHello { get }
  /// What the supervisor reports, in order. The end of this is the end of the connection, and not of the sandbox.
  var reports: AsyncStream<ShimReport> { get }
  /// PID 1 of the sandbox, once it is there.
  var process: SandboxProcess? { get }
  /// Returns the descriptors that came with the reply.
  @discardableResult
  func request(_ request: ShimRequest, passing: [Handle], within limit: Duration) async throws(SupervisorError) -> [Handle]
  /// Sends without waiting for the reply: what acts must not wait for anything.
  func send(_ request: ShimRequest) throws(SupervisorError)
  func exec(_ request: ExecRequest, within limit: Duration) async throws(SupervisorError) -> ExecSession
  /// Whether the supervisor's process has ended; waits for that up to `limit`. Nil where it cannot be seen.
  func hasEnded(within limit: Duration) async -> Bool?
  /// SIGKILL to the supervisor itself, which does not reply any more.
  func killSupervisor()
  func close()
}

extension SandboxLink {
  @discardableResult
  package func request(_ request: ShimRequest, passing: [Handle] = []) async throws(SupervisorError) -> [Handle] {
    try await self.request(request, passing: passing, within: .seconds(10))
  }
}

/// PID 1 of a sandbox, by a descriptor that can never come to mean another process.
package struct SandboxProcess: Sendable {
  package let pid: Int32
  private let process: Handle

  package init(pid: Int32, process: Handle) {
    self.pid = pid
    self.process = process
  }

  /// A namespace of it: `net`, `user`, `mnt`.
  package func namespace(_ kind: String) throws(Errno) -> Descriptor {
    let file = try Descriptor.open("/proc/\(pid)/ns/\(kind)", [.readOnly])
    // If it has not ended by now, the number was still its own when the file was opened.
    if try Process.hasEnded(process) { throw .noSuchProcess }
    return file
  }

  package func signal(_ number: Int32) throws(Errno) { try Process.signal(process.descriptor, number) }
}

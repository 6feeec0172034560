// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
package import Linux
package import Sandbox

/// Changes what is mounted in a sandbox, each time by an injector of its own (`MountInjector`).
package struct MountInjection: Sendable {
  private let helper: String
  private let process: SandboxProcess

  /// `helper`: the path of `carrel-shim`.
  package init(helper: String, process: SandboxProcess) {
    self.helper = helper
    self.process = process
  }

  /// Starts an injector: its connection. Blocking, for as long as a program takes to be started.
  package func start() throws(StepFailure) -> Handle {
    do throws(Errno) {
      let (near, far) = try Socket.pair()
      let user = try process.namespace("user")
      let mounts = try process.namespace("mnt")
      _ = try Process.spawn(
        helper, CStrings(["carrel-shim", MountInjector.name]), CStrings(Fault.environment), far.descriptor, user, mounts, errors: 2)
      return near
    } catch {
      throw StepFailure("start \(helper)", error)
    }
  }

  /// Has the injector at `connection` do one thing, and returns the mount's number. An injector that storage holds up for longer
  /// than `limit` is left to itself: what it was to do does not happen any more.
  package static func perform(
    _ request: InjectorRequest, over connection: Handle, within limit: Duration
  ) async throws(SupervisorError) -> UInt64 {
    let socket = MessageSocket<InjectorRequest, InjectorReport>(connection)
    let result = Promise<UInt64>()
    do throws(Errno) {
      try Readiness.shared.watch(connection) {
        do throws(Errno) {
          switch try socket.receive(wait: false)?.message {
          case .ready:
            try socket.send(.proceed, wait: false)
            return true
          case .done(let mount): result.fulfil(.success(mount))
          case .failed(let failure): result.fulfil(.failure(SupervisorError.failed(failure)))
          case nil: result.fulfil(.failure(SupervisorError.disconnected))
          }
        } catch {
          if error == .again { return true }
          result.fulfil(.failure(SupervisorError.refused(error)))
        }
        return false
      }
      try socket.send(request, wait: false)
    } catch {
      throw .refused(error)
    }
    defer { connection.descriptor.shutDown() }
    do {
      return try await result.value(within: limit, else: SupervisorError.noReply(seconds: limit.components.seconds))
    } catch {
      throw error as? SupervisorError ?? .disconnected
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Linux
package import Executor
package import ShimProtocol

/// Changes the mounts of a sandbox, each change with an injector of its own (`MountInjector`).
package struct MountInjection: Sendable {
  private let helper: String
  private let process: SandboxProcess

  /// `helper`: the path of `carrel-shim`.
  package init(helper: String, process: SandboxProcess) {
    self.helper = helper
    self.process = process
  }

  /// An injector that waits for its request.
  package struct Injector: Sendable {
    let connection: Handle
    let process: Handle
  }

  /// Starts an injector. Blocks until the program has started.
  package func start() throws(StepFailure) -> Injector {
    do throws(Errno) {
      let (localEnd, peerEnd) = try Socket.pair()
      let user = try process.namespace("user")
      let mounts = try process.namespace("mnt")
      let pid = try Process.spawn(
        helper, CStrings(["carrel-shim", MountInjector.name]), CStrings(Fault.environment), peerEnd.descriptor, user, mounts, errors: 2)
      // The injector waits for its request, so its pid cannot have been reused.
      return Injector(connection: localEnd, process: Handle(try Process.open(pid: pid)))
    } catch {
      throw StepFailure("start \(helper)", error)
    }
  }

  /// Sends one request to an injector and returns the mount's number. An injector that storage blocks for longer than `limit` is killed:
  /// it exits before its next step, as soon as the storage responds.
  package static func perform(
    _ request: InjectorRequest, by injector: Injector, within limit: Duration
  ) async throws(SupervisorError) -> UInt64 {
    let connection = injector.connection
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
    defer {
      connection.descriptor.shutDown()
      if !result.isFulfilled { try? Process.signal(injector.process.descriptor, Signals.kill) }
    }
    return try await result.reply(within: limit)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Credentials
package import Errors
package import Foundation
internal import Synchronization

/// Requests credentials from the controllers that the configuration names as providers: each request is sent on the call that the
/// controller has open, and its reply is matched by its id.
package final class ControllerProvider: Sendable {
  package struct CredentialRequest: Sendable {
    package let id: String
    package let workspace: String
    package let owner: String
    package let wanted: BrokeredCredential
  }

  private struct State {
    /// The function that sends a request to a controller, by controller.
    var calls: [String: @Sendable (CredentialRequest) -> Void] = [:]
    /// The requests in flight, by controller and request: a controller can reply only to its own.
    var waiting: [[String]: Promise<Data>] = [:]
  }

  private let state = Mutex(State())

  /// Sets the open call of a controller, in place of an earlier one.
  package func open(_ controller: String, _ pass: @escaping @Sendable (CredentialRequest) -> Void) {
    state.withLock { $0.calls[controller] = pass }
  }

  /// Removes the call of a controller, and fails the requests that wait for it.
  package func close(_ controller: String) {
    let left = state.withLock { state in
      state.calls[controller] = nil
      return state.waiting.keys.filter { $0[0] == controller }
    }
    for key in left { finish(key, .failure(DriverError(.failed, "controller \(controller): its call ended before it replied"))) }
  }

  package func answer(_ controller: String, _ id: String, _ result: Result<Data, DriverError>) { finish([controller, id], result) }

  private func finish(_ key: [String], _ result: Result<Data, DriverError>) {
    state.withLock { $0.waiting[key] }?.fulfil(result.mapError { $0 })
  }

  func request(_ controller: String, _ wanted: BrokeredCredential, workspace: String, owner: String, seconds: UInt32) async throws -> Data {
    let question = CredentialRequest(id: NodeServices.freshToken(), workspace: workspace, owner: owner, wanted: wanted)
    let key = [controller, question.id]
    let answer = Promise<Data>()
    let pass = state.withLock { state in
      let pass = state.calls[controller]
      if pass != nil { state.waiting[key] = answer }
      return pass
    }
    guard let pass else { throw DriverError(.failed, "controller \(controller): is not connected") }
    defer { state.withLock { $0.waiting[key] = nil } }
    pass(question)
    return try await answer.value(
      within: .seconds(seconds), else: DriverError(.failed, "controller \(controller): did not answer within \(seconds) s"))
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Logging
internal import ShimProtocol
internal import ShimClient
package import Workspaces

/// The times at which a credential file was provided and expires, in seconds since 1970.
package struct CredentialExpiry: Codable, Equatable, Sendable {
  let given: Double
  let end: Double
  /// Whether the approaching expiry has been reported.
  var isReported: Bool?

  init(_ seconds: UInt64) {
    given = Date.now.timeIntervalSince1970
    end = given + Double(seconds)
  }

  init(given: Double, seconds end: Double) {
    self.given = given
    self.end = end
  }

  /// The time of the next thing to do: the warning or, after it, the removal.
  var next: Double { isReported == true ? end : min(warning, end) }

  /// The time of the warning: a quarter of an hour before the expiry, or a quarter of the lifetime if that is less.
  var warning: Double { end - min(900, (end - given) / 4) }
}

package struct CredentialsState: FeatureState {
  /// The times of the files that expire, by name.
  package var ends: [String: CredentialExpiry] = [:]

  package init() {}
}

/// Credential files: replaced and removed while a workspace runs, and removed when they expire.
package struct CredentialsFeature: ExpiringFeature {
  package typealias State = CredentialsState
  package static let name = "credentials"

  let services: NodeServices

  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws {
    for (index, name) in spec.credentials.enumerated() { try check(name, tool, "credentials[\(index)]") }
  }

  /// Refuses the file name of the tool's token, which is reserved for the agent.
  private func check(_ name: String, _ tool: Tool?, _ field: String) throws(InvalidField) {
    guard name != tool?.tokenFile else {
      throw InvalidField(field, "\(printable(name)) is reserved for the token of the tool \(tool?.name ?? "")")
    }
  }

  package func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws {
    record[CredentialsFeature.self].ends = Dictionary(
      request.credentials.compactMap { credential in credential.lifetimeSeconds.map { (credential.name, CredentialExpiry($0)) } },
      uniquingKeysWith: { _, last in last })
  }

  // ------------------------------------------------------------------ changing

  /// Replaces credential files, each atomically, without a restart.
  func put(_ workspace: Workspace, _ credentials: [Credential]) async throws {
    let record = try workspace.requireUp("credentials can only be changed in a running workspace")
    do throws(InvalidField) {
      try WorkspaceSpec.validate(credentials)
      let tool = services.tool(of: record.spec)
      for (index, credential) in credentials.enumerated() { try check(credential.name, tool, "credentials[\(index)].name") }
    } catch {
      throw AgentError(error)
    }
    for credential in credentials {
      try await workspace.request(.putSecret(name: credential.name, content: credential.content))
      await workspace.update { $0[CredentialsFeature.self].ends[credential.name] = credential.lifetimeSeconds.map { CredentialExpiry($0) } }
    }
    await showExpiring(workspace)
    try await workspace.commit(.credentialsUpdated, ["names": credentials.map(\.name).sorted().joined(separator: " ")])
  }

  /// Removes credential files.
  func remove(_ workspace: Workspace, _ names: [String]) async throws {
    let record = try workspace.requireUp("credentials can only be removed from a running workspace")
    guard !names.isEmpty else { throw AgentError(field: "names", "is empty") }
    let known = Set(record.spec.credentials + record[CredentialsFeature.self].ends.keys)
    for name in names where !known.contains(name) {
      throw AgentError(.notFound, "names: workspace \(workspace.id) has no credential \(printable(name))")
    }
    for name in names { try await remove(workspace, name, why: "asked") }
  }

  private func remove(_ workspace: Workspace, _ name: String, why: String) async throws {
    let end = workspace.record[CredentialsFeature.self].ends[name]
    do {
      try await workspace.request(.removeSecret(name: name))
    } catch let error as AgentError where error.code == .internal {
      // The file is removed already: a previous agent ended before it recorded the removal.
      services.logger.notice("credential not present", metadata: ["workspace": "\(workspace.id)", "name": "\(name)", "error": "\(error)"])
    }
    await workspace.update { record in
      if record[CredentialsFeature.self].ends[name] == end { record[CredentialsFeature.self].ends[name] = nil }
    }
    await showExpiring(workspace)
    try await workspace.commit(.credentialsRemoved, ["name": name, "why": why])
  }

  // ------------------------------------------------------------------ expiring

  package func nextExpiry(in record: WorkspaceRecord) -> Double? { record[CredentialsFeature.self].ends.values.map(\.next).min() }

  /// Reports credentials that expire soon, and removes those that have expired.
  package func expire(_ workspace: Workspace) async -> Bool {
    var isDone = true
    for (name, end) in workspace.record[CredentialsFeature.self].ends.sorted(by: { $0.key < $1.key }) {
      let now = Date.now.timeIntervalSince1970
      guard workspace.record.state.isUp else { return true }
      // Another call may have replaced this credential while the loop removed one.
      guard workspace.record[CredentialsFeature.self].ends[name] == end, end.next <= now else { continue }
      if end.end <= now {
        do { try await remove(workspace, name, why: "its time was over") } catch {
          guard !Task.isCancelled else { return false }
          services.logger.error(
            "cannot remove a credential; retrying", metadata: ["workspace": "\(workspace.id)", "error": "\(error)"])
          isDone = false
        }
      } else {
        await workspace.update { $0[CredentialsFeature.self].ends[name]?.isReported = true }
        await showExpiring(workspace)
        try? await workspace.commit(.credentialsExpiring, ["name": name, "ends": wallTime(Date(timeIntervalSince1970: end.end))])
      }
    }
    return isDone
  }

  private func showExpiring(_ workspace: Workspace) async {
    let now = Date.now.timeIntervalSince1970
    let near = workspace.record[CredentialsFeature.self].ends.filter { $0.value.warning <= now + 0.01 }.keys.sorted()
    await workspace.setCondition(.credentialsExpiring, near.isEmpty ? nil : "soon removed: " + near.joined(separator: ", "))
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Logging
internal import Sandbox
internal import Workspaces

/// Credential files that end, and what is told of it; conditions of a workspace.
extension NodeAgent {
  static func ends(_ credentials: [Credential]) -> [String: CredentialEnd]? {
    let ends = credentials.compactMap { credential in credential.lifetimeSeconds.map { (credential.name, CredentialEnd($0)) } }
    return ends.isEmpty ? nil : Dictionary(uniqueKeysWithValues: ends)
  }

  /// Takes credential files away.
  package func removeCredentials(_ id: String, _ names: [String]) async throws {
    let managed = try requireUp(id, "credentials are removed from one that runs")
    guard !names.isEmpty else { throw AgentError(.invalidArgument, "names: is empty") }
    let known = Set(managed.record.spec.credentials + (managed.record.credentialEnds ?? [:]).keys)
    for name in names where !known.contains(name) {
      throw AgentError(.notFound, "names: workspace \(id) has no credential \(printable(name))")
    }
    for name in names { try await remove(managed, name, why: "asked") }
  }

  private func remove(_ managed: Managed, _ name: String, why: String) async throws {
    do {
      _ = try await ask(managed, .removeSecret(name: name))
    } catch let error as AgentError where error.code == .internal {
      // It is gone already: an agent that ended here has removed it.
      logger.notice("a credential is gone", metadata: ["workspace": "\(managed.record.spec.id)", "name": "\(name)", "error": "\(error)"])
    }
    managed.record.credentialEnds?[name] = nil
    managed.expiries[name]?.cancel()
    managed.expiries[name] = nil
    showExpiring(managed)
    try await commit(managed, .credentialsRemoved, ["name": name, "why": why])
  }

  /// Waits for the ends of what is there; said again, for what has changed.
  func watchCredentials(_ managed: Managed) {
    for task in managed.expiries.values { task.cancel() }
    managed.expiries = [:]
    for (name, end) in managed.record.credentialEnds ?? [:] {
      managed.expiries[name] = Task {
        do {
          if !isShown(managed, name) {
            try await sleep(until: end.warning)
            guard managed.record.state.isUp else { return }
            showExpiring(managed)
            try await commit(managed, .credentialsExpiring, ["name": name, "ends": wallTime(Date(timeIntervalSince1970: end.end))])
          }
          try await sleep(until: end.end)
          guard managed.record.state.isUp, managed.record.credentialEnds?[name] == end else { return }
          try await remove(managed, name, why: "its time was over")
        } catch is CancellationError {
        } catch {
          logger.error("a credential cannot be removed", metadata: ["workspace": "\(managed.record.spec.id)", "error": "\(error)"])
        }
      }
    }
  }

  private func sleep(until moment: Double) async throws {
    try await Task.sleep(for: .seconds(max(0, moment - Date.now.timeIntervalSince1970)))
  }

  private func isShown(_ managed: Managed, _ name: String) -> Bool {
    managed.record.conditions?["CredentialsExpiring"]?.split(separator: " ").contains { $0.hasPrefix(name + ",") || $0 == name } ?? false
  }

  func showExpiring(_ managed: Managed) {
    let now = Date.now.timeIntervalSince1970
    let near = (managed.record.credentialEnds ?? [:]).filter { $0.value.warning <= now + 0.01 }.keys.sorted()
    show(managed, "CredentialsExpiring", near.isEmpty ? nil : "soon removed: " + near.joined(separator: ", "))
  }

  /// A condition begins or, without a text, ends. On record with the next event, which tells of the same.
  func show(_ managed: Managed, _ condition: String, _ text: String?) {
    var conditions = managed.record.conditions ?? [:]
    conditions[condition] = text
    managed.record.conditions = conditions.isEmpty ? nil : conditions
  }
}

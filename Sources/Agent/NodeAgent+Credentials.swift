// SPDX-License-Identifier: Apache-2.0

internal import Credentials
internal import Foundation
internal import Linux
internal import Logging
internal import NIOPosix
internal import Networking
internal import Sandbox
internal import Supervision
internal import Workspaces

/// Short-lived credentials, renewed ahead of their end as long as a workspace runs. Its supervisor hands them out.
extension NodeAgent {
  /// Of a workspace's own loopback, where nothing else can be: it is taken before the tool starts.
  static let brokerPort: UInt16 = 15_170
  static let brokerTokenName = "broker-token"

  /// What a tool needs to know of the broker (the AWS SDKs' container credentials).
  func brokerEnvironment(_ spec: WorkspaceSpec) -> [String: String] {
    guard let role = spec.roles.first else { return [:] }
    return [
      "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:\(NodeAgent.brokerPort)\(CredentialBroker.prefix)\(role)",
      "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "\(NodeAgent.secretsPath)/\(NodeAgent.brokerTokenName)",
    ]
  }

  /// Before the tool starts. A provider that fails delays nothing: the tool starts without, and they come when it answers again.
  func openBroker(_ managed: Managed, pid: Int32) async throws(Refusal) {
    let roles = managed.record.spec.roles
    guard !roles.isEmpty else { return }
    let token = NodeAgent.freshToken()
    let listener = try await step(.isolation) { [network] in
      try network.listen(loopback: NodeAgent.brokerPort, namespace: try Descriptor.open("/proc/\(pid)/ns/net", [.readOnly]))
    }
    do {
      _ = try await ask(managed, .putSecret(name: NodeAgent.brokerTokenName, content: Array(token.utf8)))
      _ = try await ask(managed, .serveCredentials(token: Array(token.utf8)), passing: [listener])
    } catch {
      throw Refusal(.isolation, "the credential broker cannot be opened: \(error)")
    }
    let first = roles.map { role in Task { await renew(managed, role) } }
    var pauses: [Duration?] = []
    for task in first { pauses.append(await task.value) }
    managed.keepers = zip(roles, pauses).map { role, pause in keeper(managed, role, after: pause) }
  }

  /// Of a workspace that an earlier agent started: it has the broker and what that agent gave it.
  func keepCredentials(_ managed: Managed) {
    guard managed.keepers.isEmpty else { return }
    managed.keepers = managed.record.spec.roles.map { keeper(managed, $0, after: .zero) }
  }

  /// Takes a role's credentials away at once, for the rest of the workspace's life; all of them without a name.
  package func revokeCredentials(_ id: String, role: String?) async throws {
    let managed = try find(id)
    let roles = managed.record.spec.roles.filter { role == nil || $0 == role }
    guard !roles.isEmpty else {
      throw AgentError(.invalidArgument, "role: workspace \(id) has \(role.map { "no role \(printable($0))" } ?? "no roles")")
    }
    let before = managed.record.revoked
    managed.record.revoked = Array(Set((before ?? []) + roles)).sorted()
    do {
      try await commit(managed, .credentialsRevoked, ["roles": roles.joined(separator: " ")])
    } catch {
      managed.record.revoked = before
      throw error
    }
    guard managed.record.state.isUp else { return }
    for role in roles { _ = try await ask(managed, .putRole(name: role, body: [], expires: 0)) }
  }

  /// What programs were given, for the audit: the first at once, what follows within ten seconds together. The supervisor keeps
  /// the count until it is told that it is on record, so that none is lost with this agent; one may be there twice.
  func hear(_ managed: Managed, issued role: String, _ count: UInt32) {
    let isWaiting = managed.issues.updateValue(count, forKey: role) != nil
    guard !isWaiting else { return }
    Task {
      if let last = managed.noted[role] { try? await Task.sleep(until: last + .seconds(10)) }
      await note(managed, role)
    }
  }

  func noteIssues(_ managed: Managed) async { for role in managed.issues.keys.sorted() { await note(managed, role) } }

  private func note(_ managed: Managed, _ role: String) async {
    guard let count = managed.issues.removeValue(forKey: role), workspaces[managed.record.spec.id] === managed else { return }
    managed.noted[role] = .now
    guard (try? await commit(managed, .credentialsIssued, ["role": role, "count": "\(count)"])) != nil else { return }
    try? managed.link?.send(.noted(role: role, count: count))
  }

  // ------------------------------------------------------------------ keeping

  private func keeper(_ managed: Managed, _ role: String, after pause: Duration?) -> Task<Void, Never> {
    Task {
      var pause = pause
      var failures = pause == nil ? 1 : 0
      while !Task.isCancelled {
        // From a second to a minute between two attempts at a provider that fails.
        do { try await Task.sleep(for: pause ?? .seconds(min(60, 1 << min(failures, 6)) / 2)) } catch { return }
        pause = await renew(managed, role, quietly: failures > 0)
        failures = pause == nil ? failures + 1 : 0
      }
    }
  }

  /// Fetches and hands over. How long to wait before the next time; nil where it failed.
  private func renew(_ managed: Managed, _ role: String, quietly: Bool = false) async -> Duration? {
    guard !(managed.record.revoked ?? []).contains(role) else { return .seconds(86_400) }
    let spec = managed.record.spec
    do {
      guard let provider = configuration.awsProvider else { throw CredentialError("credentials.aws: is not configured any more") }
      let values = ["owner": spec.owner.name, "role": role, "workspace": spec.id]
      let credentials = try await providers.runIfActive { try provider.fetch { Tool.fill($0, values) } }
      guard !(managed.record.revoked ?? []).contains(role) else { return .seconds(86_400) }
      _ = try await ask(managed, .putRole(name: role, body: credentials.body, expires: Int64(credentials.expires.timeIntervalSince1970)))
      return .seconds(AWSCredentials.renewal(after: credentials.expires.timeIntervalSinceNow))
    } catch {
      logger.error("credentials cannot be renewed", metadata: ["workspace": "\(spec.id)", "role": "\(role)", "error": "\(error)"])
      if !quietly, !managed.record.state.isTerminal { try? await commit(managed, .credentialsFailed, ["role": role, "error": "\(error)"]) }
      return nil
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Credentials
internal import Foundation
internal import Isolation
internal import Linux
internal import Logging
internal import NIOPosix
internal import Networking
internal import Sandbox
internal import Supervision
internal import Workspaces

/// Short-lived credentials, renewed ahead of their end as long as a workspace runs. Its supervisor hands them out.
extension NodeAgent {
  static let webIdentityName = "web-identity-token"

  /// Something that a provider gives and that is renewed while a workspace runs.
  package enum Brokered: Equatable, Sendable {
    case role(String)
    case git(host: String, organisation: String)
    /// Not the broker's but a file's.
    case webIdentity(String)

    /// As the broker, and events, call it.
    var name: String {
      switch self {
      case .role(let role), .webIdentity(let role): role
      case .git(let host, let organisation): "\(CredentialBroker.gitPrefix)\(host)/\(organisation)"
      }
    }
  }

  func brokered(_ spec: WorkspaceSpec) -> [Brokered] {
    spec.roles.map { spec.hasWebIdentity ? .webIdentity($0) : .role($0) }
      + (spec.git ?? []).flatMap { host in host.organisations.map { .git(host: host.host, organisation: $0) } }
  }

  /// What a tool needs to know: of the broker, for the AWS SDKs (container credentials) and for git (gitcredentials(7)).
  func brokerEnvironment(_ spec: WorkspaceSpec) -> [String: String] {
    var all: [String: String] = [:]
    let folder = NodeAgent.secretsPath
    if let role = spec.roles.first {
      if spec.hasWebIdentity {
        all["AWS_WEB_IDENTITY_TOKEN_FILE"] = "\(folder)/\(NodeAgent.webIdentityName)"
        all["AWS_ROLE_ARN"] = configuration.webIdentity.map { Tool.fill($0.arn, ["role": role, "owner": spec.owner.name]) }
        all["AWS_ROLE_SESSION_NAME"] = spec.id
      } else {
        all["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "http://127.0.0.1:\(CredentialBroker.port)\(CredentialBroker.prefix)\(role)"
        all["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = "\(folder)/\(CredentialBroker.tokenName)"
      }
    }
    if spec.git != nil {
      // The empty one first: none of the image's own.
      let settings = [("credential.helper", ""), ("credential.helper", NodeAgent.gitHelperPath), ("credential.useHttpPath", "true")]
      all["GIT_CONFIG_COUNT"] = "\(settings.count)"
      for (index, (key, value)) in settings.enumerated() {
        all["GIT_CONFIG_KEY_\(index)"] = key
        all["GIT_CONFIG_VALUE_\(index)"] = value
      }
    }
    if spec.sshAgent == true { all["SSH_AUTH_SOCK"] = NodeAgent.sshAgentPath }
    return all
  }

  static let gitHelperPath = "/run/carrel/" + GitHelper.name
  static let sshAgentPath = "/run/carrel/ssh-agent.sock"

  /// What of the host a workspace is shown for its credentials.
  func credentialBinds(_ spec: WorkspaceSpec, ids: IDMapping) -> [Enclosure.Bind] {
    var binds: [Enclosure.Bind] = []
    if spec.git != nil {
      // The supervisor's own program under another name; nobody can write through this mount (CVE-2019-5736).
      binds.append(Enclosure.Bind(source: helper, target: NodeAgent.gitHelperPath, writable: false, executable: true, ids: nil))
    }
    if spec.sshAgent == true, let template = configuration.sshAgent {
      let socket = Tool.fill(template, ["owner": spec.owner.name])
      binds.append(Enclosure.Bind(source: socket, target: NodeAgent.sshAgentPath, writable: true, executable: false, ids: ids))
    }
    return binds
  }

  /// Whether this node can give what a spec asks for.
  func checkCredentials(_ spec: WorkspaceSpec) throws(InvalidField) {
    if !spec.roles.isEmpty {
      guard spec.hasWebIdentity ? configuration.webIdentity != nil : configuration.awsProvider != nil else {
        throw InvalidField(
          "aws.roles",
          spec.hasWebIdentity
            ? "this node has no provider of web identities (credentials.webIdentity in its configuration)"
            : "this node has no provider of AWS credentials (credentials.aws in its configuration)")
      }
    }
    for (index, host) in (spec.git ?? []).enumerated() {
      let allowed = configuration.git?.allowed[host.host] ?? []
      for organisation in host.organisations where !allowed.contains(organisation) && !allowed.contains("*") {
        throw InvalidField(
          "git[\(index)]",
          "this node gives no credentials for \(host.host)/\(organisation)\(allowed.isEmpty ? "" : "; it does for \(allowed.joined(separator: ", "))")"
        )
      }
    }
    guard spec.sshAgent != true || configuration.sshAgent != nil else {
      throw InvalidField("sshAgent", "this node knows of no ssh-agents (credentials.sshAgent in its configuration)")
    }
  }

  /// Before the tool starts. A provider that fails delays nothing: the tool starts without, and they come when it answers again.
  func openBroker(_ managed: Managed, pid: Int32) async throws(Refusal) {
    let wanted = brokered(managed.record.spec)
    guard !wanted.isEmpty else { return }
    if !wanted.allSatisfy({ if case .webIdentity = $0 { true } else { false } }) {
      let token = NodeAgent.freshToken()
      let listener = try await step(.isolation) { [network] in
        try network.listen(loopback: CredentialBroker.port, namespace: try Descriptor.open("/proc/\(pid)/ns/net", [.readOnly]))
      }
      do {
        _ = try await ask(managed, .putSecret(name: CredentialBroker.tokenName, content: Array(token.utf8)))
        _ = try await ask(managed, .serveCredentials(token: Array(token.utf8)), passing: [listener])
      } catch {
        throw Refusal(.isolation, "the credential broker cannot be opened: \(error)")
      }
    }
    let first = wanted.map { one in Task { await renew(managed, one) } }
    var pauses: [Duration?] = []
    for task in first { pauses.append(await task.value) }
    managed.keepers = zip(wanted, pauses).map { one, pause in keeper(managed, one, after: pause) }
  }

  /// Of a workspace that an earlier agent started: it has the broker and what that agent gave it.
  func keepCredentials(_ managed: Managed) {
    guard managed.keepers.isEmpty else { return }
    managed.keepers = brokered(managed.record.spec).map { keeper(managed, $0, after: .zero) }
  }

  /// Takes a role's credentials away at once, for the rest of the workspace's life; all of them without a name.
  package func revokeCredentials(_ id: String, role: String?) async throws {
    let managed = try find(id)
    let chosen = brokered(managed.record.spec).filter { role == nil || $0.name == role }
    let roles = chosen.map(\.name)
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
    for one in chosen {
      if case .webIdentity = one {
        _ = try? await ask(managed, .removeSecret(name: NodeAgent.webIdentityName))
      } else {
        _ = try await ask(managed, .putRole(name: one.name, body: [], expires: 0))
      }
    }
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

  private func keeper(_ managed: Managed, _ one: Brokered, after pause: Duration?) -> Task<Void, Never> {
    Task {
      var pause = pause
      var failures = pause == nil ? 1 : 0
      while !Task.isCancelled {
        // From a second to a minute between two attempts at a provider that fails.
        do { try await Task.sleep(for: pause ?? .seconds(min(60, 1 << min(failures, 6)) / 2)) } catch { return }
        pause = await renew(managed, one, quietly: failures > 0)
        failures = pause == nil ? failures + 1 : 0
      }
    }
  }

  /// Fetches and hands over. How long to wait before the next time; nil where it failed.
  private func renew(_ managed: Managed, _ one: Brokered, quietly: Bool = false) async -> Duration? {
    func isRevoked() -> Bool { (managed.record.revoked ?? []).contains(one.name) }
    guard !isRevoked() else { return .seconds(86_400) }
    do {
      let (body, expires) = try await fetch(one, for: managed.record.spec)
      guard !isRevoked() else { return .seconds(86_400) }
      if case .webIdentity = one {
        _ = try await ask(managed, .putSecret(name: NodeAgent.webIdentityName, content: body))
      } else {
        _ = try await ask(managed, .putRole(name: one.name, body: body, expires: Int64(expires.timeIntervalSince1970)))
      }
      return .seconds(AWSCredentials.renewal(after: expires.timeIntervalSinceNow))
    } catch {
      logger.error(
        "credentials cannot be renewed", metadata: ["workspace": "\(managed.record.spec.id)", "role": "\(one.name)", "error": "\(error)"])
      if !quietly, !managed.record.state.isTerminal {
        try? await commit(managed, .credentialsFailed, ["role": one.name, "error": "\(error)"])
      }
      return nil
    }
  }

  private func fetch(_ one: Brokered, for spec: WorkspaceSpec) async throws -> (body: [UInt8], expires: Date) {
    var values = ["owner": spec.owner.name, "workspace": spec.id, "role": one.name]
    let provider: CredentialProvider?
    switch one {
    case .role: provider = configuration.awsProvider
    case .webIdentity: provider = configuration.webIdentity?.provider
    case .git(let host, let organisation):
      provider = configuration.git?.provider
      values["host"] = host
      values["organisation"] = organisation
    }
    guard let provider else { throw CredentialError("the node's configuration names nobody any more who gives them") }
    let given = values
    let data: Data
    if case .controller(let name, let seconds) = provider {
      data = try await desk.ask(name, one, workspace: spec.id, owner: spec.owner.name, seconds: seconds)
    } else {
      data = try await providers.runIfActive { try provider.fetch { Tool.fill($0, given) } }
    }
    do throws(CredentialError) { return try NodeAgent.parse(data, one) } catch {
      throw CredentialError("\(provider.name { Tool.fill($0, given) }): \(error)")
    }
  }

  private static func parse(_ data: Data, _ one: Brokered) throws(CredentialError) -> (body: [UInt8], expires: Date) {
    switch one {
    case .role:
      let credentials = try AWSCredentials(json: data)
      return (credentials.body, credentials.expires)
    case .git:
      let credentials = try GitCredentials(json: data)
      return (credentials.body, credentials.expires)
    case .webIdentity:
      let identity = try WebIdentity(json: data)
      return (identity.body, identity.expires)
    }
  }
}

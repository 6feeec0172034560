// SPDX-License-Identifier: Apache-2.0

internal import Errors
package import ShimProtocol
internal import Configuration
internal import Concurrency
internal import Credentials
internal import Foundation
internal import Isolation
internal import Linux
internal import Logging
internal import Networking
internal import Broker
package import ShimClient
internal import Synchronization
package import Workspaces

/// A credential that a provider issues and that is renewed while a workspace runs.
package enum BrokeredCredential: Equatable, Sendable {
  case role(String)
  case git(host: String, organisation: String)
  /// A web identity, which is a file and is not served by the broker.
  case webIdentity(String)

  /// The name in the broker and in events.
  var name: String {
    switch self {
    case .role(let role), .webIdentity(let role): role
    case .git(let host, let organisation): "\(CredentialBroker.gitPrefix)\(host)/\(organisation)"
    }
  }

  var isWebIdentity: Bool { if case .webIdentity = self { true } else { false } }
}

package struct BrokerState: FeatureState {
  /// The roles whose credentials were revoked.
  package var revoked: [String] = []

  package init() {}
}

/// Short-lived credentials, renewed before they expire as long as a workspace runs. Its supervisor issues them to programs.
package struct BrokerFeature: RunningFeature {
  package typealias State = BrokerState
  package static let name = "broker"
  package static let readsReports = true

  let services: NodeServices
  let network: NetworkDriver
  let controllers: ControllerProvider
  let renewals = Renewals()

  static let webIdentityName = "web-identity-token"
  static let gitHelperPath = "/run/carrel/" + GitHelper.name
  static let sshAgentPath = "/run/carrel/ssh-agent.sock"

  private var configuration: Configuration { services.configuration }

  private func wanted(_ spec: WorkspaceSpec) -> [BrokeredCredential] {
    spec.roles.map { spec.hasWebIdentity ? .webIdentity($0) : .role($0) }
      + (spec.git ?? []).flatMap { host in host.organisations.map { .git(host: host.host, organisation: $0) } }
  }

  // ------------------------------------------------------------------ deciding

  /// Checks that this node can provide the credentials of a spec.
  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws {
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
      throw InvalidField("sshAgent", "this node has no ssh-agents (credentials.sshAgent in its configuration)")
    }
  }

  /// Adds what the tool needs to use the broker: variables for the AWS SDKs (container credentials) and for git (gitcredentials(7)).
  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    let spec = record.spec
    let folder = AttemptDraft.secretsPath
    if let role = spec.roles.first {
      // The image's static variables would take precedence in every SDK.
      for name in WorkspaceSpec.staticAWSVariables { draft.environment[name] = nil }
      if spec.hasWebIdentity {
        draft.environment["AWS_WEB_IDENTITY_TOKEN_FILE"] = "\(folder)/\(BrokerFeature.webIdentityName)"
        draft.environment["AWS_ROLE_ARN"] = configuration.webIdentity.map { Tool.fill($0.arn, ["role": role, "owner": spec.owner.name]) }
        draft.environment["AWS_ROLE_SESSION_NAME"] = spec.id
      } else {
        draft.environment["AWS_CONTAINER_CREDENTIALS_FULL_URI"] =
          "http://127.0.0.1:\(CredentialBroker.port)\(CredentialBroker.prefix)\(role)"
        draft.environment["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = "\(folder)/\(CredentialBroker.tokenName)"
      }
    }
    if spec.git != nil {
      // The empty helper comes first: it drops the helpers of the image.
      let settings = [("credential.helper", ""), ("credential.helper", BrokerFeature.gitHelperPath), ("credential.useHttpPath", "true")]
      draft.environment["GIT_CONFIG_COUNT"] = "\(settings.count)"
      for (index, (key, value)) in settings.enumerated() {
        draft.environment["GIT_CONFIG_KEY_\(index)"] = key
        draft.environment["GIT_CONFIG_VALUE_\(index)"] = value
      }
      // The supervisor's own program under another name; the read-only mount protects it from being overwritten (CVE-2019-5736).
      draft.sandbox.binds.append(
        SandboxSpec.Bind(source: services.helper, target: BrokerFeature.gitHelperPath, writable: false, executable: true, ids: nil))
    }
    if spec.sshAgent == true {
      draft.environment["SSH_AUTH_SOCK"] = BrokerFeature.sshAgentPath
      if let template = configuration.sshAgent {
        draft.sandbox.binds.append(
          SandboxSpec.Bind(
            source: Tool.fill(template, ["owner": spec.owner.name]), target: BrokerFeature.sshAgentPath, writable: true,
            executable: false, ids: draft.ownerIDs(spec.owner)))
      }
    }
  }

  // ------------------------------------------------------------------- opening

  /// Fetches credentials before the tool starts. A failing provider does not delay the start: they follow when it responds again.
  package func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {
    let wanted = wanted(workspace.spec)
    guard !wanted.isEmpty else { return }
    if !wanted.allSatisfy(\.isWebIdentity), await workspace.link?.status.servesCredentials != true {
      try await openBroker(workspace, sandbox)
    }
    let pauses = await withTaskGroup(of: (Int, Duration?).self) { group in
      for (index, one) in wanted.enumerated() { group.addTask { (index, await renew(workspace, one)) } }
      var pauses = [Duration?](repeating: nil, count: wanted.count)
      for await (index, pause) in group { pauses[index] = pause }
      return pauses
    }
    renewals.begin(workspace.id, pauses)
  }

  private func openBroker(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {
    let token = Array(NodeServices.freshToken().utf8)
    do {
      let listener = try await services.lanes.launch.run { [network] in
        try network.listen(loopback: CredentialBroker.port, namespace: try sandbox.namespace("net"))
      }
      try await workspace.request(.putSecret(name: CredentialBroker.tokenName, content: token))
      try await workspace.request(.serveCredentials(token: token), passing: [listener])
    } catch {
      throw Refusal(.isolation, "credential broker: cannot open it: \(describe(error))")
    }
  }

  // ------------------------------------------------------------------ revoking

  /// Revokes a role's credentials at once, for the rest of the workspace's life; those of all roles without a name.
  func revoke(_ workspace: Workspace, role: String?) async throws {
    let id = workspace.id
    let chosen = wanted(workspace.spec).filter { role == nil || $0.name == role }
    let roles = chosen.map(\.name)
    guard !roles.isEmpty else {
      throw AgentError(field: "role", "workspace \(id) has \(role.map { "no role \(printable($0))" } ?? "no roles")")
    }
    let before = workspace.record[BrokerFeature.self].revoked
    await workspace.update { $0[BrokerFeature.self].revoked = Array(Set(before + roles)).sorted() }
    do {
      try await workspace.commit(.credentialsRevoked, ["roles": roles.joined(separator: " ")])
    } catch {
      await workspace.update { $0[BrokerFeature.self].revoked = before }
      throw error
    }
    guard workspace.record.state.isUp else { return }
    for one in chosen {
      if one.isWebIdentity {
        _ = try? await workspace.request(.removeSecret(name: BrokerFeature.webIdentityName))
      } else {
        try await workspace.request(.putRole(name: one.name, body: [], expires: 0))
      }
    }
  }

  // ------------------------------------------------------------------- keeping

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool { !wanted(record.spec).isEmpty }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    let wanted = wanted(workspace.spec)
    // When the credentials of an adopted workspace were renewed is not known: they are renewed at once.
    let pauses = renewals.take(workspace.id) ?? wanted.map { _ in .zero }
    await withTaskGroup(of: Void.self) { group in
      for (one, pause) in zip(wanted, pauses) { group.addTask { await keep(workspace, one, after: pause) } }
      await recordIssues(workspace, reports)
      group.cancelAll()
    }
  }

  package func release(_ workspace: Workspace) async { _ = renewals.take(workspace.id) }

  private func keep(_ workspace: Workspace, _ one: BrokeredCredential, after first: Duration?) async {
    var pause = first
    var failures = first == nil ? 1 : 0
    while !Task.isCancelled {
      // The backoff for a provider that fails grows from 1 to 30 s.
      do { try await Task.sleep(for: pause ?? .seconds(min(60, 1 << min(failures, 6)) / 2)) } catch { return }
      pause = await renew(workspace, one, quietly: failures > 0)
      failures = pause == nil ? failures + 1 : 0
    }
  }

  /// Fetches a credential and hands it to the supervisor. Returns the time until the next renewal; nil if it failed.
  private func renew(_ workspace: Workspace, _ one: BrokeredCredential, quietly: Bool = false) async -> Duration? {
    func isRevoked() -> Bool { workspace.record[BrokerFeature.self].revoked.contains(one.name) }
    guard !isRevoked() else { return .seconds(86_400) }
    do {
      let (body, expires) = try await fetch(one, for: workspace.spec)
      guard !isRevoked() else { return .seconds(86_400) }
      if one.isWebIdentity {
        try await workspace.request(.putSecret(name: BrokerFeature.webIdentityName, content: body))
      } else {
        try await workspace.request(.putRole(name: one.name, body: body, expires: Int64(expires.timeIntervalSince1970)))
      }
      return .seconds(AWSCredentials.renewal(after: expires.timeIntervalSinceNow))
    } catch {
      guard !Task.isCancelled else { return nil }
      services.logger.error(
        "cannot renew credentials", metadata: ["workspace": "\(workspace.id)", "role": "\(one.name)", "error": "\(error)"])
      if !quietly, !workspace.record.state.isTerminal {
        try? await workspace.commit(.credentialsFailed, ["role": one.name, "error": "\(error)"])
      }
      return nil
    }
  }

  private func fetch(_ one: BrokeredCredential, for spec: WorkspaceSpec) async throws -> (body: [UInt8], expires: Date) {
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
    guard let provider else { throw DriverError(.failed, "the node's configuration no longer names a provider") }
    let given = values
    let data: Data
    if case .controller(let name, let seconds) = provider {
      data = try await controllers.request(name, one, workspace: spec.id, owner: spec.owner.name, seconds: seconds)
    } else {
      data = try await services.lanes.providers.run { try provider.fetch { Tool.fill($0, given) } }
    }
    do throws(DriverError) { return try BrokerFeature.parse(data, one) } catch {
      throw DriverError(.failed, "\(provider.name { Tool.fill($0, given) }): \(error)")
    }
  }

  private static func parse(_ data: Data, _ one: BrokeredCredential) throws(DriverError) -> (body: [UInt8], expires: Date) {
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

  // -------------------------------------------------------------------- audit

  /// Records what was issued to programs: the first at once, what follows within ten seconds together. The supervisor retains the count
  /// until it is notified that it is on record, so that none is lost with this agent; one may be recorded twice.
  private func recordIssues(_ workspace: Workspace, _ reports: AsyncStream<ShimReport>) async {
    let pending = IssueCounts()
    var last: [String: ContinuousClock.Instant] = [:]
    await withDiscardingTaskGroup { group in
      for await case .issued(let role, let count) in reports {
        let isWaiting = !pending.add(role, count)
        guard !isWaiting else { continue }
        let moment = last[role].map { $0 + .seconds(10) } ?? .now
        last[role] = max(moment, .now)
        group.addTask {
          if moment > .now { try? await Task.sleep(until: moment) }
          guard let count = pending.take(role) else { return }
          await record(workspace, role, count)
        }
      }
      // The tool has ended: counts that still wait are recorded before its end.
      group.cancelAll()
    }
  }

  private func record(_ workspace: Workspace, _ role: String, _ count: UInt32) async {
    let attributes = ["role": role, "count": "\(count)"]
    // At the end of the tool no caller waits for the disk any more, and the supervisor needs no notification.
    if Task.isCancelled { return await workspace.submit(.credentialsIssued, attributes) }
    guard (try? await workspace.commit(.credentialsIssued, attributes)) != nil else { return }
    try? await workspace.link?.send(.issuesRecorded(role: role, count: count))
  }
}

/// The number of times each role's credentials were issued, as far as it is not on record yet.
private final class IssueCounts: Sendable {
  private let counts = Mutex<[String: UInt32]>([:])

  /// Sets a role's count. Returns false if a count was waiting already, which is replaced.
  func add(_ role: String, _ count: UInt32) -> Bool { counts.withLock { $0.updateValue(count, forKey: role) } == nil }
  func take(_ role: String) -> UInt32? { counts.withLock { $0.removeValue(forKey: role) } }
}

/// The time until the next renewal of what `connect` fetched, stored until `run` takes it.
final class Renewals: Sendable {
  private let pauses = Mutex<[String: [Duration?]]>([:])

  func begin(_ workspace: String, _ values: [Duration?]) { pauses.withLock { $0[workspace] = values } }
  func take(_ workspace: String) -> [Duration?]? { pauses.withLock { $0.removeValue(forKey: workspace) } }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Images
package import Isolation
package import ShimProtocol
package import ShimClient
package import Workspaces

/// One capability of a workspace, such as its home or its credentials: a type with hooks into each attempt.
///
/// ```
/// Launch ── validate ─┐
///                     ▼
///   attempt:  prepare → contribute → (plan) → connect → (start) → run, expire … ended → release
///                                                        exec ── contribute
/// ```
///
/// A feature that does something while the tool runs is a `RunningFeature` or an `ExpiringFeature` as well. Hooks run in the order of `Features.list`, `ended` and `release` in the reverse order. What a feature must know about a workspace after
/// a restart is its `State`, in the record. Every hook may be called again after a crash of the agent, from where the attempt is: `prepare`
/// and `connect` repeat their work; `release` is idempotent, also without `prepare`.
package protocol WorkspaceFeature: Sendable {
  associatedtype State: FeatureState = NoState

  /// The name of its state in the record.
  static var name: String { get }
  /// The phase of the start that includes the time of `prepare`; nil: the time counts towards the next feature with a phase.
  static var phase: String? { get }

  /// Refuses a spec that this node cannot fulfil. Nothing has been done for the spec yet, and this has no effects.
  func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws
  /// Sets the initial state in the record of a new workspace.
  func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws
  /// Makes what the sandbox needs on the host.
  func prepare(_ workspace: Workspace) async throws(Refusal)
  /// Adds mounts, variables and limits to the draft of the attempt. Pure: also called for `plan` and `exec`.
  func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord)
  /// Acts on the sandbox when its namespaces exist and its tool has not started.
  func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal)
  /// Examines how the attempt ended, before anything is released.
  func ended(_ reason: Reason, _ workspace: Workspace) async
  /// Releases what the attempt holds on the host.
  func release(_ workspace: Workspace) async
}

extension WorkspaceFeature {
  package static var phase: String? { nil }
  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws {}
  package func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws {}
  package func prepare(_ workspace: Workspace) async throws(Refusal) {}
  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {}
  package func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {}
  package func ended(_ reason: Reason, _ workspace: Workspace) async {}
  package func release(_ workspace: Workspace) async {}
}

/// A feature that has something to do while the tool runs, beside it.
package protocol RunningFeature: WorkspaceFeature {
  /// Whether `run` reads the supervisor's reports.
  static var readsReports: Bool { get }

  /// Whether `run` has something to do for this workspace; asked when the tool has started. `isAdopted`: a previous agent started it.
  func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool
  /// Runs while the tool runs; cancelled at its end. `reports`: the supervisor's reports from the beginning of the attempt on; they end
  /// with the tool, before the cancellation.
  func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async
}

extension RunningFeature {
  package static var readsReports: Bool { false }
}

/// A feature with something that expires while the tool runs.
package protocol ExpiringFeature: WorkspaceFeature {
  /// The wall time at which something expires next, in seconds since 1970; nil: nothing does. Pure: asked at every change of the record.
  func nextExpiry(in record: WorkspaceRecord) -> Double?
  /// Ends what has expired. Called while the tool runs and the time of `nextExpiry` is past, and not again before it has returned;
  /// cancelled at the end of the tool. Returns false if something could not be ended, which is retried after a pause.
  func expire(_ workspace: Workspace) async -> Bool
}

/// A launch request, as features see it.
package struct LaunchRequest: Sendable {
  package let spec: WorkspaceSpec
  package let tool: Tool
  package let credentials: [Credential]

  package init(spec: WorkspaceSpec, tool: Tool, credentials: [Credential]) {
    self.spec = spec
    self.tool = tool
    self.credentials = credentials
  }
}

/// A failed step of the preparation, with the reason that the controller gets.
package struct Refusal: Error, Sendable {
  package let reason: Reason
  package init(_ code: Reason.Code, _ message: String) { reason = Reason(code, message) }
  package init(_ reason: Reason) { self.reason = reason }
}

/// The draft that an attempt's plan is compiled from. Features add to it.
package struct AttemptDraft: Sendable {
  package let tool: Tool
  package let image: StoredImage
  package var sandbox = SandboxSpec()
  package var environment: [String: String]
  /// The values of the placeholders `{name}` in a tool's arguments and variables.
  package let placeholders: [String: String]

  package static let secretsPath = "/run/carrel/credentials"

  /// Begins with the image's variables; those of features, the tool and the spec replace them.
  init(_ record: WorkspaceRecord, _ tool: Tool, _ image: StoredImage) {
    self.tool = tool
    self.image = image
    let spec = record.spec
    placeholders = [
      "port": tool.port.map(String.init) ?? "", "home": tool.home, "id": spec.id, "owner": spec.owner.name,
      "credentials": AttemptDraft.secretsPath,
      "token_file": tool.tokenFile.map { "\(AttemptDraft.secretsPath)/\($0)" } ?? "",
    ]
    environment = ["PATH": "/usr/local/bin:/usr/bin:/bin"]
    for entry in image.environment {
      guard let equals = entry.firstIndex(of: "=") else { continue }
      let (key, value) = (String(entry[..<equals]), String(entry[entry.index(after: equals)...]))
      // An image is not control input: variables that would be refused in a spec are dropped.
      if (try? WorkspaceSpec.validateVariable(key, value, path: "image")) != nil { environment[key] = value }
    }
    environment["HOME"] = tool.home
    environment["CARREL_WORKSPACE"] = spec.id
    sandbox.firstID = record.firstID
    sandbox.uid = tool.uid
    sandbox.gid = tool.gid
    sandbox.secretsPath = AttemptDraft.secretsPath
    sandbox.scratchBytes = record.amounts.scratchBytes
    sandbox.shmBytes = record.amounts.shmBytes
    sandbox.hostname = String(spec.id.map { $0 == "." ? "-" : $0 }.prefix(63))
    sandbox.arguments = (tool.arguments.isEmpty ? spec.command : tool.arguments).map { Tool.fill($0, placeholders) }
    sandbox.directory = tool.workingDirectory
  }

  /// Returns all variables. The tool's replace those of features, and the spec's replace both.
  func variables(_ spec: WorkspaceSpec) -> [String: String] {
    var all = environment
    for (key, value) in tool.environment { all[key] = Tool.fill(value, placeholders) }
    for (key, value) in spec.environment { all[key] = value }
    return all
  }

  /// Returns the variables in the form that execve(2) takes.
  static func entries(_ variables: [String: String]) -> [String] { variables.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" } }

  /// Maps the owner's files on disk to the workspace's user, and what that user makes to the owner.
  func ownerIDs(_ owner: WorkspaceSpec.Owner) -> IDMapping {
    IDMapping(fromUID: owner.uid, fromGID: owner.gid, toUID: tool.uid, toGID: tool.gid)
  }
}

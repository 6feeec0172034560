// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Images
package import Isolation
package import ShimProtocol
package import ShimClient
package import Workspaces

/// One capability of a workspace, such as its home or its credentials: a type that hooks into the life of each attempt.
///
/// ```
/// Launch ── validate ─┐
///                     ▼
///   attempt:  prepare → contribute → (plan) → connect → (start) → run … ended → release
///                                                        exec ── contribute
/// ```
///
/// Features are asked in the order of `features(…)`, and for `ended` and `release` in the opposite one. A feature holds no state of
/// one workspace: what it keeps is `State`, in the record. Every hook may be called again after a crash of the agent, from where
/// the attempt stands: `prepare` and `connect` do again what they did, `release` may come without `prepare` and twice.
package protocol WorkspaceFeature: Sendable {
  associatedtype State: FeatureState = NoState

  /// What its state is called in the record, and its part of the plan in the log.
  static var name: String { get }
  /// The phase of the start under which the time that `prepare` takes is told; nil: under that of the feature after it.
  static var phase: String? { get }

  /// Whether `run` reads the supervisor's reports.
  static var readsReports: Bool { get }

  /// Refuses a spec that this node cannot fulfil. Nothing has been done for it yet, and nothing is done here.
  func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws
  /// Sets what a new workspace's record begins with.
  func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws
  /// Makes ready on the host what the sandbox is to have.
  func prepare(_ workspace: Workspace) async throws(Refusal)
  /// Adds mounts, variables and limits to what the attempt is compiled from. Pure: also asked for `plan` and `exec`.
  func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord)
  /// The sandbox's namespaces are there, and its tool has not started.
  func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal)
  /// For as long as the tool runs: cancelled at its end. `isAdopted`: an earlier agent started it. `reports`: what the supervisor
  /// reports from the beginning of the attempt on; they end with the tool, ahead of the cancellation.
  func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async
  /// The attempt has ended, and nothing has been given back yet.
  func ended(_ reason: Reason, _ workspace: Workspace) async
  /// Gives back what the attempt held on the host.
  func release(_ workspace: Workspace) async
}

extension WorkspaceFeature {
  package static var phase: String? { nil }
  package static var readsReports: Bool { false }
  package func validate(_ spec: WorkspaceSpec, _ tool: Tool) async throws {}
  package func begin(_ record: inout WorkspaceRecord, _ request: LaunchRequest) throws {}
  package func prepare(_ workspace: Workspace) async throws(Refusal) {}
  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {}
  package func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {}
  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {}
  package func ended(_ reason: Reason, _ workspace: Workspace) async {}
  package func release(_ workspace: Workspace) async {}
}

/// A request to launch, as features see it.
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

/// A step of the preparation that failed, as the reason that the controller is told.
package struct Refusal: Error, Sendable {
  package let reason: Reason
  package init(_ code: Reason.Code, _ message: String) { reason = Reason(code, message) }
  package init(_ reason: Reason) { self.reason = reason }
}

/// What an attempt's plan is compiled from: features add to it.
package struct AttemptDraft: Sendable {
  package let tool: Tool
  package let image: StoredImage
  package var sandbox = SandboxSpec()
  package var environment: [String: String]
  /// What `{name}` stands for in a tool's arguments and variables.
  package let placeholders: [String: String]

  package static let secretsPath = "/run/carrel/credentials"

  /// The image's variables come first: what features, the tool and the spec set replaces them.
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
      // An image is no control input: what would be refused in a spec is left out here.
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

  /// All variables: the tool's and, above all, the spec's come last.
  func variables(_ spec: WorkspaceSpec) -> [String: String] {
    var all = environment
    for (key, value) in tool.environment { all[key] = Tool.fill(value, placeholders) }
    for (key, value) in spec.environment { all[key] = value }
    return all
  }

  /// As execve(2) takes them.
  static func entries(_ variables: [String: String]) -> [String] { variables.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" } }

  /// The owner's files on disk appear as the workspace's user, and what that user makes is the owner's.
  func ownerIDs(_ owner: WorkspaceSpec.Owner) -> IDMapping {
    IDMapping(fromUID: owner.uid, fromGID: owner.gid, toUID: tool.uid, toGID: tool.gid)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import ShimProtocol
internal import ShimClient
internal import Workspaces

/// The secrets of a launch, which only the sandbox's supervisor retains (docs/secrets.md): credential files, the token that the agent makes
/// for the tool, and the key of an encrypted home.
struct LaunchSecrets: Sendable {
  var credentials: [Credential] = []
  var token: (name: String, content: String)?
  var homeKey: [UInt8]?

  /// The name under which the supervisor holds the key of the home.
  static let homeKeyName = "home-key"

  var isEmpty: Bool { credentials.isEmpty && token == nil && homeKey == nil }

  /// Hands all secrets to a supervisor that waits for its plan. They then survive the end of this agent.
  func entrust(to link: any SandboxLink, _ vault: any SecretFiles) async throws {
    var files = credentials.map { (name: $0.name, content: $0.content) }
    if let token { files.append((token.name, Array(token.content.utf8))) }
    // All requests are sent before the first reply is awaited, because each reply wakes a process.
    try await withThrowingTaskGroup(of: Void.self) { group in
      for file in files {
        group.addTask {
          do {
            try await link.request(.putSecret(name: file.name, content: []), passing: [try vault.file(file.content)])
          } catch {
            throw AgentError(.internal, "credential \(file.name): cannot hand it to the supervisor: \(describe(error))")
          }
        }
      }
      if let homeKey {
        group.addTask {
          do {
            try await link.request(.hold(name: LaunchSecrets.homeKeyName), passing: [try vault.file(homeKey)])
          } catch {
            throw AgentError(.internal, "key of the home: cannot hand it to the supervisor: \(describe(error))")
          }
        }
      }
      try await group.waitForAll()
    }
  }

  /// Gets back from a supervisor what a previous agent handed to it for `spec`; nil if the supervisor replies that something is missing.
  /// Throws if it does not reply.
  static func recover(from link: any SandboxLink, for spec: WorkspaceSpec, tokenName: String?) async throws -> LaunchSecrets? {
    var secrets = LaunchSecrets()
    do {
      for name in spec.credentials where name != tokenName {
        secrets.credentials.append(Credential(name: name, content: try await read(link, .getSecret(name: name))))
      }
      if let tokenName, link.status.secrets.contains(tokenName) {
        secrets.token = (tokenName, String(decoding: try await read(link, .getSecret(name: tokenName)), as: UTF8.self))
      }
      if spec.hasEncryptedHome { secrets.homeKey = try await read(link, .getHeld(name: homeKeyName)) }
    } catch SupervisorError.refused(.noEntry) {
      return nil
    }
    return secrets
  }

  static func read(_ link: any SandboxLink, _ request: ShimRequest) async throws -> [UInt8] {
    guard let file = try await link.request(request).first else { throw SupervisorError.malformed }
    return try file.descriptor.read(at: 0, upTo: ShimProtocol.heldLimit)
  }
}

/// Describes an error of a lower layer as part of a sentence.
func describe(_ error: any Error) -> String { (error as? Errno)?.sentence ?? "\(error)" }

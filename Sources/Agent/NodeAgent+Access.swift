// SPDX-License-Identifier: Apache-2.0

internal import Images
internal import Linux
internal import Sandbox
package import Supervision
package import Workspaces

/// Ways into a running workspace: secrets and further programs.
extension NodeAgent {
  /// Replaces credential files, each atomically, without a restart.
  package func updateCredentials(_ id: String, _ credentials: [Credential]) async throws {
    let managed = try requireUp(id, "credentials go to one that runs")
    do throws(InvalidField) { try WorkspaceSpec.validate(credentials) } catch { throw AgentError(error) }
    for credential in credentials {
      _ = try await ask(managed, .putSecret(name: credential.name, content: credential.content))
      var ends = managed.record.credentialEnds ?? [:]
      ends[credential.name] = credential.lifetimeSeconds.map { CredentialEnd($0) }
      managed.record.credentialEnds = ends.isEmpty ? nil : ends
    }
    showExpiring(managed)
    watchCredentials(managed)
    try await commit(managed, .credentialsUpdated, ["names": credentials.map(\.name).sorted().joined(separator: " ")])
  }

  /// A workspace whose tool runs; `rule`: why it has to.
  func requireUp(_ id: String, _ rule: String) throws -> Managed {
    let managed = try find(id)
    guard managed.record.state.isUp else {
      throw AgentError(.failedPrecondition, "workspace \(id) is \(managed.record.state.rawValue); \(rule)")
    }
    return managed
  }

  func secret(_ name: String, of managed: Managed) async throws -> String {
    guard case .secret(let content) = try await ask(managed, .getSecret(name: name)) else {
      throw AgentError(.internal, "the supervisor gave no answer")
    }
    return String(decoding: content, as: UTF8.self)
  }

  /// One question over a connection of its own.
  func ask(_ managed: Managed, _ question: Message, passing: [Handle] = []) async throws -> Message {
    let link: SupervisorLink
    do throws(Errno) {
      link = try managed.folder.connect()
      try link.send(question, passing: passing)
    } catch {
      throw AgentError(.unavailable, "workspace \(managed.record.spec.id): its supervisor does not answer: \(error.sentence)")
    }
    defer { link.close() }
    for await received in link.messages {
      switch received.message {
      case .done, .secret, .mount, .mounts: return received.message
      case .refused(let code):
        throw AgentError(.internal, "workspace \(managed.record.spec.id): the supervisor refused: \(Errno(code).sentence)")
      default: continue  // its state, which it tells everyone who connects
      }
    }
    throw AgentError(.unavailable, "workspace \(managed.record.spec.id) has just ended")
  }

  package struct ExecRequest: Sendable {
    package let command: [String]
    package let environment: [String: String]
    package let directory: String
    package let terminal: Bool
    package let rows: UInt32
    package let columns: UInt32
    package init(
      command: [String], environment: [String: String], directory: String, terminal: Bool, rows: UInt32, columns: UInt32
    ) {
      self.command = command
      self.environment = environment
      self.directory = directory
      self.terminal = terminal
      self.rows = rows
      self.columns = columns
    }
  }

  package func exec(_ id: String, _ request: ExecRequest) async throws -> ExecSession {
    let managed = try requireUp(id, "programs run in one that is ready")
    do throws(InvalidField) {
      try WorkspaceSpec.validateCommand(request.command, path: "command")
      if request.command.isEmpty { throw InvalidField("command", "is missing") }
      for (key, value) in request.environment { try WorkspaceSpec.validateVariable(key, value, path: "environment") }
      if !request.directory.isEmpty, request.directory != "/" {
        try WorkspaceSpec.validatePath(request.directory, path: "working_directory")
      }
      if request.terminal, !(1...4096).contains(request.rows) || !(1...4096).contains(request.columns) {
        throw InvalidField("size", "expected 1 to 4096 rows and columns")
      }
    } catch {
      throw AgentError(error)
    }
    let digest = managed.record.imageDigest
    guard let tool = tool(managed.record.spec.tool), let image = try? await blocking({ [images] in try images.find(digest) })
    else { throw AgentError(.failedPrecondition, "workspace \(id): its image or tool is gone") }
    var merged: [String: String] = request.terminal ? ["TERM": "xterm-256color"] : [:]
    merged.merge(environment(managed.record, tool, image)) { _, new in new }
    merged.merge(request.environment) { _, new in new }
    do throws(Errno) {
      let link = try managed.folder.connect()
      return try await ExecSession.start(
        link,
        .exec(
          session: 0, arguments: request.command, environment: merged.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" },
          directory: request.directory.isEmpty ? tool.workingDirectory : request.directory, terminal: request.terminal,
          rows: UInt16(clamping: request.rows), columns: UInt16(clamping: request.columns)))
    } catch {
      throw AgentError(.unavailable, "workspace \(id): its supervisor does not answer: \(error.sentence)")
    }
  }
}

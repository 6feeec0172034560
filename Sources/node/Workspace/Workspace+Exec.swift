// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Images
internal import Linux
internal import ShimProtocol
package import ShimClient
internal import Workspaces

/// A further program, as a caller requests it.
package struct ExecAsked: Sendable {
  let command: [String]
  let environment: [String: String]
  let directory: String
  let terminal: Bool
  let rows: UInt32
  let columns: UInt32

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

  fileprivate func validate() throws(InvalidField) {
    try WorkspaceSpec.validateCommand(command, path: "command")
    if command.isEmpty { throw InvalidField("command", "is missing") }
    for (key, value) in environment { try WorkspaceSpec.validateVariable(key, value, path: "environment") }
    if !directory.isEmpty, directory != "/" { try WorkspaceSpec.validatePath(directory, path: "working_directory") }
    if terminal, !(1...4096).contains(rows) || !(1...4096).contains(columns) {
      throw InvalidField("size", "expected 1 to 4096 rows and columns")
    }
  }
}

/// A further program that runs, and what is needed to record its end.
package struct RunningProgram: Sendable {
  package let session: ExecSession
  fileprivate let workspace: Workspace
  fileprivate let attributes: [String: String]
  fileprivate let began: ContinuousClock.Instant

  /// Hangs up on the program because its client has left, and records how it ended. Continues if the calling task is cancelled.
  package func abandon() async {
    await uncancelled { await ended(await session.abandon(), clientLeft: true) }
  }

  /// Records how the program ended; nil if that is not known. Call it once, unless the program is abandoned.
  package func ended(_ outcome: ExecSession.Outcome?, clientLeft: Bool = false) async {
    var attributes = attributes
    if clientLeft { attributes["client"] = "left; the program was hung up on" }
    switch outcome {
    case .ended(.exited(let code))?: attributes["exitCode"] = "\(code)"
    case .ended(.signalled(let signal))?: attributes["signal"] = "\(signal)"
    case .lost?: attributes["outcome"] = "the workspace ended first"
    case nil: attributes["outcome"] = "its end is not known"
    }
    let elapsed = began.duration(to: .now).components
    attributes["milliseconds"] = "\(elapsed.seconds * 1000 + elapsed.attoseconds / 1_000_000_000_000_000)"
    await workspace.submit(.execEnded, attributes)
  }
}

extension Workspace {
  /// Starts a further program beside the tool. Its event names the caller, the program and the number of arguments, never the arguments.
  func exec(_ asked: ExecAsked, by: String) async throws -> RunningProgram {
    let record = try requireUp("programs can only run in a running workspace")
    do throws(InvalidField) { try asked.validate() } catch { throw AgentError(error) }
    guard let tool = services.tool(of: record.spec), let image = try? await services.images.find(record.imageDigest) else {
      throw AgentError(.failedPrecondition, "workspace \(id): its image or tool no longer exists")
    }
    guard let link else { throw AgentError(.unavailable, "workspace \(id): cannot reach its supervisor; retry later") }
    var variables: [String: String] = asked.terminal ? ["TERM": "xterm-256color"] : [:]
    variables.merge(draft(record, tool, image).variables(record.spec)) { _, new in new }
    variables.merge(asked.environment) { _, new in new }
    let request = ExecRequest(
      arguments: asked.command, environment: AttemptDraft.entries(variables),
      directory: asked.directory.isEmpty ? tool.workingDirectory : asked.directory, terminal: asked.terminal,
      rows: UInt16(clamping: asked.rows), columns: UInt16(clamping: asked.columns))
    var attributes = ["by": by, "program": printable(asked.command[0], limit: 200), "arguments": "\(asked.command.count - 1)"]
    if asked.terminal { attributes["terminal"] = "true" }
    do throws(SupervisorError) {
      let session = try await link.exec(request, within: .seconds(10))
      submit(.execStarted, attributes)
      return RunningProgram(session: session, workspace: self, attributes: attributes, began: .now)
    } catch {
      submit(.execEnded, attributes.merging(["outcome": "it was not started: \(error)"]) { first, _ in first })
      if case .failed(let failure) = error { throw AgentError(.failedPrecondition, "\(id): \(explain(failure))") }
      throw Workspace.callError(error, id)
    }
  }
}

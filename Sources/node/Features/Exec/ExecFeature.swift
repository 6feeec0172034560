// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Images
internal import Linux
package import ShimClient
package import ShimProtocol
package import Workspaces

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
  fileprivate let id: String

  /// Hangs up on the program because its client has left, and records how it ended. Continues if the calling task is cancelled.
  package func abandon() async {
    await uncancelled { await ended(await session.abandon(), clientLeft: true) }
  }

  /// Records how the program ended; nil if that is not known. Call it once, unless the program is abandoned.
  package func ended(_ outcome: ExecSession.Outcome?, clientLeft: Bool = false) async {
    var attributes = clientLeft ? ["client": "left; the program was hung up on"] : [:]
    switch outcome {
    case .ended(.exited(let code))?: attributes["exitCode"] = "\(code)"
    case .ended(.signalled(let signal))?: attributes["signal"] = "\(signal)"
    case .lost?: attributes["outcome"] = "the workspace ended first"
    case nil: attributes["outcome"] = "its end is not known"
    }
    await workspace.recordEnd(of: id, attributes)
  }
}

package struct ExecState: FeatureState {
  /// A program whose end is not on record.
  struct Program: Codable, Equatable, Sendable {
    let id: String
    /// The agent that started it: its streams, and with them the program, end with that agent.
    let agent: String
    /// The attributes of its first event.
    let attributes: [String: String]
    /// Nanoseconds since boot.
    let began: Int64
  }

  var running: [Program] = []

  package init() {}
}

/// Runs further programs beside the tool. Each has two events, `ExecStarted` and `ExecEnded`. The programs without the second are in the
/// record, so that it follows even if the agent or the workspace ends first.
package struct ExecFeature: RunningFeature {
  package typealias State = ExecState
  package static let name = "exec"

  /// This agent, as the records of its programs name it.
  private let agent = SandboxPlace.freshID()

  /// Starts a program. Its events name the caller, the program and the number of arguments, never the arguments.
  func start(_ asked: ExecAsked, in workspace: Workspace, by: String) async throws -> RunningProgram {
    do throws(InvalidField) { try asked.validate() } catch { throw AgentError(error) }
    return try await workspace.exec(asked, by: by, agent: agent)
  }

  package func hasWork(in record: WorkspaceRecord, isAdopted: Bool) -> Bool {
    record[ExecFeature.self].running.contains { $0.agent != agent }
  }

  package func run(_ workspace: Workspace, isAdopted: Bool, reports: AsyncStream<ShimReport>) async {
    for program in workspace.record[ExecFeature.self].running where program.agent != agent {
      await workspace.recordEnd(of: program.id, ["outcome": "the agent ended first; the program was hung up on"])
    }
  }

  package func ended(_ reason: Reason, _ workspace: Workspace) async {
    for program in workspace.record[ExecFeature.self].running {
      await workspace.recordEnd(of: program.id, ["outcome": "the workspace ended first"])
    }
  }
}

extension Workspace {
  fileprivate func exec(_ asked: ExecAsked, by: String, agent: String) async throws -> RunningProgram {
    let record = try requireUp("programs can only run in a running workspace")
    guard let tool = services.tool(of: record.spec), let image = try? await services.images.find(record.imageDigest) else {
      throw AgentError(.failedPrecondition, "workspace \(id): its image or tool no longer exists")
    }
    let link = try requireLink()
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
      let program = ExecState.Program(id: SandboxPlace.freshID(), agent: agent, attributes: attributes, began: Clock.boottime)
      update { $0[ExecFeature.self].running.append(program) }
      submit(.execStarted, attributes)
      // The workspace may have ended since the program was started.
      if self.record.state.isTerminal { recordEnd(of: program.id, ["outcome": "the workspace ended first"]) }
      return RunningProgram(session: session, workspace: self, id: program.id)
    } catch {
      submit(.execEnded, attributes.merging(["outcome": "it was not started: \(error)"]) { first, _ in first })
      if case .failed(let failure) = error { throw AgentError(.failedPrecondition, "\(id): \(explain(failure))") }
      throw Workspace.callError(error, id)
    }
  }

  /// Records the end of a program, unless it is on record already: its client, the end of the workspace and the next agent each report it.
  fileprivate func recordEnd(of program: String, _ attributes: [String: String]) {
    guard let found = record[ExecFeature.self].running.first(where: { $0.id == program }) else { return }
    update { $0[ExecFeature.self].running.removeAll { $0.id == program } }
    var all = found.attributes.merging(attributes) { _, new in new }
    all["milliseconds"] = "\((Clock.boottime - found.began) / 1_000_000)"
    submit(.execEnded, all)
  }
}

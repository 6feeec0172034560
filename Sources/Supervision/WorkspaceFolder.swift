// SPDX-License-Identifier: Apache-2.0

package import LaunchPlan
package import Linux
package import Sandbox

/// The directory of a running workspace, `<state>/workspaces/<id>/`, mode 0700: `plan`, `shim.sock`, `exit`, and
/// the output under `log/`. It is the truth about what runs.
package struct WorkspaceFolder: Sendable {
  package let path: String
  private let folder: Handle

  static let socketName = "shim.sock"

  /// Opens the directory, making it if asked to.
  package init(path: String, create: Bool = false) throws(Errno) {
    self.path = path
    let parent = try Descriptor.open("/", [.path, .directory])
    if create {
      for part in [path, path + "/log"] {
        do throws(Errno) { try parent.makeDirectory(part, mode: 0o700) } catch { if error != .exists { throw error } }
      }
    }
    folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow]))
  }

  /// What the supervisor left behind; nil while it runs, or if it was killed.
  package var exitRecord: ExitRecord? { ExitRecord.read(in: folder.descriptor) }

  /// A copy of the agent's record, for the case that the journal is lost; nil where there is none.
  package var record: [UInt8]? {
    guard let file = try? folder.descriptor.open(WorkspaceFolder.recordName, [.readOnly, .noFollow]) else { return nil }
    return try? file.readAll(limit: 1 << 20)
  }

  package func keep(record: [UInt8]) throws(Errno) {
    // Not synced: after a crash of the host there is nothing that runs to bring back.
    try folder.descriptor.replace(WorkspaceFolder.recordName, with: record, durable: false)
  }

  private static let recordName = "record.json"
  private static let planName = "plan"

  /// Whether a supervisor may have been told to launch in this attempt.
  package var hasPlan: Bool { (try? folder.descriptor.open(WorkspaceFolder.planName, [.path, .noFollow])) != nil }

  /// Clears the traces of an earlier attempt, except its output.
  package func reset() {
    for name in [WorkspaceFolder.socketName, ExitRecord.fileName, WorkspaceFolder.planName] { try? folder.descriptor.remove(name) }
  }

  /// Starts a supervisor that listens before this returns, and waits for its plan. It ends when the answer is dropped.
  package func standBy(id: String, helper: String, errors: Int32) throws(StepFailure) -> StandingSupervisor {
    do throws(Errno) {
      let listener = try Socket.listen(WorkspaceFolder.socketName, in: folder.descriptor)
      let (near, far) = try Socket.pair()
      _ = try Process.spawn(
        helper, CStrings(["carrel-shim", id]), CStrings(Fault.environment), folder.descriptor, listener, far.descriptor, errors: errors)
      return StandingSupervisor(connection: near)
    } catch {
      throw StepFailure("start \(helper)", error)
    }
  }

  /// Lets it launch by this plan.
  package func launch(_ plan: Plan, by supervisor: StandingSupervisor) throws(StepFailure) -> SupervisorLink {
    do throws(Errno) {
      // Not synced: after a crash of the host nothing runs that could want to read it.
      try folder.descriptor.replace(WorkspaceFolder.planName, with: plan.encoded(), durable: false)
      let link = try SupervisorLink(supervisor.connection)
      try link.send(.launch)
      return link
    } catch {
      throw StepFailure("launch", error)
    }
  }

  /// Connects to the supervisor. `connectionRefused` or `noEntry`: there is none.
  package func connect() throws(Errno) -> SupervisorLink {
    try SupervisorLink(Handle(try Socket.connect(WorkspaceFolder.socketName, in: folder.descriptor)))
  }

  package func log() throws(Errno) -> LogReader {
    LogReader(try folder.descriptor.open("log", [.readOnly, .directory]), path: path + "/log")
  }
}

/// A supervisor without a plan.
package struct StandingSupervisor: Sendable {
  fileprivate let connection: Handle
}

// SPDX-License-Identifier: Apache-2.0

package import LaunchPlan
package import Linux
internal import Shim
package import ShimProtocol

/// The copy of a workspace's record in one of its directories, for the case that the journal is lost.
private enum RecordCopy {
  private static let name = "record.json"

  static func read(in folder: Handle) -> [UInt8]? {
    guard let file = try? folder.descriptor.open(name, [.readOnly, .noFollow]) else { return nil }
    return try? file.readAll(limit: 1 << 20)
  }

  /// Not synced: after a crash of the host the journal is there, and nothing runs that has to be brought back.
  static func keep(_ record: [UInt8], in folder: Handle) throws(Errno) {
    try folder.descriptor.replace(name, with: record, durable: false)
  }
}

/// The directory of a workspace, `<state>/workspaces/<id>/`: its output, and a copy of its record when it last ended.
package struct WorkspaceDirectory: Sendable {
  private let folder: Handle

  package init(path: String) throws(Errno) { folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow])) }

  /// Nil where there is none.
  package var record: [UInt8]? { RecordCopy.read(in: folder) }

  package func keep(record: [UInt8]) throws(Errno) { try RecordCopy.keep(record, in: folder) }

  /// Removes what an agent that ended in the middle of `keep` has left.
  package func removeTemporaries() throws(Errno) { try folder.descriptor.removeTemporaries() }
}

/// The directory of a sandbox, `<state>/sandboxes/<id>/`, mode 0700: `plan`, `shim.sock`, `exit`, `record.json`, `mounts`. It is the
/// truth about what runs. Blocking, as files are.
package struct SandboxDirectory: Sendable {
  package let path: String
  private let folder: Handle

  static let socketName = Supervisor.socketName
  private static let mountsName = "mounts"

  /// Opens the directory, or makes a new one: `exists` where it is there already.
  package init(path: String, create: Bool = false) throws(Errno) {
    self.path = path
    if create { try Descriptor.open("/", [.path, .directory]).makeDirectory(path, mode: 0o700) }
    folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow]))
  }

  /// What the supervisor left behind; nil while it runs, or if it was killed.
  package var exitRecord: ExitRecord? { ExitRecord.read(in: folder.descriptor) }

  /// Nil where there is none.
  package var record: [UInt8]? { RecordCopy.read(in: folder) }

  package func keep(record: [UInt8]) throws(Errno) { try RecordCopy.keep(record, in: folder) }

  /// Whether a supervisor may have been told to launch.
  package var hasPlan: Bool { (try? folder.descriptor.open(Supervisor.planName, [.path, .noFollow])) != nil }

  package func write(_ plan: Plan) throws(Errno) {
    // Not synced: after a crash of the host nothing runs that could want to read it.
    try folder.descriptor.replace(Supervisor.planName, with: plan.encoded(), durable: false)
  }

  /// The targets at which mounts were attached or detached after the launch, written ahead of each: what another agent looks at.
  package var changedMounts: [String] {
    guard let file = try? folder.descriptor.open(SandboxDirectory.mountsName, [.readOnly, .noFollow]),
      let bytes = try? file.readAll(limit: 1 << 20)
    else { return [] }
    return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map(String.init)
  }

  package func willChange(mount target: String) throws(Errno) {
    let known = changedMounts
    guard !known.contains(target) else { return }
    let text = (known + [target]).map { $0 + "\n" }.joined()
    try folder.descriptor.replace(SandboxDirectory.mountsName, with: Array(text.utf8), durable: false)
  }

  /// Starts a supervisor that listens before this returns, and waits for its plan. `logs`: the workspace's folder of output;
  /// `workspace`: for people who look at processes. Returns its process, for a caller that cannot go on with it.
  @discardableResult
  package func startSupervisor(
    _ id: String, workspace: String, helper: String, logs: borrowing Descriptor, errors: Int32
  ) throws(StepFailure) -> Handle {
    do throws(Errno) {
      let listener = try Socket.listen(SandboxDirectory.socketName, in: folder.descriptor)
      let pid = try Process.spawn(
        helper, CStrings(["carrel-shim", id, workspace]), CStrings(Fault.environment), folder.descriptor, listener, logs, errors: errors)
      do throws(Errno) { return Handle(try Process.open(pid: pid)) } catch {
        // It does not end by itself: its number is still its own.
        try? Process.kill(pid, Signals.kill)
        throw error
      }
    } catch {
      throw StepFailure("start \(helper)", error)
    }
  }

  /// A connection to the supervisor, never waited for: `connectionRefused` or `noEntry` where there is none, `again` where as many
  /// wait for it as may.
  package func connect() throws(Errno) -> Handle {
    Handle(try Socket.connect(SandboxDirectory.socketName, in: folder.descriptor, wait: false))
  }
}

// SPDX-License-Identifier: Apache-2.0

package import LaunchPlan
package import Linux
internal import Shim
package import ShimProtocol

/// The copy of a workspace's record in one of its directories, used if the journal is lost.
private enum RecordCopy {
  private static let name = "record.json"

  static func read(in folder: Handle) -> [UInt8]? {
    guard let file = try? folder.descriptor.open(name, [.readOnly, .noFollow]) else { return nil }
    return try? file.readAll(limit: 1 << 20)
  }

  /// Stores the copy without fsync: after a host crash the journal exists, and no running sandbox needs the copy.
  static func keep(_ record: [UInt8], in folder: Handle) throws(Errno) {
    try folder.descriptor.replace(name, with: record, durable: false)
  }
}

/// The directory of a workspace, `<state>/workspaces/<id>/`: its output, and a copy of its record from the end of its last attempt.
package struct WorkspaceDirectory: Sendable {
  private let folder: Handle

  package init(path: String) throws(Errno) { folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow])) }

  /// The copy of the record, or nil.
  package var record: [UInt8]? { RecordCopy.read(in: folder) }

  package func keep(record: [UInt8]) throws(Errno) { try RecordCopy.keep(record, in: folder) }

  /// Removes temporary files of an agent that exited during `keep`.
  package func removeTemporaries() throws(Errno) { try folder.descriptor.removeTemporaries() }
}

/// The directory of a sandbox, `<state>/sandboxes/<id>/`, mode 0700: `plan`, `shim.sock`, `exit`, `record.json`, `mounts`. It is the
/// truth about what runs. Its functions block on file I/O.
package struct SandboxDirectory: Sendable {
  package let path: String
  private let folder: Handle

  static let socketName = Supervisor.socketName
  private static let mountsName = "mounts"

  /// Opens the directory. `create` makes a new one and throws `exists` if it exists.
  package init(path: String, create: Bool = false) throws(Errno) {
    self.path = path
    if create { try Descriptor.open("/", [.path, .directory]).makeDirectory(path, mode: 0o700) }
    folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow]))
  }

  /// The exit record of the supervisor; nil while it runs, or if it was killed.
  package var exitRecord: ExitRecord? { get throws(Errno) { try ExitRecord.read(in: folder.descriptor) } }

  /// The copy of the record, or nil.
  package var record: [UInt8]? { RecordCopy.read(in: folder) }

  package func keep(record: [UInt8]) throws(Errno) { try RecordCopy.keep(record, in: folder) }

  /// Whether a plan exists, so that the supervisor may have received a launch request.
  package var hasPlan: Bool {
    get throws(Errno) {
      do throws(Errno) { _ = try folder.descriptor.open(Supervisor.planName, [.path, .noFollow]) } catch {
        guard error == .noEntry else { throw error }
        return false
      }
      return true
    }
  }

  package func write(_ plan: Plan) throws(Errno) {
    // Not synced: after a host crash no process exists that would read it.
    try folder.descriptor.replace(Supervisor.planName, with: plan.encoded(), durable: false)
  }

  /// The targets of mounts changed after the launch, each recorded before its change, for the agent that adopts the sandbox.
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

  /// Starts a supervisor, which waits for its plan; its socket listens before this returns. `logs`: the output directory of the workspace;
  /// `workspace`: a name for process listings. Returns its process, for a caller that has to kill it.
  @discardableResult
  package func startSupervisor(
    _ id: String, workspace: String, helper: String, logs: borrowing Descriptor, errors: Int32
  ) throws(StepFailure) -> Handle {
    do throws(Errno) {
      let listener = try Socket.listen(SandboxDirectory.socketName, in: folder.descriptor)
      let pid = try Process.spawn(
        helper, CStrings(["carrel-shim", id, workspace]), CStrings(Fault.environment), folder.descriptor, listener, logs, errors: errors)
      do throws(Errno) { return Handle(try Process.open(pid: pid)) } catch {
        // The supervisor does not exit by itself, so its pid cannot have been reused.
        try? Process.kill(pid, Signals.kill)
        throw error
      }
    } catch {
      throw StepFailure("start \(helper)", error)
    }
  }

  /// Connects to the supervisor without blocking. Throws `connectionRefused` or `noEntry` if there is none, and `again` if its queue of
  /// connections is full.
  package func connect() throws(Errno) -> Handle {
    Handle(try Socket.connect(SandboxDirectory.socketName, in: folder.descriptor, wait: false))
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Errors
package import Foundation
internal import Glibc

/// The host programs that the agent runs: e2fsprogs, mount(8), cp(1), credential processes.
package enum HostProgram {
  package enum Errors: Sendable {
    /// Standard error is part of the output.
    case merged
    /// Standard error is inherited from the agent, whose log it is.
    case inherited
  }

  /// Runs a program to its end and returns its exit status and output. Blocks. After `seconds`, or more than `limit` bytes of output, its
  /// process group is killed, with every process that the program started in it; both are errors.
  package static func run(
    _ command: [String], path: String = "/usr/sbin:/usr/bin:/sbin:/bin", errors: Errors, limit: Int = 1 << 20, within seconds: UInt32? = nil
  ) throws(DriverError) -> (status: Int, output: Data) {
    let process = Foundation.Process()
    process.executableURL = URL(fileURLWithPath: "/bin/sh")
    // carreld ignores SIGCHLD, so that the kernel reaps its supervisors: it cannot get an exit status itself, so sh prints it.
    process.arguments = ["-c", "\"$@\"\(errors == .merged ? " 2>&1" : ""); echo \"=$?\"", "sh"] + command
    process.environment = ["PATH": path, "LC_ALL": "C"]
    process.standardInput = FileHandle.nullDevice
    let output = Foundation.Pipe()
    process.standardOutput = output
    do { try process.run() } catch { throw DriverError(.failed, "\(command[0]): cannot be run: \(error)") }
    // Foundation creates a new process group for the program.
    let group = process.processIdentifier
    let deadline = seconds.map { seconds in
      let item = DispatchWorkItem { kill(-group, SIGKILL) }
      DispatchQueue.global().asyncAfter(deadline: .now() + .seconds(Int(seconds)), execute: item)
      return item
    }
    defer { deadline?.cancel() }
    // 16 bytes more, for the line with the status.
    let room = limit + 16
    let printed = (try? output.fileHandleForReading.read(upToCount: room)) ?? Data()
    if printed.count == room { kill(-group, SIGKILL) }
    process.waitUntilExit()
    guard printed.count < room else {
      throw DriverError(.failed, "\(command[0]): printed more than \(limit) bytes")
    }
    guard let mark = printed.lastIndex(of: UInt8(ascii: "=")),
      let status = Int(String(decoding: printed[(mark + 1)...], as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines))
    else {
      let why = seconds.map { "did not exit within \($0) s, or was killed" } ?? "was killed"
      throw DriverError(.failed, "\(command[0]): \(why)")
    }
    return (status, printed[..<mark])
  }

  /// A directory of the host that a confined program sees.
  package struct Folder: Sendable {
    let host: String
    let inside: String
    let isWritable: Bool

    package init(_ host: String, at inside: String, isWritable: Bool = true) {
      self.host = host
      self.inside = inside
      self.isWritable = isWritable
    }
  }

  /// Returns the prefix that runs a command with the rights of an owner, in the first of these folders, and with nothing else of the host
  /// but the programs in /usr (bubblewrap(1)). For files that the owner may change at any time: a symlink leads nowhere else, whatever the
  /// owner's uid may access on the host.
  package static func confined(_ uid: UInt32, _ gid: UInt32, to folders: [Folder]) -> [String] {
    let binds = folders.flatMap { [$0.isWritable ? "--bind" : "--ro-bind", $0.host, $0.inside] }
    let links = ["bin", "sbin", "lib", "lib64"].flatMap { ["--symlink", "usr/\($0)", "/\($0)"] }
    // The end of the process group ends bwrap, and with it everything inside.
    return ["bwrap", "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--new-session"]
      + ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--ro-bind", "/usr", "/usr"] + links
      + ["--proc", "/proc", "--dev", "/dev"] + binds
      + ["setpriv", "--reuid", "\(uid)", "--regid", "\(gid)", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
      // As the owner: root without capabilities cannot enter a folder of mode 0700.
      + ["env", "--chdir=\(folders.first?.inside ?? "/")"]
  }
}

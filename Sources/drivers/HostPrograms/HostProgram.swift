// SPDX-License-Identifier: Apache-2.0

package import Foundation
internal import Glibc

/// A program of the host that could not be run, failed, took too long, or printed too much.
package struct HostProgramError: Error, Sendable, CustomStringConvertible {
  /// The exit status; nil where it has none, because it did not start or was killed.
  package let status: Int?
  package let description: String
}

/// Programs of the host that work is left to: e2fsprogs, mount(8), cp(1), credential processes.
package enum HostProgram {
  package enum Errors: Sendable {
    /// Standard error is part of the output.
    case merged
    /// Standard error is the agent's own, which is its log.
    case inherited
  }

  /// Runs a program to its end and returns its exit status and what it printed. Blocks. What it started is in its process group and is
  /// killed with it when `seconds` are over or more than `limit` bytes were printed, both of which are errors.
  package static func run(
    _ command: [String], path: String = "/usr/sbin:/usr/bin:/sbin:/bin", errors: Errors, limit: Int = 1 << 20, within seconds: UInt32? = nil
  ) throws(HostProgramError) -> (status: Int, output: Data) {
    let process = Foundation.Process()
    process.executableURL = URL(fileURLWithPath: "/bin/sh")
    // carreld ignores SIGCHLD, so that the kernel reaps its supervisors: only a parent of its own knows a program's exit status.
    process.arguments = ["-c", "\"$@\"\(errors == .merged ? " 2>&1" : ""); echo \"=$?\"", "sh"] + command
    process.environment = ["PATH": path, "LC_ALL": "C"]
    process.standardInput = FileHandle.nullDevice
    let output = Foundation.Pipe()
    process.standardOutput = output
    do { try process.run() } catch { throw HostProgramError(status: nil, description: "\(command[0]): cannot be run: \(error)") }
    // Foundation gives it a process group of its own.
    let group = process.processIdentifier
    let deadline = seconds.map { seconds in
      let item = DispatchWorkItem { kill(-group, SIGKILL) }
      DispatchQueue.global().asyncAfter(deadline: .now() + .seconds(Int(seconds)), execute: item)
      return item
    }
    defer { deadline?.cancel() }
    // With room for the line of the status.
    let room = limit + 16
    let printed = (try? output.fileHandleForReading.read(upToCount: room)) ?? Data()
    if printed.count == room { kill(-group, SIGKILL) }
    process.waitUntilExit()
    guard printed.count < room else {
      throw HostProgramError(status: nil, description: "\(command[0]): printed more than \(limit) bytes")
    }
    guard let mark = printed.lastIndex(of: UInt8(ascii: "=")),
      let status = Int(String(decoding: printed[(mark + 1)...], as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines))
    else {
      let why = seconds.map { "did not end within \($0) s, or was killed" } ?? "was killed"
      throw HostProgramError(status: nil, description: "\(command[0]): \(why)")
    }
    return (status, printed[..<mark])
  }

  /// What makes a command run with the rights of an owner, on files that the owner may change at any time: whatever those lead to is
  /// nothing that the owner could not reach.
  package static func asOwner(_ uid: UInt32, _ gid: UInt32) -> [String] {
    ["setpriv", "--reuid", "\(uid)", "--regid", "\(gid)", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
  }
}

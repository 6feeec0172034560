// SPDX-License-Identifier: Apache-2.0

internal import Foundation

/// Programs of the host that storage is left to: e2fsprogs, mount(8), cp(1).
enum HostProgram {
  /// Runs a program of the host, to its end. Those that write to an image hold flock(1) on it: where an agent ended in the middle,
  /// the next one waits for what that one began. The agent leaves the reaping of its children to the kernel (carreld ignores SIGCHLD), so
  /// that the exit status is the shell's to say.
  static func run(_ command: [String], on image: String? = nil, _ failure: String, upTo tolerated: Int = 0) throws {
    _ = try output(command, on: image, failure, upTo: tolerated)
  }

  /// The same; returns what it printed.
  static func output(_ command: [String], on image: String? = nil, _ failure: String, upTo tolerated: Int = 0) throws -> String {
    let process = Foundation.Process()
    process.executableURL = URL(fileURLWithPath: "/bin/sh")
    process.arguments = ["-c", "\"$@\" 2>&1; echo \"=$?\"", "sh"] + (image.map { ["flock", $0] } ?? []) + command
    process.environment = ["PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"]
    process.standardInput = FileHandle.nullDevice
    let output = Foundation.Pipe()
    process.standardOutput = output
    try process.run()
    let said = String(decoding: (try? output.fileHandleForReading.readToEnd()) ?? Data(), as: UTF8.self)
    process.waitUntilExit()
    let parts = said.trimmingCharacters(in: CharacterSet.whitespacesAndNewlines).split(separator: "=")
    guard let status = parts.last.flatMap({ Int($0) }), status <= tolerated else {
      let words = said.split(separator: "\n").dropLast().joined(separator: "; ")
      throw StorageError(description: "\(failure): \(words.prefix(500))")
    }
    return said.split(separator: "\n", omittingEmptySubsequences: false).dropLast(2).joined(separator: "\n")
  }

  /// What makes a command run with the rights of an owner, on files that are the owner's to change meanwhile: whatever those lead
  /// to, it is nothing that the owner could not reach.
  static func asOwner(_ uid: UInt32, _ gid: UInt32) -> [String] {
    ["setpriv", "--reuid", "\(uid)", "--regid", "\(gid)", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
  }
}

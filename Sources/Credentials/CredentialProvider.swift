// SPDX-License-Identifier: Apache-2.0

package import Foundation
internal import Glibc

/// Where the agent gets credentials from.
package enum CredentialProvider: Equatable, Sendable {
  /// A program of the platform that prints them (the SDKs' `credential_process`), with `{owner}`, `{role}` and `{workspace}` in its
  /// arguments. What it says on standard error goes to the agent's own log.
  case program([String], timeoutSeconds: UInt32)
  /// A file that somebody else keeps fresh, its path with the same placeholders.
  case file(String)
  /// One of the controllers that the agent dials, which says the same in answer to a question.
  case controller(String, timeoutSeconds: UInt32)

  package static let sizeLimit = 65_536

  /// For messages.
  package func name(_ fill: (String) -> String) -> String {
    switch self {
    case .file(let template): fill(template)
    case .program(let arguments, _): arguments[0]
    case .controller(let name, _): "controller \(name)"
    }
  }

  /// What a program or a file says. Waits, for the time-out at the longest. Controllers are asked by who speaks with them.
  package func fetch(_ fill: (String) -> String) throws(CredentialError) -> Data {
    switch self {
    case .file:
      guard let file = FileHandle(forReadingAtPath: name(fill)), let found = try? file.read(upToCount: CredentialProvider.sizeLimit) else {
        throw CredentialError("\(name(fill)) cannot be read")
      }
      return found
    case .program(let arguments, let seconds): return try CredentialProvider.run(arguments.map(fill), seconds)
    case .controller: throw CredentialError("\(name(fill)) is not asked here")
    }
  }

  private static func run(_ arguments: [String], _ seconds: UInt32) throws(CredentialError) -> Data {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: arguments[0])
    process.arguments = Array(arguments.dropFirst())
    process.environment = ["PATH": "/usr/local/bin:/usr/bin:/bin"]
    process.standardInput = FileHandle.nullDevice
    let output = Pipe()
    process.standardOutput = output
    do { try process.run() } catch { throw CredentialError("\(arguments[0]): cannot be run") }
    let pid = process.processIdentifier
    // With all that it started (Foundation gives it a process group of its own): one that is left would hold the pipe open.
    let late = DispatchWorkItem { kill(-pid, SIGKILL) }
    DispatchQueue.global().asyncAfter(deadline: .now() + .seconds(Int(seconds)), execute: late)
    defer { late.cancel() }
    let data = (try? output.fileHandleForReading.read(upToCount: sizeLimit)) ?? Data()
    process.waitUntilExit()
    guard !data.isEmpty else {
      throw CredentialError("\(arguments[0]): printed nothing within \(seconds) s; see its own words in the agent's log")
    }
    return data
  }
}

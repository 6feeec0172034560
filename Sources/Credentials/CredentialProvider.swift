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

  private static let sizeLimit = 65_536

  /// Waits, for the time-out at the longest. `parse`: what is made of what was printed.
  package func fetch<T>(_ fill: (String) -> String, _ parse: (Data) throws(CredentialError) -> T) throws(CredentialError) -> T {
    let (source, data): (String, Data)
    switch self {
    case .file(let template):
      source = fill(template)
      guard let file = FileHandle(forReadingAtPath: source), let found = try? file.read(upToCount: CredentialProvider.sizeLimit) else {
        throw CredentialError("\(source) cannot be read")
      }
      data = found
    case .program(let arguments, let seconds):
      source = arguments[0]
      data = try CredentialProvider.run(arguments.map(fill), seconds)
    }
    do throws(CredentialError) { return try parse(data) } catch { throw CredentialError("\(source): \(error)") }
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

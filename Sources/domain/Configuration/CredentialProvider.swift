// SPDX-License-Identifier: Apache-2.0

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
}

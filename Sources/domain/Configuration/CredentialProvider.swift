// SPDX-License-Identifier: Apache-2.0

/// A source of credentials for the agent.
package enum CredentialProvider: Equatable, Sendable {
  /// A program of the platform that prints them (the SDKs' `credential_process`), with the placeholders `{owner}`, `{role}` and
  /// `{workspace}` in its arguments. Its standard error goes to the agent's log.
  case program([String], timeoutSeconds: UInt32)
  /// A file that another program renews. Its path has the same placeholders.
  case file(String)
  /// One of the controllers that the agent connects to. Its reply to a request has the same content.
  case controller(String, timeoutSeconds: UInt32)

  package static let sizeLimit = 65_536

  /// Returns the name of the provider for messages.
  package func name(_ fill: (String) -> String) -> String {
    switch self {
    case .file(let template): fill(template)
    case .program(let arguments, _): arguments[0]
    case .controller(let name, _): "controller \(name)"
    }
  }
}

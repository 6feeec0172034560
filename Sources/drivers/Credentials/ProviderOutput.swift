// SPDX-License-Identifier: Apache-2.0

package import Errors
package import Foundation

/// The output of a provider: a JSON object whose values are strings. Errors never contain any of it.
struct ProviderOutput {
  private let object: [String: Any]

  init(_ json: Data) throws(DriverError) {
    guard let object = try? JSONSerialization.jsonObject(with: json) as? [String: Any] else {
      throw DriverError(.failed, "expected a JSON object; got \(json.count) bytes that are not one")
    }
    self.object = object
  }

  func has(_ name: String) -> Bool { object[name] != nil }

  func text(_ name: String) throws(DriverError) -> String {
    guard let value = object[name] as? String, !value.isEmpty, value.utf8.count <= 8192,
      value.utf8.allSatisfy({ (0x21...0x7E).contains($0) })
    else { throw DriverError(.failed, "\(name): expected a string of 1 to 8192 printable ASCII characters without spaces") }
    return value
  }

  func moment(_ name: String, after now: Date) throws(DriverError) -> Date {
    let text = try text(name)
    guard
      let date = (try? Date(text, strategy: .iso8601))
        ?? (try? Date(text, strategy: .iso8601.year().month().day().time(includingFractionalSeconds: true).timeZone(separator: .omitted)))
    else { throw DriverError(.failed, "\(name): expected a moment such as 2026-01-31T12:00:00Z") }
    guard date > now else { throw DriverError(.failed, "\(name): they have expired already") }
    return date
  }
}

/// A short-lived token for one organisation of a git host: `{"Username": "x-access-token", "Password": "…", "Expiration": "…"}`.
package struct GitCredentials: Sendable, CustomStringConvertible {
  private let username: String
  private let password: String
  package let expires: Date

  package var description: String { "git credentials until \(expires)" }

  package init(json: Data, now: Date = .now) throws(DriverError) {
    let object = try ProviderOutput(json)
    username = object.has("Username") ? try object.text("Username") : "x-access-token"
    password = try object.text("Password")
    expires = try object.moment("Expiration", after: now)
  }

  /// The format that git reads from a credential helper (git-credential(1)).
  package var body: [UInt8] {
    Array("username=\(username)\npassword=\(password)\npassword_expiry_utc=\(Int(expires.timeIntervalSince1970))\n".utf8)
  }
}

/// A token that identifies a workload to AWS: `{"Token": "…", "Expiration": "…"}`.
package struct WebIdentity: Sendable, CustomStringConvertible {
  private let token: String
  package let expires: Date

  package var description: String { "a web identity until \(expires)" }

  package init(json: Data, now: Date = .now) throws(DriverError) {
    let object = try ProviderOutput(json)
    token = try object.text("Token")
    expires = try object.moment("Expiration", after: now)
  }

  package var body: [UInt8] { Array(token.utf8) }
}

// SPDX-License-Identifier: Apache-2.0

package import Foundation

package struct CredentialError: Error, Equatable, Sendable, CustomStringConvertible {
  /// Never holds any of what a provider said.
  package let description: String
  package init(_ description: String) { self.description = description }
}

/// Temporary credentials of one AWS role. Its description shows none of them.
package struct AWSCredentials: Sendable, CustomStringConvertible {
  private let accessKeyID: String
  private let secretAccessKey: String
  private let sessionToken: String
  private let expiration: String
  package let expires: Date

  package var description: String { "AWS credentials until \(expiration)" }

  /// What SDKs expect of a `credential_process`: an object with `AccessKeyId`, `SecretAccessKey`, `SessionToken` and
  /// `Expiration` (ISO 8601), in UTF-8.
  package init(json: Data, now: Date = .now) throws(CredentialError) {
    guard let object = try? JSONSerialization.jsonObject(with: json) as? [String: Any] else {
      throw CredentialError("expected a JSON object, as of a credential_process; \(json.count) bytes are none")
    }
    func text(_ name: String) throws(CredentialError) -> String {
      guard let value = object[name] as? String, !value.isEmpty, value.utf8.count <= 8192,
        value.utf8.allSatisfy({ (0x21...0x7E).contains($0) })
      else { throw CredentialError("\(name): expected a text of 1 to 8192 printable characters") }
      return value
    }
    accessKeyID = try text("AccessKeyId")
    secretAccessKey = try text("SecretAccessKey")
    sessionToken = try text(object["SessionToken"] == nil ? "Token" : "SessionToken")
    expiration = try text("Expiration")
    guard
      let date = (try? Date(expiration, strategy: .iso8601))
        ?? (try? Date(
          expiration, strategy: .iso8601.year().month().day().time(includingFractionalSeconds: true).timeZone(separator: .omitted)))
    else {
      throw CredentialError("Expiration: expected a moment such as 2026-01-31T12:00:00Z")
    }
    guard date > now else { throw CredentialError("Expiration: they have expired already") }
    expires = date
  }

  /// As SDKs expect it of a container's credentials endpoint.
  package var body: [UInt8] {
    let fields = ["AccessKeyId": accessKeyID, "SecretAccessKey": secretAccessKey, "Token": sessionToken, "Expiration": expiration]
    return Array((try? JSONSerialization.data(withJSONObject: fields, options: [.sortedKeys, .withoutEscapingSlashes])) ?? Data())
  }

  /// How long to wait before asking for the next: so that 20 minutes are always left (SDKs renew 15 before the end), and a
  /// minute more to fetch them; of what does not last that long, half.
  package static func renewal(after lifetime: TimeInterval) -> TimeInterval {
    let ahead = lifetime - 21 * 60
    return ahead >= 60 ? ahead : max(lifetime / 2, 0.5)
  }
}

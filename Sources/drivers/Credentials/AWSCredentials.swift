// SPDX-License-Identifier: Apache-2.0

package import Errors
package import Foundation

/// Temporary credentials of one AWS role. The description contains no secret.
package struct AWSCredentials: Sendable, CustomStringConvertible {
  private let accessKeyID: String
  private let secretAccessKey: String
  private let sessionToken: String
  private let expiration: String
  package let expires: Date

  package var description: String { "AWS credentials until \(expiration)" }

  /// Reads the format that SDKs expect of a `credential_process`: an object with `AccessKeyId`, `SecretAccessKey`, `SessionToken` and
  /// `Expiration` (ISO 8601), in UTF-8.
  package init(json: Data, now: Date = .now) throws(DriverError) {
    let object = try ProviderOutput(json)
    accessKeyID = try object.text("AccessKeyId")
    secretAccessKey = try object.text("SecretAccessKey")
    sessionToken = try object.text(object.has("SessionToken") ? "SessionToken" : "Token")
    expiration = try object.text("Expiration")
    expires = try object.moment("Expiration", after: now)
  }

  /// The format that SDKs expect of a container's credentials endpoint.
  package var body: [UInt8] {
    let fields = ["AccessKeyId": accessKeyID, "SecretAccessKey": secretAccessKey, "Token": sessionToken, "Expiration": expiration]
    return Array((try? JSONSerialization.data(withJSONObject: fields, options: [.sortedKeys, .withoutEscapingSlashes])) ?? Data())
  }

  /// Returns the time to wait before the next renewal: until 21 minutes before the end, so that 20 minutes are always left (SDKs renew 15
  /// minutes before the end) after a minute to fetch. For a lifetime below 22 minutes it is half of the lifetime.
  package static func renewal(after lifetime: TimeInterval) -> TimeInterval {
    let ahead = lifetime - 21 * 60
    return ahead >= 60 ? ahead : max(lifetime / 2, 0.5)
  }
}

// SPDX-License-Identifier: Apache-2.0

import Errors
import Foundation
import Testing

@testable import Credentials

@Suite("AWS credentials") struct CredentialTests {
  static let whole = [
    "AccessKeyId": "ASIAX", "SecretAccessKey": "CANARY/secret", "SessionToken": "CANARYsession", "Expiration": "2100-01-01T00:00:00Z",
  ]

  static func read(_ changes: [String: Any]) throws(DriverError) -> AWSCredentials {
    let fields = (whole as [String: Any]).merging(changes) { $1 }
    return try AWSCredentials(json: try! JSONSerialization.data(withJSONObject: fields))
  }

  @Test("go to the SDKs as they came, and show themselves nowhere else") func whole() throws {
    let credentials = try Self.read([:])
    let body = try #require(try JSONSerialization.jsonObject(with: Data(credentials.body)) as? [String: String])
    #expect(
      body == ["AccessKeyId": "ASIAX", "SecretAccessKey": "CANARY/secret", "Token": "CANARYsession", "Expiration": "2100-01-01T00:00:00Z"])
    #expect(!"\(credentials)".contains("CANARY"))
    #expect(try Self.read(["Expiration": "2100-01-01T00:00:00.5Z"]).expires > credentials.expires)
  }

  @Test(
    "are refused by field, and no refusal holds any of them",
    arguments: [
      (["AccessKeyId": ""], "AccessKeyId:"), (["SecretAccessKey": 7], "SecretAccessKey:"),
      (["SessionToken": "CANARY\r\nX: y"], "SessionToken:"),
      (["Expiration": "CANARY"], "Expiration: expected a moment"),
      (["Expiration": "2001-01-01T00:00:00Z"], "Expiration: they have expired"),
      (["SecretAccessKey": String(repeating: "x", count: 9000)], "SecretAccessKey:"),
    ] as [([String: any Sendable], String)])
  func refused(changes: [String: any Sendable], message: String) {
    let error = #expect(throws: DriverError.self) { try Self.read(changes) }
    #expect(error?.description.hasPrefix(message) == true && error?.description.contains("CANARY") == false)
  }

  @Test("that are no JSON are refused", arguments: ["", "CANARY", "[1]", "{", "null"]) func noJSON(text: String) {
    let error = #expect(throws: DriverError.self) { try AWSCredentials(json: Data(text.utf8)) }
    #expect(error?.description.contains("CANARY") == false)
  }

  @Test(
    "are renewed while twenty minutes are left", arguments: [(3600.0, 2340.0), (1320, 60), (1200, 600), (900, 450), (6, 3), (0.2, 0.5)])
  func renewal(lifetime: Double, pause: Double) { #expect(AWSCredentials.renewal(after: lifetime) == pause) }
}

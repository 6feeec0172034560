// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Journal
package import Workspaces

/// Everything the agent knows about a workspace and keeps across restarts. Holds no secret.
package struct WorkspaceRecord: Codable, Equatable, Sendable {
  package struct Phase: Codable, Equatable, Sendable {
    package let name: String
    package let milliseconds: Double
  }

  package let spec: WorkspaceSpec
  package var state: WorkspaceState = .pending
  package var reason: Reason?
  package let amounts: ResourceAmounts
  /// Which id range and which address are its own.
  package let slot: Int
  package let address: String
  package let firstID: UInt32
  package let created: String
  package var attempt: UInt32 = 1
  package var phases: [Phase] = []
  package var imageDigest = ""
  /// Of the boot in which it was last started.
  package var bootID = ""
  /// Never used twice, see `Cgroup`.
  package var cgroup = ""
  /// When the tool was started, in nanoseconds since boot. Optional, as every field added later must be: records of
  /// an older agent lack it.
  package var startedNanoseconds: Int64?
  /// The size of its home's image in bytes; nil where the home is a directory.
  package var homeBytes: UInt64?
  /// Of its home's limit, the last of 80, 95 and 100 % that was told.
  package var homeFilled: UInt64?
  /// Roles whose credentials were taken away.
  package var revoked: [String]?
  package var stopRequestedBy: String?
  package var outOfMemoryKills: UInt64 = 0

  func encoded() throws -> String { try encodedText(self) }

  func journalRecord() throws -> JournalRecord {
    JournalRecord(id: spec.id, state: state.rawValue, slot: Int64(slot), body: try encoded())
  }

  package init(_ record: JournalRecord) throws {
    self = try JSONDecoder().decode(WorkspaceRecord.self, from: Data(record.body.utf8))
  }

  init(spec: WorkspaceSpec, amounts: ResourceAmounts, slot: Int, address: String, firstID: UInt32, created: String) {
    self.spec = spec
    self.amounts = amounts
    self.slot = slot
    self.address = address
    self.firstID = firstID
    self.created = created
  }
}

/// JSON as the journal keeps it: the same value is always the same text.
func encodedText(_ value: some Encodable) throws -> String {
  let encoder = JSONEncoder()
  encoder.outputFormatting = [.sortedKeys]
  return String(decoding: try encoder.encode(value), as: UTF8.self)
}

/// RFC 3339 with milliseconds, UTC.
func wallTime() -> String {
  Date.now.formatted(
    .iso8601.year().month().day().timeZone(separator: .omitted).time(includingFractionalSeconds: true).timeSeparator(.colon))
}

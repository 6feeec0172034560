// SPDX-License-Identifier: Apache-2.0

package import Foundation
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
  /// The limit of a home that is a directory, in bytes; nil where it has none.
  package var homeQuota: UInt64?
  /// Of its home's limit, the last of 80, 95 and 100 % that was told.
  package var homeFilled: UInt64?
  /// Roles whose credentials were taken away.
  package var revoked: [String]?
  /// What it has of datasets and project folders.
  package var datasets: [MountedDataset]?
  /// What holds of it beside its state, by name, with a sentence for people.
  package var conditions: [String: String]?
  /// Of credential files that end.
  package var credentialEnds: [String: CredentialEnd]?
  /// Its tool has had its second start without what was suspected.
  package var isRescued: Bool?
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

/// When a credential file was given and when it ends, in seconds since 1970.
package struct CredentialEnd: Codable, Equatable, Sendable {
  let given: Double
  let end: Double

  init(_ seconds: UInt64) {
    given = Date.now.timeIntervalSince1970
    end = given + Double(seconds)
  }

  /// From when on its end is near: a quarter of an hour before, or a quarter of its time.
  var warning: Double { end - min(900, (end - given) / 4) }
}

/// A dataset as a workspace has it.
package struct MountedDataset: Codable, Equatable, Sendable {
  package let target: String
  /// A directory of the host, or an image.
  package let source: String
  /// NAME@VERSION; nil where it was asked for by its path.
  package let reference: String?
  /// Below the source.
  package let path: String?
  package var writable: Bool
  let executable: Bool
  /// Of a project's folder: its group, and the storage uids of its members.
  let gid: UInt32?
  let members: [UInt32]?
  /// Seconds since 1970; nil for as long as the workspace.
  package var expires: Double?
  /// While the workspace ran, not by its spec.
  package let isAttached: Bool
}

/// JSON as the journal keeps it: the same value is always the same text.
func encodedText(_ value: some Encodable) throws -> String {
  let encoder = JSONEncoder()
  encoder.outputFormatting = [.sortedKeys]
  return String(decoding: try encoder.encode(value), as: UTF8.self)
}

/// RFC 3339 with milliseconds, UTC.
package func wallTime(_ moment: Date = .now) -> String {
  moment.formatted(
    .iso8601.year().month().day().timeZone(separator: .omitted).time(includingFractionalSeconds: true).timeSeparator(.colon))
}

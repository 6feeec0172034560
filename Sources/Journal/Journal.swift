// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import GRDB

/// A fact about a workspace's life, as it is kept and delivered.
package struct JournalEvent: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
  package static let databaseTableName = "event"

  /// Dense, from 1; the only order there is.
  package var sequence: Int64
  package var type: String
  package var workspace: String
  /// The workspace's state after it.
  package var state: String
  /// JSON, or nil.
  package var reason: String?
  /// JSON object of texts.
  package var attributes: String
  package var wallTime: String
  package var bootNanoseconds: Int64
  package var bootID: String

  package init(
    type: String, workspace: String, state: String, reason: String?, attributes: String, wallTime: String,
    bootNanoseconds: Int64, bootID: String
  ) {
    sequence = 0
    self.type = type
    self.workspace = workspace
    self.state = state
    self.reason = reason
    self.attributes = attributes
    self.wallTime = wallTime
    self.bootNanoseconds = bootNanoseconds
    self.bootID = bootID
  }
}

/// The latest state of a workspace, written in the same transaction as the event that made it.
package struct JournalRecord: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
  package static let databaseTableName = "workspace"

  package var id: String
  package var state: String
  /// Which 65,536-id range and which address of the subnet is its own; unique among the living.
  package var slot: Int64
  /// The whole record as JSON. Holds no secret.
  package var body: String

  package init(id: String, state: String, slot: Int64, body: String) {
    self.id = id
    self.state = state
    self.slot = slot
    self.body = body
  }
}

package enum JournalError: Error, Sendable, CustomStringConvertible {
  case notDurable(String)
  case corrupt(String)
  case otherVersion(Int)

  package var description: String {
    switch self {
    case .notDurable(let mode): "the journal is not durable: synchronous is \(mode), expected 2 (FULL)"
    case .corrupt(let detail): "the journal is damaged: \(detail)"
    case .otherVersion(let version): "the journal has version \(version); this agent writes version \(Journal.version)"
    }
  }
}

/// Workspaces and their events in SQLite: WAL, synchronous=FULL, a state and its event in one transaction.
/// What `commit` returned from is on disk.
package final class Journal: Sendable {
  package static let version = 1

  private let pool: DatabasePool
  /// Made with the journal; another id means that the history before is lost.
  package let streamID: String

  package init(path: String) throws {
    var configuration = Configuration()
    configuration.busyMode = .timeout(5)
    pool = try DatabasePool(path: path, configuration: configuration)
    // GRDB sets NORMAL on the writer when it turns WAL on: set FULL afterwards, and look.
    try pool.writeWithoutTransaction { database in
      try database.execute(sql: "PRAGMA synchronous = FULL")
      let mode = try String.fetchOne(database, sql: "PRAGMA synchronous") ?? "?"
      guard mode == "2" else { throw JournalError.notDurable(mode) }
      let check = try String.fetchOne(database, sql: "PRAGMA quick_check") ?? "no answer"
      guard check == "ok" else { throw JournalError.corrupt(check) }
    }
    streamID = try pool.write { database in
      let version = try Int.fetchOne(database, sql: "PRAGMA user_version") ?? 0
      guard version == 0 || version == Journal.version else { throw JournalError.otherVersion(version) }
      if version == 0 {
        try database.execute(
          sql: """
            CREATE TABLE stream (id TEXT NOT NULL);
            CREATE TABLE workspace (
              id TEXT PRIMARY KEY, state TEXT NOT NULL, slot INTEGER NOT NULL UNIQUE, body TEXT NOT NULL);
            CREATE TABLE event (
              sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, workspace TEXT NOT NULL, state TEXT NOT NULL,
              reason TEXT, attributes TEXT NOT NULL, wallTime TEXT NOT NULL, bootNanoseconds INTEGER NOT NULL,
              bootID TEXT NOT NULL);
            CREATE INDEX event_by_workspace ON event (workspace, sequence);
            PRAGMA user_version = 1;
            """)
        try database.execute(sql: "INSERT INTO stream VALUES (?)", arguments: [UUID().uuidString.lowercased()])
      }
      return try String.fetchOne(database, sql: "SELECT id FROM stream") ?? ""
    }
  }

  /// Writes the record and its event, or neither. Returns the event with its sequence number.
  package func commit(_ record: JournalRecord, _ event: JournalEvent) async throws -> JournalEvent {
    try await pool.write { database in
      try record.save(database)
      return try Journal.append(event, database)
    }
  }

  /// Removes the record; its events stay.
  package func commitDeletion(_ id: String, _ event: JournalEvent) async throws -> JournalEvent {
    try await pool.write { database in
      try database.execute(sql: "DELETE FROM workspace WHERE id = ?", arguments: [id])
      return try Journal.append(event, database)
    }
  }

  private static func append(_ event: JournalEvent, _ database: Database) throws -> JournalEvent {
    var event = event
    // Within a write transaction there is one writer: dense by construction.
    event.sequence = (try Int64.fetchOne(database, sql: "SELECT max(sequence) FROM event") ?? 0) + 1
    try event.insert(database)
    return event
  }

  package func records() async throws -> [JournalRecord] {
    try await pool.read { try JournalRecord.order(Column("id")).fetchAll($0) }
  }

  /// Events after `cursor`, in order, at most `limit`.
  package func events(after cursor: Int64, workspace: String? = nil, limit: Int) async throws -> [JournalEvent] {
    try await pool.read { database in
      var request = JournalEvent.filter(Column("sequence") > cursor)
      if let workspace { request = request.filter(Column("workspace") == workspace) }
      return try request.order(Column("sequence")).limit(limit).fetchAll(database)
    }
  }

  /// The sequence of the last event; 0 before the first.
  package func head() async throws -> Int64 {
    try await pool.read { try Int64.fetchOne($0, sql: "SELECT max(sequence) FROM event") ?? 0 }
  }

  package func close() throws { try pool.close() }
}

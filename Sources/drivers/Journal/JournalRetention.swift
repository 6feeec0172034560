// SPDX-License-Identifier: Apache-2.0

internal import GRDB

/// Acknowledgements, and the trimming of events that they allow.
extension Journal {
  /// The size of the journal and its range of sequences.
  package struct Extent: Sendable {
    /// The bytes of the pages in use. Free pages do not count: SQLite reuses them.
    package let bytes: UInt64
    /// The sequence of the oldest retained event; head + 1 if there is none.
    package let oldest: Int64
    package let head: Int64
  }

  package func extent() async throws -> Extent {
    try await pool.read { database in
      Extent(
        bytes: try Journal.bytes(database), oldest: try Journal.trimmed(database) + 1,
        head: try Journal.head(database))
    }
  }

  /// Checks the whole journal (PRAGMA integrity_check) and that its events are dense. Returns the number of events.
  package func check() async throws -> Int64 {
    try await pool.read { database in
      let said = try String.fetchAll(database, sql: "PRAGMA integrity_check")
      guard said == ["ok"] else { throw JournalError.corrupt(said.prefix(3).joined(separator: "; ")) }
      let count = try Int64.fetchOne(database, sql: "SELECT count(*) FROM event") ?? 0
      let expected = try Journal.head(database) - (try Int64.fetchOne(database, sql: "SELECT trimmed FROM stream") ?? 0)
      guard count == expected else { throw JournalError.corrupt("it has \(count) events where its sequences say \(expected)") }
      return count
    }
  }

  /// Returns the highest sequence that this controller has acknowledged, or nil if there is none.
  package func acknowledged(by controller: String) async throws -> Int64? {
    try await pool.read {
      try Int64.fetchOne($0, sql: "SELECT sequence FROM acknowledgement WHERE controller = ?", arguments: [controller])
    }
  }

  /// Stores an acknowledgement. It is cumulative: a sequence lower than before changes nothing. A sequence above the head is refused.
  package func acknowledge(_ sequence: Int64, by controller: String) async throws {
    try await pool.write { database in
      let head = try Journal.head(database)
      guard (0...head).contains(sequence) else { throw JournalError.outOfRange(asked: sequence, head: head) }
      try database.execute(
        sql: """
          INSERT INTO acknowledgement VALUES (?, ?)
          ON CONFLICT (controller) DO UPDATE SET sequence = max(sequence, excluded.sequence)
          """, arguments: [controller, sequence])
    }
  }

  /// Removes events up to `sequence`, but retains the newest `kept` events.
  package func trim(through sequence: Int64, keeping kept: Int64) async throws {
    let (head, trimmed): (Int64, Int64) = try await pool.write { database in
      let head = try Journal.head(database)
      let end = min(sequence, head - kept)
      guard try Journal.trimmed(database) < end else { return (head, 0) }
      try database.execute(sql: "DELETE FROM event WHERE sequence <= ?", arguments: [end])
      try database.execute(sql: "UPDATE stream SET trimmed = ?", arguments: [end])
      try self.measure(database)
      return (head, end)
    }
    recent.trim(through: trimmed)
    mark(head)
  }
}

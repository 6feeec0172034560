// SPDX-License-Identifier: Apache-2.0

internal import GRDB

/// Who has what, and what may therefore go.
extension Journal {
  /// How much the journal holds, and where it stands.
  package struct Extent: Sendable {
    /// Of the pages in use; free ones are used again.
    package let bytes: UInt64
    /// The sequence of the oldest event that is kept; head + 1 where none is.
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

  /// Reads all of it (PRAGMA integrity_check), and whether its events are dense. Returns how many there are.
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

  /// The highest sequence that this controller has acknowledged; nil where it never has.
  package func acknowledged(by controller: String) async throws -> Int64? {
    try await pool.read {
      try Int64.fetchOne($0, sql: "SELECT sequence FROM acknowledgement WHERE controller = ?", arguments: [controller])
    }
  }

  /// Cumulative: a lower one than before changes nothing. One above the head is refused.
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

  /// Removes events up to `sequence`, but the newest `kept` of all stay.
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

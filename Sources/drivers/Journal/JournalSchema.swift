// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import GRDB

/// The tables, version by version. A journal of an older version is migrated in one transaction; a newer one is refused.
enum JournalSchema {
  static let version = 3

  private static let steps = [
    // 1
    """
    CREATE TABLE stream (id TEXT NOT NULL);
    CREATE TABLE workspace (
      id TEXT PRIMARY KEY, state TEXT NOT NULL, slot INTEGER NOT NULL UNIQUE, body TEXT NOT NULL);
    CREATE TABLE event (
      sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, workspace TEXT NOT NULL, state TEXT NOT NULL,
      reason TEXT, attributes TEXT NOT NULL, wallTime TEXT NOT NULL, bootNanoseconds INTEGER NOT NULL,
      bootID TEXT NOT NULL);
    CREATE INDEX event_by_workspace ON event (workspace, sequence);
    """,
    // 2: trimming, which needs the head stored apart from the events; acknowledgements; durable settings.
    """
    ALTER TABLE stream ADD COLUMN head INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE stream ADD COLUMN trimmed INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE stream ADD COLUMN loss TEXT;
    UPDATE stream SET head = (SELECT coalesce(max(sequence), 0) FROM event);
    ALTER TABLE event ADD COLUMN previous TEXT;
    ALTER TABLE event ADD COLUMN generation INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE event ADD COLUMN phases TEXT;
    CREATE TABLE acknowledgement (controller TEXT PRIMARY KEY, sequence INTEGER NOT NULL);
    CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    // 3: no new tables, but records with their own schema, and sandboxes that an agent before 0.2 cannot supervise: it refuses this
    // journal with a message, and the sandboxes keep running.
    "",
  ]

  static func migrate(_ database: Database, loss: String?) throws {
    let found = try Int.fetchOne(database, sql: "PRAGMA user_version") ?? 0
    guard found <= version else { throw JournalError.newer(found) }
    for (index, step) in steps.enumerated() where index >= found {
      try database.execute(sql: step)
      if index == 0 { try database.execute(sql: "INSERT INTO stream VALUES (?)", arguments: [UUID().uuidString.lowercased()]) }
    }
    // An unchanged version is not written, so that an agent can start on a full disk.
    if found != version { try database.execute(sql: "PRAGMA user_version = \(version)") }
    if let loss, found == 0 { try database.execute(sql: "UPDATE stream SET loss = ?", arguments: [loss]) }
  }
}

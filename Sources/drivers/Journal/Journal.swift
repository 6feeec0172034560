// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import GRDB
internal import Synchronization

/// One durable fact about a workspace, as it is stored and delivered.
package struct JournalEvent: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
  package static let databaseTableName = "event"

  /// The dense sequence number, from 1. It is the only order of events.
  package var sequence: Int64
  package var type: String
  package var workspace: String
  /// The workspace's state after the event.
  package var state: String
  /// The workspace's state before the event; nil for the first event.
  package var previous: String?
  /// The workspace's attempt.
  package var generation: Int64
  /// The reason as JSON, or nil.
  package var reason: String?
  /// A JSON object whose values are strings.
  package var attributes: String
  package var wallTime: String
  package var bootNanoseconds: Int64
  package var bootID: String
  /// The durations of the phases of a start as JSON, or nil.
  package var phases: String?

  package init(
    type: String, workspace: String, state: String, previous: String?, generation: Int64, reason: String?, attributes: String,
    wallTime: String, bootNanoseconds: Int64, bootID: String, phases: String?
  ) {
    sequence = 0
    self.type = type
    self.workspace = workspace
    self.state = state
    self.previous = previous
    self.generation = generation
    self.phases = phases
    self.reason = reason
    self.attributes = attributes
    self.wallTime = wallTime
    self.bootNanoseconds = bootNanoseconds
    self.bootID = bootID
  }
}

/// The latest state of a workspace, written in the same transaction as its event.
package struct JournalRecord: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
  package static let databaseTableName = "workspace"

  package var id: String
  package var state: String
  /// The number of the workspace's range of 65,536 ids and of its address in the subnet; unique among existing records.
  package var slot: Int64
  /// The whole record as JSON, without secrets.
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
  case newer(Int)
  case outOfRange(asked: Int64, head: Int64)

  package var description: String {
    switch self {
    case .notDurable(let mode): "the journal is not durable: synchronous is \(mode); expected 2 (FULL)"
    case .corrupt(let detail): "the journal is damaged: \(detail)"
    case .newer(let version):
      "the journal has version \(version), of a newer agent; this one reads up to \(JournalSchema.version): install that version again"
    case .outOfRange(let asked, let head): "\(asked) is above the head, which is \(head)"
    }
  }
}

/// The database of records and events: SQLite with WAL and synchronous=FULL; a state change and its event are one transaction.
/// Entries are on disk when `commit` returns.
package final class Journal: Sendable {
  let pool: DatabasePool
  private let markPath: String
  private let inUse: Mutex<UInt64>
  let recent: RecentEvents
  /// The id of the stream, created with the journal. A new id means that the earlier history is lost.
  package let streamID: String
  /// The reason why the history before this stream is lost; nil for the first stream.
  package let loss: String?

  /// Opens or creates the journal. A damaged journal is renamed to `<path>-damaged-<time>` and a new stream begins. A missing or empty
  /// journal counts as lost if `hasHistory`, or a mark file, shows that there was an earlier one.
  package convenience init(path: String, hasHistory: Bool = false) throws {
    do {
      let hasHistory = hasHistory || FileManager.default.fileExists(atPath: path + ".mark")
      try self.init(opening: path, loss: hasHistory ? "the journal was missing or empty, but an earlier one existed" : nil)
    } catch {
      guard let damage = Journal.damage(error) else { throw error }
      let kept = try Journal.setAside(path)
      try self.init(opening: path, loss: "the journal was damaged (\(damage)); it is kept as \(kept)")
    }
  }

  /// Opens the journal at `path`. `loss`: the reason to store if the journal is empty.
  private init(opening path: String, loss: String?) throws {
    var configuration = Configuration()
    configuration.busyMode = .timeout(5)
    let pool = try DatabasePool(path: path, configuration: configuration)
    // GRDB sets NORMAL on the writer when it enables WAL: set FULL afterwards, and check it.
    try pool.writeWithoutTransaction { database in
      try database.execute(sql: "PRAGMA synchronous = FULL")
      let mode = try String.fetchOne(database, sql: "PRAGMA synchronous") ?? "?"
      guard mode == "2" else { throw JournalError.notDurable(mode) }
      let check = try String.fetchOne(database, sql: "PRAGMA quick_check") ?? "no answer"
      guard check == "ok" else { throw JournalError.corrupt(check) }
      // The check has read every page, and most will not be needed again.
      try database.execute(sql: "PRAGMA shrink_memory")
    }
    markPath = path + ".mark"
    let head: Int64
    let (bytes, trimmed): (UInt64, Int64)
    (streamID, self.loss, head, bytes, trimmed) = try pool.write { database in
      try JournalSchema.migrate(database, loss: loss)
      guard let row = try Row.fetchOne(database, sql: "SELECT id, loss, head, trimmed FROM stream") else {
        throw JournalError.corrupt("table stream is empty")
      }
      return (row["id"], row["loss"], row["head"], try Journal.bytes(database), row["trimmed"])
    }
    inUse = Mutex(bytes)
    recent = RecentEvents(head: head, trimmed: trimmed)
    self.pool = pool
    if let marked = marked(), marked > head {
      // Closed before the rename: a connection that closes later removes the WAL at this path, which is then the new journal's.
      try pool.close()
      throw JournalError.corrupt("it ends at event \(head), and had reached \(marked): an older copy was put in its place")
    }
    mark(head)
  }

  /// Writes the head to a mark file beside the journal, so that an older copy of the journal is detected. A mark that cannot be written,
  /// or is behind, only detects less.
  func mark(_ head: Int64) {
    try? Data("\(streamID)\n\(head)\n".utf8).write(to: URL(fileURLWithPath: markPath), options: .atomic)
  }

  private func marked() -> Int64? {
    let fields = (try? String(contentsOfFile: markPath, encoding: .utf8))?.split(separator: "\n") ?? []
    return fields.count == 2 && fields[0] == streamID ? Int64(fields[1]) : nil
  }

  /// Returns the damage of the journal file that an error reports, or nil for any other error.
  private static func damage(_ error: any Error) -> String? {
    if case JournalError.corrupt(let detail) = error { return detail }
    guard let error = error as? DatabaseError, [.SQLITE_CORRUPT, .SQLITE_NOTADB].contains(error.resultCode) else { return nil }
    return error.message ?? "\(error.resultCode)"
  }

  /// Returns whether, after this error, the file may differ from what SQLite assumes: after a failed fsync, the next fsync succeeds for
  /// pages that never reached the disk. Only a new process that reads the file again can tell.
  package static func isFatal(_ error: any Error) -> Bool {
    guard let error = error as? DatabaseError else { return false }
    return [.SQLITE_IOERR, .SQLITE_CORRUPT, .SQLITE_NOTADB].contains(error.resultCode)
  }

  private static func setAside(_ path: String) throws -> String {
    let name = "\(path)-damaged-\(Int(Date.now.timeIntervalSince1970))"
    for suffix in ["", "-wal", "-shm"] where FileManager.default.fileExists(atPath: path + suffix) {
      try FileManager.default.moveItem(atPath: path + suffix, toPath: name + suffix)
    }
    return name
  }

  // ------------------------------------------------------------------- writing

  /// An event and the change in the same transaction.
  package struct Entry: Sendable {
    package enum Change: Sendable {
      case none
      /// The new record of the workspace.
      case record(JournalRecord)
      /// The removal of the workspace's record; its events are retained.
      case deletion(of: String)
      case setting(String, to: String?)
    }

    package let event: JournalEvent
    package let change: Change

    package init(_ event: JournalEvent, _ change: Change = .none) {
      self.event = event
      self.change = change
    }
  }

  /// Writes all entries with one fsync, or none. Returns their events, in the same order, with their sequence numbers.
  package func commit(_ entries: [Entry]) async throws -> [JournalEvent] {
    let events = try await pool.write { database in
      let events = try entries.map { entry in
        switch entry.change {
        case .none: break
        case .record(let record): try record.save(database)
        case .deletion(let id): try Journal.run("DELETE FROM workspace WHERE id = ?", [id], database)
        case .setting(let name, let value): try Journal.set(name, to: value, database)
        }
        return try Journal.append(entry.event, database)
      }
      try self.measure(database)
      return events
    }
    recent.append(events)
    return events
  }

  /// Executes a statement that is compiled once, since each commit runs it.
  private static func run(_ sql: String, _ arguments: StatementArguments, _ database: Database) throws {
    try database.cachedStatement(sql: sql).execute(arguments: arguments)
  }

  package func set(_ name: String, to value: String?) async throws { try await pool.write { try Journal.set(name, to: value, $0) } }

  private static func set(_ name: String, to value: String?, _ database: Database) throws {
    try run("DELETE FROM setting WHERE name = ?", [name], database)
    if let value { try run("INSERT INTO setting VALUES (?, ?)", [name, value], database) }
  }

  private static func append(_ event: JournalEvent, _ database: Database) throws -> JournalEvent {
    var event = event
    // A write transaction has one writer, so the sequence is dense, whatever has been trimmed.
    event.sequence = try Journal.head(database) + 1
    try event.insert(database)
    try run("UPDATE stream SET head = ?", [event.sequence], database)
    return event
  }

  static func head(_ database: Database) throws -> Int64 { try number("SELECT head FROM stream", database) }

  static func number(_ sql: String, _ database: Database) throws -> Int64 {
    try Int64.fetchOne(try database.cachedStatement(sql: sql)) ?? 0
  }

  // -------------------------------------------------------------------- extent

  /// The bytes of the pages in use after the last write. Free pages do not count: SQLite reuses them.
  package var bytesInUse: UInt64 { inUse.withLock { $0 } }

  func measure(_ database: Database) throws {
    let bytes = try Journal.bytes(database)
    inUse.withLock { $0 = bytes }
  }

  static func bytes(_ database: Database) throws -> UInt64 {
    let pages = try number("PRAGMA page_count", database) - number("PRAGMA freelist_count", database)
    return UInt64(pages * (try number("PRAGMA page_size", database)))
  }

  // ------------------------------------------------------------------- reading

  package func records() async throws -> [JournalRecord] { try await pool.read { try Journal.records($0) } }

  /// Returns all records, and blocks in the meantime.
  package func allRecords() throws -> [JournalRecord] { try pool.read { try Journal.records($0) } }

  private static func records(_ database: Database) throws -> [JournalRecord] {
    try JournalRecord.order(Column("id")).fetchAll(database)
  }

  /// Returns all records and the sequence of the last event that they include.
  package func snapshot() async throws -> (sequence: Int64, records: [JournalRecord]) {
    try await pool.read { (try Journal.head($0), try JournalRecord.order(Column("id")).fetchAll($0)) }
  }

  /// The sequence of the last event; 0 before the first.
  package func head() async throws -> Int64 { try await pool.read { try Journal.head($0) } }

  package func setting(_ name: String) async throws -> String? {
    try await pool.read { try String.fetchOne($0, sql: "SELECT value FROM setting WHERE name = ?", arguments: [name]) }
  }

  package func close() throws { try pool.close() }
}

// SPDX-License-Identifier: Apache-2.0

internal import GRDB
internal import Synchronization

/// The last events in memory, so that a reader that has all earlier ones needs no disk access. All of them are on disk.
final class RecentEvents: Sendable {
  private struct State {
    /// Dense events up to the head, or none.
    var events: [JournalEvent] = []
    var head: Int64
    /// The sequence of the last trimmed event.
    var trimmed: Int64
  }
  private let state: Mutex<State>
  private static let limit = 512

  init(head: Int64, trimmed: Int64) { state = Mutex(State(head: head, trimmed: trimmed)) }

  /// Appends the events of one transaction, after its commit.
  func append(_ events: [JournalEvent]) {
    guard let last = events.last else { return }
    state.withLock { state in
      if events.first?.sequence != state.head + 1 { state.events = [] }
      state.head = max(state.head, last.sequence)
      // A transaction that is appended after a later one leaves the cache empty: readers use the disk.
      guard last.sequence == state.head else { return }
      state.events += events
      if state.events.count > RecentEvents.limit { state.events.removeFirst(state.events.count - RecentEvents.limit / 2) }
    }
  }

  func trim(through sequence: Int64) {
    state.withLock { state in
      state.trimmed = max(state.trimmed, sequence)
      state.events.removeAll { $0.sequence <= sequence }
    }
  }

  /// Returns a page of events, or nil if it has to be read from disk.
  func page(after cursor: Int64, workspace: String?, limit: Int) -> Journal.Page? {
    state.withLock { state in
      if cursor == state.head { return Journal.Page(events: [], through: cursor, oldest: state.trimmed + 1) }
      guard let first = state.events.first, first.sequence <= cursor + 1, cursor < state.head else { return nil }
      let events = state.events.dropFirst(Int(cursor + 1 - first.sequence)).filter { workspace == nil || $0.workspace == workspace }
      return Journal.Page(Array(events.prefix(limit)), limit: limit, head: state.head, oldest: state.trimmed + 1)
    }
  }
}

extension Journal {
  /// Events in order, and the sequence that they cover.
  package struct Page: Sendable {
    package let events: [JournalEvent]
    /// The sequence up to which the page contains every requested event.
    package let through: Int64
    /// The sequence of the oldest retained event; head + 1 if there is none.
    package let oldest: Int64

    init(events: [JournalEvent], through: Int64, oldest: Int64) {
      self.events = events
      self.through = through
      self.oldest = oldest
    }

    init(_ events: [JournalEvent], limit: Int, head: Int64, oldest: Int64) {
      self.init(events: events, through: events.count < limit ? head : events.last?.sequence ?? head, oldest: oldest)
    }
  }

  /// Returns events after `cursor`, in order, at most `limit`.
  package func page(after cursor: Int64, workspace: String? = nil, limit: Int) async throws -> Page {
    if let page = recent.page(after: cursor, workspace: workspace, limit: limit) { return page }
    return try await pool.read { database in
      var request = JournalEvent.filter(Column("sequence") > cursor)
      if let workspace { request = request.filter(Column("workspace") == workspace) }
      return Page(
        try request.order(Column("sequence")).limit(limit).fetchAll(database), limit: limit, head: try Journal.head(database),
        oldest: try Journal.trimmed(database) + 1)
    }
  }

  static func trimmed(_ database: Database) throws -> Int64 { try number("SELECT trimmed FROM stream", database) }
}

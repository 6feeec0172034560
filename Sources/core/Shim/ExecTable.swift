// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import ShimProtocol
  internal import Linux
#endif

/// The `exec` programs that run in a sandbox, and their clients.
struct ExecTable {
  struct Client {
    let request: UInt32
    let connection: Int
  }

  private struct Entry {
    let session: UInt32
    /// Nil once the client has disconnected.
    var client: Client?
    /// The time of its SIGKILL after a hang-up, in nanoseconds since boot.
    var killAt: Int64?
  }

  private var entries: [Entry] = []
  private var next: UInt32 = 1
  /// The nanoseconds between SIGHUP and SIGKILL.
  private static let grace: Int64 = 2_000_000_000

  /// Adds a program and returns its session; nil at the limit of programs.
  mutating func begin(request: UInt32, connection: Int) -> UInt32? {
    guard entries.count < ShimProtocol.execLimit else { return nil }
    defer { next &+= 1 }
    entries.append(Entry(session: next, client: Client(request: request, connection: connection), killAt: nil))
    return next
  }

  func client(of session: UInt32) -> Client? { entries.first { $0.session == session }?.client }

  func number(of request: UInt32, on connection: Int) -> UInt32? {
    entries.first { $0.client?.request == request && $0.client?.connection == connection }?.session
  }

  mutating func end(_ session: UInt32) -> Client? {
    guard let index = entries.firstIndex(where: { $0.session == session }) else { return nil }
    return entries.remove(at: index).client
  }

  /// Hangs up the programs of this connection, which then have no client, and returns their sessions.
  mutating func leave(connection: Int) -> [UInt32] {
    let left = entries.filter { $0.client?.connection == connection }.map { $0.session }
    for session in left { leave(session) }
    return left
  }

  private mutating func leave(_ session: UInt32) {
    hangUp(session)
    for index in entries.indices where entries[index].session == session { entries[index].client = nil }
  }

  /// Schedules the SIGKILL of a program; its client still receives the report of its end.
  mutating func hangUp(_ session: UInt32) {
    for index in entries.indices where entries[index].session == session {
      entries[index].killAt = entries[index].killAt ?? Clock.boottime + ExecTable.grace
    }
  }

  /// Returns the milliseconds until the next program is overdue; 0: none is hung up.
  func pause() -> Int32 {
    guard let soonest = entries.compactMap({ $0.killAt }).min() else { return 0 }
    return Int32(clamping: max(1, (soonest - Clock.boottime) / 1_000_000 + 1))
  }

  mutating func overdue() -> [UInt32] {
    let now = Clock.boottime
    var found: [UInt32] = []
    for index in entries.indices {
      guard let moment = entries[index].killAt, moment <= now else { continue }
      entries[index].killAt = now + ExecTable.grace
      found.append(entries[index].session)
    }
    return found
  }
}

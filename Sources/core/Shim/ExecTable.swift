// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import ShimProtocol
  internal import Linux
#endif

/// The programs of `exec` that run in a sandbox, and whose they are.
struct ExecTable {
  struct Client {
    let request: UInt32
    let connection: Int
  }

  private struct Entry {
    let session: UInt32
    /// Nil once the client has gone.
    var client: Client?
    /// When it is killed, having been hung up on; in nanoseconds since boot.
    var killAt: Int64?
  }

  private var entries: [Entry] = []
  private var next: UInt32 = 1
  /// Between SIGHUP and SIGKILL.
  private static let grace: Int64 = 2_000_000_000

  /// Nil where as many run as may.
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

  /// Those whose client was this connection: from now on nobody's.
  mutating func leave(connection: Int) -> [UInt32] {
    let left = entries.filter { $0.client?.connection == connection }.map { $0.session }
    for session in left { leave(session) }
    return left
  }

  private mutating func leave(_ session: UInt32) {
    hangUp(session)
    for index in entries.indices where entries[index].session == session { entries[index].client = nil }
  }

  /// Its client still hears of its end.
  mutating func hangUp(_ session: UInt32) {
    for index in entries.indices where entries[index].session == session {
      entries[index].killAt = entries[index].killAt ?? Clock.boottime + ExecTable.grace
    }
  }

  /// Milliseconds until the next is overdue; 0: none will be.
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

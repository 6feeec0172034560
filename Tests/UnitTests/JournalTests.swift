// SPDX-License-Identifier: Apache-2.0

import Foundation
import Testing

@testable import Journal

@Suite("The journal") struct JournalTests {
  private func temporary() throws -> String {
    let path = NSTemporaryDirectory() + "carrel-journal-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    return path
  }

  private func event(_ id: String) -> JournalEvent {
    JournalEvent(
      type: "Created", workspace: id, state: "pending", reason: nil, attributes: "{}", wallTime: "t", bootNanoseconds: 1, bootID: "b")
  }

  @Test("sequences are dense under concurrent commits, and survive reopening") func dense() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    try await withThrowingTaskGroup(of: Void.self) { group in
      for index in 0..<100 {
        let event = event("w\(index)")
        group.addTask {
          _ = try await journal.commit(JournalRecord(id: "w\(index)", state: "pending", slot: Int64(index), body: "{}"), event)
        }
      }
      try await group.waitForAll()
    }
    #expect(try await journal.events(after: 0, limit: 1000).map(\.sequence) == Array(1...100))
    let stream = journal.streamID
    try journal.close()
    let reopened = try Journal(path: folder + "/j.sqlite")
    #expect(reopened.streamID == stream)
    #expect(try await reopened.head() == 100)
    #expect(try await reopened.events(after: 98, limit: 10).count == 2)
    #expect(try await reopened.records().count == 100)
  }

  @Test("a record that is refused leaves no event, and no hole in the sequence") func atomic() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    _ = try await journal.commit(JournalRecord(id: "a", state: "pending", slot: 1, body: "{}"), event("a"))
    await #expect(throws: (any Error).self) {
      // The slot is a's: unique among the living.
      try await journal.commit(JournalRecord(id: "b", state: "pending", slot: 1, body: "{}"), event("b"))
    }
    #expect(try await journal.head() == 1)
    #expect(try await journal.commitDeletion("a", event("a")).sequence == 2)
    #expect(try await journal.records().isEmpty)
  }

  @Test("a damaged journal is refused, not read around") func damaged() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    try Data(repeating: 0x55, count: 8192).write(to: URL(fileURLWithPath: folder + "/j.sqlite"))
    #expect(throws: (any Error).self) { try Journal(path: folder + "/j.sqlite") }
  }
}

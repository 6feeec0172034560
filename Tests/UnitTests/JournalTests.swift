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
      type: "Created", workspace: id, state: "pending", previous: nil, generation: 1, reason: nil, attributes: "{}", wallTime: "t",
      bootNanoseconds: 1, bootID: "b", phases: nil)
  }

  private func entry(_ id: String, slot: Int64) -> Journal.Entry {
    Journal.Entry(event(id), .record(JournalRecord(id: id, state: "pending", slot: slot, body: "{}")))
  }

  @Test("sequences are dense under concurrent commits, and survive reopening") func dense() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    try await withThrowingTaskGroup(of: Void.self) { group in
      for index in 0..<100 {
        let entry = entry("w\(index)", slot: Int64(index))
        group.addTask { _ = try await journal.commit([entry]) }
      }
      try await group.waitForAll()
    }
    #expect(try await journal.page(after: 0, limit: 1000).events.map(\.sequence) == Array(1...100))
    let stream = journal.streamID
    try journal.close()
    let reopened = try Journal(path: folder + "/j.sqlite")
    #expect(reopened.streamID == stream)
    #expect(try await reopened.head() == 100)
    #expect(try await reopened.page(after: 98, limit: 10).events.count == 2)
    #expect(try await reopened.records().count == 100)
  }

  @Test("a record that is refused leaves no event, and no hole in the sequence") func atomic() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    _ = try await journal.commit([entry("a", slot: 1)])
    await #expect(throws: (any Error).self) {
      // The slot is a's: unique among the living.
      try await journal.commit([entry("b", slot: 1)])
    }
    #expect(try await journal.head() == 1)
    #expect(try await journal.commit([Journal.Entry(event("a"), .deletion(of: "a"))]).map(\.sequence) == [2])
    #expect(try await journal.records().isEmpty)
  }

  @Test("entries that are committed together get there in order, or none of them does") func together() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    let written = try await journal.commit([entry("a", slot: 1), Journal.Entry(event("")), entry("b", slot: 2)])
    #expect(written.map(\.sequence) == [1, 2, 3])
    #expect(written.map(\.workspace) == ["a", "", "b"])
    await #expect(throws: (any Error).self) { try await journal.commit([entry("c", slot: 3), entry("d", slot: 1)]) }
    #expect(try await journal.head() == 3)
    #expect(try await journal.records().map(\.id) == ["a", "b"])
  }

  @Test("a damaged journal is set aside whole, and a new stream says what was lost", arguments: ["all", "page", "schema"])
  func damaged(_ how: String) async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let path = folder + "/j.sqlite"
    let journal = try Journal(path: path)
    for index in 0..<200 {
      _ = try await journal.commit([entry("w\(index)", slot: Int64(index))])
    }
    let stream = journal.streamID
    try journal.close()
    var bytes = try Data(contentsOf: URL(fileURLWithPath: path))
    switch how {
    case "all": bytes = Data(repeating: 0x55, count: 8192)
    case "page": bytes.replaceSubrange(8192..<12_288, with: Data(repeating: 0xAA, count: 4096))
    default: bytes.replaceSubrange(0..<16, with: Data(repeating: 0, count: 16))
    }
    try bytes.write(to: URL(fileURLWithPath: path))
    let next = try Journal(path: path)
    #expect(next.streamID != stream)
    #expect(next.loss?.contains("kept as \(path)-damaged-") == true)
    #expect(try await next.head() == 0)
    let kept = try FileManager.default.contentsOfDirectory(atPath: folder).filter {
      $0.contains("damaged") && !$0.hasSuffix("-wal") && !$0.hasSuffix("-shm")
    }
    // Byte for byte, but for what SQLite itself brought into it from its log.
    #expect(kept.count == 1)
    if how != "page" { #expect(try Data(contentsOf: URL(fileURLWithPath: folder + "/" + kept[0])) == bytes) }
    try next.close()
    // It stays said.
    #expect(try Journal(path: path).loss == next.loss)
  }

  @Test("who has heard all before them gets the last events from memory, as they are on disk") func recent() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let journal = try Journal(path: folder + "/j.sqlite")
    for index in 0..<600 { _ = try await journal.commit([entry("w\(index % 3)", slot: Int64(index % 3))]) }
    let reopened = try Journal(path: folder + "/j.sqlite")
    let asked: [(Int64, String?, Int)] = [
      (0, nil, 10), (0, "w1", 1000), (300, nil, 1000), (590, nil, 5), (590, "w2", 100), (597, "w0", 9), (600, nil, 3),
    ]
    for (cursor, workspace, limit) in asked {
      let (here, disk) = (
        try await journal.page(after: cursor, workspace: workspace, limit: limit),
        try await reopened.page(after: cursor, workspace: workspace, limit: limit)
      )
      #expect(here.events == disk.events && here.through == disk.through && here.oldest == disk.oldest, "after \(cursor)")
    }
    #expect(journal.recent.page(after: 590, workspace: nil, limit: 5) != nil)
    #expect(reopened.recent.page(after: 590, workspace: nil, limit: 5) == nil)
    #expect(journal.bytesInUse == reopened.bytesInUse)
    try await journal.trim(through: 595, keeping: 0)
    let page = try await journal.page(after: 590, limit: 100)
    #expect(page.events.map(\.sequence) == Array(596...600) && page.oldest == 596)
    try reopened.close()
    try journal.close()
  }

  @Test("what was acknowledged goes, but the newest; sequences go on") func trimming() async throws {
    let folder = try temporary()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let path = folder + "/j.sqlite"
    let journal = try Journal(path: path)
    for index in 0..<50 {
      _ = try await journal.commit([entry("w\(index)", slot: Int64(index))])
    }
    #expect(try await journal.acknowledged(by: "c") == nil)
    try await journal.acknowledge(30, by: "c")
    try await journal.acknowledge(20, by: "c")
    #expect(try await journal.acknowledged(by: "c") == 30)
    for wrong in [51, -1] as [Int64] { await #expect(throws: JournalError.self) { try await journal.acknowledge(wrong, by: "c") } }
    try await journal.trim(through: 30, keeping: 10)
    #expect(try await journal.page(after: 0, limit: 100).events.map(\.sequence) == Array(31...50))
    try await journal.trim(through: 50, keeping: 10)
    #expect(try await journal.extent().oldest == 41)
    try await journal.trim(through: 50, keeping: 0)
    try journal.close()
    // With no event left, the next one still has the next number.
    let reopened = try Journal(path: path)
    #expect(try await reopened.commit([Journal.Entry(event("x"))]).first?.sequence == 51)
    #expect(try await reopened.extent().oldest == 51)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Journal
internal import Linux
internal import Logging
internal import Workspaces

/// How what happens is made durable.
extension NodeAgent {
  /// A commit that waits for the disk: all its entries, or none.
  struct Commit {
    let entries: [Journal.Entry]
    /// Tried again until the disk takes it: what has happened to a workspace cannot be refused any more, only told late.
    let insists: Bool
    let done: Answer<Void>
  }

  /// The record and its event, in one transaction; then the watchers hear of it. Without `insist`, a disk that is full or fails
  /// is the caller's to tell of.
  func commit(_ managed: Managed, _ type: EventType, _ attributes: [String: String] = [:], insist: Bool = true) async throws {
    let entry = try entry(managed, type, attributes)
    defer { Fault.at("after \(type.rawValue)") }
    try await submit([entry], insist: insist).value
  }

  /// The record as it is now, and its event.
  func entry(_ managed: Managed, _ type: EventType, _ attributes: [String: String] = [:]) throws -> Journal.Entry {
    // What comes late must not bring the record of a deleted workspace back.
    guard workspaces[managed.record.spec.id] === managed else { throw AgentError.noWorkspace(managed.record.spec.id) }
    let event = try event(type, managed.record, after: managed.told, attributes)
    managed.told = managed.record.state
    Fault.at("before \(type.rawValue)")
    return Journal.Entry(event, .record(try managed.record.journalRecord()))
  }

  /// An event of the node itself, with a setting that it is about.
  func tell(_ type: EventType, _ attributes: [String: String], _ change: Journal.Entry.Change = .none) async throws {
    let event = JournalEvent(
      type: type.rawValue, workspace: "", state: "", previous: nil, generation: 0, reason: nil, attributes: try encodedText(attributes),
      wallTime: wallTime(), bootNanoseconds: Clock.boottime, bootID: facts.bootID, phases: nil)
    Fault.at("before \(type.rawValue)")
    defer { Fault.at("after \(type.rawValue)") }
    try await write(Journal.Entry(event, change), insist: false)
  }

  func event(
    _ type: EventType, _ record: WorkspaceRecord, after previous: WorkspaceState?, _ attributes: [String: String] = [:]
  ) throws -> JournalEvent {
    let phases = [.ready, .stopped, .failed].contains(type) && !record.phases.isEmpty ? record.phases : nil
    return JournalEvent(
      type: type.rawValue, workspace: record.spec.id, state: record.state.rawValue, previous: previous?.rawValue,
      generation: Int64(record.attempt), reason: try record.reason.map { try encodedText($0) },
      attributes: try encodedText(attributes), wallTime: wallTime(),
      bootNanoseconds: Clock.boottime, bootID: facts.bootID,
      phases: try phases.map { try encodedText($0) })
  }

  func write(_ entry: Journal.Entry, insist: Bool) async throws { try await submit([entry], insist: insist).value }

  /// Answers when the entries are on disk. They get there in the order in which they are submitted; those that come while the
  /// disk is busy share the next transaction, and with it the fsync, which is what a commit costs.
  func submit(_ entries: [Journal.Entry], insist: Bool) -> Answer<Void> {
    let done = Answer<Void>()
    waiting.append(Commit(entries: entries, insists: insist, done: done))
    if !isCommitting {
      isCommitting = true
      Task { await commitWaiting() }
    }
    return done
  }

  private func commitWaiting() async {
    while !waiting.isEmpty {
      let together = waiting
      waiting = []
      do {
        try await put(together.flatMap(\.entries))
        for commit in together { commit.done.give(.success(())) }
      } catch {
        // Whoever may be refused is refused alone.
        for commit in together { await commitAlone(commit) }
      }
    }
    isCommitting = false
  }

  private func commitAlone(_ commit: Commit) async {
    while true {
      do {
        try await put(commit.entries)
        return commit.done.give(.success(()))
      } catch {
        guard commit.insists else { return commit.done.give(.failure(error)) }
        logger.critical("journal does not take an event; trying again", metadata: ["error": "\(error)"])
        try? await Task.sleep(for: .seconds(1))
      }
    }
  }

  private func put(_ entries: [Journal.Entry]) async throws {
    do {
      _ = try await journal.commit(entries)
    } catch  where Journal.isFatal(error) {
      logger.critical("the journal's disk failed; ending, for a new start to read what is there", metadata: ["error": "\(error)"])
      exit(1)
    }
    feed.announce()
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Journal
internal import Linux
internal import Logging
internal import Synchronization

/// The component that makes events and records durable.
protocol EventSink: Sendable {
  /// Returns a promise that is fulfilled when the entries are on disk: all of them, or none. They are written in the order of submission.
  /// `retriesUntilDurable`: retried until the disk accepts them, because what has happened to a workspace cannot be refused, only reported late.
  func submit(_ entries: [Journal.Entry], retriesUntilDurable: Bool) -> Promise<Void>
}

/// Commits to the journal. Entries that arrive while the disk is busy share the next transaction, and with it the fsync, which is the cost
/// of a commit.
final class JournalSink: EventSink {
  private struct Commit: Sendable {
    let entries: [Journal.Entry]
    let retriesUntilDurable: Bool
    let done: Promise<Void>
  }

  private let journal: Journal
  private let feed: EventFeed
  private let logger: Logger
  private struct State {
    var waiting: [Commit] = []
    /// The number of commits in progress, and when they began.
    var committing = 0
    var since: ContinuousClock.Instant?
  }

  private let state = Mutex(State())
  /// Above this number of waiting commits, those that may be refused are refused.
  private static let limit = 10_000
  private let wakes: AsyncStream<Void>
  private let wake: AsyncStream<Void>.Continuation
  /// Fails when the journal cannot be trusted any more.
  private let failure = Promise<Void>()

  init(_ journal: Journal, _ feed: EventFeed, _ logger: Logger) {
    self.journal = journal
    self.feed = feed
    self.logger = logger
    (wakes, wake) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
  }

  /// The number of commits that wait for the disk, and for how long, in seconds. Nil if none has waited for more than 2 s.
  var congestion: (commits: Int, seconds: Int64)? {
    state.withLock { state in
      guard let since = state.since, since.duration(to: .now) > .seconds(2) else { return nil }
      return (state.committing + state.waiting.count, since.duration(to: .now).components.seconds)
    }
  }

  /// Throws when the journal's disk has failed.
  func untilFailure() async throws { try await failure.value }

  func submit(_ entries: [Journal.Entry], retriesUntilDurable: Bool) -> Promise<Void> {
    let commit = Commit(entries: entries, retriesUntilDurable: retriesUntilDurable, done: Promise())
    let isTaken = state.withLock { state in
      guard retriesUntilDurable || state.waiting.count < JournalSink.limit else { return false }
      state.waiting.append(commit)
      return true
    }
    if isTaken { wake.yield() } else { commit.done.fulfil(.failure(LaneError.full(lane: "journal", queued: JournalSink.limit))) }
    return commit.done
  }

  /// Commits until the task is cancelled, and then what was submitted by then. Throws if the journal's disk failed: only a new process,
  /// which reads the file again, knows what is in it.
  func run() async throws {
    for await _ in wakes { try await commitWaiting() }
    try await commitWaiting()
  }

  private func commitWaiting() async throws {
    while true {
      let together = state.withLock { state in
        defer { state.waiting = [] }
        (state.committing, state.since) = (state.waiting.count, state.waiting.isEmpty ? nil : .now)
        return state.waiting
      }
      if together.isEmpty { return }
      try await commit(together)
    }
  }

  private func commit(_ together: [Commit]) async throws {
    do {
      try await put(together.flatMap(\.entries))
      for commit in together { commit.done.fulfil(.success(())) }
    } catch let error as JournalFailed {
      throw error
    } catch {
      // Each commit is retried alone, so that only the one at fault is refused.
      for commit in together { try await commitAlone(commit) }
    }
  }

  private func commitAlone(_ commit: Commit) async throws {
    while true {
      do {
        try await put(commit.entries)
        return commit.done.fulfil(.success(()))
      } catch let error as JournalFailed {
        throw error
      } catch {
        guard commit.retriesUntilDurable else { return commit.done.fulfil(.failure(error)) }
        logger.critical("cannot write an event to the journal; retrying", metadata: ["error": "\(error)"])
        try await Task.sleep(for: .seconds(1))
      }
    }
  }

  private func put(_ entries: [Journal.Entry]) async throws {
    do {
      // The end of the agent cancels the tasks that wait for this, not the write itself.
      _ = try await uncancelled { [journal] in try await journal.commit(entries) }
    } catch  where Journal.isFatal(error) {
      logger.critical("the journal's disk failed; the agent ends, for a new start to read what is there", metadata: ["error": "\(error)"])
      failure.fulfil(.failure(JournalFailed()))
      throw JournalFailed()
    }
    feed.announce()
  }
}

/// A failure of the journal's disk during a commit.
package struct JournalFailed: Error, CustomStringConvertible {
  package let description = "the journal's disk failed"
}

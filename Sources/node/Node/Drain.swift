// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Foundation
internal import Journal
internal import Linux
internal import Logging
internal import Workspaces

/// That the node takes no new workspaces. Kept over restarts until somebody ends it.
package struct Drain: Codable, Equatable, Sendable {
  package let by: String
  package let began: String
  /// When what still runs is stopped, in nanoseconds since the boot `bootID`; nil: never.
  let deadline: Int64?
  let bootID: String
}

extension Node {
  static let drainSetting = "drain"

  /// Refuses launches from now on. With `seconds`, what runs gets SIGTERM now and SIGKILL when they are over. Returns how
  /// many run.
  package func drain(seconds: UInt32?, by: String) async throws -> Int {
    let drain = Drain(
      by: by, began: wallTime(), deadline: seconds.map { Clock.boottime + Int64($0) * 1_000_000_000 }, bootID: facts.bootID)
    let text = try encodedText(drain)
    var attributes = ["by": by]
    if let seconds { attributes["deadlineSeconds"] = "\(seconds)" }
    // In memory first: a launch that comes while this is written is refused too.
    let before = self.drain
    self.drain = drain
    do {
      try await services.recordWhateverHappens(.drainBegan, attributes, .setting(Node.drainSetting, to: text))
    } catch {
      self.drain = before
      throw error
    }
    logger.notice("draining", metadata: ["by": "\(by)", "deadline": "\(seconds.map { "\($0) s" } ?? "none")"])
    for workspace in workspaces.values { await workspace.drain() }
    evict()
    return workspaces.values.count { !$0.record.state.isTerminal }
  }

  package func uncordon(by: String) async throws {
    guard drain != nil else { return }
    try await services.recordWhateverHappens(.drainEnded, ["by": by], .setting(Node.drainSetting, to: nil))
    drain = nil
    for workspace in workspaces.values { await workspace.undrain() }
    logger.notice("no longer draining", metadata: ["by": "\(by)"])
  }

  /// Stops what runs, by the drain's deadline; also when an agent comes back in the middle of one.
  func evict() {
    guard let drain, let deadline = drain.deadline else { return }
    let left = drain.bootID == facts.bootID ? max(0, deadline - Clock.boottime + 999_999_999) / 1_000_000_000 : 0
    for workspace in workspaces.values where !workspace.record.state.isTerminal {
      let reason = Reason(.drained, "the node is being drained by \(drain.by)")
      let id = workspace.id
      begin { _ = try? await self.stop(id, grace: UInt32(clamping: left), by: drain.by, verdict: reason) }
    }
  }

  // ----------------------------------------------------------------- retention

  /// Takes an acknowledgement of a caller that pulls, where no controller is configured to do that.
  package func acknowledge(_ sequence: Int64) async throws {
    if let owner = configuration.owner {
      throw AgentError(.failedPrecondition, "the controller \(owner.name) acknowledges this node's events")
    }
    try await acknowledge(sequence, by: Configuration.puller)
  }

  package nonisolated func acknowledge(_ sequence: Int64, by controller: String) async throws {
    do {
      try await journal.acknowledge(sequence, by: controller)
    } catch let error as JournalError {
      throw AgentError(.outOfRange, "sequence: \(error)")
    }
    Fault.at(.acknowledged)
    trimming.yield()
  }

  /// Not for every acknowledgement: each trim is a transaction of its own.
  func trimWhenAcknowledged() async {
    for await _ in trims {
      guard (try? await Task.sleep(for: .milliseconds(200))) != nil else { return }
      do { try await trim() } catch { logger.error("the journal cannot be trimmed", metadata: ["error": "\(error)"]) }
    }
  }

  /// What may go, goes: what the owner of the acknowledgement has; where nobody owns it and the limit is near, the oldest.
  func trim() async throws {
    let kept = Int64(configuration.journalKeep)
    if let acknowledged = try await journal.acknowledged(by: configuration.acknowledger) {
      try await journal.trim(through: acknowledged, keeping: kept)
    }
    Fault.at(.trimmed)
    guard configuration.owner == nil else { return }
    let extent = try await journal.extent()
    guard extent.bytes > journalRoom else { return }
    logger.warning("the journal has reached its limit and nobody acknowledges: the older half of its events goes")
    try await journal.trim(through: extent.oldest + (extent.head - extent.oldest) / 2, keeping: kept)
  }

  /// What may be used before launches are refused: a tenth is reserved for ends and deletions, which cannot be refused.
  nonisolated var journalRoom: UInt64 { (Quantity.whole(configuration.journalLimit) ?? 0) / 10 * 9 }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Configuration
internal import Foundation
internal import Journal
internal import Linux
internal import Logging
internal import Workspaces

/// A drain of the node, which accepts no launches. It persists across restarts until the node is uncordoned.
package struct Drain: Codable, Equatable, Sendable {
  package let by: String
  package let began: String
  /// The time at which what still runs is killed, in nanoseconds since the boot `bootID`; nil: never.
  let deadline: Int64?
  let bootID: String
}

extension Node {
  static let drainSetting = "drain"

  /// Refuses launches from now on. With `seconds`, what runs gets SIGTERM now and SIGKILL after that time. Returns the number of workspaces
  /// that have not ended.
  package func drain(seconds: UInt32?, by: String) async throws -> Int {
    try await whileDrainIsHeld { try await self.beginDrain(seconds, by) }
  }

  /// Serializes changes of the drain, so that the drain in memory and the one on disk are the same.
  private nonisolated func whileDrainIsHeld<T: Sendable>(_ body: @Sendable () async throws -> T) async throws -> T {
    try await draining.whileHeld(
      within: .seconds(30), else: AgentError(.unavailable, "drain: another change of it is in progress; retry"), body)
  }

  private func beginDrain(_ seconds: UInt32?, _ by: String) async throws -> Int {
    let drain = Drain(
      by: by, began: wallTime(), deadline: seconds.map { Clock.boottime + Int64($0) * 1_000_000_000 }, bootID: facts.bootID)
    let text = try encodedText(drain)
    var attributes = ["by": by]
    if let seconds { attributes["deadlineSeconds"] = "\(seconds)" }
    // The drain is set in memory first, so that launches are refused while it is written.
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

  package func uncordon(by: String) async throws { try await whileDrainIsHeld { try await self.endDrain(by) } }

  private func endDrain(_ by: String) async throws {
    guard drain != nil else { return }
    try await services.recordWhateverHappens(.drainEnded, ["by": by], .setting(Node.drainSetting, to: nil))
    drain = nil
    for workspace in workspaces.values { await workspace.undrain() }
    logger.notice("no longer draining", metadata: ["by": "\(by)"])
  }

  /// Stops what runs, by the drain's deadline; also after a restart of the agent during a drain.
  func evict() {
    guard let drain, let deadline = drain.deadline else { return }
    let left = drain.bootID == facts.bootID ? max(0, deadline - Clock.boottime + 999_999_999) / 1_000_000_000 : 0
    for workspace in workspaces.values where !workspace.record.state.isTerminal {
      let reason = Reason(.drained, "the node is being drained by \(drain.by)")
      let id = workspace.id
      begin { _ = try? await self.stop(id, grace: UInt32(clamping: left), by: drain.by, reason: reason) }
    }
  }

  // ----------------------------------------------------------------- retention

  /// Records the acknowledgement of a caller that pulls events. Refused if a controller is configured to acknowledge.
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

  /// Trims at most every 200 ms, because each trim is a transaction of its own.
  func trimWhenAcknowledged() async {
    for await _ in trims {
      guard (try? await Task.sleep(for: .milliseconds(200))) != nil else { return }
      do { try await trim() } catch { logger.error("cannot trim the journal", metadata: ["error": "\(error)"]) }
    }
  }

  /// Removes events that the owner of the acknowledgement has; without an owner, over the limit, also the older half.
  func trim() async throws {
    let kept = Int64(configuration.journalKeep)
    if let acknowledged = try await journal.acknowledged(by: configuration.acknowledger) {
      try await journal.trim(through: acknowledged, keeping: kept)
    }
    Fault.at(.trimmed)
    guard configuration.owner == nil else { return }
    let extent = try await journal.extent()
    guard extent.bytes > journalRoom else { return }
    logger.warning("the journal reached its limit without an acknowledgement; removing the older half of the events")
    try await journal.trim(through: extent.oldest + (extent.head - extent.oldest) / 2, keeping: kept)
  }

  /// The journal size up to which launches are accepted: a tenth is reserved for ends and deletions, which cannot be refused.
  nonisolated var journalRoom: UInt64 { (Quantity.whole(configuration.journalLimit) ?? 0) / 10 * 9 }
}

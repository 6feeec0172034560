// SPDX-License-Identifier: Apache-2.0

/// Measures the phases of a start.
struct PhaseTimer: Sendable {
  private var last = ContinuousClock.now

  /// Ends the current phase and returns it.
  mutating func finish(_ name: String) -> WorkspaceRecord.Phase {
    let now = ContinuousClock.now
    let elapsed = last.duration(to: now).components
    last = now
    return WorkspaceRecord.Phase(name: name, milliseconds: Double(elapsed.seconds) * 1000 + Double(elapsed.attoseconds) / 1e15)
  }
}

// SPDX-License-Identifier: Apache-2.0

/// What follows the end of an attempt, as a function without effects.
package enum Aftermath: Equatable, Sendable {
  /// It stays as it is.
  case none
  /// Another attempt without what was set aside of the home.
  case rescue
  /// Another attempt by the restart policy, after so many seconds.
  case restart(afterSeconds: UInt32)

  /// What is to be known for the decision.
  package struct Facts: Equatable, Sendable {
    package var isStopRequested = false
    package var isDraining = false
    package var needsSecrets = false
    package var isRescuePending = false
    package var policy = WorkspaceSpec.RestartPolicy.never
    /// Attempts in a row that ended soon after they had begun.
    package var quickEnds: UInt32 = 0
    package init() {}
  }

  /// An attempt that lasted so long was no loop.
  package static let settledSeconds: Int64 = 600

  package static func decide(_ state: WorkspaceState, _ reason: Reason?, _ facts: Facts) -> Aftermath {
    guard state.isTerminal, let reason, !facts.isStopRequested, !facts.isDraining else { return .none }
    if facts.isRescuePending { return .rescue }
    // Credentials, and the key of a home, came with the request and are not kept: such a workspace needs a new launch.
    guard !facts.needsSecrets, reason.code != .lifetime else { return .none }
    switch facts.policy {
    case .never: return .none
    case .onFailure where reason.code == .exited && reason.exitCode == 0: return .none
    case .always, .onFailure: return .restart(afterSeconds: delay(facts.quickEnds))
    }
  }

  /// None at first, then doubling from a second to five minutes.
  static func delay(_ quickEnds: UInt32) -> UInt32 { min(300, (1 << min(quickEnds, 10)) >> 1) }
}

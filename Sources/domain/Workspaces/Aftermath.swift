// SPDX-License-Identifier: Apache-2.0

/// The decision on what follows the end of an attempt, as a pure function.
package enum Aftermath: Equatable, Sendable {
  /// Nothing follows.
  case none
  /// Another attempt, without the files of the home that a rescue has set aside.
  case rescue
  /// Another attempt after a delay, as the restart policy requires.
  case restart(afterSeconds: UInt32)

  /// The input of the decision.
  package struct Facts: Equatable, Sendable {
    package var isStopRequested = false
    package var isDraining = false
    package var needsSecrets = false
    package var isRescuePending = false
    package var policy = WorkspaceSpec.RestartPolicy.never
    /// The number of consecutive attempts that ended within `settledSeconds`.
    package var quickEnds: UInt32 = 0
    package init() {}
  }

  /// An attempt that lasted longer than this is not part of a restart loop.
  package static let settledSeconds: Int64 = 600

  package static func decide(_ state: WorkspaceState, _ reason: Reason?, _ facts: Facts) -> Aftermath {
    guard state.isTerminal, let reason, !facts.isStopRequested, !facts.isDraining else { return .none }
    if facts.isRescuePending { return .rescue }
    // Credentials and the key of a home are part of the request and are not stored: such a workspace needs a new launch.
    guard !facts.needsSecrets, reason.code != .lifetime else { return .none }
    switch facts.policy {
    case .never: return .none
    case .onFailure where reason.code == .exited && reason.exitCode == 0: return .none
    case .always, .onFailure: return .restart(afterSeconds: delay(facts.quickEnds))
    }
  }

  /// Returns the delay in seconds: 0 after an attempt that lasted, then doubled from 1 s to 5 min.
  static func delay(_ quickEnds: UInt32) -> UInt32 { min(300, (1 << min(quickEnds, 10)) >> 1) }
}

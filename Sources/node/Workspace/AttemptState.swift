// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import ShimProtocol
internal import Workspaces

/// The state of one attempt that lives only in this process.
struct AttemptState {
  var clock = PhaseTimer()
  /// The streams of the features that read the supervisor's reports, by the feature's name.
  var reports: [String: AsyncStream<ShimReport>.Continuation] = [:]
  /// The end of the grace period, at which the tool is killed, in nanoseconds since boot; nil while there is none.
  var killAt: Int64?
  var isKilling = false
  /// The names of the features that are ending what has expired.
  var expiring: Set<String> = []
  /// Cancels the preparation of the attempt while it is in progress, for a stop.
  var cancelPreparation: (@Sendable () -> Void)?
  /// The end of the tool as its supervisor reported it.
  var reported: ExitRecord?
  /// The reason for which the start failed.
  var failure: Reason?
  // The progress of the sandbox as this agent has followed it.
  var isConnected = false
  var isConnecting = false
  var isWaiting = false
  var isReleased = false
  var isRunning = false
  var isOver = false
  /// The pause before the next attempt; fulfilling it ends the pause.
  var pause: Promise<Void>?
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import ShimProtocol

/// What lives as long as one attempt in this process.
struct AttemptState {
  var clock = PhaseTimer()
  /// Where the features that read them get the supervisor's reports.
  var reports: [AsyncStream<ShimReport>.Continuation] = []
  /// Who ends the tool when its grace period is over, by the time it is given.
  var graces: AsyncStream<Duration>.Continuation?
  /// What makes the attempt ready, as long as it does: a stop cancels it.
  var cancelPreparation: (@Sendable () -> Void)?
  /// How the tool ended, as its supervisor reported it.
  var reported: ExitRecord?
  /// Ends the pause before the next attempt.
  var pause: Promise<Void>?
}

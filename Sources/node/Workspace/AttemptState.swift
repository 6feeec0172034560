// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import ShimProtocol

/// The state of one attempt that lives only in this process.
struct AttemptState {
  var clock = PhaseTimer()
  /// The streams of the features that read the supervisor's reports.
  var reports: [AsyncStream<ShimReport>.Continuation] = []
  /// The grace periods; the tool is killed when one of them is over.
  var graces: AsyncStream<Duration>.Continuation?
  /// Cancels the preparation of the attempt while it is in progress, for a stop.
  var cancelPreparation: (@Sendable () -> Void)?
  /// The end of the tool as its supervisor reported it.
  var reported: ExitRecord?
  /// The pause before the next attempt; fulfilling it ends the pause.
  var pause: Promise<Void>?
}

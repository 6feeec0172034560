// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Cgroups
internal import Linux
package import ShimProtocol
internal import Volumes
internal import ShimClient
internal import Workspaces

/// The facts about the end of an attempt, combined once and stored with its last event. Pure.
struct StopSummary {
  let record: WorkspaceRecord
  let exit: ExitRecord?
  /// The reason for which the agent gave up the start, if it did.
  let failure: Reason?
  let usage: Usage
  let bootID: String

  /// Whether the attempt is a failed start: it ended before the tool was up, and not because the tool itself ended.
  var isFailedStart: Bool {
    guard record.state == .preparing || record.state == .pending else { return record.stopReason?.code == .readinessTimeout }
    switch exit {
    case .failed?: return true
    // The tool's exit status is known, and takes precedence over steps that the agent did not reach.
    case .ended(.exited)?: return false
    case .ended(.signalled)?, nil: return failure != nil
    }
  }

  var reason: Reason {
    if isFailedStart, record.state == .preparing || record.state == .pending {
      // A failure in the supervisor comes first; the agent then fails to hand over, which is only the consequence.
      if case .failed(let step)? = exit { return Reason(step) }
      if let failure { return failure }
    }
    if let stopReason = record.stopReason, stopReason.code == .readinessTimeout { return stopReason }
    return end
  }

  private var end: Reason {
    var reason = cause
    if usage.outOfMemoryKills > record.outOfMemoryKills, reason.signal == 9 || reason.exitCode == 137 {
      reason.code = .outOfMemory
      reason.message =
        "the tool was OOM-killed: memory limit \(Quantity.describe(bytes: record.amounts.memoryBytes)), peak \(Quantity.describe(bytes: usage.memoryPeakBytes))"
    }
    if reason.code != .lost, reason.code != .unknown {
      reason.memoryLimitBytes = record.amounts.memoryBytes
      reason.memoryPeakBytes = usage.memoryPeakBytes
    }
    if let stopReason = record.stopReason {
      reason.code = stopReason.code
      reason.message = stopReason.message
    } else if let by = record.stopRequestedBy, reason.code != .lost {
      reason.code = .requested
      reason.message = record.startedNanoseconds == nil ? "stopped by \(by) before the tool started" : "stopped by \(by)"
    }
    return reason
  }

  private var cause: Reason {
    switch exit {
    case .ended(.exited(let code))?: return Reason(.exited, "the tool ended with status \(code)", exitCode: code)
    case .ended(.signalled(let signal))?: return Reason(.signalled, "the tool was killed by signal \(signal)", signal: signal)
    case .failed(let step)?: return Reason(step)
    case nil:
      if let failure { return failure }
      return record.bootID == bootID
        ? Reason(.unknown, "the supervisor exited without an exit record; the exit status of the tool is unknown")
        : Reason(.lost, "the host was rebooted while the workspace ran")
    }
  }

  /// Returns the reason with the fields that every end has.
  static func complete(_ reason: Reason, of record: WorkspaceRecord, bootID: String, logTail: [String]?) -> Reason {
    var reason = reason
    reason.stoppedBy = record.stopRequestedBy
    // The clock of another boot cannot tell how long the tool ran.
    if let started = record.startedNanoseconds, record.bootID == bootID, Clock.boottime > started {
      reason.ranMilliseconds = UInt64((Clock.boottime - started) / 1_000_000)
    }
    reason.logTail = logTail?.map { printable($0, limit: 400) }
    reason.advice = advice(reason)
    return reason
  }

  /// Returns one sentence on what to do, which a control panel can show to an analyst.
  private static func advice(_ reason: Reason) -> String {
    switch reason.code {
    case .exited:
      reason.exitCode == 0 ? "Nothing: it ended as a program does." : "See its last lines; start it again when the cause is fixed."
    case .signalled: "Unless it was killed on purpose, see its last lines; then start it again."
    case .outOfMemory: "Process less data at a time, or request more memory; saved files are in the home."
    case .requested, .lifetime, .drained: "Start it again when it is needed; what was saved is in the home."
    case .lost: "Start it again; what was saved is in the home."
    case .unknown: "Start it again; if it happens again, a platform engineer should check the host's log."
    case .imageNotFound: "Import the image on this host, or choose one of `carrel image ls`."
    case .storage:
      "A platform engineer should check the path that is named: whether it exists, who owns it, and whether its disk is full."
    case .network, .limits, .isolation: "A platform engineer should check this host; the message names what it refused."
    case .executable: "Choose an image that has the program, or name another command."
    case .readinessTimeout:
      "See its last lines: the tool did not come up; its own configuration in the home may be the cause."
    case .internal, .credentialsLost: "Launch it again."
    }
  }
}

/// Describes a failed step in a sentence, and distinguishes the causes that an analyst can do something about.
package func explain(_ failure: StepFailure) -> String {
  let why: String =
    switch Errno(failure.errno) {
    case .noEntry where failure.kind == .interpreter: "the file exists, but the interpreter that it names does not"
    case .noEntry where failure.kind == .execution: "there is no such program in the image"
    case .access where failure.kind == .execution: "it is not executable"
    case .invalid where failure.kind == .bind:
      "workspaces need id-mapped mounts, which its file system (\(HostDirectory.fileSystem(of: failure.subject))) has not"
    case .notExecutable: "not built for this machine's architecture"
    default: Errno(failure.errno).sentence
    }
  return "\(failure.step): \(why)"
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Cgroups
internal import Linux
package import ShimProtocol
internal import Volumes
internal import ShimClient
internal import Workspaces

/// What is known of the end of an attempt, put together once and kept with its last event. Pure.
struct StopSummary {
  let record: WorkspaceRecord
  let exit: ExitRecord?
  /// Why the agent gave the start up, if it did.
  let failure: Reason?
  let usage: Usage
  let bootID: String

  /// Whether the attempt ended before the tool was up, and that is all there is to say.
  var isFailedStart: Bool {
    guard record.state == .preparing || record.state == .pending else { return record.verdict?.code == .readinessTimeout }
    switch exit {
    case .failed?: return true
    // How the tool ended is known, and nothing that the agent did not come to is in its place.
    case .ended(.exited)?: return false
    case .ended(.signalled)?, nil: return failure != nil
    }
  }

  var reason: Reason {
    if isFailedStart, record.state == .preparing || record.state == .pending {
      // What failed in the supervisor came first: the agent then cannot hand over, and says so too.
      if case .failed(let step)? = exit { return Reason(step) }
      if let failure { return failure }
    }
    if let verdict = record.verdict, verdict.code == .readinessTimeout { return verdict }
    return end
  }

  private var end: Reason {
    var reason = cause
    if usage.outOfMemoryKills > record.outOfMemoryKills, reason.signal == 9 || reason.exitCode == 137 {
      reason.code = .outOfMemory
      reason.message =
        "out of memory: the tool needed more than its limit of \(Quantity.describe(bytes: record.amounts.memoryBytes)); peak \(Quantity.describe(bytes: usage.memoryPeakBytes))"
    }
    if reason.code != .lost, reason.code != .unknown {
      reason.memoryLimitBytes = record.amounts.memoryBytes
      reason.memoryPeakBytes = usage.memoryPeakBytes
    }
    if let verdict = record.verdict {
      reason.code = verdict.code
      reason.message = verdict.message
    } else if let by = record.stopRequestedBy, reason.code != .lost {
      reason.code = .requested
      reason.message = record.startedNanoseconds == nil ? "stopped by \(by) before it was started" : "stopped by \(by)"
    }
    return reason
  }

  private var cause: Reason {
    switch exit {
    case .ended(.exited(let code))?: return Reason(.exited, "the tool ended with status \(code)", exitCode: code)
    case .ended(.signalled(let signal))?: return Reason(.signalled, "the tool was ended by signal \(signal)", signal: signal)
    case .failed(let step)?: return Reason(step)
    case nil:
      if let failure { return failure }
      return record.bootID == bootID
        ? Reason(.unknown, "the supervisor ended without a record; how the tool ended is not known")
        : Reason(.lost, "the host was rebooted")
    }
  }

  /// The reason with what is common to all ends.
  static func complete(_ reason: Reason, of record: WorkspaceRecord, bootID: String, logTail: [String]?) -> Reason {
    var reason = reason
    reason.stoppedBy = record.stopRequestedBy
    // The clock of another boot says nothing of how long it ran.
    if let started = record.startedNanoseconds, record.bootID == bootID, Clock.boottime > started {
      reason.ranMilliseconds = UInt64((Clock.boottime - started) / 1_000_000)
    }
    reason.logTail = logTail?.map { printable($0, limit: 400) }
    reason.advice = advice(reason)
    return reason
  }

  /// One sentence on what to do, that a control plane can show to an analyst.
  private static func advice(_ reason: Reason) -> String {
    switch reason.code {
    case .exited:
      reason.exitCode == 0 ? "Nothing: it ended as a program does." : "See its last lines; start it again when the cause is mended."
    case .signalled: "If nobody ended it on purpose, its last lines may say more; start it again."
    case .outOfMemory: "Work on less data at a time, or ask for more memory; what was saved is in the home."
    case .requested, .lifetime, .drained: "Start it again when it is needed; what was saved is in the home."
    case .lost: "Start it again; what was saved is in the home."
    case .unknown: "Start it again; if it happens twice, a platform engineer should look at the host's log."
    case .imageNotFound: "Import the image on this host, or choose one of `carrel image ls`."
    case .storage:
      "A platform engineer should look at the path that is named: whether it is there, whose it is, and whether its disk is full."
    case .network, .limits, .isolation: "A platform engineer should look at this host: what it refused is named."
    case .executable: "Choose an image that has the program, or name another command."
    case .readinessTimeout:
      "See its last lines: the tool did not come up; its own configuration in the home may be the cause."
    case .internal, .credentialsLost: "Launch it again."
    }
  }
}

/// A failed step as a sentence, with the causes told apart that an analyst can do something about.
package func explain(_ failure: StepFailure) -> String {
  let why: String =
    switch Errno(failure.errno) {
    case .noEntry where failure.step.hasPrefix("find the interpreter"): "the file is there, the interpreter that it names is not"
    case .noEntry where failure.step.hasPrefix("execute"): "there is no such program in the image"
    case .access where failure.step.hasPrefix("execute"): "it is not executable"
    case .invalid where failure.step.hasPrefix("bind "):
      "workspaces need id-mapped mounts, which its file system (\(HostDirectory.fileSystem(of: source(of: failure.step)))) has not"
    case .notExecutable: "it is no program for this machine's architecture"
    default: Errno(failure.errno).sentence
    }
  return "\(failure.step): \(why)"
}

/// The source in "bind SOURCE at TARGET".
private func source(of step: String) -> String { step.dropFirst(5).components(separatedBy: " at ").first ?? "" }

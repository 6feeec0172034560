// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Limits
internal import Linux
package import Sandbox
internal import Storage
internal import Supervision
internal import Workspaces

/// What is known of the end of an attempt, put together once and kept with its last event. Pure.
struct StopCertificate {
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
    case .exitedEarly, .readinessTimeout:
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
      "workspaces need id-mapped mounts, which its file system (\(HostFolder.fileSystem(of: source(of: failure.step)))) has not"
    case .notExecutable: "it is no program for this machine's architecture"
    default: Errno(failure.errno).sentence
    }
  return "\(failure.step): \(why)"
}

/// The source in "bind SOURCE at TARGET".
private func source(of step: String) -> String { step.dropFirst(5).components(separatedBy: " at ").first ?? "" }

/// The kernel's log, as far as it tells of processes that were ended for want of memory.
enum KernelLog {
  /// The last such process of this cgroup or one below it, in a record after that one, with its record's number; nil where the log
  /// cannot be read or does not tell. The kernel leaves some out when there are many.
  static func killed(in cgroup: String, after seen: UInt64) -> (process: Reason.KilledProcess, record: UInt64)? {
    guard let file = try? Descriptor.open("/dev/kmsg", [.readOnly, .nonBlocking]) else { return nil }
    var found: (Reason.KilledProcess, UInt64)?
    var pid: Int32?
    while true {
      let line: String
      do throws(Errno) {
        line = String(decoding: try file.read(upTo: 8192), as: UTF8.self)
      } catch {
        // EPIPE: records were overwritten while this read; the next read goes on behind them. EAGAIN: the end.
        if error.code == 32 { continue }
        return found
      }
      // "priority,number,microseconds,flags;text" (Documentation/ABI/testing/dev-kmsg).
      guard let record = line.split(separator: ",").dropFirst().first.flatMap({ UInt64($0) }), record > seen else { continue }
      if let victim = victim(line, cgroup) { pid = victim }
      if let pid, let process = process(line, pid) { found = (process, record) }
    }
  }

  /// "oom-kill:constraint=CONSTRAINT_MEMCG,…,task_memcg=/carrel/x,task=python,pid=7,uid=1000"
  static func victim(_ line: String, _ cgroup: String) -> Int32? {
    guard line.contains("oom-kill:"), let path = field("task_memcg=", line, until: ","),
      path == "/" + cgroup || path.hasPrefix("/\(cgroup)/")
    else { return nil }
    return field(",pid=", line, until: ",").flatMap { Int32($0) }
  }

  /// "Memory cgroup out of memory: Killed process 7 (python) total-vm:1kB, anon-rss:2kB, file-rss:3kB, shmem-rss:4kB, …"
  static func process(_ line: String, _ pid: Int32) -> Reason.KilledProcess? {
    guard let start = line.range(of: "Killed process \(pid) ("), let end = line.range(of: ") total-vm:") else { return nil }
    guard start.upperBound <= end.lowerBound else { return nil }
    let resident = ["anon-rss:", "file-rss:", "shmem-rss:"].compactMap { field($0, line, until: "kB").flatMap { UInt64($0) } }
    return Reason.KilledProcess(
      pid: pid, name: printable(String(line[start.upperBound..<end.lowerBound])), residentBytes: resident.reduce(0, +) * 1024)
  }

  private static func field(_ name: String, _ line: String, until end: String) -> String? {
    guard let start = line.range(of: name)?.upperBound else { return nil }
    let rest = line[start...]
    let stop = rest.range(of: end)?.lowerBound ?? rest.firstIndex(of: "\n") ?? rest.endIndex
    return String(rest[..<stop]).trimmingCharacters(in: .newlines)
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The kernel's log, as far as it reports processes that were OOM-killed.
package enum KernelLog {
  package struct OOMKill: Equatable, Sendable {
    /// As the host numbers it.
    package let pid: Int32
    package let name: String
    /// The resident memory that it had: anonymous, of files, and shared.
    package let residentBytes: UInt64
    /// The number of the record in the log.
    package let record: UInt64
  }

  /// The last process of this cgroup or one below it that was OOM-killed in a record after `seen`; nil where the log cannot be read or
  /// has none. The kernel leaves some out when there are many.
  package static func lastKill(in cgroup: String, after seen: UInt64) -> OOMKill? {
    do throws(Errno) {
      let file = try Descriptor.open("/dev/kmsg", [.readOnly, .nonBlocking])
      var scan = Scan(cgroup: cgroup, seen: seen)
      while true {
        do throws(Errno) {
          scan.read(String(decoding: try file.read(upTo: 8192), as: UTF8.self))
        } catch {
          // EPIPE: records were overwritten during the read; the next read goes on behind them. EAGAIN: the end.
          if error != .brokenPipe { return scan.found }
        }
      }
    } catch {
      return nil
    }
  }

  /// What was found in the records so far.
  package struct Scan {
    private let cgroup: String
    private let seen: UInt64
    private var victim: Int32?
    package private(set) var found: OOMKill?

    package init(cgroup: String, seen: UInt64) {
      self.cgroup = cgroup
      self.seen = seen
    }

    /// One record: "priority,number,microseconds,flags;text" (Documentation/ABI/testing/dev-kmsg).
    package mutating func read(_ line: String) {
      guard let record = line.split(separator: ",").dropFirst().first.flatMap({ UInt64($0) }), record > seen else { return }
      if let pid = Scan.victim(line, cgroup) { victim = pid }
      if let victim, let kill = Scan.kill(line, victim, record) { found = kill }
    }

    /// "oom-kill:constraint=CONSTRAINT_MEMCG,…,task_memcg=/carrel/x,task=python,pid=7,uid=1000"
    private static func victim(_ line: String, _ cgroup: String) -> Int32? {
      guard line.firstRange(of: "oom-kill:") != nil, let path = field("task_memcg=", line, until: ","),
        path == "/" + cgroup || path.hasPrefix("/\(cgroup)/")
      else { return nil }
      return field(",pid=", line, until: ",").flatMap { Int32($0) }
    }

    /// "Memory cgroup out of memory: Killed process 7 (python) total-vm:1kB, anon-rss:2kB, file-rss:3kB, shmem-rss:4kB, …"
    private static func kill(_ line: String, _ pid: Int32, _ record: UInt64) -> OOMKill? {
      guard let start = line.firstRange(of: "Killed process \(pid) ("), let end = line.firstRange(of: ") total-vm:"),
        start.upperBound <= end.lowerBound
      else { return nil }
      let resident = ["anon-rss:", "file-rss:", "shmem-rss:"].compactMap { field($0, line, until: "kB").flatMap { UInt64($0) } }
      return OOMKill(
        pid: pid, name: String(line[start.upperBound..<end.lowerBound]), residentBytes: resident.reduce(0, +) * 1024, record: record)
    }

    private static func field(_ name: String, _ line: String, until end: String) -> String? {
      guard let start = line.firstRange(of: name)?.upperBound else { return nil }
      let rest = line[start...]
      let stop = rest.firstRange(of: end)?.lowerBound ?? rest.firstIndex(of: "\n") ?? rest.endIndex
      return String(rest[..<stop].prefix { $0 != "\n" })
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The reports of OOM-killed processes in the kernel log.
package enum KernelLog {
  package struct OOMKill: Equatable, Sendable {
    /// The host pid.
    package let pid: Int32
    package let name: String
    /// Its resident memory: anonymous, file and shared.
    package let residentBytes: UInt64
    /// The sequence number of the record in the log.
    package let record: UInt64
  }

  /// Returns the last process in or below this cgroup that was OOM-killed in a record after `seen`; nil if the log has none or
  /// cannot be read. The kernel omits records when there are many.
  package static func lastKill(in cgroup: String, after seen: UInt64) -> OOMKill? {
    do throws(Errno) {
      let file = try Descriptor.open("/dev/kmsg", [.readOnly, .nonBlocking])
      var scan = Scan(cgroup: cgroup, seen: seen)
      while true {
        do throws(Errno) {
          scan.read(String(decoding: try file.read(upTo: 8192), as: UTF8.self))
        } catch {
          // EPIPE: records were overwritten during the read; the next read continues after them. EAGAIN is the end.
          if error != .brokenPipe { return scan.found }
        }
      }
    } catch {
      return nil
    }
  }

  /// The state of a search through the records.
  package struct Scan {
    private let cgroup: String
    private let seen: UInt64
    private var victim: Int32?
    package private(set) var found: OOMKill?

    package init(cgroup: String, seen: UInt64) {
      self.cgroup = cgroup
      self.seen = seen
    }

    /// Reads one record: "priority,number,microseconds,flags;text" (Documentation/ABI/testing/dev-kmsg).
    package mutating func read(_ line: String) {
      guard let record = line.split(separator: ",").dropFirst().first.flatMap({ UInt64($0) }), record > seen else { return }
      if let pid = Scan.victim(line, cgroup) { victim = pid }
      if let victim, let kill = Scan.kill(line, victim, record) { found = kill }
    }

    /// Returns the pid in "oom-kill:constraint=CONSTRAINT_MEMCG,…,task_memcg=/carrel/x,task=python,pid=7,uid=1000".
    private static func victim(_ line: String, _ cgroup: String) -> Int32? {
      guard line.firstRange(of: "oom-kill:") != nil, let path = field("task_memcg=", line, until: ","),
        path == "/" + cgroup || path.hasPrefix("/\(cgroup)/")
      else { return nil }
      return field(",pid=", line, until: ",").flatMap { Int32($0) }
    }

    /// Parses "Memory cgroup out of memory: Killed process 7 (python) total-vm:1kB, anon-rss:2kB, file-rss:3kB, shmem-rss:4kB, …".
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

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// Fields of /proc/PID/stat (proc_pid_stat(5)).
package struct ProcessStat {
  package let isDead: Bool
  /// The start time in clock ticks since boot: with the pid it identifies a process uniquely.
  package let start: UInt64

  package static func read(_ pid: Int32) -> ProcessStat? {
    do throws(Errno) {
      return ProcessStat(parsing: try Descriptor.open("/proc/\(pid)/stat", [.readOnly]).readAll(limit: 8192))
    } catch {
      return nil
    }
  }

  package init?(parsing bytes: [UInt8]) {
    // The name may contain any character, also a bracket: the other fields follow the last one.
    guard let end = bytes.lastIndex(of: UInt8(ascii: ")")) else { return nil }
    let fields = bytes[(end + 1)...].split(separator: UInt8(ascii: " "))
    guard fields.count > 19, let start = UInt64(String(decoding: fields[19], as: UTF8.self)) else { return nil }
    isDead = fields[0].first == UInt8(ascii: "Z") || fields[0].first == UInt8(ascii: "X")
    self.start = start
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The files of a process in `/proc/PID` (proc(5)). Values are nil once it has exited.
package struct ProcessDirectory: Sendable {
  package let pid: Int32

  package init(_ pid: Int32) { self.pid = pid }

  /// The name of its program (`comm`), which the process can change.
  package var name: String? { read("comm", limit: 64).map { String(decoding: $0.prefix { $0 != 0x0A }, as: UTF8.self) } }

  /// The names of the environment variables with which its program was executed. Values are not kept.
  package var environmentNames: [String]? {
    read("environ", limit: 8 << 20)?.split(separator: 0).compactMap { entry in
      entry.firstIndex(of: UInt8(ascii: "=")).map { String(decoding: entry[..<$0], as: UTF8.self) }
    }
  }

  /// True if it is PID 1 of its own pid namespace (`NSpid`, proc_pid_status(5)).
  package var isInit: Bool {
    let line = read("status", limit: 65_536)?.split(separator: 0x0A).first { $0.starts(with: Array("NSpid:".utf8)) }
    return line?.split(whereSeparator: { $0 == 0x20 || $0 == 0x09 }).last?.elementsEqual([UInt8(ascii: "1")]) ?? false
  }

  func read(_ file: String, limit: Int) -> [UInt8]? {
    do throws(Errno) { return try Descriptor.open("/proc/\(pid)/\(file)", [.readOnly]).readAll(limit: limit) } catch { return nil }
  }
}

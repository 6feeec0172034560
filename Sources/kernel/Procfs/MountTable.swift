// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The mounts of a process's mount namespace (proc_pid_mountinfo(5)). Reading it calls no file system.
package struct MountTable: Sendable {
  package struct Entry: Equatable, Sendable {
    package let point: String
    /// The type of the file system, such as `ext4` or `nfs4`.
    package let fileSystem: String
  }

  package let entries: [Entry]

  /// Reads the mounts of a process, by default of this one; nil if the table cannot be read.
  package init?(of pid: Int32? = nil) {
    let path = pid.map { "/proc/\($0)/mountinfo" } ?? "/proc/self/mountinfo"
    do throws(Errno) { self.init(parsing: try Descriptor.open(path, [.readOnly]).readAll(limit: 16 << 20)) } catch { return nil }
  }

  /// Parses a table; malformed lines are skipped.
  package init(parsing bytes: [UInt8]) {
    entries = bytes.split(separator: 0x0A).compactMap { line in
      let fields = line.split(separator: 0x20)
      guard fields.count > 6, let dash = fields.dropFirst(6).firstIndex(where: { $0.elementsEqual([0x2D]) }), dash + 1 < fields.count else {
        return nil
      }
      return Entry(point: MountTable.unescaped(fields[4]), fileSystem: String(decoding: fields[dash + 1], as: UTF8.self))
    }
  }

  package var points: [String] { entries.map(\.point) }

  /// Returns the type of the file system that a path is on; nil if the table has no mount for it.
  package func fileSystem(of path: String) -> String? {
    // The last mount at a mount point covers the others, and max(by:) returns the first of equals.
    entries.reversed().filter { $0.point == "/" || path == $0.point || path.hasPrefix($0.point + "/") }
      .max { $0.point.utf8.count < $1.point.utf8.count }?.fileSystem
  }

  /// Decodes a field: the kernel writes space, tab, newline and backslash as a backslash and three octal digits.
  private static func unescaped(_ field: ArraySlice<UInt8>) -> String {
    guard field.contains(0x5C) else { return String(decoding: field, as: UTF8.self) }
    let bytes = Array(field)
    var text: [UInt8] = []
    var at = 0
    while at < bytes.count {
      let digits = bytes[at...].dropFirst().prefix(3)
      if bytes[at] == 0x5C, digits.count == 3, digits.allSatisfy({ (0x30...0x37).contains($0) }) {
        text.append(UInt8(truncatingIfNeeded: digits.reduce(0) { $0 << 3 | Int($1 - 0x30) }))
        at += 4
      } else {
        text.append(bytes[at])
        at += 1
      }
    }
    return String(decoding: text, as: UTF8.self)
  }
}

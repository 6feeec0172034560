// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A process that has something of a mount open. Its texts are the process's own: they are made printable before they are shown.
package struct OpenFileUser: Equatable, Sendable {
  /// As the host numbers it.
  package let pid: Int32
  package let name: String
  /// A path as the process would see it, or what else it is.
  package let what: String

  /// The users of open files, mapped files, working and root directories. A mount is known by its number, which no path can hide.
  package static func find(_ mount: UInt64, among pids: [Int32]) -> [OpenFileUser] {
    pids.compactMap { pid in
      use(of: mount, by: pid).map { OpenFileUser(pid: pid, name: ProcessDirectory(pid).name ?? "?", what: $0) }
    }
  }

  private static func use(of mount: UInt64, by pid: Int32) -> String? {
    let folder = "/proc/\(pid)"
    for (link, what) in [("cwd", "its working directory"), ("root", "its root")] where isIn(mount, "\(folder)/\(link)") { return what }
    for number in entries(folder + "/fdinfo") {
      let lines = ProcessDirectory(pid).read("fdinfo/\(number)", limit: 1 << 20)?.split(separator: 0x0A) ?? []
      let line = lines.first { $0.starts(with: Array("mnt_id:".utf8)) }
      let id = line.map { String(decoding: $0.dropFirst(7).filter { $0 != 0x20 && $0 != 0x09 }, as: UTF8.self) }
      guard let id, UInt64(id) == mount else { continue }
      return target("\(folder)/fd", number) ?? "a file"
    }
    for range in entries(folder + "/map_files") where isIn(mount, "\(folder)/map_files/\(range)") {
      return target("\(folder)/map_files", range) ?? "a mapped file"
    }
    return nil
  }

  private static func entries(_ folder: String) -> [String] {
    do throws(Errno) { return try Descriptor.open(folder, [.readOnly, .directory]).entries() } catch { return [] }
  }

  private static func target(_ folder: String, _ name: String) -> String? {
    do throws(Errno) { return try Descriptor.open(folder, [.path, .directory]).link(name) } catch { return nil }
  }

  private static func isIn(_ mount: UInt64, _ path: String) -> Bool {
    do throws(Errno) { return try Mount.id(try Descriptor.open(path, [.path])) == mount } catch { return false }
  }

  /// Sends a signal through a descriptor of the process, and only if it still has the name that it was found with.
  package func signal(_ number: Int32) {
    do throws(Errno) {
      let process = try Process.open(pid: pid)
      if ProcessDirectory(pid).name == name { try Process.signal(process, number) }
    } catch {}
  }
}

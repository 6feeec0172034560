// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A process that has a file of a mount open. The process chooses these texts, so they must be made printable before they are
/// shown.
package struct OpenFileUser: Equatable, Sendable {
  /// The host pid.
  package let pid: Int32
  package let name: String
  /// The path of a file as the process sees it, or another use of the mount.
  package let what: String

  /// Finds processes that use a mount by an open or mapped file, their working directory or their root. It compares mount ids,
  /// which no path can hide.
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

  /// Signals the process through a pidfd, and only if its name has not changed since it was found.
  package func signal(_ number: Int32) {
    do throws(Errno) {
      let process = try Process.open(pid: pid)
      if ProcessDirectory(pid).name == name { try Process.signal(process, number) }
    } catch {}
  }
}

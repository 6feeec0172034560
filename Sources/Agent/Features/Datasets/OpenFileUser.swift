// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux
internal import Workspaces

/// A process that has something of a mount open.
package struct OpenFileUser: Equatable, Sendable {
  /// As the host numbers it.
  package let pid: Int32
  package let name: String
  /// A path as the process would see it, or what else it is.
  package let what: String

  /// Open files, mapped ones, working and root directories. By the number of the mount, which no path can hide.
  static func find(_ mount: UInt64, among pids: [Int32]) -> [OpenFileUser] {
    pids.compactMap { pid in
      guard let what = use(of: mount, by: pid) else { return nil }
      let name = (try? String(contentsOfFile: "/proc/\(pid)/comm", encoding: .utf8))?.trimmingCharacters(in: .newlines) ?? "?"
      return OpenFileUser(pid: pid, name: printable(name), what: what)
    }
  }

  private static func use(of mount: UInt64, by pid: Int32) -> String? {
    let folder = "/proc/\(pid)"
    for (link, what) in [("cwd", "its working directory"), ("root", "its root")] where isIn(mount, "\(folder)/\(link)") { return what }
    let manager = FileManager.default
    for number in (try? manager.contentsOfDirectory(atPath: folder + "/fdinfo")) ?? [] {
      let text = (try? String(contentsOfFile: "\(folder)/fdinfo/\(number)", encoding: .utf8)) ?? ""
      guard
        text.split(separator: "\n").contains(where: {
          $0.hasPrefix("mnt_id:") && UInt64($0.dropFirst(7).trimmingCharacters(in: .whitespaces)) == mount
        })
      else { continue }
      return printable((try? manager.destinationOfSymbolicLink(atPath: "\(folder)/fd/\(number)")) ?? "a file", limit: 200)
    }
    for range in (try? manager.contentsOfDirectory(atPath: folder + "/map_files")) ?? [] where isIn(mount, "\(folder)/map_files/\(range)") {
      return printable((try? manager.destinationOfSymbolicLink(atPath: "\(folder)/map_files/\(range)")) ?? "a mapped file", limit: 200)
    }
    return nil
  }

  private static func isIn(_ mount: UInt64, _ path: String) -> Bool {
    guard let file = try? Descriptor.open(path, [.path]) else { return false }
    return (try? Mount.id(file)) == mount
  }

  /// Through a descriptor, and only if it still has the name that it was found with.
  func signal(_ number: Int32) {
    guard let process = try? Linux.Process.open(pid: pid),
      (try? String(contentsOfFile: "/proc/\(pid)/comm", encoding: .utf8))?.trimmingCharacters(in: .newlines) == name
    else { return }
    try? Linux.Process.signal(process, number)
  }

  static func list(_ users: [OpenFileUser]) -> String {
    users.isEmpty
      ? "nothing"
      : users.prefix(8).map { "\($0.name) (pid \($0.pid)): \($0.what)" }.joined(separator: "; ") + (users.count > 8 ? "; …" : "")
  }
}

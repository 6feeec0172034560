// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Linux

/// Which cgroup hierarchies this host has.
package enum CgroupLayout: String, Sendable {
  /// cgroup v2 carries the controllers.
  case unified
  /// v1 controllers, and a cgroup v2 mount beside them.
  case hybrid
  /// v1 only.
  case legacy

  package static let root = "/sys/fs/cgroup"
  static let controllers = ["memory", "cpu", "cpuacct", "pids"]

  /// What a workspace sees of a host with v1 controllers: hierarchies by the names that they are mounted with, such as
  /// `cpu,cpuacct` where systemd mounts the two together (cgroups(7), /proc/[pid]/cgroup). Empty for cgroup v2.
  package var shownHierarchies: [String] {
    if self == .unified { return [] }
    let lines = ((try? String(contentsOfFile: "/proc/self/cgroup", encoding: .utf8)) ?? "").split(separator: "\n")
    let hierarchies = lines.compactMap { line -> String? in
      let fields = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
      return fields.count == 3 ? String(fields[1]) : nil
    }
    return hierarchies.filter { hierarchy in
      hierarchy.split(separator: ",").contains { CgroupLayout.controllers.contains(String($0)) }
    }
  }

  /// Looks at the host.
  package static func detect() throws(Errno) -> CgroupLayout {
    if try Mount.isFileSystem(try Descriptor.open(root, [.path, .directory]), FileSystemMagic.cgroup2) { return .unified }
    do throws(Errno) {
      let unified = try Descriptor.open(root + "/unified", [.path, .directory])
      return try Mount.isFileSystem(unified, FileSystemMagic.cgroup2) ? .hybrid : .legacy
    } catch {
      return .legacy
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// Which cgroup hierarchies this host has.
package enum CgroupLayout: String, Sendable {
  /// cgroup v2 carries the controllers.
  case unified
  /// v1 controllers, and a cgroup v2 mount beside them.
  case hybrid
  /// v1 only.
  case legacy

  package static let root = "/sys/fs/cgroup"

  /// The v1 controllers that every workspace is put under.
  package static let controllers = ["memory", "cpu", "cpuacct", "pids"]

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

  /// The v1 hierarchies of this host with the controllers that each carries, such as `cpu,cpuacct` where systemd mounts
  /// the two together (cgroups(7), /proc/[pid]/cgroup). Empty for cgroup v2.
  package var hierarchies: [String] { self == .unified ? [] : CgroupLayout.mounted }

  /// Read once: a host's hierarchies stay what they are.
  private static let mounted: [String] = {
    do throws(Errno) {
      return hierarchies(parsing: try Descriptor.open("/proc/self/cgroup", [.readOnly]).readAll(limit: 65_536))
    } catch {
      return []
    }
  }()

  static func hierarchies(parsing bytes: [UInt8]) -> [String] {
    var found: [String] = []
    for line in bytes.split(separator: UInt8(ascii: "\n")) {
      let fields = line.split(separator: UInt8(ascii: ":"), maxSplits: 2, omittingEmptySubsequences: false)
      if fields.count == 3, !fields[1].isEmpty { found.append(String(decoding: fields[1], as: UTF8.self)) }
    }
    return found
  }

  /// The hierarchies that a workspace is shown.
  package var shownHierarchies: [String] {
    hierarchies.filter { hierarchy in
      hierarchy.split(separator: ",").contains { controller in CgroupLayout.controllers.contains(String(controller)) }
    }
  }
}

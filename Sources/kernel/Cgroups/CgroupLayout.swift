// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// The cgroup hierarchies of this host.
package enum CgroupLayout: String, Sendable {
  /// The controllers are on cgroup v2.
  case unified
  /// The controllers are on v1, with a cgroup v2 mount beside them.
  case hybrid
  /// There is only cgroup v1.
  case legacy

  package static let root = "/sys/fs/cgroup"

  /// The v1 controllers that every workspace uses.
  package static let controllers = ["memory", "cpu", "cpuacct", "pids"]

  /// Detects the layout of this host.
  package static func detect() throws(Errno) -> CgroupLayout {
    if try Mount.isFileSystem(try Descriptor.open(root, [.path, .directory]), FileSystemMagic.cgroup2) { return .unified }
    do throws(Errno) {
      let unified = try Descriptor.open(root + "/unified", [.path, .directory])
      return try Mount.isFileSystem(unified, FileSystemMagic.cgroup2) ? .hybrid : .legacy
    } catch {
      return .legacy
    }
  }

  /// The v1 hierarchies of this host, each with its controllers, such as `cpu,cpuacct` where systemd mounts the two together
  /// (cgroups(7), /proc/[pid]/cgroup). Empty on cgroup v2.
  package var hierarchies: [String] { self == .unified ? [] : CgroupLayout.mounted }

  /// Read once: the hierarchies of a host do not change.
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

  /// The hierarchies that a workspace can see.
  package var shownHierarchies: [String] {
    hierarchies.filter { hierarchy in
      hierarchy.split(separator: ",").contains { controller in CgroupLayout.controllers.contains(String(controller)) }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

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
}

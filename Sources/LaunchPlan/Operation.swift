// SPDX-License-Identifier: Apache-2.0

/// One step of a launch. A plan is a flat list of these; `Sandbox` executes them in order.
///
/// Steps up to the mounts have a part that the supervisor does on the host (open the source, pin it by a
/// descriptor, map its ids) and a part that the child does inside its new namespaces (attach it). Paths
/// that the child resolves are resolved inside the new root, never following a link out of it.
package enum Operation: Equatable, Sendable {
  /// Join this cgroup, a directory of a v1 hierarchy or of the v2 one.
  case cgroup(path: String)
  /// A user namespace owned by `first`, mapping ids 0… inside to `first`… on the host.
  case userNamespace(first: UInt32, count: UInt32)
  /// Namespaces beside it (`Linux.Namespaces`).
  case namespaces(UInt64)
  /// A read-only image layer; the first is the topmost.
  case layer(path: String)
  /// The root: an overlay of the layers, its upper side on a tmpfs of this size, thrown away at the end.
  case root(scratchBytes: UInt64, scratchInodes: UInt64)
  case directory(path: String, mode: UInt32, uid: UInt32, gid: UInt32)
  /// A directory of the host. With `fromUID`, that owner's files appear as `toUID`'s.
  case bind(source: String, target: String, attributes: UInt64, ids: IDMapping?)
  /// A tmpfs that is never swapped, which the supervisor fills and the workspace may only read.
  case secrets(target: String, bytes: UInt64)
  case proc
  case sysfs
  /// cgroup2, or these v1 hierarchies (`memory`, `cpu,cpuacct`), read-only at /sys/fs/cgroup.
  case cgroupFileSystem(hierarchies: [String])
  case tmpfs(target: String, bytes: UInt64, inodes: UInt64, mode: UInt32, attributes: UInt64)
  case device(path: String, major: UInt32, minor: UInt32)
  case devpts
  case mqueue
  case symlink(path: String, target: String)
  case file(path: String, mode: UInt32, content: [UInt8])
  case mask(path: String)
  case readOnly(path: String)
  case pivotRoot
  case hostname(String)
  case sysctl(key: String, value: String)
  case resourceLimit(resource: UInt32, soft: UInt64, hard: UInt64)
  case outOfMemoryScore(UInt32)
  case sessionKeyring
  case cgroupNamespace
  /// Wait until the agent says that network and secrets are in place.
  case awaitStart
  case capabilities
  case user(uid: UInt32, gid: UInt32, groups: [UInt32], mask: UInt32)
  case undumpable
  case noNewPrivileges
  case seccomp(program: [UInt8])
  /// How the tool's output is kept: segments of `segmentBytes`, the newest `segments` of them, read no
  /// faster than `bytesPerSecond`.
  case log(segmentBytes: UInt64, segments: UInt32, bytesPerSecond: UInt64)
  case execute(arguments: [String], environment: [String], directory: String)
}

/// One id of a file system shown as another inside the workspace.
package struct IDMapping: Equatable, Sendable {
  package let fromUID: UInt32
  package let fromGID: UInt32
  package let toUID: UInt32
  package let toGID: UInt32

  package init(fromUID: UInt32, fromGID: UInt32, toUID: UInt32, toGID: UInt32) {
    self.fromUID = fromUID
    self.fromGID = fromGID
    self.toUID = toUID
    self.toGID = toGID
  }
}

/// A launch plan: everything is decided; what is left is to do it.
package struct Plan: Equatable, Sendable {
  package var operations: [Operation]
  package init(_ operations: [Operation]) { self.operations = operations }
}

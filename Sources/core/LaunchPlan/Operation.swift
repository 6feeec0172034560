// SPDX-License-Identifier: Apache-2.0

/// One step of a launch. A plan is a flat list of these; `Sandbox` executes them in order.
///
/// Steps up to the mounts have a part that the supervisor does on the host (open the source, pin it by a
/// descriptor, map its ids) and a part that the child does inside its new namespaces (attach it). Paths
/// that the child resolves are resolved inside the new root, never following a link out of it.
package enum Operation: Equatable, Sendable {
  /// Join this cgroup, a directory of a v1 hierarchy or of the v2 one.
  case cgroup(path: String)
  /// A user namespace with these id maps, owned by the host uid `owner`: the kernel counts for the owner what the
  /// namespace uses up.
  case userNamespace(owner: UInt32, uids: [IDRange], gids: [IDRange])
  /// Namespaces beside it (`Linux.Namespaces`).
  case namespaces(UInt64)
  /// An existing namespace of one kind instead of a new one.
  case joinNamespace(kind: UInt64, path: String)
  /// A read-only image layer; the first is the topmost.
  case layer(path: String)
  /// The root: an overlay of the layers, its upper side on a tmpfs of this size, thrown away at the end.
  case root(scratchBytes: UInt64, scratchInodes: UInt64)
  /// The root: this directory of the host with everything mounted below it, instead of an overlay.
  case rootDirectory(path: String)
  /// Attributes and propagation of what is mounted at this path of the root, once nothing is made in it any more.
  case attributes(path: String, change: MountChange)
  /// Made if it is not there.
  case workingDirectory(path: String)
  case directory(path: String, mode: UInt32, uid: UInt32, gid: UInt32)
  /// A directory or file of the host.
  case bind(source: String, target: String, options: BindOptions)
  /// A tmpfs that is never swapped, which the supervisor fills and the workspace may only read.
  case secrets(target: String, bytes: UInt64)
  /// A new file system instance. Options are `key` or `key=value`. `copyUp`: it starts with what the root had there.
  case fileSystem(type: String, source: String, target: String, options: [String], change: MountChange, copyUp: Bool)
  /// cgroup2, or these v1 hierarchies (`memory`, `cpu,cpuacct`) side by side.
  case cgroupFileSystem(hierarchies: [String], target: String, attributes: UInt64)
  /// The host's device node of this path, after proof that it is this device.
  case device(path: String, major: UInt32, minor: UInt32)
  /// A new device node that is made outside, where a user namespace may make none; the ids are the host's.
  case outerNode(path: String, mode: UInt32, major: UInt32, minor: UInt32, uid: UInt32, gid: UInt32)
  /// A new device node or FIFO; `mode` with the file type, as mknod(2) takes it.
  case node(path: String, mode: UInt32, major: UInt32, minor: UInt32, uid: UInt32, gid: UInt32)
  case symlink(path: String, target: String)
  case file(path: String, mode: UInt32, content: [UInt8])
  case mask(path: String)
  case readOnly(path: String)
  case pivotRoot
  case hostname(String)
  case domainname(String)
  case sysctl(key: String, value: String)
  /// `strict`: a limit that cannot be set fails the launch; else the host's own stays in force.
  case resourceLimit(resource: UInt32, soft: UInt64, hard: UInt64, strict: Bool)
  case outOfMemoryScore(Int32)
  case personality(UInt64)
  /// `monotonic` or `boottime`, seconds, nanoseconds (time_namespaces(7)).
  case timeOffsets([String])
  case sessionKeyring
  case cgroupNamespace
  /// Tell the launcher that namespaces and mounts stand, and wait until it has done its part there.
  case rendezvous
  /// A program that the launch runs to completion; it fails the launch if it fails. Its standard input is these parts
  /// with the pid between them that the host has for the child. Zero seconds: as long as it takes.
  case hook(arguments: [String], environment: [String], seconds: UInt32, input: [String])
  /// A pseudo-terminal of the container's own as its standard streams; the other end goes to this socket.
  case terminal(socket: String, rows: UInt32, columns: UInt32)
  /// Wait until the program is to start.
  case awaitStart
  /// From here on this user, with these capabilities and no other.
  case user(uid: UInt32, gid: UInt32, groups: [UInt32], mask: UInt32, capabilities: CapabilitySets)
  case undumpable
  case noNewPrivileges
  /// A security module's label for the program: written to this file of the process's `attr` folder in proc(5).
  case label(file: String, text: String)
  case scheduler(Scheduler)
  /// Class and level as ioprio_set(2) has them.
  case ioPriority(UInt32)
  /// A bit for each CPU, the first in the lowest bit of the first byte (sched_setaffinity(2)).
  case cpuAffinity([UInt8])
  /// The filter that follows asks whoever listens at this socket: its descriptor goes there with these parts, the pid that
  /// the host has for the child between them.
  case seccompListener(socket: String, state: [String])
  /// A compiled filter, with the flags of seccomp(2).
  case seccomp(program: [UInt8], flags: UInt64)
  /// How the tool's output is kept: segments of `segmentBytes`, the newest `segments` of them, read no
  /// faster than `bytesPerSecond`.
  case log(segmentBytes: UInt64, segments: UInt32, bytesPerSecond: UInt64)
  case execute(arguments: [String], environment: [String], directory: String)
}

/// `count` ids from `inside` on are `outside`… to the one that maps (user_namespaces(7)).
package struct IDRange: Equatable, Sendable {
  package let inside: UInt32
  package let outside: UInt32
  package let count: UInt32

  package init(inside: UInt32, outside: UInt32, count: UInt32) {
    self.inside = inside
    self.outside = outside
    self.count = count
  }
}

extension [IDRange] {
  /// The id outside of one inside; nil where it is not mapped.
  package func outside(_ id: UInt32) -> UInt32? {
    for range in self where id >= range.inside && id - range.inside < range.count { return range.outside + (id - range.inside) }
    return nil
  }
}

/// What mount_setattr(2) sets and clears on a mount. `recursive`: on all below it as well.
package struct MountChange: Equatable, Sendable {
  package var set: UInt64 = 0
  package var clear: UInt64 = 0
  package var recursiveSet: UInt64 = 0
  package var recursiveClear: UInt64 = 0
  /// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE (mount(2)), with MS_REC; 0: as it is.
  package var propagation: UInt64 = 0

  package init(set: UInt64 = 0, clear: UInt64 = 0, propagation: UInt64 = 0) {
    self.set = set
    self.clear = clear
    self.propagation = propagation
  }
}

/// As sched_setattr(2) takes it; times in nanoseconds.
package struct Scheduler: Equatable, Sendable {
  package var policy: UInt32 = 0
  package var flags: UInt64 = 0
  package var nice: Int32 = 0
  package var priority: UInt32 = 0
  package var runtime: UInt64 = 0
  package var deadline: UInt64 = 0
  package var period: UInt64 = 0
  package init() {}
}

package struct BindOptions: Equatable, Sendable {
  package var change: MountChange
  /// With everything that is mounted below the source.
  package var recursive = false
  /// The source may lead through symlinks; else none is followed.
  package var followsSource = false
  /// The owner's files appear as somebody else's: ids of the file system inside, ids of the host outside.
  package var uids: [IDRange] = []
  package var gids: [IDRange] = []
  /// So do those of everything that is mounted below.
  package var mapsRecursively = false

  package init(change: MountChange) { self.change = change }
}

/// A bit for each capability (capabilities(7)), set by set.
package struct CapabilitySets: Equatable, Sendable {
  package var bounding: UInt64 = 0
  package var effective: UInt64 = 0
  package var permitted: UInt64 = 0
  package var inheritable: UInt64 = 0
  package var ambient: UInt64 = 0
  package init() {}
}

/// A launch plan: everything is decided; what is left is to do it.
package struct Plan: Equatable, Sendable {
  package var operations: [Operation]
  package init(_ operations: [Operation]) { self.operations = operations }
}

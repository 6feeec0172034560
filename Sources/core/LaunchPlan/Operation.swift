// SPDX-License-Identifier: Apache-2.0

/// One step of a launch. A plan is a flat list of these; `Executor` executes them in order.
///
/// Steps up to the mounts have a part that the supervisor executes on the host (open the source, pin it by a descriptor, map its
/// ids) and a part that the child executes inside its new namespaces (attach it). The child resolves paths inside the new root and
/// never follows a link out of it.
package enum Operation: Equatable, Sendable {
  /// Join this cgroup, a directory of a v1 or the v2 hierarchy.
  case cgroup(path: String)
  /// Create a user namespace with these id maps, owned by the host uid `owner`, for whom the kernel counts the resources that the
  /// namespace uses.
  case userNamespace(owner: UInt32, uids: [IDRange], gids: [IDRange])
  /// Create the other namespaces (`Linux.Namespaces`).
  case namespaces(UInt64)
  /// Become uid and gid 0 of the user namespace, without supplementary groups.
  case namespaceRoot
  /// Make all mounts of the new mount namespace slaves of the host's: what is mounted inside never reaches the host.
  case slaveMounts
  /// Set the file mode creation mask (umask(2)) under which the root is filled.
  case fileMask(UInt32)
  /// Follow symlinks in paths of the root, which never lead out of it. The runtime-spec requires this; without it they are an error,
  /// because a symlink of the image could redirect a mount (CVE-2019-19921).
  case followSymlinks
  /// Close all descriptors from this number on, except those that later operations need.
  case closeDescriptors(from: UInt32)
  /// Join an existing namespace of one kind instead of a new one.
  case joinNamespace(kind: UInt64, path: String)
  /// Add a read-only image layer; the first one is the topmost.
  case layer(path: String)
  /// Mount the root as an overlay of the layers; its upper layer is a tmpfs of this size, which is discarded at the end. All of it
  /// is mounted on a tmpfs that no other process can reach, and that is detached with the host's root.
  case root(scratchBytes: UInt64, scratchInodes: UInt64)
  /// Use this directory of the host, with all mounts below it, as the root instead of an overlay.
  case rootDirectory(path: String)
  /// Set attributes and propagation of the mount at this path of the root, after the last change inside it.
  case attributes(path: String, change: MountChange)
  /// Make the directory if it does not exist.
  case workingDirectory(path: String)
  case directory(path: String, mode: UInt32, uid: UInt32, gid: UInt32)
  /// Mount a directory or file of the host.
  case bind(source: String, target: String, options: BindOptions)
  /// Mount a tmpfs that is never swapped; the supervisor fills it, and the workspace can only read it.
  case secrets(target: String, bytes: UInt64)
  /// Mount a new file system instance. Options are `key` or `key=value`. With `copyUp` it starts with the content that it covers in
  /// the root.
  case fileSystem(type: String, source: String, target: String, options: [String], change: MountChange, copyUp: Bool)
  /// Mount cgroup2, or these v1 hierarchies (`memory`, `cpu,cpuacct`) side by side.
  case cgroupFileSystem(hierarchies: [String], target: String, attributes: UInt64)
  /// Mount the host's device node of this path, after it was verified to be this device.
  case device(path: String, major: UInt32, minor: UInt32)
  /// Make a device node on the host, because a user namespace cannot make one, and mount it; the ids are host ids.
  case outerNode(path: String, mode: UInt32, major: UInt32, minor: UInt32, uid: UInt32, gid: UInt32)
  /// Make a device node or FIFO; `mode` includes the file type, as for mknod(2).
  case node(path: String, mode: UInt32, major: UInt32, minor: UInt32, uid: UInt32, gid: UInt32)
  case symlink(path: String, target: String)
  case file(path: String, mode: UInt32, content: [UInt8])
  case mask(path: String)
  case readOnly(path: String)
  case pivotRoot
  case hostname(String)
  case domainname(String)
  case sysctl(key: String, value: String)
  /// Set a limit. If it cannot be set, the launch fails with `strict`; without, the host's limit stays in force.
  case resourceLimit(resource: UInt32, soft: UInt64, hard: UInt64, strict: Bool)
  case outOfMemoryScore(Int32)
  case personality(UInt64)
  /// Set clock offsets, each a clock (`monotonic` or `boottime`), seconds and nanoseconds (time_namespaces(7)).
  case timeOffsets([String])
  case sessionKeyring
  case cgroupNamespace
  /// Report to the launcher that namespaces and mounts exist, and wait until it has done its part.
  case rendezvous
  /// Run a program to completion; if it fails, the launch fails. Its standard input is these parts with the host pid of the child
  /// between them. Zero seconds: no time limit.
  case hook(arguments: [String], environment: [String], seconds: UInt32, input: [String])
  /// Open a pseudo-terminal in the container as its standard streams; the master is sent to this socket.
  case terminal(socket: String, rows: UInt32, columns: UInt32)
  /// Wait for the request to start the program.
  case awaitStart
  /// Become this user, with exactly these capabilities.
  case user(uid: UInt32, gid: UInt32, groups: [UInt32], mask: UInt32, capabilities: CapabilitySets)
  case undumpable
  case noNewPrivileges
  /// Set a security module's label for the program by writing it to this file of the process's `attr` directory in proc(5).
  case label(file: String, text: String)
  case scheduler(Scheduler)
  /// Set the I/O class and level, encoded as for ioprio_set(2).
  case ioPriority(UInt32)
  /// Set the CPU affinity, a bit for each CPU; the first is the lowest bit of the first byte (sched_setaffinity(2)).
  case cpuAffinity([UInt8])
  /// Send the listener of the filter that follows to this socket, with these parts around the host pid of the child.
  case seccompListener(socket: String, state: [String])
  /// Load a compiled filter, with the flags of seccomp(2).
  case seccomp(program: [UInt8], flags: UInt64)
  /// Store the tool's output in segments of `segmentBytes`, of which the newest `segments` are retained, and read it no faster than
  /// `bytesPerSecond`.
  case log(segmentBytes: UInt64, segments: UInt32, bytesPerSecond: UInt64)
  case execute(arguments: [String], environment: [String], directory: String)
}

/// A map of `count` ids from `inside` on to ids from `outside` on, in the namespace that maps (user_namespaces(7)).
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
  /// Returns the outside id of an inside id; nil if it is not mapped.
  package func outside(_ id: UInt32) -> UInt32? {
    for range in self where id >= range.inside && id - range.inside < range.count { return range.outside + (id - range.inside) }
    return nil
  }
}

/// The attributes that mount_setattr(2) sets and clears on a mount and, if `recursive`, also on all mounts below it.
package struct MountChange: Equatable, Sendable {
  package var set: UInt64 = 0
  package var clear: UInt64 = 0
  package var recursiveSet: UInt64 = 0
  package var recursiveClear: UInt64 = 0
  /// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE (mount(2)), optionally with MS_REC; 0: no change.
  package var propagation: UInt64 = 0

  package init(set: UInt64 = 0, clear: UInt64 = 0, propagation: UInt64 = 0) {
    self.set = set
    self.clear = clear
    self.propagation = propagation
  }
}

/// The arguments of sched_setattr(2); times are in nanoseconds.
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
  /// True if all mounts below the source are included.
  package var recursive = false
  /// True if symlinks in the source are followed; otherwise they are an error.
  package var followsSource = false
  /// Id maps of the mount: file system ids inside, host ids outside. They make the owner's files appear as another user's.
  package var uids: [IDRange] = []
  package var gids: [IDRange] = []
  /// True if the maps also apply to all mounts below.
  package var mapsRecursively = false

  package init(change: MountChange) { self.change = change }
}

/// Capability sets with a bit for each capability (capabilities(7)).
package struct CapabilitySets: Equatable, Sendable {
  package var bounding: UInt64 = 0
  package var effective: UInt64 = 0
  package var permitted: UInt64 = 0
  package var inheritable: UInt64 = 0
  package var ambient: UInt64 = 0
  package init() {}
}

/// A launch plan: it contains every decision, and only has to be executed.
package struct Plan: Equatable, Sendable {
  package var operations: [Operation]
  package init(_ operations: [Operation]) { self.operations = operations }
}

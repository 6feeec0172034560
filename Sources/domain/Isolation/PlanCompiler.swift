// SPDX-License-Identifier: Apache-2.0

package import LaunchPlan
internal import Linux

/// The mapping of the ids of a file system to ids inside a workspace.
package struct IDMapping: Equatable, Sendable {
  package let fromUID: UInt32
  package let fromGID: UInt32
  package let toUID: UInt32
  package let toGID: UInt32
  /// Further uids that own files there. Each is mapped too, because the kernel refuses writes to a file whose owner is not mapped,
  /// whatever the group is permitted.
  package let others: [UInt32]

  package init(fromUID: UInt32, fromGID: UInt32, toUID: UInt32, toGID: UInt32, others: [UInt32] = []) {
    self.fromUID = fromUID
    self.fromGID = fromGID
    self.toUID = toUID
    self.toGID = toGID
    self.others = others
  }

  /// The first id inside for `others`, away from the workspace's own user.
  private var firstOther: UInt32 { toUID >= 50_000 ? 20_000 : 60_000 }

  /// Returns the options of a mount in a workspace whose host ids begin at `first`.
  package func options(_ change: MountChange, first: UInt32) -> BindOptions {
    var options = BindOptions(change: change)
    options.uids = [IDRange(inside: fromUID, outside: first + toUID, count: 1)]
    for (index, uid) in others.enumerated() {
      options.uids.append(IDRange(inside: uid, outside: first + firstOther + UInt32(index), count: 1))
    }
    options.gids = [IDRange(inside: fromGID, outside: first + toGID, count: 1)]
    return options
  }
}

/// The resolved input of the plan compiler: everything that a launch plan depends on.
package struct SandboxSpec: Sendable {
  package struct Bind: Sendable {
    package let source: String
    package let target: String
    package let writable: Bool
    package let executable: Bool
    package let ids: IDMapping?
    package init(source: String, target: String, writable: Bool, executable: Bool, ids: IDMapping?) {
      self.source = source
      self.target = target
      self.writable = writable
      self.executable = executable
      self.ids = ids
    }
  }

  /// Directories of the cgroup hierarchies to join.
  package var cgroups: [String] = []
  /// The v1 hierarchies that are visible inside, such as `memory` or `cpu,cpuacct`; empty for cgroup v2.
  package var cgroupHierarchies: [String] = []
  /// The first of 65,536 host ids.
  package var firstID: UInt32 = 0
  package var uid: UInt32 = 1000
  package var gid: UInt32 = 1000
  /// Unpacked layers, the topmost first.
  package var layers: [String] = []
  package var binds: [Bind] = []
  package var secretsPath = "/run/carrel/credentials"
  package var scratchBytes: UInt64 = 1 << 30
  package var shmBytes: UInt64 = 64 << 20
  package var hostname = "workspace"
  package var hosts: [UInt8] = []
  package var resolver: [UInt8] = []
  package var openFiles: UInt64 = 65_536
  package var arguments: [String] = []
  package var environment: [String] = []
  package var directory = "/"
  package var logSegmentBytes: UInt64 = 2 << 20
  package var logSegments: UInt32 = 8
  package var logBytesPerSecond: UInt64 = 8 << 20

  package init() {}
}

/// The default isolation as a straight list of operations. Where the order matters, a comment gives the reason.
package enum PlanCompiler {
  /// The number of host ids of one workspace.
  package static let idCount: UInt32 = 65_536

  /// The number of terminals of a workspace: all workspaces of a host share the kernel's (pty.max in proc(5)).
  private static let terminals = 64

  static let devices: [(String, UInt32, UInt32)] = [
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
  ]

  /// Paths that reveal details of the host or reach its hardware: the common list of container engines.
  static let masked = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware",
    "/sys/devices/virtual/powercap",
  ]
  /// Paths that reveal the activity of the host's disks, and by the files of loop devices which owners are at work. The links to those in
  /// /sys/block then lead nowhere.
  static let disks = [
    "/proc/diskstats", "/proc/partitions", "/sys/devices/virtual/block", "/sys/fs/btrfs", "/sys/fs/ext4", "/sys/fs/xfs",
  ]
  static let readOnly = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

  /// The numbers of RLIMIT_CORE, RLIMIT_NOFILE and RLIMIT_MEMLOCK on Linux (getrlimit(2)).
  private static let coreLimit: UInt32 = 4
  private static let fileLimit: UInt32 = 7
  private static let lockLimit: UInt32 = 8

  /// Returns the operation of one bind mount, for a launch or for an injection into a running sandbox.
  package static func operation(_ bind: SandboxSpec.Bind, first: UInt32) -> Operation {
    var attributes: MountAttributes = [.noSetuid, .noDevices]
    if !bind.executable { attributes.insert(.noExec) }
    if !bind.writable { attributes.insert(.readOnly) }
    let change = MountChange(set: attributes.rawValue)
    let options = bind.ids?.options(change, first: first) ?? BindOptions(change: change)
    return .bind(source: bind.source, target: bind.target, options: options)
  }

  package static func compile(_ spec: SandboxSpec, seccomp: [UInt8]) -> Plan {
    let harder = MountAttributes([.noSetuid, .noDevices, .noExec]).rawValue
    let namespaces: Namespaces = [.mount, .pid, .ipc, .uts, .network]
    let ids = [IDRange(inside: 0, outside: spec.firstID, count: idCount)]
    var steps: [Operation] = []
    func fileSystem(_ type: String, _ target: String, _ attributes: UInt64, _ options: [String] = []) -> Operation {
      .fileSystem(
        type: type, source: type, target: target, options: options, change: MountChange(set: attributes), copyUp: false)
    }

    steps += [
      .closeDescriptors(from: 3),
      .userNamespace(owner: spec.firstID, uids: ids, gids: ids),
      .namespaces(namespaces.rawValue),
      .namespaceRoot,
      .slaveMounts,
      .fileMask(0),
    ]
    steps += spec.cgroups.map { .cgroup(path: $0) }
    steps += [
      // A higher OOM score makes the kernel kill a workspace before it kills the agent.
      .outOfMemoryScore(500),
      // The cgroup namespace follows the join, so that its root is the workspace's own cgroup.
      .cgroupNamespace,
    ]
    steps += spec.layers.map { .layer(path: $0) }
    steps += [
      .root(scratchBytes: spec.scratchBytes, scratchInodes: max(spec.scratchBytes / 4096, 65_536)),
      fileSystem("proc", "/proc", harder),
      fileSystem("sysfs", "/sys", harder | MountAttributes.readOnly.rawValue),
      .cgroupFileSystem(
        hierarchies: spec.cgroupHierarchies, target: "/sys/fs/cgroup", attributes: harder | MountAttributes.readOnly.rawValue),
      // The tmpfs hides the image's own /dev, which could contain links to anywhere.
      fileSystem("tmpfs", "/dev", MountAttributes([.noSetuid, .noExec]).rawValue, ["size=65536", "nr_inodes=128", "mode=0755"]),
    ]
    steps += devices.map { .device(path: "/dev/\($0.0)", major: $0.1, minor: $0.2) }
    steps += [
      fileSystem(
        "devpts", "/dev/pts", MountAttributes([.noSetuid, .noExec]).rawValue,
        ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5", "max=\(terminals)"]),
      fileSystem(
        "tmpfs", "/dev/shm", harder, ["size=\(spec.shmBytes)", "nr_inodes=\(max(spec.shmBytes / 4096, 1024))", "mode=1777"]),
      fileSystem("mqueue", "/dev/mqueue", harder),
      .symlink(path: "/dev/ptmx", target: "pts/ptmx"),
      .symlink(path: "/dev/fd", target: "/proc/self/fd"),
      .symlink(path: "/dev/stdin", target: "/proc/self/fd/0"),
      .symlink(path: "/dev/stdout", target: "/proc/self/fd/1"),
      .symlink(path: "/dev/stderr", target: "/proc/self/fd/2"),
      .directory(path: "/tmp", mode: 0o1777, uid: 0, gid: 0),
      .directory(path: "/var/tmp", mode: 0o1777, uid: 0, gid: 0),
      .directory(path: "/run", mode: 0o755, uid: 0, gid: 0),
      .file(path: "/etc/hostname", mode: 0o644, content: Array("\(spec.hostname)\n".utf8)),
      .file(path: "/etc/hosts", mode: 0o644, content: spec.hosts),
      .file(path: "/etc/resolv.conf", mode: 0o644, content: spec.resolver),
    ]
    steps += spec.binds.map { operation($0, first: spec.firstID) }
    steps += [
      .secrets(target: spec.secretsPath, bytes: 8 << 20),
      .hostname(spec.hostname),
      // These are set while /proc/sys is still writable: no nested user and network namespaces, and ping without raw sockets.
      // max_mnt_namespaces is not set, because a detached mount, which the masks below make, counts as a namespace.
      .sysctl(key: "user.max_user_namespaces", value: "0"),
      .sysctl(key: "user.max_net_namespaces", value: "0"),
      .sysctl(key: "net.ipv4.ping_group_range", value: "\(spec.gid) \(spec.gid)"),
      .sysctl(key: "net.ipv4.ip_unprivileged_port_start", value: "0"),
    ]
    steps += (masked + disks).map { .mask(path: $0) }
    steps += readOnly.map { .readOnly(path: $0) }
    steps += [
      .pivotRoot,
      // Core files are off, because the host's core_pattern may be a pipe to a program outside.
      .resourceLimit(resource: coreLimit, soft: 0, hard: 0, strict: false),
      .resourceLimit(resource: fileLimit, soft: spec.openFiles, hard: spec.openFiles, strict: false),
      .resourceLimit(resource: lockLimit, soft: 64 << 20, hard: 64 << 20, strict: false),
      .sessionKeyring,
      .awaitStart,
      .user(uid: spec.uid, gid: spec.gid, groups: [spec.gid], mask: 0o022, capabilities: CapabilitySets()),
      // This follows the ids, because setresuid resets the flag.
      .undumpable,
      // This precedes the filter, because without CAP_SYS_ADMIN the kernel accepts a filter only from a process with no_new_privs.
      .noNewPrivileges,
      // The filter is last, because what follows needs only calls that the workspace itself may make.
      .seccomp(program: seccomp, flags: 0),
      .log(segmentBytes: spec.logSegmentBytes, segments: spec.logSegments, bytesPerSecond: spec.logBytesPerSecond),
      .execute(arguments: spec.arguments, environment: spec.environment, directory: spec.directory),
    ]
    return Plan(steps)
  }
}

// SPDX-License-Identifier: Apache-2.0

extension Operation {
  /// The kind of an operation. The raw value is its code in the encoding, whose meaning never changes.
  package enum Kind: UInt8, CaseIterable, Sendable {
    case cgroup = 1
    case userNamespace = 2
    case namespaces = 3
    case layer = 4
    case root = 5
    case directory = 6
    case bind = 7
    case secrets = 8
    case cgroupFileSystem = 11
    case device = 13
    case symlink = 16
    case file = 17
    case mask = 18
    case readOnly = 19
    case pivotRoot = 20
    case hostname = 21
    case sysctl = 22
    case resourceLimit = 23
    case outOfMemoryScore = 24
    case sessionKeyring = 25
    case cgroupNamespace = 26
    case awaitStart = 27
    case user = 29
    case undumpable = 30
    case noNewPrivileges = 31
    case seccomp = 32
    case log = 33
    case execute = 34
    case fileSystem = 35
    case joinNamespace = 36
    case rootDirectory = 37
    case attributes = 38
    case node = 39
    case domainname = 40
    case rendezvous = 41
    case hook = 42
    case terminal = 43
    case personality = 44
    case timeOffsets = 45
    case workingDirectory = 46
    case label = 47
    case scheduler = 48
    case ioPriority = 49
    case cpuAffinity = 50
    case seccompListener = 51
    case outerNode = 52
    case namespaceRoot = 53
    case slaveMounts = 54
    case fileMask = 55
    case followSymlinks = 56
    case closeDescriptors = 57
  }

  package var kind: Kind {
    switch self {
    case .cgroup: .cgroup
    case .userNamespace: .userNamespace
    case .namespaces: .namespaces
    case .layer: .layer
    case .root: .root
    case .directory: .directory
    case .bind: .bind
    case .secrets: .secrets
    case .cgroupFileSystem: .cgroupFileSystem
    case .device: .device
    case .symlink: .symlink
    case .file: .file
    case .mask: .mask
    case .readOnly: .readOnly
    case .pivotRoot: .pivotRoot
    case .hostname: .hostname
    case .sysctl: .sysctl
    case .resourceLimit: .resourceLimit
    case .outOfMemoryScore: .outOfMemoryScore
    case .sessionKeyring: .sessionKeyring
    case .cgroupNamespace: .cgroupNamespace
    case .awaitStart: .awaitStart
    case .user: .user
    case .undumpable: .undumpable
    case .noNewPrivileges: .noNewPrivileges
    case .seccomp: .seccomp
    case .log: .log
    case .execute: .execute
    case .fileSystem: .fileSystem
    case .joinNamespace: .joinNamespace
    case .rootDirectory: .rootDirectory
    case .attributes: .attributes
    case .node: .node
    case .domainname: .domainname
    case .rendezvous: .rendezvous
    case .hook: .hook
    case .terminal: .terminal
    case .personality: .personality
    case .timeOffsets: .timeOffsets
    case .workingDirectory: .workingDirectory
    case .label: .label
    case .scheduler: .scheduler
    case .ioPriority: .ioPriority
    case .cpuAffinity: .cpuAffinity
    case .seccompListener: .seccompListener
    case .outerNode: .outerNode
    case .namespaceRoot: .namespaceRoot
    case .slaveMounts: .slaveMounts
    case .fileMask: .fileMask
    case .followSymlinks: .followSymlinks
    case .closeDescriptors: .closeDescriptors
    }
  }
}

extension Operation.Kind {
  /// The name in errors and in `carrel plan`, and an operation of this kind whose fields are still to be decoded.
  var definition: (name: String, blank: Operation) {
    switch self {
    case .cgroup: ("join cgroup", .cgroup(path: ""))
    case .userNamespace: ("new user namespace", .userNamespace(owner: 0, uids: [], gids: []))
    case .namespaces: ("new namespaces", .namespaces(0))
    case .layer: ("image layer", .layer(path: ""))
    case .root: ("overlay root", .root(scratchBytes: 0, scratchInodes: 0))
    case .directory: ("directory", .directory(path: "", mode: 0, uid: 0, gid: 0))
    case .bind: ("bind", .bind(source: "", target: "", options: BindOptions(change: MountChange())))
    case .secrets: ("secrets", .secrets(target: "", bytes: 0))
    case .cgroupFileSystem: ("mount cgroup", .cgroupFileSystem(hierarchies: [], target: "", attributes: 0))
    case .device: ("device", .device(path: "", major: 0, minor: 0))
    case .symlink: ("symlink", .symlink(path: "", target: ""))
    case .file: ("file", .file(path: "", mode: 0, content: []))
    case .mask: ("mask", .mask(path: ""))
    case .readOnly: ("make read-only", .readOnly(path: ""))
    case .pivotRoot: ("pivot root", .pivotRoot)
    case .hostname: ("hostname", .hostname(""))
    case .sysctl: ("sysctl", .sysctl(key: "", value: ""))
    case .resourceLimit: ("rlimit", .resourceLimit(resource: 0, soft: 0, hard: 0, strict: false))
    case .outOfMemoryScore: ("oom score", .outOfMemoryScore(0))
    case .sessionKeyring: ("new session keyring", .sessionKeyring)
    case .cgroupNamespace: ("new cgroup namespace", .cgroupNamespace)
    case .awaitStart: ("await start", .awaitStart)
    case .user: ("become user", .user(uid: 0, gid: 0, groups: [], mask: 0, capabilities: CapabilitySets()))
    case .undumpable: ("become undumpable", .undumpable)
    case .noNewPrivileges: ("no new privileges", .noNewPrivileges)
    case .seccomp: ("load seccomp filter", .seccomp(program: [], flags: 0))
    case .log: ("keep output", .log(segmentBytes: 0, segments: 0, bytesPerSecond: 0))
    case .execute: ("execute", .execute(arguments: [], environment: [], directory: ""))
    case .fileSystem: ("mount", .fileSystem(type: "", source: "", target: "", options: [], change: MountChange(), copyUp: false))
    case .joinNamespace: ("join namespace", .joinNamespace(kind: 0, path: ""))
    case .rootDirectory: ("root directory", .rootDirectory(path: ""))
    case .attributes: ("attributes", .attributes(path: "", change: MountChange()))
    case .node: ("device node", .node(path: "", mode: 0, major: 0, minor: 0, uid: 0, gid: 0))
    case .domainname: ("domain name", .domainname(""))
    case .rendezvous: ("rendezvous", .rendezvous)
    case .hook: ("hook", .hook(arguments: [], environment: [], seconds: 0, input: []))
    case .terminal: ("terminal", .terminal(socket: "", rows: 0, columns: 0))
    case .personality: ("personality", .personality(0))
    case .timeOffsets: ("time offsets", .timeOffsets([]))
    case .workingDirectory: ("working directory", .workingDirectory(path: ""))
    case .label: ("security label", .label(file: "", text: ""))
    case .scheduler: ("scheduler", .scheduler(Scheduler()))
    case .ioPriority: ("io priority", .ioPriority(0))
    case .cpuAffinity: ("cpu affinity", .cpuAffinity([]))
    case .seccompListener: ("seccomp listener", .seccompListener(socket: "", state: []))
    case .outerNode: ("outer device node", .outerNode(path: "", mode: 0, major: 0, minor: 0, uid: 0, gid: 0))
    case .namespaceRoot: ("become root of the user namespace", .namespaceRoot)
    case .slaveMounts: ("make mounts slaves of the host's", .slaveMounts)
    case .fileMask: ("file mask", .fileMask(0))
    case .followSymlinks: ("follow symlinks in the root", .followSymlinks)
    case .closeDescriptors: ("close descriptors", .closeDescriptors(from: 0))
    }
  }
}

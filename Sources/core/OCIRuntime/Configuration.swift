// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Cgroups
  internal import Linux
  internal import Executor
#endif

/// A container's `config.json` (OCI runtime-spec 1.2), read and checked. An unsupported field is refused by name.
struct Configuration {
  let json: JSON
  let bundle: String
  let version: String
  let annotations: [(key: String, value: String)]
  let hooks: Hooks
  let linux: JSON
  let space: NamespaceSet
  let resources: Resources
  let deviceRules: [DeviceRule]
  private let mountLabel: String
  private let devices: [Device]
  private let mounts: [MountReader]
  /// Nil if the container has no process; it then cannot be started.
  let process: ProcessSpecification?

  init(_ bytes: [UInt8], bundle: String) throws(RuntimeError) {
    json = try JSON(parsing: bytes, name: "config.json")
    self.bundle = bundle
    version = try json.string("ociVersion") ?? ""
    guard version.utf8.starts(with: "1.".utf8) else { throw json.error("ociVersion", "expected 1.x, found \(version)") }
    annotations = try json.object("annotations")?.stringMembers() ?? []
    hooks = try Hooks(json)
    guard let linux = try json.object("linux") else { throw json.error("linux", "is missing") }
    self.linux = linux
    for name in ["intelRdt", "memoryPolicy"] where linux.has(name) { throw linux.error(name, "not supported") }
    mountLabel = try linux.string("mountLabel") ?? ""
    if !mountLabel.isEmpty && !SecurityLabels.hasSELinux { throw linux.error("mountLabel", "\(mountLabel): this host has no SELinux") }
    space = try NamespaceSet(linux)
    resources = try linux.object("resources").map(ResourcesReader.read) ?? Resources()
    var devices: [Device] = []
    for entry in try linux.objects("devices") { devices.append(try Device(entry)) }
    self.devices = devices
    deviceRules = try ResourcesReader.deviceRules(try linux.object("resources"))
    var mounts: [MountReader] = []
    for entry in try json.objects("mounts") { mounts.append(try MountReader(entry, bundle: bundle)) }
    self.mounts = mounts
    if let process = try json.object("process") {
      let specification = try ProcessSpecification(process)
      guard !specification.arguments.isEmpty else { throw process.error("args", "is empty") }
      self.process = specification
    } else {
      process = nil
    }
  }

  /// Compiles the plan, from the first namespace to the program.
  ///
  /// `inherited`: the number of descriptors from 3 on that the program inherits. `listening`: how many more come first that are sockets
  /// of a service manager (sd_listen_fds(3)).
  func plan(
    _ cgroup: Cgroup?, states: ContainerState, socket: String, cache: FilterCache, inherited: UInt32 = 0, listening: UInt32 = 0
  ) throws(RuntimeError) -> Plan {
    guard var process else { throw json.error("process", "is missing") }
    if listening > 0 { process.environment += ["LISTEN_FDS=\(listening)", "LISTEN_PID=1"] }
    var steps: [Operation] = [.closeDescriptors(from: 3 + inherited + listening), .followSymlinks]
    steps += space.operations(joining: (cgroup?.paths ?? []).map { .cgroup(path: $0) })
    if let score = process.outOfMemoryScore { steps.append(.outOfMemoryScore(score)) }
    // This follows joining the cgroup, so that the container sees its own cgroup as the root.
    if space.made.contains(.cgroup) { steps.append(.cgroupNamespace) }
    if space.made.contains(.time) { steps.append(.timeOffsets(space.timeOffsets)) }
    let root = try root()
    steps.append(.rootDirectory(path: root.path))
    steps += mountSteps(cgroup)
    steps += try deviceSteps()
    if !hooks.runtime.isEmpty { steps.append(.rendezvous) }
    steps += hooks.createContainer.map { $0.operation(states.parts(.creating)) }
    steps += try sysctls()
    for path in try paths("maskedPaths") { steps.append(.mask(path: path)) }
    for path in try paths("readonlyPaths") { steps.append(.readOnly(path: path)) }
    steps.append(.pivotRoot)
    if let name = try name("hostname") { steps.append(.hostname(name)) }
    if let name = try name("domainname") { steps.append(.domainname(name)) }
    if let persona = try personality() { steps.append(.personality(persona)) }
    steps.append(.sessionKeyring)
    let last = process.operations(
      filter: try SeccompReader.operations(linux, states.parts(.creating), cache: cache), gate: true,
      hooks: hooks.startContainer.map { $0.operation(states.parts(.created)) }, socket: socket)
    // The working directory and the console may have to be made, so the root becomes read-only only after them.
    let beforeGate = last.firstIndex { if case .undumpable = $0 { true } else { false } } ?? 0
    steps += last[..<beforeGate] + seals(cgroup)
    if root.change != MountChange() { steps.append(.attributes(path: "/", change: root.change)) }
    return Plan(steps + last[beforeGate...])
  }

  private func root() throws(RuntimeError) -> (path: String, change: MountChange) {
    guard let root = try json.object("root"), let path = try root.string("path"), !path.isEmpty else {
      throw json.error("root.path", "is missing")
    }
    var change = MountChange(set: try root.bool("readonly") == true ? MountAttributes.readOnly.rawValue : 0)
    if let name = try linux.string("rootfsPropagation"), !name.isEmpty {
      guard let bits = MountReader.propagation(name) else { throw linux.error("rootfsPropagation", "\(name): not a propagation type") }
      change.propagation = bits
    }
    return (path.utf8.first == UInt8(ascii: "/") ? path : bundle + "/" + path, change)
  }

  /// Returns the operations that make mounts read-only that had to be filled first.
  private func seals(_ cgroup: Cgroup?) -> [Operation] {
    mounts.filter { $0.isSealedLast || isFolderOfCgroups($0, cgroup) && $0.isReadOnly }.map {
      .attributes(path: $0.target, change: MountChange(set: MountAttributes.readOnly.rawValue))
    }
  }

  /// Returns whether the mount is, on v1, a directory with a bind for each hierarchy.
  private func isFolderOfCgroups(_ mount: MountReader, _ cgroup: Cgroup?) -> Bool {
    mount.isOfCgroups && !space.has(.cgroup) && cgroup.map { $0.layout != .unified } ?? false
  }

  private func mountSteps(_ cgroup: Cgroup?) -> [Operation] {
    var steps: [Operation] = []
    for mount in mounts {
      if mount.isOfCgroups {
        steps += cgroupMounts(mount, cgroup)
      } else {
        steps.append(mount.operation(space, label: mountLabel))
      }
    }
    return steps
  }

  /// Returns the operations that mount the container's own part of the cgroups, on v1 and v2 alike.
  private func cgroupMounts(_ mount: MountReader, _ cgroup: Cgroup?) -> [Operation] {
    let layout = cgroup?.layout ?? .unified
    let attributes = mount.change.set
    if space.has(.cgroup) { return [.cgroupFileSystem(hierarchies: layout.shownHierarchies, target: mount.target, attributes: attributes)] }
    // Without its own cgroup namespace the container would see the host's cgroups; it gets a bind of its own part instead.
    guard let cgroup else { return [] }
    func bind(_ source: String, _ target: String) -> Operation {
      var options = BindOptions(change: MountChange(set: attributes))
      options.followsSource = true
      return .bind(source: source, target: target, options: options)
    }
    if layout == .unified { return [bind(cgroup.folder(""), mount.target)] }
    var steps: [Operation] = [
      .fileSystem(
        type: "tmpfs", source: "cgroup", target: mount.target, options: ["mode=755", "size=65536"],
        change: MountChange(set: attributes & ~MountAttributes.readOnly.rawValue), copyUp: false)
    ]
    for controller in cgroup.controllers { steps.append(bind(cgroup.folder(controller), mount.target + "/" + controller)) }
    return steps
  }

  private func deviceSteps() throws(RuntimeError) -> [Operation] {
    // With the host's /dev bound, no nodes have to be made.
    if mounts.contains(where: { $0.isBind && $0.target == "/dev" }) { return [] }
    var steps: [Operation] = []
    for device in Device.defaults where !devices.contains(where: { $0.path == device.path }) {
      steps.append(try device.operation(space))
    }
    for device in devices { steps.append(try device.operation(space)) }
    // The standard links of config-linux.md and runc.
    for (path, target) in [
      ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"), ("/dev/stdout", "/proc/self/fd/1"),
      ("/dev/stderr", "/proc/self/fd/2"), ("/dev/ptmx", "pts/ptmx"),
    ] {
      steps.append(.symlink(path: path, target: target))
    }
    return steps
  }

  /// Returns the operations for `sysctl`. It accepts only sysctls of the container's own namespaces: others would change the host
  /// (CVE-2022-0811).
  private func sysctls() throws(RuntimeError) -> [Operation] {
    var steps: [Operation] = []
    guard let sysctl = try linux.object("sysctl") else { return [] }
    for (key, value) in try sysctl.stringMembers() {
      guard key.utf8.allSatisfy(Configuration.isKeyByte), !key.split(separator: "/").contains(where: { $0 == ".." || $0 == "." }) else {
        throw sysctl.error(key, "is not a sysctl")
      }
      let dotted = String(decoding: key.utf8.map { $0 == UInt8(ascii: "/") ? UInt8(ascii: ".") : $0 }, as: UTF8.self)
      let kind: Namespaces
      if dotted.utf8.starts(with: "net.".utf8) {
        kind = .network
      } else if dotted.utf8.starts(with: "fs.mqueue.".utf8) || Configuration.ipcSysctls.contains(dotted) {
        kind = .ipc
      } else if dotted == "kernel.hostname" {
        throw sysctl.error(key, "is what hostname is for")
      } else if dotted == "kernel.domainname" {
        kind = .uts
      } else if dotted.utf8.starts(with: "user.".utf8) {
        kind = .user
      } else {
        throw sysctl.error(key, "is not of a namespace: it would be set for the whole host")
      }
      guard space.made.contains(kind) else { throw sysctl.error(key, "belongs to a namespace that the container shares with the host") }
      guard !value.utf8.contains(where: { $0 < 0x20 && $0 != 0x09 }) else { throw sysctl.error(key, "its value holds a control character") }
      steps.append(.sysctl(key: dotted, value: value))
    }
    return steps
  }

  private static let ipcSysctls = [
    "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
    "kernel.shm_rmid_forced",
  ]

  private static func isKeyByte(_ byte: UInt8) -> Bool {
    (0x61...0x7A).contains(byte) || (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte)
      || [0x2E, 0x2F, 0x5F, 0x2D].contains(byte)
  }

  private func paths(_ name: String) throws(RuntimeError) -> [String] {
    let paths = try linux.strings(name)
    for path in paths where path.utf8.first != UInt8(ascii: "/") || path.split(separator: "/").contains(where: { $0 == ".." }) {
      throw linux.error(name, "\(path): expected an absolute path")
    }
    return paths
  }

  private func name(_ field: String) throws(RuntimeError) -> String? {
    guard let name = try json.string(field), !name.isEmpty else { return nil }
    guard space.has(.uts) else { throw json.error(field, "the container has no uts namespace of its own") }
    guard name.utf8.count <= 64 else { throw json.error(field, "expected at most 64 bytes") }
    return name
  }

  /// Returns the execution domain (personality(2)).
  private func personality() throws(RuntimeError) -> UInt64? {
    guard let json = try linux.object("personality") else { return nil }
    guard try json.strings("flags").isEmpty else { throw json.error("flags", "no flag is supported") }
    switch try json.string("domain") ?? "" {
    case "LINUX": return 0
    case "LINUX32": return 8
    case let other: throw json.error("domain", "\(other) is not an execution domain")
    }
  }
}

/// `hooks` (config.md, "POSIX-platform Hooks").
struct Hooks {
  /// The hooks prestart and createRuntime, which run on the host when namespaces and mounts exist.
  let runtime: [Hook]
  let createContainer: [Hook]
  let startContainer: [Hook]
  let poststart: [Hook]
  let poststop: [Hook]

  init(_ json: JSON) throws(RuntimeError) {
    let hooks = try json.object("hooks")
    func read(_ name: String) throws(RuntimeError) -> [Hook] {
      var entries: [Hook] = []
      for entry in try hooks?.objects(name) ?? [] {
        guard let path = try entry.string("path"), path.utf8.first == UInt8(ascii: "/") else {
          throw entry.error("path", "expected an absolute path")
        }
        let timeout = try entry.signed("timeout")
        if let timeout, timeout <= 0 || timeout > 86_400 { throw entry.error("timeout", "expected 1 to 86400 seconds") }
        let arguments = [path] + (try entry.strings("args"))
        // Hooks that run in the container do not inherit the caller's environment; the others are the caller's own programs.
        let environment = entry.has("env") || name == "startContainer" ? try entry.strings("env") : Process.environment
        entries.append(Hook(arguments: arguments, environment: environment, seconds: UInt32(timeout ?? 0)))
      }
      return entries
    }
    runtime = try read("prestart") + (try read("createRuntime"))
    createContainer = try read("createContainer")
    startContainer = try read("startContainer")
    poststart = try read("poststart")
    poststop = try read("poststop")
  }
}

extension Hook {
  /// Returns the operation that runs it during the launch.
  func operation(_ state: [String]) -> Operation {
    .hook(arguments: arguments, environment: environment, seconds: seconds, input: state)
  }
}

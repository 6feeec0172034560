// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Cgroups
  internal import Linux
  package import Executor
  internal import ShimProtocol
#endif

/// The command-line options of `exec`.
package struct ExecOptions {
  /// The file with the whole `process` object; if empty, the container's own is used, changed by the options below.
  package var processFile = ""
  package var arguments: [String] = []
  package var environment: [String] = []
  package var directory = ""
  /// uid[:gid]
  package var user = ""
  package var groups: [String] = []
  package var capabilities: [String] = []
  package var terminal = false
  package var forbidsNewPrivileges = false
  package var consoleSocket = ""
  package var pidFile = ""
  package var inherited: UInt32 = 0
  /// True if the process starts even in a paused container, where it waits.
  package var ignoresPause = false
  /// Existing cgroups below the container's, on v1 with a prefix of controllers: `a/b`, `cpu,memory:a/b`.
  package var cgroups: [String] = []
  /// The AppArmor profile, and the SELinux context.
  package var profile = ""
  package var context = ""
  package init() {}
}

extension Containers {
  /// Starts a process in a running container, with the same namespaces, cgroup, filter and rules as its first process.
  package func exec(_ id: String, _ options: ExecOptions) throws(RuntimeError) -> Launch.Started {
    let folder = try store.open(id)
    let state = try folder.state()
    guard state.process() != nil else { throw RuntimeError("container \(id) is not running") }
    let status = folder.status(state)
    guard status != .paused || options.ignoresPause else { throw RuntimeError("container \(id) is paused") }
    let configuration = try folder.configuration(state)
    try Containers.protectExecutable(configuration.space)
    let specification = try specification(options, configuration)

    var steps: [Operation] = [.closeDescriptors(from: 3 + options.inherited), .followSymlinks]
    let joins = try joined(state.pid)
    let isMapped = joins.contains { if case .joinNamespace(Namespaces.user.rawValue, _) = $0 { true } else { false } }
    let first = specification.scheduling.initialAffinity
    if !first.isEmpty { steps.append(.cpuAffinity(first)) }
    steps += NamespaceSet.entering(joins, try cgroupSteps(state.cgroup, options.cgroups), isMapped: isMapped, ownsMounts: false)
    // Its namespaces are the container's only if the process still lives after they were found.
    guard state.process() != nil else { throw RuntimeError("container \(id) is not running") }
    if let score = specification.outOfMemoryScore { steps.append(.outOfMemoryScore(score)) }
    if !specification.scheduling.finalAffinity.isEmpty { steps.append(.cpuAffinity(specification.scheduling.finalAffinity)) }
    steps += specification.operations(
      filter: try SeccompReader.operations(configuration.linux, state.parts(status), cache: store.filters), gate: false, hooks: [],
      socket: options.consoleSocket)
    let started: Launch.Started
    do throws(StepFailure) { started = try Launch(Plan(steps)).start() } catch { throw RuntimeError(error) }
    try writePID(started.child.pid, options.pidFile)
    return started
  }

  private func cgroupSteps(_ cgroup: Cgroup?, _ below: [String]) throws(RuntimeError) -> [Operation] {
    guard let cgroup else { return [] }
    var (everywhere, places): (String, [(controller: String, path: String)]) = ("", [])
    for text in below {
      let parts = text.split(separator: ":", maxSplits: 1)
      guard let path = parts.last, !path.split(separator: "/").contains("..") else {
        throw RuntimeError("--cgroup \(text): expected a path below the container's")
      }
      if parts.count == 1 { everywhere = "/" + path }
      for controller in parts.count == 1 ? [] : parts[0].split(separator: ",") {
        guard cgroup.layout != .unified, cgroup.controllers.contains(String(controller)) else {
          throw RuntimeError("--cgroup \(text): the container has no cgroup of the v1 controller \(controller)")
        }
        places.append((String(controller), "/" + path))
      }
    }
    return cgroup.paths.map { path in
      let own = places.first { cgroup.folder($0.controller) == path }?.path
      return .cgroup(path: path + (own ?? everywhere))
    }
  }

  private func specification(_ options: ExecOptions, _ configuration: Configuration) throws(RuntimeError) -> ProcessSpecification {
    if !options.processFile.isEmpty {
      let text: [UInt8]
      do throws(Errno) { text = try Descriptor.open(options.processFile, [.readOnly]).readAll(limit: JSON.sizeLimit) } catch {
        throw RuntimeError("--process \(options.processFile): \(error.sentence)")
      }
      let specification = try ProcessSpecification(try JSON(parsing: text, name: options.processFile))
      guard !specification.arguments.isEmpty else { throw RuntimeError("\(options.processFile): args: is empty") }
      return specification
    }
    guard var specification = configuration.process else { throw RuntimeError("the container has no default process; use --process") }
    guard !options.arguments.isEmpty else { throw RuntimeError("exec: no program to run") }
    specification.arguments = options.arguments
    specification.terminal = options.terminal
    specification.override(environment: options.environment)
    if !options.directory.isEmpty { specification.directory = options.directory }
    try specification.labels.override(profile: options.profile, context: options.context)
    if options.forbidsNewPrivileges { specification.forbidsNewPrivileges = true }
    if !options.user.isEmpty {
      let parts = options.user.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
      guard let uid = Containers.id(parts[0]) else { throw RuntimeError("--user \(options.user): expected UID[:GID]") }
      specification.uid = uid
      if parts.count > 1 {
        guard let gid = Containers.id(parts[1]) else { throw RuntimeError("--user \(options.user): expected UID[:GID]") }
        specification.gid = gid
      }
    }
    for text in options.groups {
      guard let gid = Containers.id(Substring(text)) else { throw RuntimeError("--additional-gids \(text): expected a number") }
      specification.groups.append(gid)
    }
    for name in options.capabilities {
      guard let number = Capabilities.number(name) else {
        warn("--cap \(name): unknown capability, ignored")
        continue
      }
      specification.capabilities.bounding |= 1 << number
      specification.capabilities.effective |= 1 << number
      specification.capabilities.permitted |= 1 << number
    }
    return specification
  }

  /// Parses an id of digits only: a sign, a leading zero or an overflow is refused (CVE-2024-40635).
  static func id(_ text: Substring) -> UInt32? {
    guard !text.isEmpty, text.utf8.allSatisfy({ (0x30...0x39).contains($0) }), text == "0" || text.utf8.first != 0x30,
      let number = UInt32(text), number < 1 << 31
    else { return nil }
    return number
  }

  /// Returns the operations that join those of its namespaces that are not already this process's own.
  private func joined(_ pid: Int32) throws(RuntimeError) -> [Operation] {
    var steps: [Operation] = []
    for entry in NamespaceSet.kinds {
      let theirs = "/proc/\(pid)/ns/\(entry.file)"
      do throws(Errno) {
        let own = try Descriptor.open("/proc/self/ns/\(entry.file)", [.readOnly]).status()
        let other = try Descriptor.open(theirs, [.readOnly]).status()
        if own.inode == other.inode && own.device == other.device { continue }
      } catch {
        // The kernel does not have this kind of namespace.
        if error == .noEntry && Process.exists("/proc/\(pid)/ns/mnt") { continue }
        throw RuntimeError("cannot open \(theirs): \(error.sentence)")
      }
      steps.append(.joinNamespace(kind: entry.kind.rawValue, path: theirs))
    }
    return steps
  }
}

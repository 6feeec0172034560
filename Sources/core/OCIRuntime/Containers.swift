// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  package import Cgroups
  internal import Linux
  internal import Procfs
  internal import Executor
  internal import ShimProtocol
#endif

/// The command-line options of `create` and `run`.
package struct CreateOptions {
  package var bundle = "."
  /// The configuration file; if empty, the bundle's `config.json`.
  package var configuration = ""
  package var pidFile = ""
  package var consoleSocket = ""
  package var inherited: UInt32 = 0
  /// The number of inherited descriptors that are sockets of a service manager (sd_listen_fds(3)); they come first.
  package var listening: UInt32 = 0
  package var noPivot = false
  package init() {}
}

/// An event that `events` prints.
package enum ContainerEvent {
  case usage(Usage)
  case outOfMemory
}

/// The operations of the runtime-spec (runtime.md, "Operations") on the containers of a store.
package struct Containers {
  let store: ContainerStore

  /// True if systemd creates the cgroups (`--systemd-cgroup`).
  private let usesSystemd: Bool

  package init(_ store: ContainerStore, usesSystemd: Bool) {
    self.store = store
    self.usesSystemd = usesSystemd
  }

  // ------------------------------------------------------------------ create

  /// A container that was created and waits, with the lock on it.
  private struct Created {
    let folder: ContainerDirectory
    let configuration: Configuration
    let state: ContainerState
    let started: Launch.Started
  }

  /// Creates the container, which then waits for `start`.
  package func create(_ id: String, _ options: CreateOptions) throws(RuntimeError) { _ = try make(id, options, opensByConnection: true) }

  /// Creates and starts the container. Unless `detached`, it waits for its end and, unless `keeps`, deletes it. Returns the exit
  /// code.
  package func run(_ id: String, _ options: CreateOptions, detached: Bool, keeps: Bool) throws(RuntimeError) -> Int32 {
    var created: Created? = try make(id, options, opensByConnection: false)
    guard let (started, state, hooks) = created.map({ ($0.started, $0.state, $0.configuration.hooks) }) else { return 1 }
    do throws(RuntimeError) {
      if detached && started.terminal != nil { throw RuntimeError("--detach: a terminal needs --console-socket") }
      do throws(StepFailure) { try started.release() } catch { throw RuntimeError(error) }
      Containers.run(hooks.poststart, state, .running)
    } catch {
      created = nil
      try delete(id, force: true)
      throw error
    }
    // Release the lock, so that other commands can use the container while it runs.
    created = nil
    if detached { return 0 }
    let code = Foreground.wait(for: started)
    if !keeps, let folder = try? store.open(id) {
      try folder.lock()
      Containers.clear(folder, state, hooks)
    }
    return code
  }

  private func make(_ id: String, _ options: CreateOptions, opensByConnection: Bool) throws(RuntimeError) -> Created {
    if options.noPivot { throw RuntimeError("--no-pivot: not supported: a process with CAP_SYS_CHROOT can leave a chroot") }
    let bundle = try absolute(options.bundle)
    let text: [UInt8]
    let file = options.configuration.isEmpty ? bundle + "/config.json" : options.configuration
    do throws(Errno) {
      text = try Descriptor.open(file, [.readOnly]).readAll(limit: JSON.sizeLimit)
    } catch {
      throw RuntimeError("cannot read \(file): \(error.sentence)")
    }
    let configuration = try Configuration(text, bundle: bundle)
    try Containers.protectExecutable(configuration.space)
    if configuration.process?.terminal == false && !options.consoleSocket.isEmpty {
      throw RuntimeError("--console-socket: the process has no terminal")
    }
    let folder = try store.make(id)
    do throws(RuntimeError) {
      try folder.lock()
      return try make(folder, configuration, text, options, opensByConnection)
    } catch {
      folder.remove()
      throw error
    }
  }

  private func make(
    _ folder: ContainerDirectory, _ configuration: Configuration, _ text: [UInt8], _ options: CreateOptions, _ opensByConnection: Bool
  ) throws(RuntimeError) -> Created {
    let scope = try scope(configuration, folder.id)
    let cgroup = try CgroupPath.cgroup(configuration, id: folder.id, scope)
    var state = ContainerState(id: folder.id, configuration: configuration, cgroup: cgroup, scope: scope?.name ?? "")
    let plan = try configuration.plan(
      cgroup, states: state, socket: options.consoleSocket, cache: store.filters, inherited: options.inherited,
      listening: options.listening)
    try folder.write("config.json", text, isAwaited: false)
    if cgroup.exists {
      // A process that joins it would freeze, and this command would hang.
      if cgroup.isFrozen { throw RuntimeError("linux.cgroupsPath: \(cgroup.path) is frozen") }
      state.sharesCgroup = !cgroup.processes().isEmpty
      if state.sharesCgroup { warn("linux.cgroupsPath: \(cgroup.path) is in use by processes that will outlive this container") }
    }
    do throws(RuntimeError) {
      let holder = try scope?.start()
      defer { withExtendedLifetime(holder) {} }
      try holder?.enter(cgroup)
      try limit(cgroup, configuration)
      let gate: Launch.Gate
      do throws(Errno) {
        gate =
          opensByConnection
          ? .listener(Handle(try Socket.listen(ContainerDirectory.socketName, in: folder.folder.descriptor))) : .caller
      } catch {
        throw RuntimeError("cannot listen in \(folder.path): \(error.sentence)")
      }
      let started: Launch.Started
      do throws(StepFailure) {
        started = try Launch(plan, gate: gate).start { (pid) throws(StepFailure) in
          for hook in configuration.hooks.runtime { try Containers.run(hook, state.parts(.creating), pid) }
        }
      } catch {
        throw RuntimeError(error)
      }
      state.pid = started.child.pid
      state.processStart = ProcessStat.read(started.child.pid)?.start ?? 0
      do throws(RuntimeError) {
        try folder.write("state.json", Array(state.encoded().utf8), isAwaited: true)
        try writePID(started.child.pid, options.pidFile)
      } catch {
        do throws(Errno) {
          try started.child.signal(Signals.kill)
          _ = try Process.reap(started.child.pid, wait: true)
        } catch {}
        throw error
      }
      return Created(folder: folder, configuration: configuration, state: state, started: started)
    } catch {
      Containers.remove(cgroup, isShared: state.sharesCgroup, scope: scope?.name)
      throw error
    }
  }

  private func scope(_ configuration: Configuration, _ id: String) throws(RuntimeError) -> SystemdScope? {
    usesSystemd ? try SystemdScope(try configuration.linux.string("cgroupsPath") ?? "", id: id) : nil
  }

  /// Executes the runtime again from a read-only mount. A container with its own user namespace needs no such protection: its root
  /// cannot write to files of the host's root.
  static func protectExecutable(_ space: NamespaceSet) throws(RuntimeError) {
    if space.isMapped || !Defence.readOnlyExecutable.isOn { return }
    do throws(Errno) { try Process.executeFromReadOnlyMount() } catch {
      throw RuntimeError("cannot run from a read-only mount: \(error.sentence)")
    }
  }

  private func limit(_ cgroup: Cgroup, _ configuration: Configuration) throws(RuntimeError) {
    if let name = configuration.resources.unsupported(cgroup.layout) { throw RuntimeError("linux.resources.\(name): not supported") }
    do throws(CgroupError) {
      try cgroup.create(controllers: CgroupPath.controllers(configuration.resources, cgroup.layout))
      try cgroup.apply(configuration.resources.values(cgroup.layout))
      try cgroup.restrict(configuration.deviceRules)
    } catch {
      throw RuntimeError(error.description)
    }
  }

  /// Runs hooks after the operation. A failure is only a warning (runtime.md, "Lifecycle", steps 10 and 14).
  private static func run(_ hooks: [Hook], _ state: ContainerState, _ status: ContainerStatus) {
    for hook in hooks {
      do throws(StepFailure) { try run(hook, state.parts(status), status == .stopped ? 0 : state.pid) } catch {
        warn(RuntimeError(error).message)
      }
    }
  }

  private static func run(_ hook: Hook, _ state: [String], _ pid: Int32) throws(StepFailure) {
    do throws(Errno) {
      try hook.run(state, pid: pid)
    } catch {
      throw StepFailure("hook " + (hook.arguments.first ?? ""), error)
    }
  }

  func writePID(_ pid: Int32, _ path: String) throws(RuntimeError) {
    if path.isEmpty { return }
    do throws(Errno) {
      // Engines watch for this file, so it must be complete when it appears.
      let temporary = path + ".tmp"
      try Descriptor.open(temporary, [.writeOnly, .create, .truncate, .noFollow], mode: 0o644).write(Array("\(pid)".utf8))
      try Descriptor.open(".", [.path, .directory]).rename(temporary, to: path)
    } catch {
      throw RuntimeError("cannot write --pid-file \(path): \(error.sentence)")
    }
  }

  private func absolute(_ path: String) throws(RuntimeError) -> String {
    do throws(Errno) {
      let folder = try Descriptor.open(path, [.path, .directory])
      return try Descriptor.open("/", [.path, .directory]).link(folder.procPath)
    } catch {
      throw RuntimeError("--bundle \(path): \(error.sentence)")
    }
  }

  // ------------------------------------------------------------------- start

  /// Lets the program run; throws the reason if it cannot.
  package func start(_ id: String) throws(RuntimeError) {
    let folder = try store.open(id)
    try folder.lock()
    let state = try folder.state()
    let status = folder.status(state)
    guard status == .created else { throw RuntimeError("container \(id) is \(status.rawValue), and only a created one can be started") }
    let hooks = try folder.configuration(state).hooks
    let report: InitReport?
    do throws(Errno) {
      let connection = InitSocket(Handle(try Socket.connect(ContainerDirectory.socketName, in: folder.folder.descriptor)))
      try folder.folder.descriptor.remove(ContainerDirectory.socketName)
      report = try connection.receive()?.message
    } catch {
      throw RuntimeError("container \(id): cannot start: \(error.sentence)")
    }
    // EOF without a message: the socket was closed on execve, so the program runs.
    if case .failed(let failure)? = report { throw RuntimeError(failure) }
    Containers.run(hooks.poststart, state, .running)
  }

  // -------------------------------------------------------------------- kill

  package func kill(_ id: String, _ signal: Int32, all: Bool) throws(RuntimeError) {
    let folder = try store.open(id)
    let state = try folder.state()
    if all, let cgroup = state.cgroup { return cgroup.signal(signal) }
    guard let process = state.process() else { throw RuntimeError("container \(id) is not running") }
    do throws(Errno) { try Process.signal(process.descriptor, signal) } catch {
      throw RuntimeError("container \(id): cannot signal: \(error.sentence)")
    }
    // A v1 freezer delays even SIGKILL until it thaws.
    if signal == Signals.kill, let cgroup = state.cgroup, cgroup.layout != .unified, cgroup.isFrozen {
      do throws(CgroupError) { try cgroup.freeze(false) } catch { throw RuntimeError(error.description) }
    }
  }

  // ------------------------------------------------------------------ delete

  package func delete(_ id: String, force: Bool) throws(RuntimeError) {
    let folder: ContainerDirectory
    do throws(RuntimeError) { folder = try store.open(id) } catch { if force { return } else { throw error } }
    try folder.lock()
    let state: ContainerState
    do throws(RuntimeError) { state = try folder.state() } catch {
      // A `create` was interrupted; its child has exited with it.
      guard force else { throw error }
      clearCutOff(folder)
      return folder.remove()
    }
    if let process = state.process() {
      let status = folder.status(state)
      guard force || status == .created else { throw RuntimeError("container \(id) is \(status.rawValue); kill it first, or use --force") }
      do throws(Errno) { try Process.signal(process.descriptor, Signals.kill) } catch {}
      if let cgroup = state.cgroup { do throws(CgroupError) { try cgroup.freeze(false) } catch {} }
      for attempt in 0..<1000 where state.process() != nil {
        if attempt == 50, let cgroup = state.cgroup { do throws(CgroupError) { try cgroup.returnToFreezer(state.pid) } catch {} }
        Clock.sleep(milliseconds: 2)
      }
      // A container that still has a process must not be deleted.
      guard state.process() == nil else {
        throw RuntimeError("container \(id): process \(state.pid) still exists after SIGKILL; retry once it has exited")
      }
    }
    var hooks: Hooks?
    do throws(RuntimeError) { hooks = try folder.configuration(state).hooks } catch { warn(error.message) }
    Containers.clear(folder, state, hooks)
  }

  /// Removes the leftovers of an interrupted `create`; without a state file, the configuration gives the path of the cgroup.
  private func clearCutOff(_ folder: ContainerDirectory) {
    do throws(RuntimeError) {
      let configuration = try Configuration(try folder.read("config.json"), bundle: "/")
      let scope = try scope(configuration, folder.id)
      // Without a state file it is unknown whether the cgroup is shared, so processes in it are not killed.
      let cgroup = try CgroupPath.cgroup(configuration, id: folder.id, scope)
      Containers.remove(cgroup, isShared: !cgroup.processes().isEmpty, scope: scope?.name)
    } catch {
      warn(error.message)
    }
  }

  /// Removes the leftovers of a container that has ended.
  private static func clear(_ folder: ContainerDirectory, _ state: ContainerState, _ hooks: Hooks?) {
    if let cgroup = state.cgroup { remove(cgroup, isShared: state.sharesCgroup, scope: state.scope.isEmpty ? nil : state.scope) }
    if let hooks { run(hooks.poststop, state, .stopped) }
    folder.remove()
  }

  private static func remove(_ cgroup: Cgroup, isShared: Bool, scope: String?) {
    if isShared { cgroup.removeIfEmpty() } else { end(cgroup) }
    guard let scope else { return }
    SystemdScope.stop(scope)
    cgroup.removeUpwards(in: SystemdScope.unmanaged)
  }

  private static func end(_ cgroup: Cgroup) {
    for attempt in 0..<500 {
      if cgroup.remove() { return }
      // Kill the remaining processes: in a shared pid namespace they do not end with the first process.
      if attempt == 2 { cgroup.signal(Signals.kill) }
      Clock.sleep(milliseconds: attempt < 20 ? 1 : 10)
    }
  }

  // ------------------------------------------------------------------- state

  package func state(_ id: String) throws(RuntimeError) -> String {
    let folder = try store.open(id)
    let state = try folder.state()
    return state.text(folder.status(state))
  }

  /// A line of `list`.
  package struct Entry {
    package let id: String
    /// 0 if it has stopped.
    package let pid: Int32
    package let status: ContainerStatus
    package let bundle: String
    package let created: String
    /// The user who created it: `root`, or `#` and the uid.
    package let owner: String
  }

  package func list() throws(RuntimeError) -> [Entry] {
    var found: [Entry] = []
    for id in try store.ids() {
      do throws(RuntimeError) {
        let folder = try store.open(id)
        let state = try folder.state()
        let status = folder.status(state)
        var uid: UInt32 = 0
        do throws(Errno) { uid = try folder.folder.descriptor.status().uid } catch {}
        let owner = uid == 0 ? "root" : "#\(uid)"
        let pid = status == .stopped ? 0 : state.pid
        found.append(Entry(id: id, pid: pid, status: status, bundle: state.bundle, created: state.created, owner: owner))
      } catch {
        warn("\(id): \(error.message)")
      }
    }
    return found
  }

  package func processes(_ id: String) throws(RuntimeError) -> [Int32] { try cgroup(id).processes() }

  package func pause(_ id: String, _ paused: Bool) throws(RuntimeError) {
    let folder = try store.open(id)
    let status = folder.status(try folder.state())
    guard status == (paused ? .running : .paused) else { throw RuntimeError("container \(id) is \(status.rawValue)") }
    let cgroup = try cgroup(id)
    do throws(CgroupError) { try cgroup.freeze(paused) } catch { throw RuntimeError(error.description) }
  }

  package func usage(_ id: String) throws(RuntimeError) -> Usage { try cgroup(id).usage() }

  /// Calls `report` with the usage at an interval, and after an OOM kill in the container, until it ends.
  package func watch(_ id: String, milliseconds: UInt32, _ report: (ContainerEvent) -> Void) throws(RuntimeError) {
    let folder = try store.open(id)
    let state = try folder.state()
    let cgroup = try cgroup(id)
    var kills = cgroup.usage().outOfMemoryKills
    while let process = state.process() {
      let usage = cgroup.usage()
      if usage.outOfMemoryKills > kills { report(.outOfMemory) }
      kills = usage.outOfMemoryKills
      report(.usage(usage))
      var poller = Poller()
      _ = poller.add(process)
      do throws(Errno) { try poller.wait(milliseconds: Int32(clamping: milliseconds)) } catch {
        throw RuntimeError("cannot wait: \(error.sentence)")
      }
    }
  }

  /// Changes the limits of a running container. `text` is an object like `linux.resources`.
  package func update(_ id: String, _ text: [UInt8]) throws(RuntimeError) {
    let folder = try store.open(id)
    try folder.lock()
    var state = try folder.state()
    guard var cgroup = state.cgroup else { throw RuntimeError("container \(id) has no cgroup") }
    let resources = try ResourcesReader.read(try JSON(parsing: text, name: "resources"))
    if let name = resources.unsupported(cgroup.layout) { throw RuntimeError("\(name): not supported") }
    let values = resources.values(cgroup.layout)
    do throws(CgroupError) {
      var further: [String] = []
      for value in values where cgroup.layout != .unified && !(cgroup.controllers + further).contains(value.controller) {
        further.append(value.controller)
      }
      if !further.isEmpty {
        // Write the state first, so that `delete` finds the new cgroups.
        state.cgroup = Cgroup(layout: cgroup.layout, path: cgroup.path, controllers: cgroup.controllers + further)
        do throws(RuntimeError) { try folder.write("state.json", Array(state.encoded().utf8), isAwaited: true) } catch {
          throw CgroupError(id, error.message)
        }
        cgroup = try cgroup.joining(further)
      }
      do throws(CgroupError) { try cgroup.apply(values) } catch {
        // On v1 the memory limit must not exceed that of memory and swap, and either may have to change first.
        guard cgroup.layout != .unified, values.count > 1 else { throw error }
        try cgroup.apply(values.reversed())
        try cgroup.apply(values)
      }
    } catch {
      throw RuntimeError(error.description)
    }
  }

  private func cgroup(_ id: String) throws(RuntimeError) -> Cgroup {
    guard let cgroup = try store.open(id).state().cgroup else { throw RuntimeError("container \(id) has no cgroup") }
    return cgroup
  }
}

extension RuntimeError {
  init(_ failure: StepFailure) { self.init("cannot \(failure.step): \(Errno(failure.errno).sentence)") }
}

/// Prints a warning to standard error; the command continues.
func warn(_ message: String) {
  StandardStream.error.write("carrel-runtime: \(message)\n")
}

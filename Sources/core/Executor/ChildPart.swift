// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import ShimProtocol
  package import LaunchPlan
  package import Linux
#endif

/// The part of a launch that the child executes inside its new namespaces, operation by operation, in the plan's order.
package struct ChildPart {
  let operations: [Operation]
  let host: HostPart
  let supervisor: ParentSocket
  /// The socket on which `awaitStart` waits for a connection; if nil, it waits for a message of the supervisor.
  private let gate: Handle?
  /// Descriptors that `closeDescriptors` keeps for the caller.
  private let kept: [Handle?]
  /// True if this process becomes the program; otherwise it is PID 1 of a workspace, which starts the program.
  private let becomesProgram: Bool
  var root: Handle?
  var layers: [Handle] = []
  /// The directory that was looked up last.
  var last: (path: String, folder: Handle)?
  /// The mounts attached over masked files and directories; the first of each kind is cloned for the others.
  var masks: (file: Handle?, folder: Handle?)
  /// The resolution of paths inside the root, which `followSymlinks` changes.
  var walk: Resolution = [.inRoot, .noSymlinks]
  /// The file to which the program's label is written right before it runs, so that hooks do not get the label.
  private var label: (file: Handle, text: String)?
  /// The socket of the seccomp listener, and the container process state to send there.
  private var listener: (socket: Handle, state: String)?
  /// The connection that opened the gate; its client receives the failure if the program cannot run.
  private(set) var starter: ParentSocket?
  var hostPID: Int32 = 0
  /// The program's end of the terminal.
  var terminal: Handle?
  /// The program for `execute`, after everything that must precede its filter is done.
  private var program: (payload: Program, isInDirectory: Bool)?
  /// The directory at which the root is mounted.
  private var place: Handle?

  package init(
    _ plan: Plan, _ host: HostPart, _ supervisor: ParentSocket, gate: Handle? = nil, keeping kept: [Handle?] = [], becomesProgram: Bool
  ) {
    self.kept = kept
    self.becomesProgram = becomesProgram
    operations = plan.operations
    self.host = host
    self.supervisor = supervisor
    self.gate = gate
  }

  /// Executes all operations before `execute`.
  package mutating func enter() throws(StepFailure) {
    // This precedes the wait: a child that holds its parent's end of the socket never reads the EOF that says that its parent died.
    if let first = firstClosed { try host.closeAllExcept([supervisor.handle, gate] + kept, from: first) }
    do throws(Errno) {
      // The ids of its user namespace are mapped by then.
      guard case .proceed(let pid)? = try supervisor.receive()?.message else { throw .noSuchProcess }
      hostPID = pid
    } catch {
      throw StepFailure("enter namespaces", error)
    }
    place = openRootPath()
    for (index, operation) in operations.enumerated() {
      switch operation {
      case .awaitStart: if gate != nil { try findProgram() }
      case .user, .seccomp, .seccompListener: try prepareProgram()
      default: break
      }
      do throws(Errno) { try apply(operation, index) } catch { throw StepFailure(operation, error) }
      if case .user = operation, let program, !program.isInDirectory { try program.payload.enterDirectory() }
    }
  }

  /// Executes the program; returns only if that fails.
  func execute() -> StepFailure { program?.payload.execute() ?? StepFailure("execute", .invalid, kind: .execution) }

  /// Prepares the program as far as possible before a filter restricts the system calls for it.
  private mutating func prepareProgram() throws(StepFailure) {
    guard becomesProgram, program == nil else { return }
    var user: UInt32 = 0
    for operation in operations { if case .user(let uid, _, _, _, _) = operation { user = uid } }
    for operation in operations {
      guard case .execute(let arguments, var environment, let directory) = operation else { continue }
      if !environment.contains(where: { $0.utf8.starts(with: "HOME=".utf8) }) { environment.append("HOME=" + PasswordFile.home(of: user)) }
      let payload = Program(arguments: arguments, environment: environment, directory: directory)
      if terminal == nil { try Program.redirect(Program.Streams()) }
      if let label {
        do throws(Errno) { try label.file.descriptor.write(Array(label.text.utf8)) } catch {
          throw StepFailure("label the program " + label.text, error)
        }
      }
      try Program.closeDescriptors(from: firstClosed ?? 3)
      // The directory may be accessible only to root or, on network storage, only to the user.
      var isInDirectory = true
      do throws(StepFailure) { try payload.enterDirectory() } catch {
        if error.errno != Errno.access.code { throw error }
        isInDirectory = false
      }
      program = (payload, isInDirectory)
    }
  }

  /// Opens the root's own path on the host, where hooks expect it, with the host's ids; returns nil if it cannot be reached or is
  /// not the directory that was opened before.
  private func openRootPath() -> Handle? {
    for (index, operation) in operations.enumerated() {
      guard case .rootDirectory(let path) = operation, let root = host.opened[index] else { continue }
      do throws(Errno) {
        let (found, opened) = (Handle(try Descriptor.open(path, [.path, .directory])), try root.descriptor.status())
        let status = try found.descriptor.status()
        if status.inode == opened.inode && status.device == opened.device { return found }
      } catch {}
    }
    return nil
  }

  /// Reports a missing program already while the container is being created, where the caller expects the error.
  private func findProgram() throws(StepFailure) {
    for operation in operations {
      guard case .execute(let arguments, let environment, let directory) = operation else { continue }
      let name = arguments.first ?? ""
      do throws(Errno) {
        // The directory may be accessible only to the user.
        do throws(Errno) { try Process.changeDirectory(directory) } catch { if error != .access { throw error } }
        guard Program.candidates(name, environment).contains(where: { Process.exists($0) }) else { throw .noEntry }
        try Process.changeDirectory("/")
      } catch {
        throw StepFailure("find " + name, error)
      }
    }
  }

  /// The first descriptor that is closed; nil if none is.
  private var firstClosed: UInt32? {
    for operation in operations { if case .closeDescriptors(let first) = operation { return first } }
    return nil
  }

  private mutating func apply(_ operation: Operation, _ index: Int) throws(Errno) {
    switch operation {
    case .cgroup: try host.opened[index]?.descriptor.write([UInt8(ascii: "0")])
    case .layer: if let layer = host.opened[index] { layers.append(layer) }
    case .root(let bytes, let inodes): try makeRoot(bytes, inodes)
    case .directory(let path, let mode, let uid, let gid):
      let folder = try folder(at: path, creating: true)
      let writable = try folder.open(".", [.readOnly, .directory])
      try writable.setMode(mode)
      try writable.setOwner(uid, gid)
    case .rootDirectory: try makeRoot(from: index)
    case .attributes(let path, let change):
      try ChildPart.change(try here.descriptor.open(relative(path), [.path], resolving: walk), change)
      if change.propagation != 0 { try propagate(path, change.propagation) }
    case .workingDirectory(let path): _ = try folder(at: path, creating: true)
    case .bind(_, let target, let options):
      guard let mount = host.opened[index] else { throw .invalid }
      try attach(mount.descriptor, to: target)
      // Propagation is a property of the attached mount.
      if options.change.propagation != 0 { try propagate(target, options.change.propagation) }
    case .secrets(let target, _):
      guard let mount = host.opened[index] else { throw .invalid }
      try attach(mount.descriptor, to: target)
    case .fileSystem(let type, let source, let target, let options, let change, let copyUp):
      try mount(type, source, target, options, change, copyUp: copyUp)
    case .cgroupFileSystem(let hierarchies, let target, let attributes):
      try mountCgroups(hierarchies, at: target, MountAttributes(rawValue: attributes))
    case .device(let path, _, _), .outerNode(let path, _, _, _, _, _):
      guard let node = host.opened[index] else { throw .invalid }
      try Mount.attach(node.descriptor, to: try makeFile(path, mode: 0o666))
    case .node(let path, let mode, let major, let minor, let uid, let gid):
      try makeNode(path, mode, major, minor, uid, gid)
    case .symlink(let path, let target):
      let (parent, name) = try parent(of: path)
      do throws(Errno) { try parent.descriptor.makeSymlink(name, to: target) } catch { if error != .exists { throw error } }
    case .file(let path, let mode, let content): try makeFile(path, mode: mode, content: content)
    case .mask(let path): try mask(path)
    case .readOnly(let path): try makeReadOnly(path)
    case .pivotRoot:
      try Mount.pivot(into: try here.descriptor)
      last = nil
    case .hostname(let name): try Process.setHostname(name)
    case .domainname(let name): try Process.setDomainname(name)
    case .personality(let persona): try Process.setPersonality(persona)
    case .timeOffsets(let offsets): try setTimeOffsets(offsets)
    case .sysctl(let key, let value): try setSysctl(key, value)
    case .resourceLimit(let resource, let soft, let hard, let strict):
      if strict { return try Process.setLimit(Int32(resource), soft: soft, hard: hard) }
      // Without CAP_SYS_RESOURCE a hard limit cannot be raised: the host's limit then stays in force.
      let ceiling = min(hard, try Process.limit(Int32(resource)).hard)
      try Process.setLimit(Int32(resource), soft: min(soft, ceiling), hard: ceiling)
    case .sessionKeyring: try Process.newSessionKeyring()
    case .cgroupNamespace: try Process.unshare(.cgroup)
    case .rendezvous:
      try supervisor.send(.ready)
      guard case .proceed? = try supervisor.receive()?.message else { throw .noSuchProcess }
    case .hook(let arguments, let environment, let seconds, let input):
      try Hook(arguments: arguments, environment: environment, seconds: seconds).run(input, pid: hostPID)
    case .terminal(_, let rows, let columns): try openTerminal(index, rows: rows, columns: columns)
    case .awaitStart: try awaitStart()
    case .user(let uid, let gid, let groups, let mask, let sets):
      // Dropping capabilities from the bounding set needs a capability, so it precedes the change of user, which removes them all.
      try Process.limitBoundingCapabilities(to: sets.bounding)
      // The inheritable set, too, can only be built from permitted capabilities.
      if sets.permitted | sets.inheritable != 0 { try Process.keepPermittedCapabilities() }
      try Process.setIDs(uid: uid, gid: gid, groups: groups)
      // This follows the change of ids: leaving uid 0 needs CAP_SETUID, and the ambient set can be set only now.
      try Process.setCapabilities(
        effective: sets.effective, permitted: sets.permitted, inheritable: sets.inheritable, ambient: sets.ambient)
      Process.setFileMask(mask)
    case .undumpable: try dropHostAccess()
    case .noNewPrivileges: try Process.forbidNewPrivileges()
    case .label(let file, let text):
      guard let proc = host.opened[index] else { throw .invalid }
      label = (Handle(try proc.descriptor.open("thread-self/attr/" + file, [.writeOnly])), text)
    case .scheduler(let scheduler):
      try Process.setScheduler(
        policy: scheduler.policy, flags: scheduler.flags, nice: scheduler.nice, priority: scheduler.priority,
        runtime: scheduler.runtime, deadline: scheduler.deadline, period: scheduler.period)
    case .ioPriority(let value): try Process.setIOPriority(value)
    case .cpuAffinity(let mask): try Process.setAffinity(mask)
    case .seccompListener(_, let parts):
      guard let socket = host.opened[index] else { throw .invalid }
      listener = (socket, Hook.joined(parts, pid: hostPID))
    case .seccomp(let program, let flags):
      guard let listener else { return try Process.loadFilter(program, flags: flags) }
      let answers = try Process.loadAskingFilter(program, flags: flags)
      try Socket.send(listener.socket.descriptor, Array(listener.state.utf8), passing: [answers])
    case .joinNamespace(let kind, _):
      if Namespaces(rawValue: kind) == .cgroup, let file = host.opened[index] { try Process.join(file.descriptor, .cgroup) }
    case .namespaceRoot: try Process.setIDs(uid: 0, gid: 0, groups: [])
    case .slaveMounts: try Mount.makeSlave()
    case .fileMask(let mask): Process.setFileMask(mask)
    case .followSymlinks: walk = Defence.resolveInRoot.isOn ? .inRoot : []
    // `enter` has closed them.
    case .closeDescriptors: break
    // These are the supervisor's.
    case .userNamespace, .namespaces, .outOfMemoryScore, .log, .execute: break
    }
  }

  // ------------------------------------------------------------------ the root

  /// Mounts a tmpfs in this mount namespace as the staging area: other processes cannot reach it, so the paths that the overlay
  /// needs are safe. It is detached with the old root. It covers a directory of the host from which no hook runs.
  private func makeStagingMount() throws(Errno) -> Descriptor {
    let staging = try Mount.make("tmpfs", [("mode", "0700"), ("size", "1048576")])
    try Mount.attach(staging, to: try stagingTarget())
    try staging.makeDirectory("root", mode: 0o755)
    return staging
  }

  private func stagingTarget() throws(Errno) -> Descriptor {
    for place in ["/tmp", "/mnt", "/media", "/srv"] {
      let isNeeded = operations.contains { operation in
        if case .hook(let arguments, _, _, _) = operation { return arguments.first?.utf8.starts(with: (place + "/").utf8) ?? false }
        return false
      }
      if isNeeded { continue }
      do throws(Errno) { return try Descriptor.open(place, [.path, .directory, .noFollow]) } catch { if error != .noEntry { throw error } }
    }
    throw .noEntry
  }

  private mutating func makeRoot(from index: Int) throws(Errno) {
    guard let mount = host.opened[index] else { throw .invalid }
    if let place {
      try Mount.attach(mount.descriptor, to: place.descriptor)
    } else {
      try Mount.attach(mount.descriptor, to: try makeStagingMount().open("root", [.path, .directory]))
    }
    root = mount
  }

  private mutating func makeRoot(_ bytes: UInt64, _ inodes: UInt64) throws(Errno) {
    let staging = try makeStagingMount()
    try staging.makeDirectory("scratch", mode: 0o700)
    let scratch = try Mount.make(
      "tmpfs", [("size", "\(bytes)"), ("nr_inodes", "\(inodes)"), ("mode", "0755")],
      attributes: [.noSetuid, .noDevices])
    try Mount.attach(scratch, to: try staging.open("scratch", [.path, .directory]))
    try staging.makeDirectory("scratch/upper", mode: 0o755)
    try staging.makeDirectory("scratch/work", mode: 0o755)
    var lower = ""
    for (index, layer) in layers.enumerated() {
      try staging.makeDirectory("\(index)", mode: 0o755)
      try Mount.attach(layer.descriptor, to: try staging.open("\(index)", [.path, .directory]))
      lower += (index > 0 ? ":" : "") + "\(index)"
    }
    try Process.changeDirectory(staging)
    try Mount.overlay(at: "root", options: "lowerdir=\(lower),upperdir=scratch/upper,workdir=scratch/work,userxattr")
    let mounted = try staging.open("root", [.path, .directory])
    // Overlay becomes read-only without an error when it cannot make its work directory.
    if try Mount.isReadOnly(mounted) { throw .readOnly }
    root = Handle(mounted)
  }

  var here: Handle {
    get throws(Errno) {
      guard let root else { return Handle(try Descriptor.open("/", [.path, .directory])) }
      return root
    }
  }

  /// Opens a directory of the new root.
  mutating func folder(at path: String, creating: Bool) throws(Errno) -> Descriptor {
    let root = try here
    do throws(Errno) {
      return try root.descriptor.open(relative(path), [.path, .directory], resolving: walk)
    } catch {
      guard creating, error == .noEntry else { throw error }
    }
    let (parent, name) = try parent(of: path)
    do throws(Errno) {
      try parent.descriptor.makeDirectory(name, mode: 0o755)
    } catch {
      if error != .exists { throw error }
    }
    return try root.descriptor.open(relative(path), [.path, .directory], resolving: walk)
  }

  /// Opens the parent directory of a path. Plans list neighbours one after another, so the last directory is cached until something
  /// is mounted.
  mutating func parent(of path: String) throws(Errno) -> (Handle, String) {
    let path = path.utf8.last == UInt8(ascii: "/") ? path.split(separator: "/").joined(separator: "/") : path
    guard let name = path.split(separator: "/").last else { throw .invalid }
    let above = String(decoding: path.utf8.dropLast(name.utf8.count), as: UTF8.self)
    if let last, last.path == above { return (last.folder, String(name)) }
    let folder = Handle(try folder(at: above, creating: true))
    last = (above, folder)
    return (folder, String(name))
  }

  @discardableResult
  mutating func makeFile(_ path: String, mode: UInt32, content: [UInt8] = []) throws(Errno) -> Descriptor {
    let (parent, name) = try parent(of: path)
    let flags: OpenFlags = [.writeOnly, .create, .exclusive, .noFollow]
    let file: Descriptor
    do throws(Errno) {
      file = try parent.descriptor.open(name, flags, mode: mode)
    } catch {
      guard error == .exists else { throw error }
      // A file or symlink that the image has there is replaced and never followed.
      try parent.descriptor.remove(name)
      file = try parent.descriptor.open(name, flags, mode: mode)
    }
    if !content.isEmpty { try file.write(content) }
    return file
  }

  /// Attaches a mount to a directory or file of the root, which is made if it does not exist.
  mutating func attach(_ mount: borrowing Descriptor, to target: String) throws(Errno) {
    if try mount.status().kind == .directory { return try attach(folder: mount, to: target) }
    let existing: Descriptor
    do throws(Errno) {
      existing = try here.descriptor.open(relative(target), [.path], resolving: walk)
    } catch {
      guard error == .noEntry else { throw error }
      let (parent, name) = try parent(of: target)
      existing = try parent.descriptor.open(name, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o644)
    }
    try Mount.attach(mount, to: existing)
  }

  mutating func attach(folder mount: borrowing Descriptor, to target: String) throws(Errno) {
    try Mount.attach(mount, to: try folder(at: target, creating: true))
    last = nil
  }

  /// Makes this process untraceable and closes every descriptor of the host that a trace would find (CVE-2024-21626), and the locks
  /// of its creator. The objects that owned the closed numbers live until the program is executed.
  private func dropHostAccess() throws(Errno) {
    if Defence.undumpable.isOn { try Process.becomeUndumpable() }
    guard becomesProgram, Defence.closedDescriptors.isOn else { return }
    var needed: [Handle?] = [supervisor.handle, gate, terminal, starter?.handle, label?.file]
    for (index, operation) in operations.enumerated() { if case .seccompListener = operation { needed.append(host.opened[index]) } }
    try Process.closeAll(from: firstClosed ?? 3, except: needed.compactMap { $0 })
  }

  private mutating func awaitStart() throws(Errno) {
    guard let gate else {
      try supervisor.send(.waiting)
      guard case .start? = try supervisor.receive()?.message else { throw .noSuchProcess }
      return
    }
    try supervisor.send(.waiting)
    var poller = Poller()
    _ = poller.add(gate)
    try poller.wait()
    starter = ParentSocket(Handle(try Socket.accept(gate.descriptor)))
  }
}

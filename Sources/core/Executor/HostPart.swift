// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import ShimProtocol
  package import LaunchPlan
  package import Linux
#endif

/// The part of a launch that the supervisor executes on the host. Before the clone it opens every source, so that nothing is looked
/// up twice; after it, it maps ids. The child inherits the opened descriptors and attaches them.
package final class HostPart {
  private let operations: [Operation]
  /// The descriptor that was opened for each operation, by the operation's index.
  private(set) var opened: [Handle?]
  /// The writable side of the secrets' file system.
  package private(set) var secrets: Handle?
  /// The host's null device, for masked files.
  private(set) var null: Handle?
  /// The v2 cgroup in which the child is created.
  private var cgroupDescriptor: Handle?

  package init(_ plan: Plan) {
    operations = plan.operations
    opened = [Handle?](repeating: nil, count: plan.operations.count)
  }

  package func prepare() throws(StepFailure) {
    for (index, operation) in operations.enumerated() {
      do throws(Errno) { opened[index] = try open(operation) } catch { throw StepFailure(operation, error) }
    }
  }

  private func open(_ operation: Operation) throws(Errno) -> Handle? {
    switch operation {
    case .cgroup(let path):
      // On v1 the child writes itself to `tasks`, as a single thread and without the grace period of some 8 ms that a write to
      // `cgroup.procs` waits for. v2 has no such file, but clone3 can create the child in the cgroup.
      do throws(Errno) {
        return Handle(try Descriptor.open(path + "/tasks", [.writeOnly]))
      } catch {
        guard error == .noEntry else { throw error }
        cgroupDescriptor = Handle(try Descriptor.open(path, [.path, .directory, .noFollow]))
        return nil
      }
    case .layer(let path):
      return Handle(try Mount.clone(try Descriptor.open(path, [.path, .directory, .noFollow])))
    case .rootDirectory(let path):
      let mount = try Mount.clone(try Descriptor.open(path, [.path, .directory]), recursive: true)
      try Mount.leavePeerGroup(mount)
      return Handle(mount)
    case .bind(let source, _, let options): return Handle(try bind(source, options))
    case .joinNamespace(_, let path): return Handle(try Descriptor.open(path, [.readOnly]))
    case .terminal(let socket, _, _): return socket.isEmpty ? nil : Handle(try Socket.connect(path: socket))
    case .seccompListener(let socket, _): return Handle(try Socket.connect(path: socket))
    // Use the host's /proc: the container's may be any file system (CVE-2019-16884).
    case .label: return Handle(try Descriptor.open("/proc", [.path, .directory]))
    case .secrets(_, let bytes): return Handle(try makeSecrets(bytes))
    case .device(let path, let major, let minor): return Handle(try device(path, major, minor))
    case .outerNode(_, let mode, let major, let minor, let uid, let gid):
      return Handle(try makeNode(mode, major, minor, uid, gid))
    case .mask:
      if null == nil { null = Handle(try device("/dev/null", 1, 3)) }
      return nil
    default: return nil
    }
  }

  private func bind(_ source: String, _ options: BindOptions) throws(Errno) -> Descriptor {
    let file: Descriptor
    if options.followsSource {
      file = try Descriptor.open(source, [.path])
    } else {
      // No symlink is followed, so that the path that was checked is the one that is mounted.
      file = try Descriptor.openPlain(source, [.path])
    }
    let mount = try Mount.clone(file, recursive: options.recursive)
    // MS_SHARED, bit 20, requests that the mount stays in its peer group.
    if options.change.propagation & (1 << 20) == 0 { try Mount.leavePeerGroup(mount) }
    try ChildPart.change(mount, options.change)
    return mount
  }

  /// Clones a device node of the host after it has verified that it is that device (CVE-2025-31133).
  private func device(_ path: String, _ major: UInt32, _ minor: UInt32) throws(Errno) -> Descriptor {
    let mount = try Mount.clone(path)
    let status = try mount.status()
    guard status.kind == .characterDevice, status.major == major, status.minor == minor else { throw .invalid }
    return mount
  }

  /// Makes a device node on its own detached file system.
  private func makeNode(_ mode: UInt32, _ major: UInt32, _ minor: UInt32, _ uid: UInt32, _ gid: UInt32) throws(Errno) -> Descriptor {
    let mount = try Mount.make("tmpfs", [("mode", "0700"), ("size", "0"), ("nr_inodes", "2")], attributes: [.noSetuid, .noExec])
    try mount.makeNode("node", mode: mode, major: major, minor: minor)
    try mount.setOwner(uid, gid, "node")
    try mount.setMode(mode & 0o7777, "node")
    return try HostPart.clone(try mount.open("node", [.path, .noFollow]), in: mount)
  }

  /// Clones the mount at `file` in a detached mount. The caller holds `mount` until then: without a descriptor the mount is
  /// destroyed.
  private static func clone(_ file: borrowing Descriptor, in mount: borrowing Descriptor) throws(Errno) -> Descriptor {
    do throws(Errno) { return try Mount.clone(file) } catch {
      // Kernels before 6.15 clone only attached mounts: attach it in a mount namespace of its own.
      try Process.unshare(.mount)
      try Mount.makeSlave()
      try Mount.attach(mount, to: try Descriptor.open("/mnt", [.path, .directory, .noFollow]))
      return try Mount.clone(file)
    }
  }

  private func makeSecrets(_ bytes: UInt64) throws(Errno) -> Descriptor {
    let hardening: MountAttributes = [.noSetuid, .noDevices, .noExec]
    let mount: Descriptor
    do throws(Errno) {
      mount = try Mount.make(
        "tmpfs", [("size", "\(bytes)"), ("nr_inodes", "1024"), ("mode", "0755"), ("noswap", "")],
        attributes: hardening)
    } catch {
      // Kernels before 6.4 lack noswap. ramfs is never swapped either, but has no size limit; `SecretStore` bounds each file.
      mount = try Mount.make("ramfs", [("mode", "0755")], attributes: hardening)
    }
    secrets = Handle(try mount.open(".", [.readOnly, .directory]))
    let readOnlyClone = try HostPart.clone(mount, in: mount)
    try Mount.setAttributes(readOnlyClone, [.readOnly])
    return readOnlyClone
  }

  /// Clones the child into the new namespaces; returns nil in the child.
  package func clone() throws(StepFailure) -> Child? {
    var flags: Namespaces = []
    var owner: UInt32 = 0
    var joined: [(kind: Namespaces, file: Handle)] = []
    for (index, operation) in operations.enumerated() {
      switch operation {
      case .userNamespace(let id, _, _):
        owner = id
        flags.insert(.user)
      case .namespaces(let kinds): flags.formUnion(Namespaces(rawValue: kinds))
      // The child joins the cgroup namespace later itself: from inside it a process cannot move to a cgroup outside (`nsdelegate`).
      case .joinNamespace(let kind, _):
        let kind = Namespaces(rawValue: kind)
        if let file = opened[index], kind != .cgroup { joined.append((kind, file)) }
      default: break
      }
    }
    do throws(Errno) {
      if !joined.isEmpty { return try clone(into: flags, joining: joined) }
      if owner == 0 { return try Process.clone(into: flags, cgroup: cgroupDescriptor) }
      // The owner of the namespace must be the workspace's own host uid: the kernel counts inotify instances, namespaces and more
      // for the owner, and if root were the owner, one workspace could use up the limits of all.
      try Process.keepCapabilitiesAcrossSetID()
      try Process.setEffectiveIDs(owner, owner)
      let child: Child?
      do throws(Errno) {
        child = try Process.clone(into: flags, cgroup: cgroupDescriptor)
      } catch {
        try Process.setEffectiveIDs(0, 0)
        throw error
      }
      guard let child else { return nil }
      try Process.setEffectiveIDs(0, 0)
      return child
    } catch {
      throw StepFailure("new namespaces", error)
    }
  }

  /// Clones through a process that joins the namespaces, so that this process stays in its own: that process's clone belongs to the
  /// user namespace it has joined, and is a child of this process.
  private func clone(into flags: Namespaces, joining joined: [(kind: Namespaces, file: Handle)]) throws(Errno) -> Child? {
    let pipe = try Pipe()
    let pid = try Process.fork()
    if pid == 0 {
      var report: Int32
      do throws(Errno) {
        // Join the user namespace first: joining the others needs the capabilities in it.
        for entry in joined where entry.kind == .user { try Process.join(entry.file.descriptor, .user) }
        for entry in joined where entry.kind != .user { try Process.join(entry.file.descriptor, entry.kind) }
        guard let clonedPID = try Process.cloneSibling(into: flags, cgroup: cgroupDescriptor) else { return nil }
        report = clonedPID
      } catch {
        report = -error.code
      }
      var bytes: [UInt8] = []
      bytes.append(number: UInt64(bitPattern: Int64(report)), width: 8)
      do throws(Errno) { try pipe.writing?.descriptor.write(bytes) } catch {}
      Process.exit(0)
    }
    pipe.closeWriting()
    let bytes = try pipe.reading.descriptor.read(upTo: 8)
    _ = try Process.reap(pid, wait: true)
    var reader = Reader(bytes)
    let report: Int64
    do throws(PlanError) { report = Int64(bitPattern: try reader.number(width: 8)) } catch { throw .noChild }
    if report < 0 { throw Errno(Int32(-report)) }
    // The pid cannot have been reused: it is a child of this process, which alone can reap it.
    let childPID = Int32(report)
    return Child(pid: childPID, handle: Handle(try Process.open(pid: childPID)))
  }

  /// Writes id maps, maps mounts, and does what else needs the child's pid.
  package func complete(child: Child) throws(StepFailure) {
    var namespace: Handle?
    let owner = operations.contains { if case .userNamespace = $0 { true } else { false } }
    for (index, operation) in operations.enumerated() {
      do throws(Errno) {
        switch operation {
        case .userNamespace(_, let uids, let gids):
          try writeMap(child.pid, "uid_map", uids)
          try writeMap(child.pid, "gid_map", gids)
        case .layer:
          guard let mount = opened[index], owner else { continue }
          if namespace == nil { namespace = Handle(try Descriptor.open("/proc/\(child.pid)/ns/user", [.readOnly])) }
          if let namespace { try Mount.mapIDs(mount.descriptor, by: namespace.descriptor) }
        case .bind(_, _, let options): try mapBind(index, options)
        case .outOfMemoryScore(let score):
          try Descriptor.open("/proc/\(child.pid)/oom_score_adj", [.writeOnly]).write(Array("\(score)".utf8))
        default: break
        }
      } catch {
        throw StepFailure(operation, error)
      }
    }
  }

  /// Maps the binds only, which needs no child.
  func completeBinds() throws(StepFailure) {
    for (index, operation) in operations.enumerated() {
      guard case .bind(_, _, let options) = operation else { continue }
      do throws(Errno) { try mapBind(index, options) } catch { throw StepFailure(operation, error) }
    }
  }

  private func mapBind(_ index: Int, _ options: BindOptions) throws(Errno) {
    guard let mount = opened[index], !options.uids.isEmpty else { return }
    try Mount.mapIDs(mount.descriptor, by: try mappingNamespace(options.uids, options.gids), recursive: options.mapsRecursively)
  }

  private func writeMap(_ pid: Int32, _ name: String, _ ranges: [IDRange]) throws(Errno) {
    var text = ""
    for range in ranges { text += "\(range.inside) \(range.outside) \(range.count)\n" }
    try Descriptor.open("/proc/\(pid)/\(name)", [.writeOnly]).write(Array(text.utf8))
  }

  /// Creates a user namespace that serves only as the id map of a mount. Its process has exited when this returns; the descriptor
  /// keeps the namespace.
  private func mappingNamespace(_ uids: [IDRange], _ gids: [IDRange]) throws(Errno) -> Descriptor {
    let gate = try Pipe()
    guard let holder = try Process.clone(into: .user) else {
      // The child waits to be killed: the read blocks, since nothing is written.
      do throws(Errno) { _ = try gate.reading.descriptor.read(upTo: 1) } catch {}
      Process.exit(0)
    }
    let result: Result<Int32, Errno>
    do throws(Errno) {
      try writeMap(holder.pid, "uid_map", uids)
      try writeMap(holder.pid, "gid_map", gids)
      result = .success(try Descriptor.open("/proc/\(holder.pid)/ns/user", [.readOnly]).release())
    } catch {
      result = .failure(error)
    }
    try holder.signal(Signals.kill)
    _ = try Process.reap(holder.pid, wait: true)
    return Descriptor(adopting: try result.get())
  }

  /// Closes in the child every descriptor except those it attaches and `kept`: above all the parent's end of their socket, whose
  /// EOF tells the child that its parent has died. The objects that owned the closed numbers live until the child exits.
  package func closeAllExcept(_ kept: [Handle?], from first: UInt32) throws(StepFailure) {
    guard Defence.closedDescriptors.isOn else { return }
    var all = opened
    all.append(null)
    do throws(Errno) {
      try Process.closeAll(from: first, except: (all + kept).compactMap { $0 })
    } catch {
      throw StepFailure("close descriptors", error)
    }
  }

  /// Closes everything except the secrets.
  package func closeMounts() {
    opened = []
    null = nil
  }
}

/// Returns the path without its leading slash, for a look-up below a root descriptor.
func relative(_ path: String) -> String {
  let trimmed = path.drop { $0 == "/" }
  return trimmed.isEmpty ? "." : String(trimmed)
}

extension StepFailure {
  /// Creates the failure of an operation of a plan.
  init(_ operation: Operation, _ error: Errno) {
    if case .bind(let source, _, _) = operation {
      self.init(operation.label, error, kind: .bind, subject: source)
    } else {
      self.init(operation.label, error)
    }
  }
}

extension Operation {
  /// The operation's name and the path that it applies to.
  var label: String {
    switch self {
    case .cgroup(let path), .layer(let path), .rootDirectory(let path), .directory(let path, _, _, _), .device(let path, _, _),
      .node(let path, _, _, _, _, _), .outerNode(let path, _, _, _, _, _), .symlink(let path, _), .file(let path, _, _), .mask(let path),
      .readOnly(let path),
      .joinNamespace(_, let path), .terminal(let path, _, _):
      name + " " + path
    case .bind(let source, let target, _): name + " " + source + " at " + target
    case .fileSystem(let type, _, let target, _, _, _): name + " " + type + " at " + target
    case .secrets(let target, _): name + " " + target
    case .resourceLimit(let resource, let soft, let hard, _): name + " \(resource) to \(soft):\(hard)"
    case .sysctl(let key, _): name + " " + key
    case .hook(let arguments, _, _, _): name + " " + (arguments.first ?? "")
    default: name
    }
  }
}

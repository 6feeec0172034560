// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// What the child does inside its new namespaces, operation by operation, in the plan's order.
struct ChildPart {
  private let operations: [Operation]
  private let host: HostPart
  private let supervisor: MessageSocket
  private var root: Handle?
  private var layers: [Handle] = []

  init(_ plan: Plan, _ host: HostPart, _ supervisor: MessageSocket) {
    operations = plan.operations
    self.host = host
    self.supervisor = supervisor
  }

  /// Everything up to, and without, `execute`.
  mutating func enter() throws(StepFailure) {
    do throws(Errno) {
      guard case .proceed? = try supervisor.receive()?.message else { throw .noSuchProcess }
      if isolated { try Process.setIDs(uid: 0, gid: 0, groups: []) }
      try Mount.makeSlave()
      Process.setFileMask(0)
    } catch {
      throw StepFailure("enter namespaces", error)
    }
    for (index, operation) in operations.enumerated() {
      do throws(Errno) { try apply(operation, index) } catch { throw StepFailure(operation.label, error) }
    }
  }

  private var isolated: Bool {
    for operation in operations { if case .userNamespace = operation { return true } }
    return false
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
    case .bind(_, let target, _, _), .secrets(let target, _): try attach(index, to: target)
    case .proc:
      let proc = try Mount.make("proc", attributes: [.noSetuid, .noDevices, .noExec])
      guard try Mount.isFileSystem(proc, FileSystemMagic.proc) else { throw .invalid }
      try attach(proc, to: "/proc")
    case .sysfs:
      try attach(try Mount.make("sysfs", attributes: [.readOnly, .noSetuid, .noDevices, .noExec]), to: "/sys")
    case .cgroupFileSystem(let hierarchies): try mountCgroups(hierarchies)
    case .tmpfs(let target, let bytes, let inodes, let mode, let attributes):
      let mount = try Mount.make(
        "tmpfs", [("size", "\(bytes)"), ("nr_inodes", "\(inodes)"), ("mode", octal(mode))],
        attributes: MountAttributes(rawValue: attributes))
      try attach(mount, to: target)
    case .device(let path, _, _):
      guard let node = host.opened[index] else { throw .invalid }
      try makeFile(path, mode: 0o666, content: [])
      try Mount.attach(
        node.descriptor, to: try rootDescriptor().open(relative(path), [.path, .noFollow], resolving: [.inRoot, .noSymlinks]))
    case .devpts:
      let pts = try Mount.make(
        "devpts", [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")],
        attributes: [.noSetuid, .noExec])
      guard try Mount.isFileSystem(pts, FileSystemMagic.devpts) else { throw .invalid }
      try attach(pts, to: "/dev/pts")
    case .mqueue: try attach(try Mount.make("mqueue", attributes: [.noSetuid, .noDevices, .noExec]), to: "/dev/mqueue")
    case .symlink(let path, let target):
      let (parent, name) = try parent(of: path)
      try parent.descriptor.makeSymlink(name, to: target)
    case .file(let path, let mode, let content): try makeFile(path, mode: mode, content: content)
    case .mask(let path): try mask(path, with: host.opened[index])
    case .readOnly(let path): try makeReadOnly(path)
    case .pivotRoot: try Mount.pivot(into: try rootDescriptor())
    case .hostname(let name): try Process.setHostname(name)
    case .sysctl(let key, let value): try setSysctl(key, value)
    case .resourceLimit(let resource, let soft, let hard):
      // Hosts without CAP_SYS_RESOURCE cannot raise a hard limit: the host's own then stays in force.
      let present = try Process.limit(Int32(resource))
      let ceiling = min(hard, present.hard)
      try Process.setLimit(Int32(resource), soft: min(soft, ceiling), hard: ceiling)
    case .sessionKeyring: try Process.newSessionKeyring()
    case .cgroupNamespace: try Process.unshare(.cgroup)
    case .awaitStart:
      try supervisor.send(.waiting(pid: Process.id))
      guard case .start? = try supervisor.receive()?.message else { throw .noSuchProcess }
    case .capabilities: try Process.dropBoundingCapabilities()
    case .user(let uid, let gid, let groups, let mask):
      try Process.setIDs(uid: uid, gid: gid, groups: groups)
      // After the ids: leaving uid 0 needs CAP_SETUID, and the ambient set can only be emptied now.
      try Process.clearCapabilities()
      Process.setFileMask(mask)
    case .undumpable: try Process.becomeUndumpable()
    case .noNewPrivileges: try Process.forbidNewPrivileges()
    case .seccomp(let program): try Process.loadFilter(program)
    case .userNamespace, .namespaces, .outOfMemoryScore, .log, .execute: break
    }
  }

  // ------------------------------------------------------------------ the root

  /// A tmpfs over /tmp of this mount namespace is the workbench: nobody else can reach a path in it, so the
  /// paths that the overlay needs are safe. It goes with the old root.
  private mutating func makeRoot(_ bytes: UInt64, _ inodes: UInt64) throws(Errno) {
    let bench = try Mount.make("tmpfs", [("mode", "0700"), ("size", "1048576")])
    try Mount.attach(bench, to: try Descriptor.open("/tmp", [.path, .directory, .noFollow]))
    let here = try bench.open(".", [.readOnly, .directory])
    try here.makeDirectory("scratch", mode: 0o700)
    try here.makeDirectory("root", mode: 0o755)
    let scratch = try Mount.make(
      "tmpfs", [("size", "\(bytes)"), ("nr_inodes", "\(inodes)"), ("mode", "0755")],
      attributes: [.noSetuid, .noDevices])
    try Mount.attach(scratch, to: try here.open("scratch", [.path, .directory]))
    try here.makeDirectory("scratch/upper", mode: 0o755)
    try here.makeDirectory("scratch/work", mode: 0o755)
    var lower = ""
    for (index, layer) in layers.enumerated() {
      try here.makeDirectory("\(index)", mode: 0o755)
      try Mount.attach(layer.descriptor, to: try here.open("\(index)", [.path, .directory]))
      lower += (index > 0 ? ":" : "") + "\(index)"
    }
    try Process.changeDirectory(here)
    try Mount.overlay(at: "root", options: "lowerdir=\(lower),upperdir=scratch/upper,workdir=scratch/work,userxattr")
    let mounted = try here.open("root", [.path, .directory])
    // Overlay turns silently read-only when it cannot make its work directory.
    if try Mount.isReadOnly(mounted) { throw .readOnly }
    root = Handle(mounted)
  }

  private func rootDescriptor() throws(Errno) -> Descriptor {
    guard let root else { return try Descriptor.open("/", [.path, .directory]) }
    return try root.descriptor.duplicate()
  }

  /// A folder of the new root. No component may be a symlink: an image could lead a mount elsewhere with one
  /// (CVE-2019-19921, CVE-2026-47766).
  private func folder(at path: String, creating: Bool) throws(Errno) -> Descriptor {
    let root = try rootDescriptor()
    do throws(Errno) {
      return try root.open(relative(path), [.path, .directory], resolving: [.inRoot, .noSymlinks])
    } catch {
      guard creating, error == .noEntry else { throw error }
    }
    let (parent, name) = try parent(of: path)
    do throws(Errno) {
      try parent.descriptor.makeDirectory(name, mode: 0o755)
    } catch {
      if error != .exists { throw error }
    }
    return try root.open(relative(path), [.path, .directory], resolving: [.inRoot, .noSymlinks])
  }

  private func parent(of path: String) throws(Errno) -> (Handle, String) {
    let parts = path.split(separator: "/")
    guard let name = parts.last else { throw .invalid }
    var above = ""
    for part in parts.dropLast() { above += "/" + part }
    return (Handle(try folder(at: above.isEmpty ? "/" : above, creating: true)), String(name))
  }

  private func makeFile(_ path: String, mode: UInt32, content: [UInt8]) throws(Errno) {
    let (parent, name) = try parent(of: path)
    // Whatever the image has there, a symlink too, is replaced and not followed.
    do throws(Errno) { try parent.descriptor.remove(name) } catch { if error != .noEntry { throw error } }
    let file = try parent.descriptor.open(name, [.writeOnly, .create, .exclusive, .noFollow], mode: mode)
    try file.write(content)
  }

  private func attach(_ index: Int, to target: String) throws(Errno) {
    guard let mount = host.opened[index] else { throw .invalid }
    try Mount.attach(mount.descriptor, to: try folder(at: target, creating: true))
  }

  private func attach(_ mount: borrowing Descriptor, to target: String) throws(Errno) {
    try Mount.attach(mount, to: try folder(at: target, creating: true))
  }

  private func mountCgroups(_ hierarchies: [String]) throws(Errno) {
    let hardening: MountAttributes = [.readOnly, .noSetuid, .noDevices, .noExec]
    if hierarchies.isEmpty {
      try attach(try Mount.make("cgroup2", attributes: hardening), to: "/sys/fs/cgroup")
      return
    }
    let parent = try Mount.make("tmpfs", [("mode", "0755"), ("size", "65536")], attributes: [.noSetuid, .noDevices, .noExec])
    try attach(parent, to: "/sys/fs/cgroup")
    for hierarchy in hierarchies {
      let controllers = hierarchy.split(separator: ",")
      try attach(
        try Mount.make("cgroup", controllers.map { (String($0), "") }, attributes: hardening), to: "/sys/fs/cgroup/\(hierarchy)")
      // Where two are mounted together, each is found by its own name as well, as on the host.
      if controllers.count > 1 {
        for controller in controllers { try parent.makeSymlink(String(controller), to: hierarchy) }
      }
    }
    try Mount.setAttributes(parent, [.readOnly])
  }

  private func mask(_ path: String, with null: Handle?) throws(Errno) {
    let target: Descriptor
    do throws(Errno) {
      target = try rootDescriptor().open(relative(path), [.path, .noFollow], resolving: [.inRoot, .noSymlinks])
    } catch {
      // Not every kernel has every one of these.
      if error == .noEntry || error == .notDirectory { return }
      throw error
    }
    if try target.status().kind == .directory {
      try Mount.attach(
        try Mount.make(
          "tmpfs", [("mode", "0755"), ("size", "0"), ("nr_inodes", "2")], attributes: [.readOnly, .noSetuid, .noDevices, .noExec]),
        to: target)
    } else {
      guard let null else { throw .invalid }
      try Mount.attach(null.descriptor, to: target)
    }
  }

  private func makeReadOnly(_ path: String) throws(Errno) {
    let target: Descriptor
    do throws(Errno) {
      target = try rootDescriptor().open(relative(path), [.path, .noFollow], resolving: [.inRoot, .noSymlinks])
    } catch {
      if error == .noEntry { return }
      throw error
    }
    let clone = try Mount.clone(target)
    try Mount.setAttributes(clone, [.readOnly, .noSetuid, .noDevices, .noExec])
    try Mount.attach(clone, to: target)
  }

  private func setSysctl(_ key: String, _ value: String) throws(Errno) {
    var path = "proc/sys"
    for part in key.split(separator: ".") { path += "/" + part }
    let root = try rootDescriptor()
    let proc = try root.open("proc", [.path, .directory], resolving: [.inRoot, .noSymlinks])
    guard try Mount.isFileSystem(proc, FileSystemMagic.proc) else { throw .invalid }
    let file = try root.open(path, [.writeOnly], resolving: [.inRoot, .noSymlinks])
    try file.write(Array(value.utf8))
  }
}

private func octal(_ mode: UInt32) -> String {
  "\(mode >> 9 & 7)\(mode >> 6 & 7)\(mode >> 3 & 7)\(mode & 7)"
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// What the supervisor does on the host for each operation: before the clone it opens every source, so that
/// nothing is looked up twice; after it, it maps ids. What it opened, the child inherits and attaches.
final class HostPart {
  private let operations: [Operation]
  /// By the operation's index: what was opened for it.
  private(set) var opened: [Handle?]
  /// The side of the secrets' file system that can be written to.
  private(set) var secrets: Handle?
  /// The v2 cgroup that the child is born into.
  private var birthplace: Handle?

  init(_ plan: Plan) {
    operations = plan.operations
    opened = [Handle?](repeating: nil, count: plan.operations.count)
  }

  func prepare() throws(StepFailure) {
    for (index, operation) in operations.enumerated() {
      do throws(Errno) { opened[index] = try open(operation) } catch { throw StepFailure(operation.label, error) }
    }
  }

  private func open(_ operation: Operation) throws(Errno) -> Handle? {
    switch operation {
    case .cgroup(let path):
      let folder = try Descriptor.open(path, [.path, .directory, .noFollow])
      // v1: the child writes itself into `tasks`, as one thread and without the grace period of some 8 ms that a
      // write to `cgroup.procs` waits for. v2 has no such file, and clone3 can start the child in the right place.
      do throws(Errno) {
        return Handle(try folder.open("tasks", [.writeOnly]))
      } catch {
        guard error == .noEntry else { throw error }
        birthplace = Handle(folder)
        return nil
      }
    case .layer(let path):
      return Handle(try Mount.clone(try Descriptor.open(path, [.path, .directory, .noFollow])))
    case .bind(let source, _, let attributes, _):
      // No symlink anywhere in the source: what was checked is what is mounted.
      let root = try Descriptor.open("/", [.path, .directory])
      let folder = try root.open(relative(source), [.path, .directory], resolving: [.inRoot, .noSymlinks])
      let mount = try Mount.clone(folder)
      try Mount.setAttributes(mount, MountAttributes(rawValue: attributes))
      return Handle(mount)
    case .secrets(_, let bytes): return Handle(try makeSecrets(bytes))
    case .device(let path, let major, let minor): return Handle(try device(path, major, minor))
    case .mask: return Handle(try device("/dev/null", 1, 3))
    default: return nil
    }
  }

  /// A clone of a host device node, after proof that it is that device (CVE-2025-31133).
  private func device(_ path: String, _ major: UInt32, _ minor: UInt32) throws(Errno) -> Descriptor {
    let node = try Descriptor.open(path, [.path, .noFollow])
    let status = try node.status()
    guard status.kind == .characterDevice, status.major == major, status.minor == minor else { throw .invalid }
    return try Mount.clone(node)
  }

  private func makeSecrets(_ bytes: UInt64) throws(Errno) -> Descriptor {
    let hardening: MountAttributes = [.noSetuid, .noDevices, .noExec]
    let mount: Descriptor
    do throws(Errno) {
      mount = try Mount.make(
        "tmpfs", [("size", "\(bytes)"), ("nr_inodes", "1024"), ("mode", "0755"), ("noswap", "")],
        attributes: hardening)
    } catch {
      // Kernels before 6.4 lack noswap. ramfs is never swapped either; `putSecret` bounds what it holds.
      mount = try Mount.make("ramfs", [("mode", "0755")], attributes: hardening)
    }
    secrets = Handle(try mount.open(".", [.readOnly, .directory]))
    let twin: Descriptor
    do throws(Errno) {
      twin = try Mount.clone(mount)
    } catch {
      // Before 6.15 only attached mounts can be cloned: attach it out of everybody's sight.
      try Process.unshare(.mount)
      try Mount.makeSlave()
      try Mount.attach(mount, to: try Descriptor.open("/mnt", [.path, .directory, .noFollow]))
      twin = try Mount.clone(mount)
    }
    try Mount.setAttributes(twin, [.readOnly])
    return twin
  }

  /// The clone into the new namespaces; nil in the child.
  func clone() throws(StepFailure) -> Child? {
    var flags: Namespaces = []
    var owner: UInt32?
    for operation in operations {
      switch operation {
      case .userNamespace(let first, _):
        owner = first
        flags.insert(.user)
      case .namespaces(let kinds): flags.formUnion(Namespaces(rawValue: kinds))
      default: break
      }
    }
    do throws(Errno) {
      guard let owner else { return try Process.clone(into: flags, cgroup: birthplace) }
      // The namespace must belong to the workspace's own host uid: the kernel counts inotify instances,
      // namespaces and more for the owner, and with root as the owner one workspace could use up all.
      try Process.keepCapabilitiesAcrossSetID()
      try Process.setEffectiveIDs(owner, owner)
      guard let child = try Process.clone(into: flags, cgroup: birthplace) else { return nil }
      try Process.setEffectiveIDs(0, 0)
      return child
    } catch {
      throw StepFailure("new namespaces", error)
    }
  }

  /// Id maps, id-mapped mounts and what else needs the child's pid.
  func complete(child: Child) throws(StepFailure) {
    var namespace: Handle?
    var first: UInt32 = 0
    for (index, operation) in operations.enumerated() {
      do throws(Errno) {
        switch operation {
        case .userNamespace(let start, let count):
          first = start
          try writeMap(child.pid, "uid_map", inside: 0, outside: start, count: count)
          try writeMap(child.pid, "gid_map", inside: 0, outside: start, count: count)
          namespace = Handle(try Descriptor.open("/proc/\(child.pid)/ns/user", [.readOnly]))
        case .layer:
          if let mount = opened[index], let namespace { try Mount.mapIDs(mount.descriptor, by: namespace.descriptor) }
        case .bind(_, _, _, let ids):
          if let mount = opened[index], let ids {
            try Mount.mapIDs(mount.descriptor, by: try mappingNamespace(ids, first: first))
          }
        case .outOfMemoryScore(let score):
          try Descriptor.open("/proc/\(child.pid)/oom_score_adj", [.writeOnly]).write(Array("\(score)".utf8))
        default: break
        }
      } catch {
        throw StepFailure(operation.label, error)
      }
    }
  }

  private func writeMap(_ pid: Int32, _ name: String, inside: UInt32, outside: UInt32, count: UInt32) throws(Errno) {
    let file = try Descriptor.open("/proc/\(pid)/\(name)", [.writeOnly])
    try file.write(Array("\(inside) \(outside) \(count)\n".utf8))
  }

  /// A user namespace that only serves as the map of a mount. Its process is gone when this returns; the
  /// descriptor keeps the namespace.
  private func mappingNamespace(_ ids: IDMapping, first: UInt32) throws(Errno) -> Descriptor {
    let gate = try Pipe()
    guard let holder = try Process.clone(into: .user) else {
      // In the child: wait to be killed. Reading is enough, since nobody writes.
      do throws(Errno) { _ = try gate.reading.descriptor.read(upTo: 1) } catch {}
      Process.exit(0)
    }
    let result: Result<Int32, Errno>
    do throws(Errno) {
      try writeMap(holder.pid, "uid_map", inside: ids.fromUID, outside: first + ids.toUID, count: 1)
      try writeMap(holder.pid, "gid_map", inside: ids.fromGID, outside: first + ids.toGID, count: 1)
      result = .success(try Descriptor.open("/proc/\(holder.pid)/ns/user", [.readOnly]).release())
    } catch {
      result = .failure(error)
    }
    try holder.signal(Signals.kill)
    _ = try Process.reap(holder.pid, wait: true)
    return Descriptor(adopting: try result.get())
  }

  /// The supervisor is done with everything but the secrets.
  func closeMounts() { opened = [] }
}

/// Without the leading slash, for a look-up below a root descriptor.
func relative(_ path: String) -> String {
  let trimmed = path.drop { $0 == "/" }
  return trimmed.isEmpty ? "." : String(trimmed)
}

extension Operation {
  /// Its name, with the path it is about.
  var label: String {
    switch self {
    case .cgroup(let path), .layer(let path), .directory(let path, _, _, _), .device(let path, _, _),
      .symlink(let path, _), .file(let path, _, _), .mask(let path), .readOnly(let path):
      name + " " + path
    case .bind(let source, let target, _, _): name + " " + source + " at " + target
    case .secrets(let target, _), .tmpfs(let target, _, _, _, _): name + " " + target
    case .sysctl(let key, _): name + " " + key
    default: name
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import ShimProtocol
  internal import LaunchPlan
  internal import Linux
#endif

/// Operations that attach a mount to the root, or change one.
extension ChildPart {
  /// Changes the attributes of a mount and of all mounts below it (mount_setattr(2)), but not propagation: a detached mount has
  /// none.
  static func change(_ mount: borrowing Descriptor, _ change: MountChange) throws(Errno) {
    if change.recursiveSet | change.recursiveClear != 0 {
      try Mount.setAttributes(
        mount, MountAttributes(rawValue: change.recursiveSet), clearing: MountAttributes(rawValue: change.recursiveClear),
        recursive: true)
    }
    if change.set | change.clear != 0 {
      try Mount.setAttributes(
        mount, MountAttributes(rawValue: change.set), clearing: MountAttributes(rawValue: change.clear))
    }
  }

  func propagate(_ target: String, _ propagation: UInt64) throws(Errno) {
    let mounted = try here.descriptor.open(relative(target), [.path], resolving: walk)
    // mount_setattr(2) takes the propagation type without MS_REC, which is bit 14.
    let recursive = propagation & (1 << 14) != 0
    try Mount.setAttributes(mounted, [], propagation: propagation & ~(1 << 14), recursive: recursive)
  }

  mutating func mount(
    _ type: String, _ source: String, _ target: String, _ options: [String], _ change: MountChange, copyUp: Bool
  ) throws(Errno) {
    var pairs: [(String, String)] = source.isEmpty ? [] : [("source", source)]
    for option in options {
      let parts = option.split(separator: "=", maxSplits: 1)
      pairs.append((String(parts.first ?? ""), parts.count > 1 ? String(parts[1]) : ""))
    }
    let mount = try Mount.make(type, pairs, attributes: MountAttributes(rawValue: change.set))
    if copyUp {
      do throws(Errno) {
        let below = try folder(at: target, creating: false).open(".", [.readOnly, .directory])
        // A read-only file system must be filled before it becomes read-only.
        try Mount.setAttributes(mount, [], clearing: .readOnly)
        try Copy.contents(of: below, to: try mount.open(".", [.readOnly, .directory]))
        try Mount.setAttributes(mount, MountAttributes(rawValue: change.set))
      } catch {
        if error != .noEntry { throw error }
      }
    }
    let walked = walk
    // Never follow a symlink of the image: it would choose the files that are later read and written there (CVE-2019-19921).
    if type == "proc" || type == "sysfs", Defence.resolveInRoot.isOn { walk = [.inRoot, .noSymlinks] }
    defer { walk = walked }
    try attach(folder: mount, to: target)
    if change.propagation != 0 { try propagate(target, change.propagation) }
  }

  mutating func makeNode(
    _ path: String, _ mode: UInt32, _ major: UInt32, _ minor: UInt32, _ uid: UInt32, _ gid: UInt32
  ) throws(Errno) {
    let (parent, name) = try parent(of: path)
    do throws(Errno) {
      try parent.descriptor.makeNode(name, mode: mode, major: major, minor: minor)
    } catch {
      // The node may exist already, with the host's /dev in the container; a different node at this path is an error.
      guard error == .exists else { throw error }
      let status = try parent.descriptor.open(name, [.path, .noFollow]).status()
      guard status.major == major, status.minor == minor else { throw .exists }
      return
    }
    try parent.descriptor.setOwner(uid, gid, name)
    try parent.descriptor.setMode(mode & 0o7777, name)
  }

  func setTimeOffsets(_ offsets: [String]) throws(Errno) {
    try Process.unshare(.time)
    let file = try Descriptor.open("/proc/self/timens_offsets", [.writeOnly])
    var text = ""
    for offset in offsets { text += offset + "\n" }
    try file.write(Array(text.utf8))
    // The namespace must be empty while its offsets are set; afterwards the process that made it joins it here.
    try Process.join(try Descriptor.open("/proc/self/ns/time_for_children", [.readOnly]), .time)
  }

  mutating func openTerminal(_ index: Int, rows: UInt32, columns: UInt32) throws(Errno) {
    let pair = try Terminal.open("/dev/pts/ptmx")
    // A container that is joined may have any file at this path.
    guard try Mount.isFileSystem(pair.slave.descriptor, FileSystemMagic.devpts) else { throw .invalid }
    if rows | columns != 0 { try Terminal.resize(pair.master.descriptor, rows: UInt16(clamping: rows), columns: UInt16(clamping: columns)) }
    for operation in operations {
      if case .user(let uid, _, _, _, _) = operation { try pair.slave.descriptor.setOwner(uid, .max) }
    }
    if let socket = host.opened[index] {
      try Socket.send(socket.descriptor, Array("/dev/pts/ptmx".utf8), passing: [pair.master])
    } else {
      try supervisor.send(.terminal, passing: [pair.master])
    }
    // Hooks that run before the program already use the terminal.
    do throws(StepFailure) { try Program.redirect(Program.Streams(terminal: pair.slave)) } catch { throw Errno(error.errno) }
    terminal = pair.slave
    if root != nil {
      try Mount.attach(try Mount.clone(pair.slave.descriptor), to: try makeFile("/dev/console", mode: 0o600))
    }
  }

  mutating func mountCgroups(_ hierarchies: [String], at target: String, _ attributes: MountAttributes) throws(Errno) {
    if hierarchies.isEmpty {
      try attach(folder: try Mount.make("cgroup2", attributes: attributes), to: target)
      return
    }
    let parent = try Mount.make("tmpfs", [("mode", "0755"), ("size", "65536")], attributes: [.noSetuid, .noDevices, .noExec])
    try attach(folder: parent, to: target)
    for hierarchy in hierarchies {
      let controllers = hierarchy.split(separator: ",")
      try parent.makeDirectory(hierarchy, mode: 0o755)
      let folder = try parent.open(hierarchy, [.path, .directory, .noFollow])
      try Mount.attach(try Mount.make("cgroup", controllers.map { (String($0), "") }, attributes: attributes), to: folder)
      // Controllers that are mounted together can each be found by name as well, as on the host.
      if controllers.count > 1 {
        for controller in controllers { try parent.makeSymlink(String(controller), to: hierarchy) }
      }
    }
    try Mount.setAttributes(parent, attributes)
  }

  mutating func mask(_ path: String) throws(Errno) {
    let target: Descriptor
    do throws(Errno) {
      target = try here.descriptor.open(relative(path), [.path, .noFollow], resolving: [.inRoot, .noSymlinks])
    } catch {
      // Not every kernel has all of these files.
      if error == .noEntry || error == .notDirectory { return }
      throw error
    }
    let isFolder = try target.status().kind == .directory
    last = nil
    if let mask = isFolder ? masks.folder : masks.file { return try Mount.attach(try Mount.clone(mask.descriptor), to: target) }
    let mask: Handle
    if isFolder {
      mask = Handle(
        try Mount.make(
          "tmpfs", [("mode", "0755"), ("size", "0"), ("nr_inodes", "2")], attributes: [.readOnly, .noSetuid, .noDevices, .noExec]))
      masks.folder = mask
    } else {
      guard let null = host.null else { throw .invalid }
      mask = null
      masks.file = mask
    }
    try Mount.attach(mask.descriptor, to: target)
  }

  mutating func makeReadOnly(_ path: String) throws(Errno) {
    let target: Descriptor
    do throws(Errno) {
      target = try here.descriptor.open(relative(path), [.path, .noFollow], resolving: [.inRoot, .noSymlinks])
    } catch {
      if error == .noEntry { return }
      throw error
    }
    let clone = try Mount.clone(target)
    try Mount.setAttributes(clone, [.readOnly, .noSetuid, .noDevices, .noExec])
    try Mount.attach(clone, to: target)
    last = nil
  }

  func setSysctl(_ key: String, _ value: String) throws(Errno) {
    var path = "proc/sys"
    for part in key.split(separator: ".") { path += "/" + part }
    let root = try here
    let proc = try root.descriptor.open("proc", [.path, .directory], resolving: [.inRoot, .noSymlinks])
    guard try Mount.isFileSystem(proc, FileSystemMagic.proc) else { throw .invalid }
    let file = try root.descriptor.open(path, [.writeOnly], resolving: [.inRoot, .noSymlinks])
    try file.write(Array(value.utf8))
  }
}

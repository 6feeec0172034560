// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import HostPrograms
internal import Linux
internal import Procfs
internal import Synchronization

/// Homes that are volume files: each is a sparse file `<home>.img`, mounted through a loop device while a workspace of its owner runs.
/// Its size is a hard limit on any host, and a full one affects its owner only.
///
/// The programs of the file system check and grow it: e2fsck(8) checks ext4 before the mount that follows an unclean unmount (XFS and
/// btrfs recover at mount). A volume file is never mounted twice.
package final class HomeVolumes: Sendable {
  package struct Usage: Equatable, Sendable {
    package let usedBytes: UInt64
    package let limitBytes: UInt64
    package let usedInodes: UInt64
    package let limitInodes: UInt64
    /// The use of blocks or inodes, whichever is nearer to its limit. Rounded up: a last block that is too small is of no use.
    package var percent: UInt64 { max(share(usedBytes, limitBytes), share(usedInodes, limitInodes)) }
    private func share(_ used: UInt64, _ limit: UInt64) -> UInt64 { limit == 0 ? 0 : (used * 100 + limit - 1) / limit }

    /// Reads the use of the file system, or of the project with a quota, that contains a directory. Nil if it cannot be read.
    package init?(at path: String) {
      guard let values = try? FileManager.default.attributesOfFileSystem(forPath: path) else { return nil }
      func number(_ key: FileAttributeKey) -> UInt64 { (values[key] as? NSNumber)?.uint64Value ?? 0 }
      limitBytes = number(.systemSize)
      usedBytes = limitBytes - min(limitBytes, number(.systemFreeSize))
      limitInodes = number(.systemNodes)
      usedInodes = limitInodes - min(limitInodes, number(.systemFreeNodes))
    }
  }

  /// The requested properties of a home.
  package struct HomeRequirements: Sendable {
    package let bytes: UInt64
    /// Whether the spec requests this size. Otherwise it is the default of the node, and a larger home is accepted.
    package let isExact: Bool
    /// The format of a new volume file.
    package let format: VolumeFormat
    /// Whether the spec requests this format; an existing volume file with another one is then refused.
    package let isFormatExact: Bool
    package let isEncrypted: Bool
    package let key: [UInt8]?

    package init(
      bytes: UInt64, isExact: Bool = false, format: VolumeFormat = .ext4, isFormatExact: Bool = false, isEncrypted: Bool = false,
      key: [UInt8]? = nil
    ) {
      self.bytes = bytes
      self.isExact = isExact
      self.format = format
      self.isFormatExact = isFormatExact
      self.isEncrypted = isEncrypted
      self.key = key
    }
  }

  private let root: String
  private let holder: String
  /// The users of each mount point.
  private let uses = Mutex<[String: Users]>([:])

  /// The workspaces that use a home. The lock is held during mount and unmount, so that they cannot race; the check of one home after
  /// an unclean unmount delays no other home.
  private final class Users: Sendable { let ids = Mutex<Set<String>>([]) }

  /// `root`: the directory of the mount points; `holder`: this node's name, which another node reports if a home is in use.
  package init(root: String, holder: String) throws {
    self.root = root
    self.holder = holder
    try FileManager.default.createDirectory(atPath: root, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
  }

  /// Returns the path of the files of this home while it is mounted.
  package func path(_ home: String) -> String { mountPoint(home) + "/home" }

  private func mountPoint(_ home: String) -> String {
    root + "/" + home.dropFirst().replacing("%", with: "%25").replacing("/", with: "%2F")
  }

  private func users(_ point: String) -> Users {
    uses.withLock { uses in
      let users = uses[point] ?? Users()
      uses[point] = users
      return users
    }
  }

  /// Mounts a home for a workspace, and creates or grows it first. Returns true if the home was full and its reserve was released for
  /// it. Blocks, for long if a large home was not unmounted cleanly.
  package func acquire(_ home: String, by workspace: String, _ requirements: HomeRequirements, uid: UInt32, gid: UInt32) throws -> Bool {
    let point = mountPoint(home)
    return try users(point).ids.withLock { ids in
      let isNew = try !mounted().contains(point)
      if isNew {
        try mount(home, at: point, requirements)
      } else if requirements.bytes > size(home + ".img") {
        // A home that cannot grow while it is in use grows at the next start.
        try? growMounted(home, at: point, to: requirements.bytes)
      }
      do {
        try HostDirectory.prepareHome(path(home), uid: uid, gid: gid)
        try HomeEncryption.open(path(home), of: home, isAsked: requirements.isEncrypted, key: requirements.key)
      } catch {
        if ids.isEmpty { unmount(point, lock: home + ".img.lock") }
        throw error
      }
      ids.insert(workspace)
      return isNew && makeReserve(point, of: size(home + ".img"), percent: use(home)?.percent ?? 0)
    }
  }

  /// Grows a home. A home in use is grown while mounted, if its file system can.
  package func grow(_ home: String, to bytes: UInt64) throws {
    let point = mountPoint(home)
    try users(point).ids.withLock { _ in
      let size = size(home + ".img")
      guard size > 0 else { throw DriverError(.failedPrecondition, "there is no home \(home).img") }
      guard bytes > size else {
        throw DriverError(.failedPrecondition, "home \(home).img: cannot shrink from \(size) bytes; a home can only grow")
      }
      if try mounted().contains(point) { return try growMounted(home, at: point, to: bytes) }
      try mount(home, at: point, HomeRequirements(bytes: bytes))
      unmount(point, lock: home + ".img.lock")
    }
  }

  /// Creates or releases the reserve of a home: a 64th of its blocks and some inodes, beside the home, where its owner cannot reach it.
  /// A full home gets the reserve, so that a tool can start and the owner can delete files; it is created again below 90 % use.
  private func makeReserve(_ point: String, of bytes: UInt64, percent: UInt64) -> Bool {
    let kept = point + "/headroom"
    let manager = FileManager.default
    if manager.fileExists(atPath: kept) {
      guard percent >= 100 else { return false }
      return (try? manager.removeItem(atPath: kept)) != nil
    }
    guard percent < 90,
      (try? manager.createDirectory(atPath: kept, withIntermediateDirectories: false, attributes: [.posixPermissions: 0o700])) != nil
    else {
      return false
    }
    for number in 0..<HomeVolumes.headroomInodes { _ = manager.createFile(atPath: "\(kept)/\(number)", contents: nil) }
    try? HostProgram.run(["fallocate", "--length", "\(bytes / 64)", kept + "/blocks"], "")
    return false
  }

  private static let headroomInodes = 32

  /// Records the use by a workspace that the previous agent started, whose home is mounted.
  package func adopt(_ home: String, by workspace: String) {
    users(mountPoint(home)).ids.withLock { _ = $0.insert(workspace) }
  }

  /// Unmounts the home when its last workspace releases it. Idempotent.
  package func release(_ home: String, by workspace: String) {
    let point = mountPoint(home)
    users(point).ids.withLock { ids in if ids.remove(workspace) != nil, ids.isEmpty { unmount(point, lock: home + ".img.lock") } }
  }

  /// Returns the mounted homes that no workspace uses, left by an agent that exited between mount and start. `name`: the name of the mount
  /// point below the root.
  package func unusedMounts() throws -> [(name: String, home: String)] {
    try mounted().filter { point in users(point).ids.withLock(\.isEmpty) }.map { point in
      let name = String(point.dropFirst(root.count + 1))
      return (name, "/" + name.replacing("%2F", with: "/").replacing("%25", with: "%"))
    }
  }

  /// Unmounts a home unless a workspace has begun to use it. Blocks on its storage, without a time limit.
  package func unmountUnused(_ home: String) {
    let point = mountPoint(home)
    users(point).ids.withLock { ids in if ids.isEmpty { unmount(point, lock: home + ".img.lock") } }
  }

  /// Runs `body` while neither a workspace, whose writes block, nor another node writes to the volume file of a home. `concerns`: whether
  /// `body` uses the volume file at all.
  package func withFrozenHome(_ home: String, if concerns: Bool, _ body: () throws -> Void) throws {
    guard concerns else { return try body() }
    let point = mountPoint(home)
    try users(point).ids.withLock { _ in
      guard try mounted().contains(point) else {
        try lock(home + ".img")
        defer { unlink(home + ".img.lock") }
        return try body()
      }
      try HostProgram.run(["fsfreeze", "--freeze", point], "home \(home): cannot freeze its file system")
      defer { thaw(point) }
      try body()
    }
  }

  /// Thaws a home that was frozen for a copy when the previous agent exited. Blocks on its storage, without a time limit.
  package func thaw(home: String) { thaw(mountPoint(home)) }

  private func thaw(_ point: String) { try? HostProgram.run(["fsfreeze", "--unfreeze", point], "") }

  /// Runs `body` with a home mounted, without a change to its size or format.
  package func withMountedHome<T>(_ home: String, _ body: (String) throws -> T) throws -> T {
    let point = mountPoint(home)
    let temporaryUser = "a visit"
    try users(point).ids.withLock { ids in
      if try !mounted().contains(point) {
        try mount(home, at: point, HomeRequirements(bytes: size(home + ".img")))
        if HomeEncryption.isEncrypted(path(home)) {
          unmount(point, lock: home + ".img.lock")
          throw DriverError(.failedPrecondition, "home \(home) is encrypted; it can be read only while a workspace uses it")
        }
      }
      ids.insert(temporaryUser)
    }
    defer { release(home, by: temporaryUser) }
    return try body(path(home))
  }

  /// Returns the use of a home, or nil if it is not mounted.
  package func use(_ home: String) -> Usage? { Usage(at: path(home)) }

  // ------------------------------------------------------------------ mounting

  private func mount(_ home: String, at point: String, _ requirements: HomeRequirements) throws {
    let image = home + ".img"
    guard !Linux.Process.exists(home) else {
      throw DriverError(
        .failedPrecondition,
        "home \(home) is a directory, and this node keeps homes as images; move its files into the image, and the directory away")
    }
    let file = Handle(try open(image))
    try lock(image)
    do {
      let format = try ready(image, file, requirements)
      try? FileManager.default.createDirectory(atPath: point, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
      try attach(image, file.descriptor, format, to: point)
    } catch {
      unlink(image + ".lock")
      throw error
    }
    guard requirements.bytes > size(image) else { return }
    do { try growMounted(home, at: point, to: requirements.bytes) } catch {
      unmount(point, lock: image + ".lock")
      throw error
    }
  }

  /// Mounts the volume file through a loop device, which the kernel removes with the last mount. Uses system calls and not mount(8),
  /// since each start waits for this.
  private func attach(_ image: String, _ file: borrowing Descriptor, _ format: VolumeFormat, to point: String) throws {
    do throws(Errno) {
      // Waits for a program that a previous agent may have left running on the file. The lock uses a descriptor of its own: on the
      // loop device's descriptor it would be held for as long as the device exists.
      try Descriptor.openPlain(image, [.readOnly]).lock(waiting: true)
      let loop = try LoopDevice.attach(file, named: image)
      let mount = try Mount.make(
        format.rawValue, [("source", loop.path)] + format.mountOptions, attributes: [.noSetuid, .noDevices, .noAccessTime])
      try Mount.attach(mount, to: Descriptor.openPlain(point, [.path, .directory]))
    } catch {
      throw DriverError(
        .failedPrecondition,
        "home \(image) cannot be mounted: "
          + (error == .noDevice ? "the kernel does not support \(format.rawValue) or loop devices" : error.sentence))
    }
  }

  private func growMounted(_ home: String, at point: String, to bytes: UInt64) throws {
    let (image, before) = (home + ".img", size(home + ".img"))
    let format = try VolumeFormat.found(in: try open(image), of: image) ?? .ext4
    let device = try HostProgram.output(["findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", point], "home \(image)")
    func resize(_ bytes: UInt64) throws {
      try self.resize(image, bytes)
      try HostProgram.run(["losetup", "--set-capacity", device], "home \(image) cannot grow")
    }
    do {
      try resize(bytes)
      try HostProgram.run(format.grow(device, at: point), on: image, "home \(image) cannot grow while it is in use")
    } catch {
      try? resize(before)
      throw error
    }
  }

  private func open(_ image: String) throws -> Descriptor {
    do throws(Linux.Errno) {
      return try Descriptor.openPlain(image, [.readWrite, .create], mode: 0o600)
    } catch {
      throw DriverError(.failedPrecondition, "home \(image) cannot be opened: \(error.sentence)")
    }
  }

  /// Makes this node the only writer: a lock file beside the volume file names the node, also for homes on a shared file system.
  private func lock(_ image: String) throws {
    let path = image + ".lock"
    let made = FileManager.default.createFile(
      atPath: path + ".\(holder)", contents: Data((holder + "\n").utf8), attributes: [.posixPermissions: 0o600])
    defer { unlink(path + ".\(holder)") }
    // link(2) is atomic: the lock file never exists without its content.
    if made, (try? FileManager.default.linkItem(atPath: path + ".\(holder)", toPath: path)) != nil { return }
    let other = (try? String(contentsOfFile: path, encoding: .utf8))?.trimmingCharacters(in: .whitespacesAndNewlines) ?? "?"
    guard other == holder else { throw DriverError(.failedPrecondition, "home \(image) is in use on node \(other) (\(path))") }
  }

  /// Creates, checks and grows the file system, as far as that is possible before the mount. Returns its format.
  private func ready(_ image: String, _ file: Handle, _ requirements: HomeRequirements) throws -> VolumeFormat {
    guard let format = try VolumeFormat.found(in: file.descriptor, of: image) else {
      guard requirements.bytes >= requirements.format.floor else {
        throw DriverError(
          .failedPrecondition, "home \(image): \(requirements.format.rawValue) needs at least \(requirements.format.floor >> 20) MiB")
      }
      try resize(image, requirements.bytes)
      try HostProgram.run(
        requirements.format.make(image, isEncrypted: requirements.isEncrypted), on: image, "home \(image): cannot create the file system")
      return requirements.format
    }
    let size = size(image)
    guard !requirements.isFormatExact || format == requirements.format else {
      throw DriverError(
        .failedPrecondition,
        "home \(image) is \(format.rawValue); the file system of an existing home cannot be changed to \(requirements.format.rawValue)")
    }
    guard requirements.bytes >= size || !requirements.isExact else {
      throw DriverError(
        .failedPrecondition, "home \(image): cannot shrink from \(size) to \(requirements.bytes) bytes; a home can only grow")
    }
    guard format == .ext4 else { return format }
    // s_state is not "clean", or the journal needs a replay (ext4's on-disk layout).
    let block = try file.descriptor.read(at: 1024, upTo: 1024)
    let isUnclean = block.count < 1024 || block[58] & 1 == 0 || block[96] & 4 != 0
    let isSmall = requirements.bytes > size
    if isUnclean || isSmall {
      try HostProgram.run(
        ["e2fsck", "-p", "-f", image], on: image, "home \(image): e2fsck -p cannot repair it; run e2fsck by hand", upTo: 1)
    }
    if isSmall {
      try resize(image, requirements.bytes)
      try HostProgram.run(["resize2fs", image], on: image, "home \(image) cannot grow")
    }
    return format
  }

  private func size(_ image: String) -> UInt64 {
    ((try? FileManager.default.attributesOfItem(atPath: image))?[.size] as? NSNumber)?.uint64Value ?? 0
  }

  private func resize(_ image: String, _ bytes: UInt64) throws {
    let handle = try FileHandle(forUpdating: URL(fileURLWithPath: image))
    try handle.truncate(atOffset: bytes)
    try handle.close()
  }

  private func unmount(_ point: String, lock: String) {
    // fstrim returns the blocks of deleted files to the host; sync first makes the deletions durable.
    try? HostProgram.run(["sync", "--file-system", point], "")
    try? HostProgram.run(["fstrim", point], "")
    HomeEncryption.close(point + "/home")
    try? HostProgram.run(["umount", point], "")
    if (try? mounted().contains(point)) ?? true { try? HostProgram.run(["umount", "--lazy", point], "") }
    rmdir(point)
    unlink(lock)
  }

  private func mounted() throws -> [String] {
    guard let table = MountTable() else { throw DriverError(.failedPrecondition, "homes: the table of mounts cannot be read; retry") }
    return table.points.filter { $0.hasPrefix(root + "/") }
  }
}

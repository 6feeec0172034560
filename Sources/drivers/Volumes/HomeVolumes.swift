// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import HostPrograms
internal import Linux
internal import Procfs
internal import Synchronization

/// Homes that are file systems of their own: a sparse image beside the homes, `<home>.img`, mounted through a loop device while a
/// workspace of its owner runs. Its size is a hard limit on any host, and what it fills, it fills for its owner alone.
///
/// Checks and growth are left to the programs of the file system: an ext4 image is checked before it is mounted after an unclean
/// end (XFS and btrfs mend themselves when they are mounted), and none is ever mounted twice.
package final class HomeVolumes: Sendable {
  package struct Use: Equatable, Sendable {
    package let usedBytes: UInt64
    package let limitBytes: UInt64
    package let usedInodes: UInt64
    package let limitInodes: UInt64
    /// Of blocks or inodes, whichever is nearer to its limit; rounded up, since a last block that fits nothing is none.
    package var percent: UInt64 { max(share(usedBytes, limitBytes), share(usedInodes, limitInodes)) }
    private func share(_ used: UInt64, _ limit: UInt64) -> UInt64 { limit == 0 ? 0 : (used * 100 + limit - 1) / limit }

    /// Of the file system, or of the project with a quota, that a directory is on or in; nil where there is none.
    package init?(at path: String) {
      guard let values = try? FileManager.default.attributesOfFileSystem(forPath: path) else { return nil }
      func number(_ key: FileAttributeKey) -> UInt64 { (values[key] as? NSNumber)?.uint64Value ?? 0 }
      limitBytes = number(.systemSize)
      usedBytes = limitBytes - min(limitBytes, number(.systemFreeSize))
      limitInodes = number(.systemNodes)
      usedInodes = limitInodes - min(limitInodes, number(.systemFreeNodes))
    }
  }

  /// What is asked of a home.
  package struct HomeRequirements: Sendable {
    package let bytes: UInt64
    /// Whether somebody asked for this size, or it is what the node gives; then a larger one is as good.
    package let isExact: Bool
    /// Of an image that is to be made.
    package let format: VolumeFormat
    /// Whether somebody asked for this format; then another one that is there is refused.
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
  /// By mount point.
  private let uses = Mutex<[String: Users]>([:])

  /// The workspaces that use a home. Locked while it is mounted or unmounted, so that the two never cross; one home's check after an
  /// unclean end delays no other.
  private final class Users: Sendable { let ids = Mutex<Set<String>>([]) }

  /// `root`: where they are mounted; `holder`: this node's name, for whoever finds a home in use.
  package init(root: String, holder: String) throws {
    self.root = root
    self.holder = holder
    try FileManager.default.createDirectory(atPath: root, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
  }

  /// Where the files of this home are while it is mounted.
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

  /// Mounts a home for a workspace, making or growing it first. Blocks; may take long after an unclean end of a large one. True: it is
  /// full, and the headroom that was kept for this was given to it.
  package func acquire(_ home: String, by workspace: String, _ wish: HomeRequirements, uid: UInt32, gid: UInt32) throws -> Bool {
    let point = mountPoint(home)
    return try users(point).ids.withLock { ids in
      let isNew = !mounted().contains(point)
      if isNew {
        try mount(home, at: point, wish)
      } else if wish.bytes > size(home + ".img") {
        // What cannot grow while it is in use does so at the next start.
        try? growMounted(home, at: point, to: wish.bytes)
      }
      do {
        try HostDirectory.prepareHome(path(home), uid: uid, gid: gid)
        try HomeEncryption.open(path(home), of: home, isAsked: wish.isEncrypted, key: wish.key)
      } catch {
        if ids.isEmpty { unmount(point, lock: home + ".img.lock") }
        throw error
      }
      ids.insert(workspace)
      return isNew && headroom(point, of: size(home + ".img"), percent: use(home)?.percent ?? 0)
    }
  }

  /// Makes a home larger: one that is in use while it is, where its file system can, any other at once.
  package func grow(_ home: String, to bytes: UInt64) throws {
    let point = mountPoint(home)
    try users(point).ids.withLock { _ in
      let size = size(home + ".img")
      guard size > 0 else { throw StorageError(description: "there is no home \(home).img") }
      guard bytes > size else { throw StorageError(description: "home \(home).img has \(size) bytes; homes only grow") }
      if mounted().contains(point) { return try growMounted(home, at: point, to: bytes) }
      try mount(home, at: point, HomeRequirements(bytes: bytes))
      unmount(point, lock: home + ".img.lock")
    }
  }

  /// Beside the home, where its owner cannot reach: a 64th of the blocks, and some inodes. A full home gets them, so that a tool finds
  /// room to start and its owner room to tidy up; they are put back when there is room for them again.
  private func headroom(_ point: String, of bytes: UInt64, percent: UInt64) -> Bool {
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

  /// Of a workspace that an earlier agent started: its home is mounted.
  package func adopt(_ home: String, by workspace: String) {
    // An agent may have ended while it stood still for a copy.
    thaw(mountPoint(home))
    users(mountPoint(home)).ids.withLock { _ = $0.insert(workspace) }
  }

  /// The last one unmounts it. May be said twice.
  package func release(_ home: String, by workspace: String) {
    let point = mountPoint(home)
    users(point).ids.withLock { ids in if ids.remove(workspace) != nil, ids.isEmpty { unmount(point, lock: home + ".img.lock") } }
  }

  /// Mounts that no workspace uses: an agent ended between mounting and starting. Returns their names.
  package func sweep() -> [String] {
    mounted().compactMap { point in
      users(point).ids.withLock { ids in
        guard ids.isEmpty else { return nil }
        let name = String(point.dropFirst(root.count + 1))
        unmount(point, lock: "/" + name.replacing("%2F", with: "/").replacing("%25", with: "%") + ".img.lock")
        return name
      }
    }
  }

  /// Runs `body` while nothing is written to a home's image: not by a workspace, whose writes wait, nor by another node. `concerns`:
  /// whether it is about the image at all.
  package func standingStill(_ home: String, if concerns: Bool, _ body: () throws -> Void) throws {
    guard concerns else { return try body() }
    let point = mountPoint(home)
    try users(point).ids.withLock { _ in
      guard mounted().contains(point) else {
        try lock(home + ".img")
        defer { try? FileManager.default.removeItem(atPath: home + ".img.lock") }
        return try body()
      }
      try HostProgram.run(["fsfreeze", "--freeze", point], "home \(home) cannot be made to stand still")
      defer { thaw(point) }
      try body()
    }
  }

  private func thaw(_ point: String) { try? HostProgram.run(["fsfreeze", "--unfreeze", point], "") }

  /// Mounts a home for a while, as it is, whoever it belongs to.
  package func visit<T>(_ home: String, _ body: (String) throws -> T) throws -> T {
    let point = mountPoint(home)
    let temporaryUser = "a visit"
    try users(point).ids.withLock { ids in
      if !mounted().contains(point) {
        try mount(home, at: point, HomeRequirements(bytes: size(home + ".img")))
        if HomeEncryption.isEncrypted(path(home)) {
          unmount(point, lock: home + ".img.lock")
          throw StorageError(description: "home \(home) is encrypted, and can be looked into only while a workspace has it open")
        }
      }
      ids.insert(temporaryUser)
    }
    defer { release(home, by: temporaryUser) }
    return try body(path(home))
  }

  /// Nil where it is not mounted.
  package func use(_ home: String) -> Use? { Use(at: path(home)) }

  // ------------------------------------------------------------------ mounting

  private func mount(_ home: String, at point: String, _ wish: HomeRequirements) throws {
    let image = home + ".img"
    guard !Linux.Process.exists(home) else {
      throw StorageError(
        description:
          "home \(home) is a directory, and this node keeps homes as images; move its files into the image, and the directory away")
    }
    let file = Handle(try open(image))
    try lock(image)
    do {
      let format = try ready(image, file, wish)
      try? FileManager.default.createDirectory(atPath: point, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
      try attach(image, file.descriptor, format, to: point)
    } catch {
      try? FileManager.default.removeItem(atPath: image + ".lock")
      throw error
    }
    guard wish.bytes > size(image) else { return }
    do { try growMounted(home, at: point, to: wish.bytes) } catch {
      unmount(point, lock: image + ".lock")
      throw error
    }
  }

  /// Through a device of the kernel's, which goes when the last mount does. By descriptors and not by mount(8), since this is what a
  /// start waits for.
  private func attach(_ image: String, _ file: borrowing Descriptor, _ format: VolumeFormat, to point: String) throws {
    do throws(Errno) {
      // An agent that ended in the middle may have left a program at work on it: not before that ends. By another descriptor than the
      // device's, which would hold the lock as long as it is there.
      try Descriptor.openPlain(image, [.readOnly]).lock(waiting: true)
      let loop = try LoopDevice.attach(file, named: image)
      let mount = try Mount.make(
        format.rawValue, [("source", loop.path)] + format.mountOptions, attributes: [.noSetuid, .noDevices, .noAccessTime])
      try Mount.attach(mount, to: Descriptor.openPlain(point, [.path, .directory]))
    } catch {
      throw StorageError(
        description: "home \(image) cannot be mounted: "
          + (error == .noDevice ? "this kernel has no \(format.rawValue), or no loop devices" : error.sentence))
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
      throw StorageError(description: "home \(image) cannot be opened: \(error.sentence)")
    }
  }

  /// One writer: a file beside the image names the node that has it, also where homes lie on a shared file system.
  private func lock(_ image: String) throws {
    let path = image + ".lock"
    let made = FileManager.default.createFile(
      atPath: path + ".\(holder)", contents: Data((holder + "\n").utf8), attributes: [.posixPermissions: 0o600])
    defer { try? FileManager.default.removeItem(atPath: path + ".\(holder)") }
    // link(2) makes it whole or not at all.
    if made, (try? FileManager.default.linkItem(atPath: path + ".\(holder)", toPath: path)) != nil { return }
    let other = (try? String(contentsOfFile: path, encoding: .utf8))?.trimmingCharacters(in: .whitespacesAndNewlines) ?? "?"
    guard other == holder else { throw StorageError(description: "home \(image) is in use on node \(other) (\(path))") }
  }

  /// Made, sound, and grown, as far as it can be before it is mounted.
  private func ready(_ image: String, _ file: Handle, _ wish: HomeRequirements) throws -> VolumeFormat {
    guard let format = try VolumeFormat.found(in: file.descriptor, of: image) else {
      guard wish.bytes >= wish.format.floor else {
        throw StorageError(description: "home \(image): \(wish.format.rawValue) needs at least \(wish.format.floor >> 20) MiB")
      }
      try resize(image, wish.bytes)
      try HostProgram.run(wish.format.make(image, isEncrypted: wish.isEncrypted), on: image, "home \(image) cannot be made")
      return wish.format
    }
    let size = size(image)
    guard !wish.isFormatExact || format == wish.format else {
      throw StorageError(description: "home \(image) is \(format.rawValue), and \(wish.format.rawValue) was asked for; it stays what it is")
    }
    guard wish.bytes >= size || !wish.isExact else {
      throw StorageError(description: "home \(image) has \(size) bytes, and \(wish.bytes) were asked for; homes only grow")
    }
    guard format == .ext4 else { return format }
    // s_state without "clean", or a journal to replay (ext4's on-disk layout).
    let block = try file.descriptor.read(at: 1024, upTo: 1024)
    let isUnclean = block.count < 1024 || block[58] & 1 == 0 || block[96] & 4 != 0
    let isSmall = wish.bytes > size
    if isUnclean || isSmall {
      try HostProgram.run(
        ["e2fsck", "-p", "-f", image], on: image, "home \(image) was not left clean, and cannot be mended without a person", upTo: 1)
    }
    if isSmall {
      try resize(image, wish.bytes)
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
    // What was deleted inside is given back to the host, once its deletion is on the disk.
    try? HostProgram.run(["sync", "--file-system", point], "")
    try? HostProgram.run(["fstrim", point], "")
    HomeEncryption.close(point + "/home")
    try? HostProgram.run(["umount", point], "")
    if mounted().contains(point) { try? HostProgram.run(["umount", "--lazy", point], "") }
    rmdir(point)
    try? FileManager.default.removeItem(atPath: lock)
  }

  private func mounted() -> [String] { (MountTable()?.points ?? []).filter { $0.hasPrefix(root + "/") } }
}

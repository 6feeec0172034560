// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Linux

/// Unpacks a layer into an empty directory by descriptors, and never outside it. Deletions become the markers of overlayfs: a 0:0
/// character device for a whiteout, `user.overlay.opaque` for an opaque directory (image-spec, "Whiteouts"; kernel, overlayfs.rst,
/// "userxattr").
struct LayerUnpacker {
  /// The counts of what was unpacked, and of what was left out by policy.
  struct Report: Equatable {
    var devices = 0
    var setuidBits = 0
    var attributes = 0
    var bytes: UInt64 = 0
    var entries = 0
  }

  private let root: Handle
  private let limits: UnpackLimits
  private let name: String
  private var parent: (path: String, handle: Handle)?
  private(set) var report = Report()
  /// The directories whose times are set at the end, since each new file in a directory changes its time.
  private var directories: [(path: String, modified: Int64)] = []

  init(into root: Handle, name: String, limits: UnpackLimits) {
    self.root = root
    self.limits = limits
    self.name = name
  }

  mutating func unpack(_ stream: ArchiveStream) throws {
    while let entry = try stream.next() { try unpack(entry, stream) }
    for directory in directories.reversed() {
      do throws(Errno) {
        let folder = try root.descriptor.open(directory.path, [.readOnly, .directory], resolving: [.inRoot, .noSymlinks])
        try folder.setModificationTime(directory.modified, ".")
      } catch {
        if error != .noEntry && error != .loop && error != .notDirectory { throw DriverError("\(name): \(directory.path)", error) }
      }
    }
  }

  private mutating func unpack(_ entry: ArchiveStream.Entry, _ stream: ArchiveStream) throws {
    let parts = try components(entry.path)
    guard let last = parts.last else { return }  // the root itself
    report.entries += 1
    let folderPath = parts.dropLast().joined(separator: "/")
    do throws(Errno) {
      let folder = try parentFolder(folderPath)
      if last.hasPrefix(".wh.") { return try whiteOut(last, in: folder) }
    } catch {
      throw DriverError("\(name): \(entry.path)", error)
    }
    guard (0..<65_536).contains(entry.uid), (0..<65_536).contains(entry.gid) else {
      throw DriverError(.invalid, "\(name): \(entry.path): uid \(entry.uid), gid \(entry.gid): must be below 65536")
    }
    do {
      try make(entry, last, stream)
    } catch let error as Errno {
      throw DriverError("\(name): \(entry.path)", error)
    }
  }

  private mutating func make(_ entry: ArchiveStream.Entry, _ last: String, _ stream: ArchiveStream) throws {
    guard let folder = parent?.handle else { return }
    let (uid, gid) = (UInt32(entry.uid), UInt32(entry.gid))
    switch entry.kind {
    case .directory:
      if (try? folder.descriptor.status(last).kind) != .directory {
        try clear(last, in: folder)
        try folder.descriptor.makeDirectory(last, mode: 0o700)
      }
      let made = try folder.descriptor.open(last, [.readOnly, .directory, .noFollow])
      try made.setOwner(uid, gid)
      try made.setMode(entry.mode & 0o7777)
      try keepAttributes(entry, on: made)
      directories.append((try components(entry.path).joined(separator: "/"), entry.modified))
    case .file:
      try clear(last, in: folder)
      let made = try folder.descriptor.open(last, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o600)
      var end: UInt64 = 0
      try stream.content { block, offset in
        try made.write(block, at: offset)
        end = offset + UInt64(block.count)
      }
      report.bytes += end
      try made.setOwner(uid, gid)
      // The mode is set after the owner: chown clears the setuid and setgid bits. They are left out: they have no effect under nosuid.
      if entry.mode & 0o6000 != 0 { report.setuidBits += 1 }
      try made.setMode(entry.mode & 0o1777)
      try keepAttributes(entry, on: made)
      try folder.descriptor.setModificationTime(entry.modified, last)
    case .symlink:
      guard !entry.linkTarget.isEmpty else { throw DriverError(.invalid, "\(name): \(entry.path): symlink without a target") }
      try clear(last, in: folder)
      try folder.descriptor.makeSymlink(last, to: entry.linkTarget)
      try folder.descriptor.setOwner(uid, gid, last)
      try folder.descriptor.setModificationTime(entry.modified, last)
    case .hardlink: try link(entry, last, folder)
    case .other: report.devices += 1
    }
  }

  /// Creates a hard link. Its target must be an earlier regular file of this layer, at a path without symlinks.
  private func link(_ entry: ArchiveStream.Entry, _ last: String, _ folder: Handle) throws {
    let parts = try components(entry.linkTarget)
    guard let targetName = parts.last else { throw DriverError(.invalid, "\(name): \(entry.path): hard link to the root") }
    do throws(Errno) {
      let path = parts.dropLast().joined(separator: "/")
      let targetFolder = try root.descriptor.open(
        path.isEmpty ? "." : path, [.path, .directory], resolving: [.inRoot, .noSymlinks])
      guard try targetFolder.status(targetName).kind == .regular else { throw .invalid }
      try clear(last, in: folder)
      try folder.descriptor.makeHardLink(last, to: targetName, in: targetFolder)
    } catch {
      throw DriverError(
        .invalid, "\(name): \(entry.path): hard link to \(entry.linkTarget), which is not an earlier regular file of this layer")
    }
  }

  private func whiteOut(_ marker: String, in folder: Handle) throws(Errno) {
    if marker == ".wh..wh..opq" {
      let opened = try folder.descriptor.open(".", [.readOnly, .directory])
      return try opened.setExtendedAttribute("user.overlay.opaque", [UInt8(ascii: "y")])
    }
    let hidden = String(marker.dropFirst(4))
    // ".wh..", ".wh..." and ".wh." would name the directory, its parent or nothing.
    if hidden.isEmpty || hidden == "." || hidden == ".." || hidden.hasPrefix(".wh.") { throw .invalid }
    try clear(hidden, in: folder)
    try folder.descriptor.makeWhiteout(hidden)
  }

  /// Sets the extended attributes in the `user` namespace, except those that control overlayfs.
  private mutating func keepAttributes(_ entry: ArchiveStream.Entry, on file: borrowing Descriptor) throws(Errno) {
    for (key, value) in entry.attributes {
      if key.hasPrefix("user.") && !key.hasPrefix("user.overlay.") && value.count <= 65_536 {
        try file.setExtendedAttribute(key, value)
      } else {
        report.attributes += 1
      }
    }
  }

  private func clear(_ last: String, in folder: Handle) throws(Errno) {
    do throws(Errno) {
      try folder.descriptor.remove(last)
    } catch {
      if error == .noEntry { return }
      guard error == .isDirectory else { throw error }
      try folder.descriptor.remove(last, directory: true)
    }
  }

  /// Opens the directory of an entry and retains it for the next one, which is often in the same directory. Symlinks of this layer in the
  /// path are followed inside the layer only.
  private mutating func parentFolder(_ path: String) throws(Errno) -> Handle {
    if let parent, parent.path == path { return parent.handle }
    let handle = Handle(try openFolder(path))
    parent = (path, handle)
    return handle
  }

  private func openFolder(_ path: String) throws(Errno) -> Descriptor {
    let walk: Resolution = [.inRoot, .noMagicLinks]
    do throws(Errno) {
      return try root.descriptor.open(path.isEmpty ? "." : path, [.path, .directory], resolving: walk)
    } catch {
      guard error == .noEntry else { throw error }
    }
    // The archive has no entry for the directory: it is created, as tar does.
    return try root.descriptor.openDirectory(making: path, resolving: walk)
  }

  private func components(_ path: String) throws -> [String] {
    guard path.utf8.count <= limits.pathBytes else {
      throw DriverError(.invalid, "\(name): a path of \(path.utf8.count) bytes; at most \(limits.pathBytes)")
    }
    guard !path.hasPrefix("/") else { throw DriverError(.invalid, "\(name): \(path): is an absolute path") }
    let parts = path.split(separator: "/").filter { $0 != "." }.map(String.init)
    guard !parts.contains("..") else { throw DriverError(.invalid, "\(name): \(path): contains '..', which leaves the layer") }
    guard parts.count <= limits.depth else {
      throw DriverError(.invalid, "\(name): a path \(parts.count) deep; at most \(limits.depth)")
    }
    return parts
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Flags of open(2), with the kernel's values.
package struct OpenFlags: OptionSet, Sendable {
  package let rawValue: Int32
  package init(rawValue: Int32) { self.rawValue = rawValue }
  package static let readOnly: OpenFlags = []
  package static let writeOnly = OpenFlags(rawValue: Int32(CLX_O_WRONLY))
  package static let readWrite = OpenFlags(rawValue: Int32(CLX_O_RDWR))
  package static let create = OpenFlags(rawValue: Int32(CLX_O_CREAT))
  package static let exclusive = OpenFlags(rawValue: Int32(CLX_O_EXCL))
  package static let truncate = OpenFlags(rawValue: Int32(CLX_O_TRUNC))
  package static let append = OpenFlags(rawValue: Int32(CLX_O_APPEND))
  package static let directory = OpenFlags(rawValue: Int32(CLX_O_DIRECTORY))
  package static let path = OpenFlags(rawValue: Int32(CLX_O_PATH))
  package static let noFollow = OpenFlags(rawValue: Int32(CLX_O_NOFOLLOW))
  package static let nonBlocking = OpenFlags(rawValue: Int32(CLX_O_NONBLOCK))
  /// Creates a file without a name in the directory at the path (O_TMPFILE).
  package static let temporary = OpenFlags(rawValue: Int32(CLX_O_TMPFILE))
  package static let noTerminal = OpenFlags(rawValue: Int32(CLX_O_NOCTTY))
}

/// The restrictions on how openat2(2) resolves a path.
package struct Resolution: OptionSet, Sendable {
  package let rawValue: UInt64
  package init(rawValue: UInt64) { self.rawValue = rawValue }
  package static let noMagicLinks = Resolution(rawValue: UInt64(CLX_RESOLVE_NO_MAGICLINKS))
  package static let noSymlinks = Resolution(rawValue: UInt64(CLX_RESOLVE_NO_SYMLINKS))
  package static let beneath = Resolution(rawValue: UInt64(CLX_RESOLVE_BENEATH))
  package static let inRoot = Resolution(rawValue: UInt64(CLX_RESOLVE_IN_ROOT))
}

/// The fields of fstat(2) that Carrel uses.
package struct FileStatus: Sendable {
  package enum Kind: Sendable { case regular, directory, symlink, characterDevice, blockDevice, fifo, socket }
  package let kind: Kind
  package let permissions: UInt32
  package let uid: UInt32
  package let gid: UInt32
  package let size: UInt64
  package let inode: UInt64
  package let device: UInt64
  package let major: UInt32
  package let minor: UInt32
}

extension Descriptor {
  /// Opens an absolute path, or one relative to the working directory.
  package static func open(_ path: String, _ flags: OpenFlags, mode: UInt32 = 0) throws(Errno) -> Descriptor {
    let number = try retrying { path.withCString { clx_openat(Int32(CLX_AT_FDCWD), $0, flags.rawValue, mode) } }
    return Descriptor(adopting: Int32(number))
  }

  package func open(_ path: String, _ flags: OpenFlags, mode: UInt32 = 0) throws(Errno) -> Descriptor {
    let number = try retrying { path.withCString { clx_openat(self.number, $0, flags.rawValue, mode) } }
    return Descriptor(adopting: Int32(number))
  }

  /// Opens by openat2(2). The kernel returns EAGAIN when it detects a race; the call is then retried up to 64 times.
  package func open(_ path: String, _ flags: OpenFlags, mode: UInt32 = 0, resolving: Resolution) throws(Errno)
    -> Descriptor
  {
    var attempts = 0
    while true {
      let result = path.withCString { clx_openat2(self.number, $0, flags.rawValue, mode, resolving.rawValue) }
      if result == Int(-EINTR) || (result == Int(-EAGAIN) && attempts < 64) {
        attempts += 1
        continue
      }
      return Descriptor(adopting: Int32(try check(result)))
    }
  }

  /// Opens an absolute path in which no component may be a symlink.
  package static func openPlain(_ path: String, _ flags: OpenFlags, mode: UInt32 = 0) throws(Errno) -> Descriptor {
    let relative = path.drop { $0 == "/" }
    let root = try Descriptor.open("/", [.path, .directory])
    return try root.open(relative.isEmpty ? "." : String(relative), flags, mode: mode, resolving: [.inRoot, .noSymlinks])
  }

  package func status(_ path: String = "") throws(Errno) -> FileStatus {
    var raw = clx_file()
    try check(path.withCString { clx_fstatat(number, $0, &raw) })
    let kind: FileStatus.Kind =
      switch raw.mode & 0o170000 {
      case 0o040000: .directory
      case 0o120000: .symlink
      case 0o020000: .characterDevice
      case 0o060000: .blockDevice
      case 0o010000: .fifo
      case 0o140000: .socket
      default: .regular
      }
    return FileStatus(
      kind: kind, permissions: raw.mode & 0o7777, uid: raw.uid, gid: raw.gid, size: raw.size, inode: raw.inode,
      device: raw.device, major: raw.major, minor: raw.minor)
  }

  /// Makes a directory at an absolute path or one relative to the working directory, as does `removeDirectory`.
  package static func makeDirectory(_ path: String, mode: UInt32) throws(Errno) {
    try check(path.withCString { clx_mkdirat(Int32(CLX_AT_FDCWD), $0, mode) })
  }
  package static func removeDirectory(_ path: String) throws(Errno) {
    try check(path.withCString { clx_unlinkat(Int32(CLX_AT_FDCWD), $0, Int32(CLX_AT_REMOVEDIR)) })
  }
  package func makeDirectory(_ path: String, mode: UInt32) throws(Errno) {
    try check(path.withCString { clx_mkdirat(number, $0, mode) })
  }

  /// Opens a directory below this one (O_PATH), after making those in its path that are missing, with mode 0755. `prepare` is called with
  /// each that is new, which another process may have replaced in the meantime.
  package func openDirectory(
    making path: String, resolving: Resolution, prepare: (borrowing Descriptor) throws(Errno) -> Void = { (_) throws(Errno) in }
  ) throws(Errno) -> Descriptor {
    var done = "."
    for part in path.split(separator: "/") {
      let above = done
      done += "/" + part
      do throws(Errno) {
        _ = try open(done, [.path, .directory], resolving: resolving)
        continue
      } catch {
        if error != .noEntry { throw error }
      }
      do throws(Errno) {
        try open(above, [.path, .directory], resolving: resolving).makeDirectory(String(part), mode: 0o755)
      } catch {
        if error != .exists { throw error }
      }
      try prepare(try open(done, [.readOnly, .directory], resolving: resolving))
    }
    return try open(done, [.path, .directory], resolving: resolving)
  }
  package func makeSymlink(_ path: String, to target: String) throws(Errno) {
    try check(path.withCString { p in target.withCString { clx_symlinkat($0, number, p) } })
  }
  package func makeHardLink(_ path: String, to existing: String, in folder: borrowing Descriptor) throws(Errno) {
    let from = folder.number
    try check(path.withCString { p in existing.withCString { clx_linkat(from, $0, number, p) } })
  }
  package func makeNode(_ path: String, mode: UInt32, major: UInt32, minor: UInt32) throws(Errno) {
    // mknod(2) takes a device number in Linux's 32-bit encoding.
    let device = UInt64(minor & 0xFF) | UInt64(major) << 8 | UInt64(minor & ~0xFF) << 12
    try check(path.withCString { clx_mknodat(number, $0, mode, device) })
  }
  package func makeWhiteout(_ path: String) throws(Errno) {
    try check(path.withCString { clx_mknodat(number, $0, 0o020000, 0) })
  }
  package func remove(_ path: String, directory: Bool = false) throws(Errno) {
    try check(path.withCString { clx_unlinkat(number, $0, directory ? Int32(CLX_AT_REMOVEDIR) : 0) })
  }
  package func rename(_ from: String, to: String) throws(Errno) {
    try check(from.withCString { f in to.withCString { clx_renameat(number, f, number, $0) } })
  }
  package func setOwner(_ uid: UInt32, _ gid: UInt32, _ path: String = "") throws(Errno) {
    try check(path.withCString { clx_fchownat(number, $0, uid, gid) })
  }
  package func setMode(_ mode: UInt32) throws(Errno) { try check(clx_fchmod(number, mode)) }
  package func setMode(_ mode: UInt32, _ path: String) throws(Errno) {
    try check(path.withCString { clx_fchmodat(number, $0, mode) })
  }
  package func setModificationTime(_ seconds: Int64, _ path: String) throws(Errno) {
    try check(path.withCString { clx_utimens(number, $0, seconds) })
  }
  package func exists(_ path: String) -> Bool {
    path.withCString { clx_access(number, $0, 0) } == 0
  }

  package func link(_ path: String) throws(Errno) -> String {
    var bytes = [CChar](repeating: 0, count: 4096)
    let count = try check(
      path.withCString { p in bytes.withUnsafeMutableBufferPointer { clx_readlinkat(number, p, $0.baseAddress, 4096) } })
    return String(decoding: bytes[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// Returns the names in this directory, which must be open for reading, without "." and "..".
  package func entries() throws(Errno) -> [String] {
    var names: [String] = []
    var buffer = [UInt8](repeating: 0, count: 32_768)
    while true {
      let count = try retrying { buffer.withUnsafeMutableBytes { clx_getdents(number, $0.baseAddress, 32_768) } }
      if count == 0 { return names }
      // struct linux_dirent64 (getdents(2)) has the length of the record at 16 and the name, up to a NUL, at 19.
      var at = 0
      while at + 19 < count {
        let length = Int(buffer[at + 16]) | Int(buffer[at + 17]) << 8
        guard length > 19, at + length <= count else { break }
        let name = String(decoding: buffer[(at + 19)..<(at + length)].prefix { $0 != 0 }, as: UTF8.self)
        if name != "." && name != ".." { names.append(name) }
        at += length
      }
    }
  }

  package func setExtendedAttribute(_ name: String, _ value: [UInt8]) throws(Errno) {
    try check(name.withCString { n in value.withUnsafeBytes { clx_fsetxattr(number, n, $0.baseAddress, $0.count) } })
  }
  package func extendedAttribute(_ name: String) throws(Errno) -> [UInt8] {
    var value = [UInt8](repeating: 0, count: 65_536)
    let count = try check(name.withCString { n in value.withUnsafeMutableBytes { clx_fgetxattr(number, n, $0.baseAddress, 65_536) } })
    return Array(value[..<count])
  }
  /// Writes all data of this file system to its disk.
  package func syncFileSystem() throws(Errno) { try retrying { clx_syncfs(number) } }

  /// Writes a file so that a crash leaves the old one or the new one whole: temporary file, fsync, rename, fsync of the directory.
  package func replace(_ name: String, with bytes: [UInt8], mode: UInt32 = 0o600, durable: Bool = true) throws(Errno) {
    let temporary = ".\(name)\(Descriptor.temporarySuffix)"
    do throws(Errno) {
      let file = try open(temporary, [.writeOnly, .create, .truncate, .noFollow], mode: mode)
      try file.write(bytes)
      if durable { try file.sync() }
      try rename(temporary, to: name)
    } catch {
      do throws(Errno) { try remove(temporary) } catch {}
      throw error
    }
    if durable { try sync() }
  }

  private static var temporarySuffix: String { ".tmp" }

  /// Removes the temporary files of processes that ended during `replace`. No other process may write to this directory.
  package func removeTemporaries() throws(Errno) {
    for name in try entries() where name.hasPrefix(".") && name.hasSuffix(Descriptor.temporarySuffix) { try remove(name) }
  }

  /// Acquires an exclusive lock that lasts until this descriptor is closed. Without `waiting`, throws `again` if another process
  /// holds it.
  package func lock(waiting: Bool = false) throws(Errno) { try retrying { clx_flock(number, waiting ? 2 : 2 | 4) } }
}

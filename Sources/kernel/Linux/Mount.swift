// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Attributes of a mount (mount_setattr(2)).
package struct MountAttributes: OptionSet, Sendable {
  package let rawValue: UInt64
  package init(rawValue: UInt64) { self.rawValue = rawValue }
  package static let readOnly = MountAttributes(rawValue: UInt64(CLX_ATTR_RDONLY))
  package static let noSetuid = MountAttributes(rawValue: UInt64(CLX_ATTR_NOSUID))
  package static let noDevices = MountAttributes(rawValue: UInt64(CLX_ATTR_NODEV))
  package static let noExec = MountAttributes(rawValue: UInt64(CLX_ATTR_NOEXEC))
  package static let noAccessTime = MountAttributes(rawValue: UInt64(CLX_ATTR_NOATIME))
  package static let strictAccessTime = MountAttributes(rawValue: UInt64(CLX_ATTR_STRICTATIME))
  package static let noDirectoryAccessTime = MountAttributes(rawValue: UInt64(CLX_ATTR_NODIRATIME))
  package static let noSymlinks = MountAttributes(rawValue: UInt64(CLX_ATTR_NOSYMFOLLOW))
  /// The whole field for access times, which must be cleared before one of its values is set.
  package static let accessTimes = MountAttributes(rawValue: UInt64(CLX_ATTR_ATIME))
}

/// File system types by the magic number that statfs(2) reports.
package enum FileSystemMagic {
  package static let proc = Int(CLX_SUPER_PROC)
  package static let devpts = Int(CLX_SUPER_DEVPTS)
  package static let cgroup2 = Int(CLX_SUPER_CGROUP2)
}

/// Operations on mounts, as descriptors that are not attached yet or were attached by `attach(to:)`.
///
/// Nothing here mounts by a path that a container could have changed: sources become descriptors, and targets are descriptors
/// (CVE-2021-30465 and similar).
package enum Mount {
  /// Clones the mount at `path`; the clone pins the source.
  package static func clone(
    _ folder: borrowing Descriptor, _ path: String = "", recursive: Bool = false
  ) throws(Errno) -> Descriptor {
    let number = folder.number
    var flags = UInt32(CLX_OPEN_TREE_CLONE) | UInt32(path.isEmpty ? CLX_AT_EMPTY_PATH : 0)
    if recursive { flags |= UInt32(CLX_AT_RECURSIVE) }
    return Descriptor(adopting: Int32(try check(path.withCString { clx_open_tree(number, $0, flags) })))
  }

  /// Clones the mount of the directory or file at an absolute path; a symlink there is not followed.
  package static func clone(_ path: String) throws(Errno) -> Descriptor {
    let flags = UInt32(CLX_OPEN_TREE_CLONE | CLX_AT_SYMLINK_NOFOLLOW)
    return Descriptor(adopting: Int32(try check(path.withCString { clx_open_tree(Int32(CLX_AT_FDCWD), $0, flags) })))
  }

  /// Leaves the peer group of the mount that this one was cloned from, so that mounts and unmounts inside do not propagate to the
  /// host. On hosts with systemd every mount is in such a group, and pivot_root(2) refuses one as the root.
  package static func leavePeerGroup(_ mount: borrowing Descriptor) throws(Errno) {
    try setAttributes(mount, [], propagation: 1 << 19, recursive: true)  // MS_SLAVE
  }

  /// Creates a new file system instance. An option with an empty value is a flag.
  package static func make(
    _ type: String, _ options: [(String, String)] = [], attributes: MountAttributes = []
  ) throws(Errno) -> Descriptor {
    let context = Descriptor(adopting: Int32(try check(type.withCString { clx_fsopen($0) })))
    let number = context.number
    for (key, value) in options {
      let result = key.withCString { k in
        value.isEmpty
          ? clx_fsconfig(number, UInt32(CLX_FSCONFIG_SET_FLAG), k, nil)
          : value.withCString { clx_fsconfig(number, UInt32(CLX_FSCONFIG_SET_STRING), k, $0) }
      }
      try check(result)
    }
    try check(clx_fsconfig(number, UInt32(CLX_FSCONFIG_CMD_CREATE), nil, nil))
    return Descriptor(adopting: Int32(try check(clx_fsmount(number, UInt32(attributes.rawValue)))))
  }

  /// Sets and clears attributes of a mount. `propagation` is one of MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE, or 0 for no
  /// change.
  package static func setAttributes(
    _ mount: borrowing Descriptor, _ attributes: MountAttributes, clearing cleared: MountAttributes = [], propagation: UInt64 = 0,
    recursive: Bool = false
  ) throws(Errno) {
    let flags = recursive ? UInt32(CLX_AT_RECURSIVE) : 0
    try check(clx_mount_setattr(mount.number, flags, attributes.rawValue, cleared.rawValue, propagation, -1))
  }

  /// Maps the ids of a detached mount's files by the id maps of `userNamespace`.
  package static func mapIDs(
    _ mount: borrowing Descriptor, by userNamespace: borrowing Descriptor, recursive: Bool = false
  ) throws(Errno) {
    try check(clx_mount_setattr(mount.number, recursive ? UInt32(CLX_AT_RECURSIVE) : 0, UInt64(CLX_ATTR_IDMAP), 0, 0, userNamespace.number))
  }

  package static func attach(_ mount: borrowing Descriptor, to target: borrowing Descriptor) throws(Errno) {
    try check(clx_move_mount(mount.number, target.number))
  }

  /// Mounts an overlay by mount(2). All paths must be made by the caller and be unreachable for other processes.
  package static func overlay(at target: String, options: String) throws(Errno) {
    // 2 | 4 is MS_NOSUID | MS_NODEV.
    try check(
      target.withCString { t in
        options.withCString { o in "overlay".withCString { clx_mount($0, t, $0, 2 | 4, o) } }
      })
  }

  /// Stops mount events from propagating to the mount namespace that this one was copied from.
  package static func makeSlave() throws(Errno) {
    try check(clx_make_slave())
  }

  /// Changes the root by pivot_root(2) with both paths ".", which stacks the old root under the new one, and detaches the old root.
  package static func pivot(into root: borrowing Descriptor) throws(Errno) {
    try check(clx_fchdir(root.number))
    try check(".".withCString { clx_pivot_root($0, $0) })
    try check(".".withCString { clx_umount2($0, Int32(CLX_MNT_DETACH)) })
    try check("/".withCString { clx_chdir($0) })
  }

  /// Returns the id of the mount that a file is on; ids are unique only until the next boot.
  package static func id(_ file: borrowing Descriptor) throws(Errno) -> UInt64 {
    var id: UInt64 = 0
    try check(clx_mount_id(file.number, &id))
    return id
  }

  /// Unmounts the mount whose root this is: at once from its mount point, and completely when no file on it is open any more. It
  /// goes through the directory's descriptor, so that no path is resolved.
  package static func detach(_ root: borrowing Descriptor) throws(Errno) {
    try check(clx_fchdir(root.number))
    try check(".".withCString { clx_umount2($0, Int32(CLX_MNT_DETACH)) })
    try check("/".withCString { clx_chdir($0) })
  }

  package static func isFileSystem(_ file: borrowing Descriptor, _ magic: Int) throws(Errno) -> Bool {
    try check(clx_super_magic(file.number)) == magic
  }

  package static func isReadOnly(_ file: borrowing Descriptor) throws(Errno) -> Bool {
    try check(clx_super_readonly(file.number)) != 0
  }
}

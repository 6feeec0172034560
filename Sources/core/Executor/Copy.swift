// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// Copies trees, for file systems that start with the content that they cover in the root.
enum Copy {
  /// Copies directories, files and symlinks with their owners and modes, and skips device nodes and sockets. It never follows a
  /// symlink.
  static func contents(of source: borrowing Descriptor, to target: borrowing Descriptor) throws(Errno) {
    let from = try source.status()
    try target.setOwner(from.uid, from.gid)
    try target.setMode(from.permissions)
    for name in try source.entries() {
      let entry = try source.open(name, [.path, .noFollow])
      let status = try entry.status()
      switch status.kind {
      case .directory:
        try target.makeDirectory(name, mode: 0o700)
        try contents(
          of: try source.open(name, [.readOnly, .directory, .noFollow]),
          to: try target.open(name, [.readOnly, .directory, .noFollow]))
      case .symlink:
        try target.makeSymlink(name, to: try source.link(name))
        try target.setOwner(status.uid, status.gid, name)
      case .regular:
        let reading = try source.open(name, [.readOnly, .noFollow, .nonBlocking])
        let writing = try target.open(name, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o600)
        while true {
          let bytes = try reading.read(upTo: 65_536)
          if bytes.isEmpty { break }
          try writing.write(bytes)
        }
        try writing.setOwner(status.uid, status.gid)
        try writing.setMode(status.permissions)
      default: break
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Linux
internal import Procfs

/// Directories of the host that are mounted into a workspace.
package enum HostDirectory {
  /// Creates a home if it is missing, and checks that the owner owns it. A symlink, a file, or a directory owned by another user in its
  /// place is refused, and nothing below it is ever chowned.
  package static func prepareHome(_ path: String, uid: UInt32, gid: UInt32) throws {
    // The owner's files are in the volume file: a new, empty directory would hide them.
    guard !Process.exists(path + ".img") else {
      throw refusal(path, "is an image, \(path).img; expected a directory (storage.driver)")
    }
    let (parent, name) = split(path)
    let status: FileStatus
    do throws(Errno) {
      let folder = try Descriptor.openPlain(parent, [.path, .directory])
      do throws(Errno) {
        try folder.makeDirectory(name, mode: 0o700)
        try folder.setOwner(uid, gid, name)
      } catch {
        if error != .exists { throw error }
      }
      status = try folder.status(name)
    } catch {
      throw refusal(path, "cannot be used: \(error.sentence) (on \(fileSystem(of: path)))")
    }
    guard status.kind == .directory else {
      throw refusal(path, "is a \(status.kind); expected a directory")
    }
    guard status.uid == uid else {
      throw refusal(path, "belongs to uid \(status.uid), not to the owner's storage uid \(uid)")
    }
  }

  /// Returns the type of the file system that contains a path, for messages.
  package static func fileSystem(of path: String) -> String { MountTable()?.fileSystem(of: path) ?? "an unknown file system" }

  /// Checks that the path of a dataset is an existing directory without a symlink in the path.
  package static func checkDataset(_ path: String) throws {
    do throws(Errno) {
      _ = try Descriptor.openPlain(path, [.path, .directory])
    } catch {
      let why = error == .loop ? "the path contains a symlink, which is not allowed" : error.sentence
      throw DriverError(.failedPrecondition, "dataset \(path): \(why)")
    }
  }

  /// Prepares a project folder: new files in it belong to the group and are writable by it, whatever the umask. Its owner must be a
  /// member, since nothing can be created in a directory whose owner is not mapped in the sandbox.
  package static func prepareProject(_ path: String, gid: UInt32, members: [UInt32]) throws {
    do throws(Errno) {
      let folder = try Descriptor.openPlain(path, [.readOnly, .directory])
      let status = try folder.status()
      let owner = members.contains(status.uid) ? status.uid : members.min() ?? status.uid
      if status.uid != owner || status.gid != gid { try folder.setOwner(owner, gid) }
      if status.permissions & 0o2777 != 0o2770 { try folder.setMode(0o2770) }
      try folder.setExtendedAttribute("system.posix_acl_default", projectACL)
    } catch {
      throw DriverError(.failedPrecondition, "project folder \(path): \(error.sentence)")
    }
  }

  /// The ACL (acl(5)) in the kernel's format: version 2, then tag, permissions and id of each entry. user::rwx group::rwx other::---
  private static let projectACL: [UInt8] =
    [2, 0, 0, 0] + [(1, 7), (4, 7), (32, 0)].flatMap { [UInt8($0.0), 0, UInt8($0.1), 0, 0xFF, 0xFF, 0xFF, 0xFF] }

  private static func refusal(_ path: String, _ why: String) -> DriverError {
    DriverError(.failedPrecondition, "home \(path) \(why)")
  }

  private static func split(_ path: String) -> (parent: String, name: String) {
    let parts = path.split(separator: "/")
    let parent = parts.dropLast().joined(separator: "/")
    return ("/" + parent, String(parts.last ?? "."))
  }
}

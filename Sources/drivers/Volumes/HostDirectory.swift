// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Procfs

package struct StorageError: Error, Sendable, CustomStringConvertible {
  package let description: String
  package init(description: String) { self.description = description }
}

/// Folders of the host that are given to a workspace.
package enum HostDirectory {
  /// Makes sure that a home is there and is the owner's. A missing one is created; a symlink, a file, or
  /// somebody else's folder in its place is refused, and nothing below it is ever chowned.
  package static func prepareHome(_ path: String, uid: UInt32, gid: UInt32) throws {
    // The files that its owner looks for are in there.
    guard !Process.exists(path + ".img") else {
      throw refusal(path, "is an image, \(path).img, and a directory was asked for (storage.driver)")
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
      throw refusal(path, "is a \(status.kind), not a directory; it is not followed")
    }
    guard status.uid == uid else {
      throw refusal(path, "belongs to uid \(status.uid), not to the owner's storage uid \(uid)")
    }
  }

  /// What kind of file system a path is on, for messages.
  package static func fileSystem(of path: String) -> String { MountTable()?.fileSystem(of: path) ?? "an unknown file system" }

  /// Checks a dataset's folder: there, a directory, no symlink on the way.
  package static func checkDataset(_ path: String) throws {
    do throws(Errno) {
      _ = try Descriptor.openPlain(path, [.path, .directory])
    } catch {
      let why = error == .loop ? "there is a symlink in it, which is not followed" : error.sentence
      throw StorageError(description: "dataset \(path): \(why)")
    }
  }

  /// Makes a folder one of a project: what is made in it belongs to the group and is writable to it, whatever mask its maker has. Its
  /// owner has to be a member, since nobody may make anything in a folder whose owner is nobody inside.
  package static func prepareProject(_ path: String, gid: UInt32, members: [UInt32]) throws {
    do throws(Errno) {
      let folder = try Descriptor.openPlain(path, [.readOnly, .directory])
      let status = try folder.status()
      let owner = members.contains(status.uid) ? status.uid : members.min() ?? status.uid
      if status.uid != owner || status.gid != gid { try folder.setOwner(owner, gid) }
      if status.permissions & 0o2777 != 0o2770 { try folder.setMode(0o2770) }
      try folder.setExtendedAttribute("system.posix_acl_default", projectACL)
    } catch {
      throw StorageError(description: "project folder \(path): \(error.sentence)")
    }
  }

  /// acl(5) as the kernel keeps it: version 2, then tag, permissions and id of each entry. user::rwx group::rwx other::---
  private static let projectACL: [UInt8] =
    [2, 0, 0, 0] + [(1, 7), (4, 7), (32, 0)].flatMap { [UInt8($0.0), 0, UInt8($0.1), 0, 0xFF, 0xFF, 0xFF, 0xFF] }

  private static func refusal(_ path: String, _ why: String) -> StorageError {
    StorageError(description: "home \(path) \(why)")
  }

  private static func split(_ path: String) -> (parent: String, name: String) {
    let parts = path.split(separator: "/")
    let parent = parts.dropLast().joined(separator: "/")
    return ("/" + parent, String(parts.last ?? "."))
  }
}

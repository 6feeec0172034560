// SPDX-License-Identifier: Apache-2.0

internal import Linux

package struct StorageError: Error, Sendable, CustomStringConvertible {
  package let description: String
}

/// Folders of the host that are given to a workspace.
package enum HostFolder {
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
      let root = try Descriptor.open("/", [.path, .directory])
      let folder = try root.open(parent, [.path, .directory], resolving: [.inRoot, .noSymlinks])
      do throws(Errno) {
        try folder.makeDirectory(name, mode: 0o700)
        try folder.setOwner(uid, gid, name)
      } catch {
        if error != .exists { throw error }
      }
      status = try folder.status(name)
    } catch {
      throw refusal(path, "cannot be used: \(error.sentence)")
    }
    guard status.kind == .directory else {
      throw refusal(path, "is a \(status.kind), not a directory; it is not followed")
    }
    guard status.uid == uid else {
      throw refusal(path, "belongs to uid \(status.uid), not to the owner's storage uid \(uid)")
    }
  }

  /// Checks a dataset's folder: there, a directory, no symlink on the way.
  package static func checkDataset(_ path: String) throws {
    do throws(Errno) {
      let root = try Descriptor.open("/", [.path, .directory])
      _ = try root.open(String(path.dropFirst()), [.path, .directory], resolving: [.inRoot, .noSymlinks])
    } catch {
      let why = error == .loop ? "there is a symlink in it, which is not followed" : error.sentence
      throw StorageError(description: "dataset \(path): \(why)")
    }
  }

  private static func refusal(_ path: String, _ why: String) -> StorageError {
    StorageError(description: "home \(path) \(why)")
  }

  private static func split(_ path: String) -> (parent: String, name: String) {
    let parts = path.split(separator: "/")
    let parent = parts.dropLast().joined(separator: "/")
    return (parent.isEmpty ? "." : parent, String(parts.last ?? "."))
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import HostPrograms
internal import Linux
internal import Synchronization

/// Datasets that are volume files (squashfs or EROFS). Each is mounted once, read-only, while at least one workspace uses it.
package final class DatasetVolumes: Sendable {
  private let root: String
  /// The users of each mount point.
  private let users = Mutex<[String: Users]>([:])
  /// The mount points that each workspace may use.
  private let points = Mutex<[String: Set<String>]>([:])

  /// The workspaces that use one volume file. The lock is held during mount and unmount, so that they cannot race; a volume file whose
  /// file system does not respond delays no other.
  private final class Users: Sendable { let ids = Mutex<Set<String>>([]) }

  package init(root: String) throws {
    self.root = root
    try FileManager.default.createDirectory(atPath: root, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
  }

  /// Returns whether the registered path is a file and not a directory.
  package static func isImage(_ path: String) -> Bool {
    (try? Descriptor.openPlain(path, [.path]).status())?.kind == .regular
  }

  package func path(_ image: String) -> String {
    root + "/" + image.dropFirst().replacing("%", with: "%25").replacing("/", with: "%2F")
  }

  private func users(_ point: String) -> Users {
    users.withLock { users in
      if let known = users[point] { return known }
      let fresh = Users()
      users[point] = fresh
      return fresh
    }
  }

  package func acquire(_ image: String, by workspace: String) throws {
    let point = path(image)
    points.withLock { _ = $0[workspace, default: []].insert(point) }
    try users(point).ids.withLock { ids in
      if ids.isEmpty {
        let type = try DatasetVolumes.type(image)
        try? FileManager.default.createDirectory(atPath: point, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o755])
        do {
          try HostProgram.run(
            ["mount", "-t", type, "-o", "loop,ro,nosuid,nodev", image, point], "dataset \(image) cannot be mounted")
        } catch {
          rmdir(point)
          throw error
        }
      }
      ids.insert(workspace)
    }
  }

  /// Records the use by a workspace that the previous agent started.
  package func adopt(_ image: String, by workspace: String) {
    let point = path(image)
    points.withLock { _ = $0[workspace, default: []].insert(point) }
    users(point).ids.withLock { _ = $0.insert(workspace) }
  }

  /// Releases all datasets of a workspace except these. Idempotent.
  package func release(by workspace: String, except kept: [String] = []) {
    let kept = Set(kept.map(path))
    let had = points.withLock { points in
      let had = points[workspace] ?? []
      let rest = had.intersection(kept)
      points[workspace] = rest.isEmpty ? nil : rest
      return had.subtracting(kept)
    }
    for point in had {
      users(point).ids.withLock { ids in
        if ids.remove(workspace) != nil, ids.isEmpty { unmount(point) }
      }
    }
  }

  /// Unmounts what no workspace uses. Returns the names.
  package func sweep() -> [String] {
    let points = (try? FileManager.default.contentsOfDirectory(atPath: root)) ?? []
    return points.sorted().filter { name in
      let point = "\(root)/\(name)"
      return users(point).ids.withLock { ids in
        guard ids.isEmpty else { return false }
        unmount(point)
        return true
      }
    }
  }

  private func unmount(_ point: String) {
    try? HostProgram.run(["umount", "--lazy", point], "")
    rmdir(point)
  }

  /// Detects the type by the magic number in the file, never by a trial mount.
  private static func type(_ image: String) throws -> String {
    do throws(Errno) {
      let file = try Descriptor.openPlain(image, [.readOnly])
      if try file.read(at: 0, upTo: 4) == Array("hsqs".utf8) { return "squashfs" }
      if try file.read(at: 1024, upTo: 4) == [0xE2, 0xE1, 0xF5, 0xE0] { return "erofs" }
    } catch {
      throw DriverError(.failedPrecondition, "dataset \(image): \(error.sentence)")
    }
    throw DriverError(.failedPrecondition, "dataset \(image) is neither a directory nor a squashfs or EROFS image")
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import HostPrograms
internal import Linux
internal import Synchronization

/// Datasets that are file systems in a file, squashfs or EROFS: each mounted once, read-only, while any workspace has it.
package final class DatasetVolumes: Sendable {
  private let root: String
  /// By mount point, who has it.
  private let users = Mutex<[String: Users]>([:])
  /// By workspace, the mount points that it may have.
  private let points = Mutex<[String: Set<String>]>([:])

  /// The workspaces that have one image. Locked while it is mounted or unmounted, so that the two never cross; an image whose file system
  /// does not answer holds up no other.
  private final class Users: Sendable { let ids = Mutex<Set<String>>([]) }

  package init(root: String) throws {
    self.root = root
    try FileManager.default.createDirectory(atPath: root, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
  }

  /// Whether what is registered there is a file, and not a directory.
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

  /// Of a workspace that an earlier agent started.
  package func adopt(_ image: String, by workspace: String) {
    let point = path(image)
    points.withLock { _ = $0[workspace, default: []].insert(point) }
    users(point).ids.withLock { _ = $0.insert(workspace) }
  }

  /// Everything that a workspace has but these. Idempotent.
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

  /// Mounts that no workspace has. Returns their names.
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

  /// By what is in the file, never by trying.
  private static func type(_ image: String) throws -> String {
    do throws(Errno) {
      let file = try Descriptor.openPlain(image, [.readOnly])
      if try file.read(at: 0, upTo: 4) == Array("hsqs".utf8) { return "squashfs" }
      if try file.read(at: 1024, upTo: 4) == [0xE2, 0xE1, 0xF5, 0xE0] { return "erofs" }
    } catch {
      throw StorageError(description: "dataset \(image): \(error.sentence)")
    }
    throw StorageError(description: "dataset \(image) is neither a directory nor a squashfs or EROFS image")
  }
}

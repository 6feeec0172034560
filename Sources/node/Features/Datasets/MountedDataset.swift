// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Volumes

/// A dataset as a workspace has it.
package struct MountedDataset: Codable, Equatable, Sendable {
  package let target: String
  /// A directory of the host, or a volume file.
  package let source: String
  /// NAME@VERSION; nil if it was requested by its path.
  package let reference: String?
  /// The path below the source; nil for the source itself.
  package let path: String?
  package var writable: Bool
  let executable: Bool
  /// The group of a project's folder, and the storage uids of its members.
  let gid: UInt32?
  let members: [UInt32]?
  /// The expiry in seconds since 1970; nil: as long as the workspace.
  package var expires: Double?
  /// Whether it was attached while the workspace ran, and is not in its spec.
  package let isAttached: Bool
  /// Whether the source was a volume file, not a directory, when it was resolved; nil in records of commit 7ede341.
  var isVolume: Bool?

  var isImage: Bool { isVolume ?? false }
  var isOver: Bool { expires.map { $0 <= Date.now.timeIntervalSince1970 } ?? false }

  /// The attributes of its events.
  var attributes: [String: String] {
    var all = ["target": target, "dataset": reference ?? source, "mode": writable ? "rw" : "ro"]
    if let path { all["path"] = path }
    if let expires { all["expires"] = wallTime(Date(timeIntervalSince1970: expires)) }
    return all
  }

  /// Returns the root of the source as a directory of the host; a volume file has one while it is open.
  func base(_ images: DatasetVolumes) -> String { isImage ? images.path(source) : source }

  /// Returns the directory of the host that is mounted.
  func folder(_ images: DatasetVolumes) -> String { base(images) + (path.map { "/" + $0 } ?? "") }
}

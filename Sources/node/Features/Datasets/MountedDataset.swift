// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Volumes

/// A dataset as a workspace has it.
package struct MountedDataset: Codable, Equatable, Sendable {
  package let target: String
  /// A directory of the host, or an image.
  package let source: String
  /// NAME@VERSION; nil where it was asked for by its path.
  package let reference: String?
  /// Below the source.
  package let path: String?
  package var writable: Bool
  let executable: Bool
  /// Of a project's folder: its group, and the storage uids of its members.
  let gid: UInt32?
  let members: [UInt32]?
  /// Seconds since 1970; nil for as long as the workspace.
  package var expires: Double?
  /// While the workspace ran, not by its spec.
  package let isAttached: Bool
  /// Whether the source is an image and not a directory, as it was when it was resolved; nil in records of commit 7ede341.
  var isVolume: Bool?

  var isImage: Bool { isVolume ?? false }
  var isOver: Bool { expires.map { $0 <= Date.now.timeIntervalSince1970 } ?? false }

  /// As an event tells of it.
  var attributes: [String: String] {
    var all = ["target": target, "dataset": reference ?? source, "mode": writable ? "rw" : "ro"]
    if let path { all["path"] = path }
    if let expires { all["expires"] = wallTime(Date(timeIntervalSince1970: expires)) }
    return all
  }

  /// The root of the source as a directory of the host, which an image has once it is open.
  func base(_ images: DatasetVolumes) -> String { isImage ? images.path(source) : source }

  /// What of the host is mounted.
  func folder(_ images: DatasetVolumes) -> String { base(images) + (path.map { "/" + $0 } ?? "") }
}

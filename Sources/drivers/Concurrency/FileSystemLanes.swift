// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// A lane for each file system, so that one that does not respond takes no thread from another.
package final class FileSystemLanes: Sendable {
  private let kind: String
  private let width: Int
  private let queueLimit: Int
  private let patience: Duration?
  private let lanes = Mutex<[String: Lane]>([:])

  /// The number of lanes from which on idle ones are removed.
  private static let kept = 64

  package init(_ kind: String, width: Int, queue: Int, patience: Duration?) {
    self.kind = kind
    self.width = width
    queueLimit = queue
    self.patience = patience
  }

  package var gauges: [Lane.Gauge] { lanes.withLock { $0.values.map(\.gauge) }.sorted { $0.name < $1.name } }

  /// Returns the lane of the file system that contains a path, found by the names of mount points alone.
  package func lane(for path: String, among points: [String]) -> Lane {
    let point = FileSystemLanes.longest(of: points, above: path)
    return lanes.withLock { lanes in
      if let lane = lanes[point] { return lane }
      if lanes.count >= FileSystemLanes.kept { lanes = lanes.filter { !$0.value.isIdle } }
      let lane = Lane("\(kind) \(point)", width: width, queue: queueLimit, patience: patience)
      lanes[point] = lane
      return lane
    }
  }

  static func longest(of points: [String], above path: String) -> String {
    points.filter { point in
      point == "/" || path == point || path.hasPrefix(point + "/")
    }.max { $0.utf8.count < $1.utf8.count } ?? "/"
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Concurrency
internal import Foundation
internal import Procfs

/// The lanes for work that may block. Nothing that touches a disk, cgroupfs or a registry file runs on an actor.
///
/// | lane | width | work |
/// |---|---|---|
/// | launch | 4 | sandbox folders, cgroups, links: milliseconds each |
/// | cleanup | 4 | release of what an attempt held |
/// | images | 1 | imports and removals, which take minutes and saturate a disk |
/// | providers | 4 | calls of credential providers, which are programs of others |
/// | inspect | 2 | occasional reads of /proc, of the cgroups of workspaces, and of small files |
/// | controllers | 4 | checks whether a controller listens on its socket |
/// | storage | 4 for each file system | homes, datasets, packages: a dead export blocks only itself |
/// | volumes | 4 for each file system | home volumes, whose check (fsck) has no time limit |
/// | copies | 2 for each file system | snapshots and other copies of homes |
package struct Lanes: Sendable {
  let launch = Lane("launch", width: 4, queue: 1024)
  let cleanup = Lane("cleanup", width: 4, queue: 20_000)
  let images = Lane("images", width: 1, queue: 64)
  let providers = Lane("providers", width: 4, queue: 2048)
  let inspect = Lane("inspect", width: 2, queue: 4096)
  package let controllers = Lane("controllers", width: 4, queue: 64)
  private let storage = FileSystemLanes("storage", width: 4, queue: 128, patience: Lanes.patience)
  private let volumes = FileSystemLanes("volumes", width: 4, queue: 1024, patience: nil)
  private let copies = FileSystemLanes("copies", width: 2, queue: 64, patience: nil)
  private let mounts = MountPoints()

  /// The time after which an operation on a directory counts against its file system.
  static let patience = Duration.seconds(10)

  /// Runs work on a directory of a user. `path`: the directory, which selects the lane.
  func onStorage<T: Sendable>(_ path: String, within limit: Duration? = nil, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(storage, path, within: limit, body)
  }

  /// Runs work on a home volume. `path`: the volume file.
  func onVolume<T: Sendable>(_ path: String, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(volumes, path, within: nil, body)
  }

  func onCopies<T: Sendable>(_ path: String, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(copies, path, within: nil, body)
  }

  private func run<T: Sendable>(
    _ lanes: FileSystemLanes, _ path: String, within limit: Duration?, _ body: @escaping @Sendable () throws -> T
  ) async throws -> T {
    let points: [String]
    if let known = mounts.unchanged { points = known } else { points = try await launch.run { [mounts] in mounts.current() } }
    let lane = lanes.lane(for: path, among: points)
    if let limit { return try await lane.run(within: limit, body) }
    return try await lane.run(body)
  }

  package var gauges: [Lane.Gauge] {
    [launch, cleanup, images, providers, inspect, controllers].map(\.gauge) + storage.gauges + volumes.gauges + copies.gauges
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Concurrency
internal import Foundation
internal import Procfs

/// Where work that may block is done. Nothing that touches a disk, cgroupfs or a registry file runs on an actor.
///
/// | lane | width | what waits there |
/// |---|---|---|
/// | launch | 4 | sandbox folders, cgroups, links: milliseconds each |
/// | cleanup | 4 | giving back what an attempt held |
/// | images | 1 | imports and removals, which take minutes and all of a disk |
/// | providers | 4 | credential providers, which are not ours |
/// | inspect | 2 | /proc and cgroups of workspaces, looked at now and then |
/// | controllers | 4 | whether somebody listens at a controller's socket |
/// | storage | 4 for each file system | homes, datasets, packages: a dead export stops only itself |
/// | volumes | 4 for each file system | homes in images, whose check has no limit |
/// | copies | 2 for each file system | snapshots and other copies of homes |
package struct Lanes: Sendable {
  let launch = Lane("launch", width: 4, queue: 1024)
  let cleanup = Lane("cleanup", width: 4, queue: 20_000)
  let images = Lane("images", width: 1, queue: 64)
  let providers = Lane("providers", width: 4, queue: 2048)
  let inspect = Lane("inspect", width: 2, queue: 4096)
  package let controllers = Lane("controllers", width: 4, queue: 64)
  private let storage: FileSystemLanes
  private let volumes: FileSystemLanes
  private let copies: FileSystemLanes

  /// Operations on a directory that take longer count against its file system.
  static let patience = Duration.seconds(10)

  init() {
    let points: @Sendable () -> [String] = { MountTable()?.points ?? [] }
    storage = FileSystemLanes("storage", width: 4, queue: 128, patience: Lanes.patience, mountPoints: points)
    volumes = FileSystemLanes("volumes", width: 4, queue: 1024, patience: nil, mountPoints: points)
    copies = FileSystemLanes("copies", width: 2, queue: 64, patience: nil, mountPoints: points)
  }

  /// For directories of users: `path` is what the work is about.
  func onStorage<T: Sendable>(_ path: String, within limit: Duration? = nil, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(storage, path, within: limit, body)
  }

  /// For homes in images: `path` is the image's.
  func onVolume<T: Sendable>(_ path: String, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(volumes, path, within: nil, body)
  }

  func onCopies<T: Sendable>(_ path: String, _ body: @escaping @Sendable () throws -> T) async throws -> T {
    try await run(copies, path, within: nil, body)
  }

  private func run<T: Sendable>(
    _ lanes: FileSystemLanes, _ path: String, within limit: Duration?, _ body: @escaping @Sendable () throws -> T
  ) async throws -> T {
    let lane = try await launch.run { lanes.lane(for: path) }
    if let limit { return try await lane.run(within: limit, body) }
    return try await lane.run(body)
  }

  package var gauges: [Lane.Gauge] {
    [launch, cleanup, images, providers, inspect, controllers].map(\.gauge) + storage.gauges + volumes.gauges + copies.gauges
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import HostPrograms
internal import Linux

/// The packages that an owner installed, stored in the home apart for each image: `.local/share/carrel/packages/<image>/…`, where `<image>`
/// is the beginning of its digest. The owner can change the home at any moment: root walks it by descriptors and follows no symlink, and
/// longer work runs with the owner's own rights.
package struct HomePackages: Sendable {
  package static let folder = ".local/share/carrel/packages"
  private static let snapshotsName = "snapshots"

  /// The path of the home on the host.
  private let home: String
  private let uid: UInt32
  private let gid: UInt32

  package init(home: String) throws {
    self.home = home
    do throws(Errno) {
      let status = try Descriptor.openPlain(home, [.path, .directory]).status()
      (uid, gid) = (status.uid, status.gid)
    } catch {
      throw DriverError(.failedPrecondition, "home \(home): \(error.sentence)")
    }
  }

  /// Returns the name of an image's packages.
  package static func key(_ digest: String) -> String { String(digest.drop { $0 != ":" }.dropFirst().prefix(16)) }

  /// Whether a name is that of an image's packages. The owner may put other files beside them.
  private static func isKey(_ name: String) -> Bool {
    name.utf8.count == 16 && name.utf8.allSatisfy { (0x30...0x39).contains($0) || (0x61...0x66).contains($0) }
  }

  /// The number of images whose packages are reported, and listed: the owner can make any number of folders.
  private static let reported = 16
  private static let listed = 256

  /// Creates the directories for packages. If this image had none, returns other images that have packages, at most 16.
  package func prepare(_ key: String, folders: [String]) throws -> [String] {
    do throws(Errno) {
      let root = try Descriptor.openPlain(home, [.path, .directory])
      let all = try make(HomePackages.folder, in: root)
      let isNew = !all.exists(key)
      let found = isNew ? try all.open(".", [.readOnly, .directory]).entries().filter { HomePackages.isKey($0) && $0 != key } : []
      let others = Array(found.sorted().prefix(HomePackages.reported))
      for name in folders { _ = try make("\(HomePackages.folder)/\(key)/\(name)", in: root) }
      return others
    } catch {
      throw DriverError(.failedPrecondition, "home \(home): cannot create \(HomePackages.folder): \(error.sentence)")
    }
  }

  private func make(_ path: String, in root: borrowing Descriptor) throws(Errno) -> Descriptor {
    try root.openDirectory(making: path, resolving: [.inRoot, .noSymlinks]) { (made) throws(Errno) in
      // A directory that the owner put in its place in the meantime is owned by the owner already.
      if try made.status().uid == Linux.Process.effectiveUser { try made.setOwner(uid, gid) }
    }
  }

  // ------------------------------------------------------- for platform engineers

  package struct Entry: Equatable, Sendable {
    package let key: String
    package let bytes: UInt64
    package let snapshots: [String]
  }

  package func list() -> [Entry] {
    names(HomePackages.folder).filter(HomePackages.isKey).prefix(HomePackages.listed).map { key in
      Entry(
        key: key, bytes: HomeStore.size("\(home)/\(HomePackages.folder)/\(key)"),
        snapshots: Array(names("\(HomePackages.folder)/\(HomePackages.snapshotsName)/\(key)").prefix(1000)))
    }
  }

  private func names(_ path: String) -> [String] {
    guard let root = try? Descriptor.openPlain(home, [.path, .directory]),
      let folder = try? root.open(path, [.readOnly, .directory], resolving: [.inRoot, .noSymlinks])
    else { return [] }
    return ((try? folder.entries()) ?? []).sorted()
  }

  /// Copies the packages. Returns the name of the copy.
  package func snapshot(_ key: String) throws -> String {
    let name = HomeStore.stamp(.now)
    try run("mkdir -p snapshots/\"$1\" && cp --archive --reflink=auto -- \"$1\" snapshots/\"$1\"/\"$2\"", key, name)
    return name
  }

  /// Renames the packages to a snapshot, and copies `snapshot`, if given, into their place. Returns the name of the new snapshot.
  package func reset(_ key: String, to snapshot: String? = nil) throws -> String {
    if let snapshot, !names("\(HomePackages.folder)/\(HomePackages.snapshotsName)/\(key)").contains(snapshot) {
      throw DriverError(.failedPrecondition, "packages for \(key): snapshot \(snapshot) does not exist")
    }
    let name = HomeStore.stamp(.now) + (snapshot == nil ? "-before-reset" : "-before-restore")
    try run(
      "mkdir -p snapshots/\"$1\" && mv -T -- \"$1\" snapshots/\"$1\"/\"$2\""
        + (snapshot == nil ? "" : " && cp --archive --reflink=auto -T -- snapshots/\"$1\"/\"$3\" \"$1\""), key, name, snapshot ?? "")
    return name
  }

  private func run(_ script: String, _ arguments: String...) throws {
    guard names(HomePackages.folder).contains(arguments[0]) else {
      throw DriverError(.failedPrecondition, "packages for \(arguments[0]): not found")
    }
    try HostProgram.run(
      HostProgram.confined(uid, gid, to: [HostProgram.Folder(home, at: "/home")])
        + ["sh", "-c", "cd \"\(HomePackages.folder)\" && \(script)", "sh"] + arguments, "packages in \(home)")
  }
}

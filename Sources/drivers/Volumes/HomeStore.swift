// SPDX-License-Identifier: Apache-2.0

internal import Errors
package import Foundation
internal import HostPrograms
internal import Linux
internal import Synchronization

/// The homes below the configured directory, by owner: `<owner>` or `<owner>.img`, snapshots below `.snapshots/<owner>`, and removed homes
/// below `.removed/<owner>`. cp(1) copies them, and shares blocks where the file system can. It copies a directory with the owner's own
/// rights: the owner may change it during the copy, and cp(1) reads only what the owner can read.
package struct HomeStore: Sendable {
  private let root: String
  private let images: HomeVolumes

  package init(root: String, images: HomeVolumes) {
    self.root = root
    self.images = images
  }

  /// A copy of a home, or a home that was renamed to be replaced or removed.
  package struct Snapshot: Equatable, Sendable {
    /// The time in UTC and a label.
    package let name: String
    /// The space used on the host.
    package let bytes: UInt64
    /// The time in the name, as RFC 3339.
    package var created: String {
      let digits = Array(name.prefix(16))
      guard digits.count == 16 else { return "" }
      func part(_ range: Range<Int>) -> String { String(digits[range]) }
      return "\(part(0..<4))-\(part(4..<6))-\(part(6..<8))T\(part(9..<11)):\(part(11..<13)):\(part(13..<15))Z"
    }
  }

  package func path(_ owner: String) -> String { "\(root)/\(owner)" }

  package func owners() -> [String] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: root)) ?? []
    let aside = [".snapshots", ".removed"].flatMap { (try? FileManager.default.contentsOfDirectory(atPath: "\(root)/\($0)")) ?? [] }
    let homes = names.filter { !$0.hasPrefix(".") && !$0.contains(".img.") }.map { $0.hasSuffix(".img") ? String($0.dropLast(4)) : $0 }
    return Set(homes + aside).sorted()
  }

  /// Returns whether the home is a volume file, or nil if the owner has no home.
  package func isImage(_ owner: String) -> Bool? {
    if Linux.Process.exists(path(owner) + ".img") { return true }
    return Linux.Process.exists(path(owner)) ? false : nil
  }

  package func bytes(_ owner: String) -> UInt64 { HomeStore.size(path(owner) + (isImage(owner) == true ? ".img" : "")) }

  package func snapshots(_ owner: String) -> [Snapshot] { list(".snapshots", owner) }
  package func removed(_ owner: String) -> [Snapshot] { list(".removed", owner) }

  private func list(_ kind: String, _ owner: String) -> [Snapshot] {
    let folder = "\(root)/\(kind)/\(owner)"
    return ((try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []).filter { !$0.hasPrefix(".") }.sorted().map {
      Snapshot(name: $0.hasSuffix(".img") ? String($0.dropLast(4)) : $0, bytes: HomeStore.size("\(folder)/\($0)"))
    }
  }

  // ------------------------------------------------------------------- copying

  package typealias Progress = @Sendable (UInt64) -> Void

  /// Copies a home. A directory may be in use during the copy; a volume file is frozen for it.
  package func snapshot(_ owner: String, label: String, _ progress: @escaping Progress) throws -> Snapshot {
    let source = try existing(owner)
    let (name, target) = try place(".snapshots", owner, label, source)
    try copy(source, to: target, of: owner, progress)
    return Snapshot(name: name, bytes: HomeStore.size(target))
  }

  /// Replaces a home with a copy of a snapshot. The present home is renamed to a new snapshot, which is returned; nothing is overwritten.
  package func restore(_ owner: String, _ snapshot: String, _ progress: @escaping Progress) throws -> Snapshot? {
    let source = try find(".snapshots", owner, snapshot)
    let target = path(owner) + (source.hasSuffix(".img") ? ".img" : "")
    let temporary = "\(root)/.snapshots/\(owner)/.restoring"
    try? FileManager.default.removeItem(atPath: temporary)
    try copy(source, to: temporary, of: owner, progress)
    var before: Snapshot?
    if isImage(owner) != nil {
      let present = try existing(owner)
      let (name, aside) = try place(".snapshots", owner, "before-restore", present)
      try HomeStore.move(present, aside)
      before = Snapshot(name: name, bytes: HomeStore.size(aside))
    }
    try HomeStore.move(temporary, target)
    return before
  }

  /// Copies a snapshot to a new home of another owner, who must not have one, and changes the owner of every file.
  package func clone(_ owner: String, _ snapshot: String, to other: String, uid: UInt32, gid: UInt32, _ progress: @escaping Progress) throws
  {
    guard isImage(other) == nil else { throw DriverError(.failedPrecondition, "home \(path(other)) is there already") }
    let source = try find(".snapshots", owner, snapshot)
    let isImage = source.hasSuffix(".img")
    let temporary = "\(root)/.snapshots/\(owner)/.cloning-\(other)"
    try? FileManager.default.removeItem(atPath: temporary)
    try copy(source, to: temporary, of: owner, progress)
    do {
      // chown as root is safe: the copy is not yet reachable by any owner.
      let own = ["chown", "--recursive", "--no-dereference", "\(uid):\(gid)"]
      if isImage {
        let format = try VolumeFormat.found(in: try Descriptor.openPlain(temporary, [.readOnly]), of: temporary) ?? .ext4
        if let renaming = format.rename(temporary) { try HostProgram.run(renaming, "copy \(temporary): cannot change its UUID") }
        try HostProgram.run(
          [
            "sh", "-c", HomeStore.chowning, "sh", temporary, "\(root)/.snapshots/\(owner)/.mount-\(other)", "\(uid):\(gid)",
            format.rawValue, format.mountOptions.map(\.0).joined(separator: ","),
          ],
          "copy \(temporary): cannot change the owner to \(other)")
      } else {
        try HostProgram.run(own + [temporary], "copy \(temporary): cannot change the owner to \(other)")
      }
      try HomeStore.move(temporary, path(other) + (isImage ? ".img" : ""))
    } catch {
      try? FileManager.default.removeItem(atPath: temporary)
      throw error
    }
  }

  private static let chowning = """
    mkdir -p "$2" && mount -t "$4" -o "loop,nosuid,nodev${5:+,$5}" "$1" "$2" || exit 1
    chown --recursive --no-dereference "$3" "$2/home"; status=$?
    umount "$2" && rmdir "$2"
    exit $status
    """

  private func copy(_ source: String, to target: String, of owner: String, _ progress: @escaping Progress) throws {
    let ended = Mutex(false)
    let reporter = Thread {
      while !ended.withLock({ $0 }) {
        Thread.sleep(forTimeInterval: 1)
        progress(HomeStore.size(target))
      }
    }
    reporter.start()
    defer { ended.withLock { $0 = true } }
    do {
      if source.hasSuffix(".img") {
        try images.withFrozenHome(path(owner), if: source == path(owner) + ".img") {
          try HostProgram.run(["cp", "--reflink=auto", "--sparse=always", "--preserve=mode", source, target], "cannot copy \(source)")
        }
      } else {
        let status = try Descriptor.openPlain(source, [.path, .directory]).status()
        try FileManager.default.createDirectory(atPath: target, withIntermediateDirectories: false, attributes: [.posixPermissions: 0o700])
        try Descriptor.openPlain(target, [.readOnly, .directory]).setOwner(status.uid, status.gid)
        let folders = [HostProgram.Folder(source, at: "/source", isWritable: false), HostProgram.Folder(target, at: "/target")]
        try HostProgram.run(
          HostProgram.confined(status.uid, status.gid, to: folders) + ["cp", "--archive", "--reflink=auto", ".", "/target/"],
          "cannot copy \(source)")
      }
    } catch {
      try? FileManager.default.removeItem(atPath: target)
      throw error
    }
  }

  // ------------------------------------------------------------------ removing

  package func remove(_ owner: String) throws -> Snapshot {
    let source = try existing(owner)
    let (name, target) = try place(".removed", owner, "", source)
    try HomeStore.move(source, target)
    return Snapshot(name: name, bytes: HomeStore.size(target))
  }

  /// Moves a removed home back; without a name, the one that was removed last.
  package func recover(_ owner: String, _ name: String?) throws {
    guard isImage(owner) == nil else { throw DriverError(.failedPrecondition, "home \(path(owner)): already exists; remove it first") }
    guard let name = name ?? removed(owner).last?.name else { throw DriverError(.failedPrecondition, "\(owner) has no removed home") }
    let source = try find(".removed", owner, name)
    try HomeStore.move(source, path(owner) + (source.hasSuffix(".img") ? ".img" : ""))
  }

  /// Deletes homes that were removed before `moment`. Returns their owners.
  package func purge(before moment: Date) -> [String] {
    let format = HomeStore.stamp(moment)
    return ((try? FileManager.default.contentsOfDirectory(atPath: root + "/.removed")) ?? []).filter { owner in
      var any = false
      for snapshot in removed(owner) where snapshot.name.prefix(16) < format {
        guard let path = try? find(".removed", owner, snapshot.name) else { continue }
        try? FileManager.default.removeItem(atPath: path)
        any = true
      }
      rmdir("\(root)/.removed/\(owner)")
      return any
    }
  }

  // --------------------------------------------------------------------- paths

  private func existing(_ owner: String) throws -> String {
    guard let isImage = isImage(owner) else { throw DriverError(.failedPrecondition, "there is no home \(path(owner))") }
    return path(owner) + (isImage ? ".img" : "")
  }

  private func find(_ kind: String, _ owner: String, _ name: String) throws -> String {
    let plain = "\(root)/\(kind)/\(owner)/\(name)"
    guard !name.isEmpty, !name.hasPrefix("."), !name.contains("/"),
      let path = [plain, plain + ".img"].first(where: { Linux.Process.exists($0) })
    else {
      throw DriverError(.failedPrecondition, "\(owner) has no \(kind == ".removed" ? "removed home" : "snapshot") of that name")
    }
    return path
  }

  private func place(_ kind: String, _ owner: String, _ label: String, _ source: String) throws -> (name: String, path: String) {
    let folder = "\(root)/\(kind)/\(owner)"
    // 0700: cp(1), which runs as the owner, sees only what root has mounted for it.
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
    let stem = HomeStore.stamp(.now) + (label.isEmpty ? "" : "-" + label)
    for number in 0..<1000 {
      let name = number == 0 ? stem : "\(stem)-\(number)"
      let path = "\(folder)/\(name)"
      if !Linux.Process.exists(path), !Linux.Process.exists(path + ".img") {
        return (name, path + (source.hasSuffix(".img") ? ".img" : ""))
      }
    }
    throw DriverError(.failedPrecondition, "\(folder): names \(stem) to \(stem)-999 are all in use")
  }

  package static func stamp(_ moment: Date) -> String {
    moment.formatted(
      .verbatim(
        "\(year: .padded(4))\(month: .twoDigits)\(day: .twoDigits)T\(hour: .twoDigits(clock: .twentyFourHour, hourCycle: .zeroBased))\(minute: .twoDigits)\(second: .twoDigits)Z",
        timeZone: TimeZone(secondsFromGMT: 0) ?? .current, calendar: Calendar(identifier: .gregorian)))
  }

  private static func move(_ from: String, _ to: String) throws {
    guard Foundation.rename(from, to) == 0 else {
      throw DriverError(.failedPrecondition, "cannot move \(from) to \(to): \(String(cString: strerror(errno)))")
    }
  }

  /// Returns the space used on the host, in bytes.
  static func size(_ path: String) -> UInt64 {
    guard let text = try? HostProgram.output(["du", "--summarize", "--block-size=1", "--one-file-system", path], "") else { return 0 }
    return UInt64(text.split(separator: "\n").last?.split(separator: "\t").first ?? "") ?? 0
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import HostPrograms
internal import Linux

/// The limit of a home that is a directory: a project quota of its file system (ext4 and XFS, mounted with `prjquota`). Everything in
/// the home belongs to its own project, whichever user creates it. setquota(8) and chattr(1) do the work.
package enum HomeQuota {
  /// Sets the limit. Returns true if the home is full and its limit was raised by a 64th now, until it has free space again. Blocks.
  package static func apply(_ home: String, bytes: UInt64, uid: UInt32, gid: UInt32) throws -> Bool {
    let project = try HomeQuota.project(of: home)
    if try current(home) != project {
      let own = HostProgram.confined(uid, gid, to: [HostProgram.Folder(home, at: "/home")])
      for (kind, flags) in [("f", "-p"), ("d", "+P -p")] {
        try HostProgram.run(
          own + ["find", ".", "-xdev", "-type", kind, "-exec", "chattr"] + flags.split(separator: " ").map(String.init)
            + ["\(project)", "{}", "+"],
          "home \(home): cannot set a limit (storage.size): its file system has no project quotas")
      }
    }
    let before = HomeVolumes.Usage(at: home)
    let isOpened = before.map { $0.limitBytes > bytes && $0.limitBytes <= bytes + bytes / 32 } ?? false
    let isFull =
      before.map { $0.limitBytes <= bytes + bytes / 32 && max($0.usedBytes * 100 / bytes, $0.percent) >= (isOpened ? 90 : 100) } ?? false
    try limit(home, project, isFull ? bytes + bytes / 64 : bytes)
    return isFull && !isOpened
  }

  private static func limit(_ home: String, _ project: UInt32, _ bytes: UInt64) throws {
    let failure = "home \(home): cannot set a limit (storage.size)"
    let mount = try HostProgram.output(["findmnt", "--noheadings", "--output", "TARGET", "--target", home], failure)
    try HostProgram.run(
      ["setquota", "-P", "\(project)", "0", "\(bytes / 1024)", "0", "\(bytes / 16_384)", mount],
      "\(failure): \(mount) has no project quotas (mount option prjquota)")
    // A file system with quota accounting but no enforcement accepts the limit without an error.
    guard let use = HomeVolumes.Usage(at: home), use.limitBytes <= bytes else {
      throw DriverError(.failedPrecondition, "\(failure): \(mount) does not enforce project quotas (mount option prjquota)")
    }
  }

  /// Returns the project of a home, derived from the inode of the directory, so that no list of projects is needed.
  private static func project(of home: String) throws -> UInt32 {
    do throws(Errno) {
      let inode = try Descriptor.openPlain(home, [.path, .directory]).status().inode
      return max(1, UInt32(truncatingIfNeeded: inode ^ inode >> 31) & 0x7FFF_FFFF)
    } catch {
      throw DriverError(.failedPrecondition, "home \(home): \(error.sentence)")
    }
  }

  /// Returns the project that the directory and new files in it belong to, or nil.
  private static func current(_ home: String) throws -> UInt32? {
    let said = (try? HostProgram.output(["lsattr", "-d", "-p", home], "")) ?? ""
    let fields = said.split(separator: " ")
    guard fields.count >= 2, let project = UInt32(fields[0]), fields[1].contains("P") else { return nil }
    return project
  }
}

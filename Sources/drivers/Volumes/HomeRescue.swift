// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import Linux

/// Sets aside files in a home that prevent a tool from starting: renames them, never deletes them, and leaves a note.
package struct HomeRescue: Sendable {
  /// The path of the home on the host.
  private let home: String

  package init(home: String) { self.home = home }

  /// Returns those of these paths, relative to the home, that exist.
  package func present(_ paths: [String]) -> [String] {
    guard let root = try? Descriptor.openPlain(home, [.path, .directory]) else { return [] }
    return paths.filter { path in
      let (above, name) = HomeRescue.split(path)
      guard let folder = try? root.open(above, [.path, .directory], resolving: HomeRescue.walk) else { return false }
      return (try? folder.status(name)) != nil
    }
  }

  /// Returns those of these paths that are larger than `limit` bytes.
  package func larger(_ paths: [String], than limit: UInt64) -> [String] {
    present(paths).filter { path in
      guard let root = try? Descriptor.openPlain(home, [.path, .directory]),
        let file = try? root.open(path, [.path], resolving: HomeRescue.walk), let status = try? file.status()
      else { return false }
      return status.kind == .directory ? HomeStore.size("\(home)/\(path)") > limit : status.size > limit
    }
  }

  /// Renames the paths and leaves a note in the home. Returns the note's name and the old and new paths, or nil if none existed.
  package func setAside(_ paths: [String], why: String) throws -> (note: String, moved: [(from: String, to: String)])? {
    let stamp = HomeStore.stamp(.now)
    do throws(Errno) {
      let root = try Descriptor.openPlain(home, [.path, .directory])
      var moved: [(from: String, to: String)] = []
      for path in paths {
        let (above, name) = HomeRescue.split(path)
        do throws(Errno) {
          let folder = try root.open(above, [.path, .directory], resolving: HomeRescue.walk)
          try folder.rename(name, to: "\(name).set-aside-\(stamp)")
          moved.append((path, "\(path).set-aside-\(stamp)"))
        } catch {
          if error != .noEntry { throw error }
        }
      }
      guard !moved.isEmpty else { return nil }
      let note = "CARREL-RESCUE-\(stamp).txt"
      var text = "\(why)\n\nSet aside, with nothing in it changed:\n\n"
      for entry in moved { text += "  ~/\(entry.from)  is now  ~/\(entry.to)\n" }
      text += "\nTo undo it, stop using what is in the first place and rename it back, in a terminal:\n\n"
      for entry in moved { text += "  mv -T ~/'\(entry.to)' ~/'\(entry.from)'\n" }
      try leave(note, text, in: root)
      return (note, moved)
    } catch {
      throw DriverError(.failedPrecondition, "home \(home): cannot set files aside: \(error.sentence)")
    }
  }

  /// Writes the note. A failure is ignored: on a full disk the rescue goes on without a note.
  private func leave(_ name: String, _ text: String, in root: borrowing Descriptor) throws(Errno) {
    let owner = try root.status()
    do throws(Errno) {
      let file = try root.open(name, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o644)
      try file.setOwner(owner.uid, owner.gid)
      try file.write(Array(text.utf8))
    } catch {}
  }

  private static let walk: Resolution = [.inRoot, .noSymlinks]

  private static func split(_ path: String) -> (above: String, name: String) {
    let parts = path.split(separator: "/").map(String.init)
    let above = parts.dropLast().joined(separator: "/")
    return (above.isEmpty ? "." : above, parts.last ?? ".")
  }
}

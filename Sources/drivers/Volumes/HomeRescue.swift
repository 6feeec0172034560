// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux

/// Sets things in a home aside that keep a tool from its start: renamed, never deleted, with a note that says so.
package struct HomeRescue: Sendable {
  /// The home, where it is on the host.
  private let home: String

  package init(home: String) { self.home = home }

  /// Which of these paths, relative to the home, are there.
  package func present(_ paths: [String]) -> [String] {
    guard let root = try? Descriptor.openPlain(home, [.path, .directory]) else { return [] }
    return paths.filter { path in
      let (above, name) = HomeRescue.split(path)
      guard let folder = try? root.open(above, [.path, .directory], resolving: HomeRescue.walk) else { return false }
      return (try? folder.status(name)) != nil
    }
  }

  /// Which of these are larger than `limit` bytes.
  package func larger(_ paths: [String], than limit: UInt64) -> [String] {
    present(paths).filter { path in
      guard let root = try? Descriptor.openPlain(home, [.path, .directory]),
        let file = try? root.open(path, [.path], resolving: HomeRescue.walk), let status = try? file.status()
      else { return false }
      return status.kind == .directory ? HomeStore.size("\(home)/\(path)") > limit : status.size > limit
    }
  }

  /// Renames them and leaves a note in the home. Returns the note's name, and what each is called now; nil where nothing was there any more.
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
      throw StorageError(description: "home \(home): what is suspected cannot be set aside: \(error.sentence)")
    }
  }

  /// A full disk keeps no note, and that is no reason to give up.
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

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import ShimProtocol
  internal import LaunchPlan
  internal import Linux
#endif

/// The secrets of a supervisor.
///
/// Before the launch no secret may be in this process's memory, since PID 1 is a copy of it: secrets arrive as descriptors of files
/// in memory and are not read until PID 1 has been cloned. From then on they are files in the sandbox's own file system.
struct SecretStore {
  private struct Entry {
    let name: String
    let file: Handle
  }

  /// Credential files that wait for the launch.
  private var waiting: [Entry] = []
  /// Held secrets of the agent, never visible in the sandbox.
  private var held: [Entry] = []
  /// The directory of the sandbox's secrets, and their owner.
  struct Place {
    /// The writable side of their file system; nil if the plan has none.
    let folder: Handle?
    let owner: (uid: UInt32, gid: UInt32)
  }

  private var folder: Handle?
  private var owner: (uid: UInt32, gid: UInt32) = (0, 0)

  private static let countLimit = 256

  var heldNames: [String] { held.map { $0.name } }

  var names: [String] {
    guard let folder else { return waiting.map { $0.name } }
    do throws(Errno) {
      return try folder.descriptor.open(".", [.readOnly, .directory]).entries().filter { $0.utf8.first != UInt8(ascii: ".") }
    } catch {
      return []
    }
  }

  /// Writes the files that waited for the launch to the sandbox's file system.
  mutating func open(_ place: Place) throws(StepFailure) {
    folder = place.folder
    owner = place.owner
    for entry in waiting {
      do throws(Errno) {
        try write(entry.name, try SecretStore.read(entry.file))
      } catch {
        throw StepFailure("store credential " + entry.name, error)
      }
    }
    waiting = []
  }

  /// Stores a secret; `file`, if it was passed with the message, replaces `content`.
  mutating func put(_ name: String, _ content: [UInt8], _ file: Handle?) throws(Errno) {
    guard SecretStore.isName(name) else { throw .invalid }
    if folder != nil {
      if let file { return try write(name, try SecretStore.read(file)) }
      return try write(name, content)
    }
    // Its content would then be in PID 1's memory.
    guard let file else { throw .invalid }
    try SecretStore.put(Entry(name: name, file: file), in: &waiting)
  }

  mutating func hold(_ name: String, _ file: Handle?) throws(Errno) {
    guard let file, SecretStore.isName(name) else { throw .invalid }
    try SecretStore.put(Entry(name: name, file: file), in: &held)
  }

  mutating func release() { held = [] }

  private static func put(_ entry: Entry, in list: inout [Entry]) throws(Errno) {
    list.removeAll { $0.name == entry.name }
    guard list.count < countLimit else { throw .noSpace }
    list.append(entry)
  }

  func held(_ name: String) throws(Errno) -> Handle {
    guard let entry = held.first(where: { $0.name == name }) else { throw .noEntry }
    return entry.file
  }

  func file(_ name: String) throws(Errno) -> Handle {
    guard let folder else {
      guard let entry = waiting.first(where: { $0.name == name }) else { throw .noEntry }
      return entry.file
    }
    guard SecretStore.isName(name) else { throw .invalid }
    return Handle(try folder.descriptor.open(name, [.readOnly, .noFollow]))
  }

  mutating func remove(_ name: String) throws(Errno) {
    guard SecretStore.isName(name) else { throw .invalid }
    guard let folder else {
      guard waiting.contains(where: { $0.name == name }) else { throw .noEntry }
      return waiting.removeAll { $0.name == name }
    }
    try folder.descriptor.remove(name)
  }

  private static func isName(_ name: String) -> Bool {
    !name.isEmpty && name.utf8.first != UInt8(ascii: ".") && !name.utf8.contains(UInt8(ascii: "/"))
  }

  private static func read(_ file: Handle) throws(Errno) -> [UInt8] {
    // Read from offset 0: this process and the writer share the file offset.
    let bytes = try file.descriptor.read(at: 0, upTo: ShimProtocol.heldLimit + 1)
    guard bytes.count <= ShimProtocol.heldLimit else { throw .messageTooLong }
    return bytes
  }

  /// Replaces a secret by rename, so that a reader finds the old content or the new one, never a part.
  private func write(_ name: String, _ content: [UInt8]) throws(Errno) {
    guard let folder else { throw .notSupported }
    let temporary = ".new"
    do throws(Errno) { try folder.descriptor.remove(temporary) } catch {}
    do throws(Errno) {
      let file = try folder.descriptor.open(temporary, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o400)
      try file.write(content)
      try file.setOwner(owner.uid, owner.gid)
      try folder.descriptor.rename(temporary, to: name)
    } catch {
      do throws(Errno) { try folder.descriptor.remove(temporary) } catch {}
      throw error
    }
  }

  /// Returns the host ids of the sandbox's user.
  static func owner(_ plan: Plan) -> (uid: UInt32, gid: UInt32) {
    var maps: (uids: [IDRange], gids: [IDRange]) = ([], [])
    for operation in plan.operations {
      if case .userNamespace(_, let uids, let gids) = operation { maps = (uids, gids) }
      if case .user(let uid, let gid, _, _, _) = operation {
        return (maps.uids.outside(uid) ?? uid, maps.gids.outside(gid) ?? gid)
      }
    }
    return (0, 0)
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import Linux
#endif

/// The directory of `--root`, with mode 0700. It has a directory for each container, with `state.json`, a copy of `config.json`,
/// the socket to which `start` connects while the container waits for it; and the compiled filters.
package struct ContainerStore {
  let path: String

  package init(_ path: String) throws(RuntimeError) {
    self.path = path
    do throws(Errno) {
      // Usually it exists.
      if Process.exists(path) { return }
      var folder = path.utf8.first == UInt8(ascii: "/") ? "" : "."
      for part in path.split(separator: "/") {
        folder += "/" + part
        do throws(Errno) { try Descriptor.makeDirectory(folder, mode: 0o700) } catch { if error != .exists { throw error } }
      }
    } catch {
      throw RuntimeError("cannot make \(path): \(error.sentence)")
    }
  }

  var filters: FilterCache { FilterCache(path + "/.filters") }

  static func validate(_ id: String) throws(RuntimeError) {
    let bytes = Array(id.utf8)
    guard let first = bytes.first, bytes.count <= 255, first != UInt8(ascii: "."), first != UInt8(ascii: "-"),
      bytes.allSatisfy({ byte in
        (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
          || [0x5F, 0x2B, 0x2D, 0x2E].contains(byte)
      })
    else { throw RuntimeError("\(id): not a container id: expected 1 to 255 of letters, digits and _+-. with a letter or digit first") }
  }

  /// Makes the container's directory; a lock on it lasts as long as `folder`.
  func make(_ id: String) throws(RuntimeError) -> ContainerDirectory {
    try ContainerStore.validate(id)
    do throws(Errno) {
      try Descriptor.open(path, [.path, .directory]).makeDirectory(id, mode: 0o700)
    } catch {
      throw RuntimeError(error == .exists ? "container \(id) exists already" : "cannot make \(path)/\(id): \(error.sentence)")
    }
    return try open(id)
  }

  func open(_ id: String) throws(RuntimeError) -> ContainerDirectory {
    try ContainerStore.validate(id)
    do throws(Errno) {
      let folder = try Descriptor.open(path, [.path, .directory]).open(id, [.readOnly, .directory, .noFollow])
      return ContainerDirectory(id: id, path: path + "/" + id, folder: Handle(folder))
    } catch {
      throw RuntimeError(error == .noEntry ? "container \(id) does not exist" : "cannot open \(path)/\(id): \(error.sentence)")
    }
  }

  package func ids() throws(RuntimeError) -> [String] {
    do throws(Errno) {
      let names = try Descriptor.open(path, [.readOnly, .directory]).entries()
      return names.filter { $0.utf8.first != UInt8(ascii: ".") }.sorted { Array($0.utf8).lexicographicallyPrecedes(Array($1.utf8)) }
    } catch {
      throw RuntimeError("cannot read \(path): \(error.sentence)")
    }
  }
}

/// One container's directory.
struct ContainerDirectory {
  let id: String
  let path: String
  let folder: Handle

  static let socketName = "start"

  /// Writes a file; with `isAwaited`, atomically, because other processes may be waiting for it.
  func write(_ name: String, _ text: [UInt8], isAwaited: Bool) throws(RuntimeError) {
    do throws(Errno) {
      if isAwaited { return try folder.descriptor.replace(name, with: text, durable: false) }
      try folder.descriptor.open(name, [.writeOnly, .create, .exclusive, .noFollow], mode: 0o600).write(text)
    } catch {
      throw RuntimeError("cannot write \(path)/\(name): \(error.sentence)")
    }
  }

  func read(_ name: String) throws(RuntimeError) -> [UInt8] {
    do throws(Errno) {
      return try folder.descriptor.open(name, [.readOnly, .noFollow]).readAll(limit: JSON.sizeLimit)
    } catch {
      throw RuntimeError("container \(id): cannot read \(name): \(error.sentence)")
    }
  }

  func state() throws(RuntimeError) -> ContainerState { try ContainerState(parsing: try read("state.json")) }

  func configuration(_ state: ContainerState) throws(RuntimeError) -> Configuration {
    try Configuration(try read("config.json"), bundle: state.bundle)
  }

  func status(_ state: ContainerState) -> ContainerStatus {
    guard state.process() != nil else { return .stopped }
    if folder.descriptor.exists(ContainerDirectory.socketName) { return .created }
    return state.cgroup?.isFrozen == true ? .paused : .running
  }

  /// Acquires the lock, so that only one command at a time changes a container.
  func lock() throws(RuntimeError) {
    do throws(Errno) { try folder.descriptor.lock(waiting: true) } catch { throw RuntimeError("cannot lock \(path): \(error.sentence)") }
  }

  func remove() {
    do throws(Errno) {
      for name in try folder.descriptor.entries() { try folder.descriptor.remove(name) }
      try Descriptor.removeDirectory(path)
    } catch {}
  }
}

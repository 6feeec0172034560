// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import Linux
internal import Synchronization
internal import Workspaces

/// An image that is ready to run.
package struct StoredImage: Codable, Equatable, Sendable {
  package let name: String
  package let digest: String
  /// The diff_ids of the layers, the lowest first.
  package let layers: [String]
  package let sizeBytes: UInt64
  package let created: String
  package let environment: [String]
  package let configJSON: String
}

/// The unpacked images of this host. `layers/<diff_id>/` contains the files of a layer, shared by all images that have it;
/// `images/<digest>.json` describes an image; `names.json` maps names to digests.
///
/// An import is a transaction: it works in its own directory under `ingest/`, and becomes visible by renames. The functions block: call
/// them on a lane.
package final class ImageStore: Sendable {
  private let root: Handle
  private let path: String
  /// The lock for one import or removal at a time.
  private let writing = Mutex(())
  /// The cached content of the disk: a launch looks up its image twice, without disk access.
  private let known = Mutex<Cache?>(nil)

  private struct Cache: Sendable {
    var names: [String: String]
    var images: [String: StoredImage] = [:]
  }

  package init(path: String) throws {
    self.path = path
    try FileManager.default.createDirectory(
      atPath: path, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
    root = Handle(try Descriptor.open(path, [.readOnly, .directory]))
    // Leftovers of an interrupted import.
    try? FileManager.default.removeItem(atPath: path + "/ingest")
    for folder in ["layers", "images", "ingest"] {
      try FileManager.default.createDirectory(atPath: path + "/" + folder, withIntermediateDirectories: true)
    }
    for folder in [path, path + "/images"] { try Descriptor.open(folder, [.readOnly, .directory]).removeTemporaries() }
  }

  // ---------------------------------------------------------------- reading

  package func list() throws -> [StoredImage] {
    try names().sorted { $0.key < $1.key }.compactMap { name, digest in try? image(digest: digest, name: name) }
  }

  /// Finds an image by name, by name without its tag `latest`, or by digest.
  package func find(_ reference: String) throws -> StoredImage {
    guard let (name, digest) = ImageStore.resolve(reference, try names()) else {
      throw DriverError(.notFound, "there is no image \(reference); see `carrel image ls`")
    }
    return try image(digest: digest, name: name)
  }

  /// Finds an image in memory, where it is after its first use; never reads the disk.
  package func known(_ reference: String) -> StoredImage? {
    known.withLock { known in
      guard let known, let (name, digest) = ImageStore.resolve(reference, known.names) else { return nil }
      return known.images[name].flatMap { $0.digest == digest ? $0 : nil }
    }
  }

  private static func resolve(_ reference: String, _ names: [String: String]) -> (name: String, digest: String)? {
    // A digest is only a digest: an image whose name looks like one must not stand for another.
    if let digest = Digest(reference)?.description { return names.first { $0.value == digest }.map { ($0.key, digest) } }
    for candidate in [reference, reference + ":latest"] {
      if let digest = names[candidate] { return (candidate, digest) }
    }
    return nil
  }

  /// Returns the directories of an image's layers, the topmost first, in the order of overlayfs.
  package func layerPaths(_ image: StoredImage) -> [String] {
    // Builders repeat a layer, for example an empty one. Where it is topmost it has all its files, and overlayfs refuses a second.
    var seen: Set<String> = []
    return image.layers.reversed().filter { seen.insert($0).inserted }.map { "\(path)/layers/\($0.dropFirst(7))" }
  }

  private func names() throws -> [String: String] {
    if let names = known.withLock({ $0?.names }) { return names }
    let names = try readNames()
    known.withLock { $0 = Cache(names: names) }
    return names
  }

  private func readNames() throws -> [String: String] {
    let bytes: [UInt8]
    do throws(Errno) { bytes = try root.descriptor.open("names.json", [.readOnly, .noFollow]).readAll(limit: 64 << 20) } catch {
      // Only a missing file means that there are no images: after any other error the next import would overwrite the list.
      guard error == .noEntry else { throw DriverError(.failedPrecondition, "the list of images cannot be read: \(error.sentence)") }
      return [:]
    }
    return try JSONDecoder().decode([String: String].self, from: Data(bytes))
  }

  private func image(digest: String, name: String) throws -> StoredImage {
    if let image = known.withLock({ $0?.images[name] }), image.digest == digest { return image }
    let image = try readImage(digest: digest, name: name)
    known.withLock { $0?.images[name] = image }
    return image
  }

  private func readImage(digest: String, name: String) throws -> StoredImage {
    guard let data = FileManager.default.contents(atPath: "\(path)/images/\(digest.dropFirst(7)).json") else {
      throw DriverError(.dataLoss, "image \(name): its description \(digest) is missing; import it again")
    }
    let stored = try JSONDecoder().decode(StoredImage.self, from: data)
    return StoredImage(
      name: name, digest: stored.digest, layers: stored.layers, sizeBytes: stored.sizeBytes, created: stored.created,
      environment: stored.environment, configJSON: stored.configJSON)
  }

  // ---------------------------------------------------------------- writing

  /// Imports an OCI layout directory, an oci-archive or a docker-archive.
  package func importImage(
    from source: String, name: String?, limits: UnpackLimits = UnpackLimits(),
    progress: (String) -> Void = { _ in }
  ) throws -> StoredImage {
    try writing.withLock { _ in
      let ingest = "\(path)/ingest/\(UUID().uuidString)"
      try FileManager.default.createDirectory(atPath: ingest, withIntermediateDirectories: true)
      defer { try? FileManager.default.removeItem(atPath: ingest) }
      let layout = try openSource(source, ingest, limits, progress)
      let image = try ImageSource(root: layout.descriptor)
      guard let finalName = name ?? image.name.map(ImageStore.plainName), !finalName.isEmpty else {
        throw DriverError(.invalid, "the archive names no image; give a name")
      }
      guard WorkspaceSpec.isImageName(finalName), Digest(finalName) == nil else {
        throw DriverError(.invalid, "the archive names its image \(printable(finalName)), which is not NAME or NAME:TAG; give a name")
      }
      var size: UInt64 = 0
      for (index, layer) in image.layers.enumerated() {
        progress("layer \(index + 1) of \(image.layers.count): \(layer.diffID.hex.prefix(12))")
        size += try ensure(layer, layout, ingest, limits, progress)
      }
      let stored = StoredImage(
        name: finalName, digest: image.digest.description, layers: image.layers.map(\.diffID.description),
        sizeBytes: size, created: image.config.created ?? "", environment: image.config.config?.Env ?? [],
        configJSON: String(decoding: image.configBytes, as: UTF8.self))
      try publish(stored)
      return stored
    }
  }

  private func publish(_ stored: StoredImage) throws {
    let folder = try root.descriptor.open("images", [.readOnly, .directory])
    try folder.replace("\(stored.digest.dropFirst(7)).json", with: Array(try JSONEncoder().encode(stored)))
    var names = try names()
    names[stored.name] = stored.digest
    defer { known.withLock { $0 = nil } }
    try root.descriptor.replace("names.json", with: Array(try JSONEncoder().encode(names)))
  }

  /// Removes a name, and the description and layers if no other name needs them. `inUse`: the digests of images with workspaces
  /// that have not ended. Layers that another image shares with this one are retained.
  package func remove(_ reference: String, inUse: Set<String>) throws {
    try writing.withLock { _ in
      var names = try names()
      // Earlier releases accepted names that look like digests.
      let image = try names[reference].map { try self.image(digest: $0, name: reference) } ?? find(reference)
      names[image.name] = nil
      let others = try names.map { try self.image(digest: $0.value, name: $0.key) }
      let kept = Set(others.flatMap(\.layers))
      if !others.contains(where: { $0.digest == image.digest }), inUse.contains(image.digest) {
        throw DriverError(.inUse, "image \(image.name) is in use by a workspace; delete that first")
      }
      defer { known.withLock { $0 = nil } }
      try root.descriptor.replace("names.json", with: Array(try JSONEncoder().encode(names)))
      guard !others.contains(where: { $0.digest == image.digest }) else { return }
      try? FileManager.default.removeItem(atPath: "\(path)/images/\(image.digest.dropFirst(7)).json")
      for layer in image.layers where !kept.contains(layer) {
        // Renamed out of `layers` before the removal: a crash leaves no partial layer that looks complete.
        let hidden = "\(path)/ingest/\(UUID().uuidString)"
        try? FileManager.default.moveItem(atPath: "\(path)/layers/\(layer.dropFirst(7))", toPath: hidden)
        try? FileManager.default.removeItem(atPath: hidden)
      }
    }
  }

  // ------------------------------------------------------------------ parts

  private func openSource(
    _ source: String, _ ingest: String, _ limits: UnpackLimits, _ progress: (String) -> Void
  ) throws -> Handle {
    let given: Handle
    do throws(Errno) {
      given = Handle(try Descriptor.open(source, [.readOnly, .nonBlocking]))
    } catch {
      throw DriverError("image \(source)", error)
    }
    switch try given.descriptor.status().kind {
    case .directory: return given
    case .regular:
      progress("reading the archive")
      let folder = ingest + "/archive"
      try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
      let spread = Handle(try Descriptor.open(folder, [.readOnly, .directory]))
      let stream = try ArchiveStream(given.descriptor, name: source, limits: limits)
      var unpacker = LayerUnpacker(into: spread, name: source, limits: limits)
      try unpacker.unpack(stream)
      return spread
    default: throw DriverError(.invalid, "\(source): expected a directory or a file")
    }
  }

  /// Unpacks a layer unless it exists already. Returns its size.
  private func ensure(
    _ layer: ImageSource.Layer, _ layout: Handle, _ ingest: String, _ limits: UnpackLimits, _ progress: (String) -> Void
  ) throws -> UInt64 {
    let sizes = try root.descriptor.open("layers", [.readOnly, .directory])
    let sizeFile = "\(layer.diffID.hex).size"
    if sizes.exists(layer.diffID.hex), let file = try? sizes.open(sizeFile, [.readOnly]),
      let size = UInt64(String(decoding: try file.readAll(limit: 64), as: UTF8.self))
    {
      return size
    }
    let blob = try ImageSource.open(layout.descriptor, layer.path)
    if let digest = layer.digest { try verify(blob, digest, layer.size) }
    let folder = "\(ingest)/\(layer.diffID.hex)"
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    let target = Handle(try Descriptor.open(folder, [.readOnly, .directory]))
    try target.descriptor.setMode(0o755)
    let reopened = try ImageSource.open(layout.descriptor, layer.path)
    let stream = try ArchiveStream(reopened, name: "layer \(layer.diffID.hex.prefix(12))", limits: limits)
    var unpacker = LayerUnpacker(into: target, name: "layer \(layer.diffID.hex.prefix(12))", limits: limits)
    try unpacker.unpack(stream)
    let found = try stream.finish()
    guard found == layer.diffID else {
      throw DriverError(.dataLoss, "layer \(layer.path): unpacks to \(found); the image's config expects \(layer.diffID)")
    }
    let report = unpacker.report
    if report.devices + report.setuidBits + report.attributes > 0 {
      progress("left out: \(report.devices) devices, \(report.setuidBits) setuid bits, \(report.attributes) extended attributes")
    }
    // The layer must be on disk before the rename makes it visible.
    try target.descriptor.syncFileSystem()
    try sizes.replace(sizeFile, with: Array("\(report.bytes)".utf8))
    try? FileManager.default.removeItem(atPath: "\(path)/layers/\(layer.diffID.hex)")
    try FileManager.default.moveItem(atPath: folder, toPath: "\(path)/layers/\(layer.diffID.hex)")
    try sizes.sync()
    return report.bytes
  }

  private func verify(_ blob: borrowing Descriptor, _ digest: Digest, _ size: UInt64?) throws {
    let hasher = Hasher256()
    var count: UInt64 = 0
    while true {
      let bytes = try blob.read(upTo: 1 << 20)
      if bytes.isEmpty { break }
      hasher.update(bytes)
      count += UInt64(bytes.count)
      if let size, count > size { break }
    }
    guard size == nil || count == size, hasher.finish() == digest else {
      throw DriverError(.dataLoss, "blob \(digest): content does not match its digest and size")
    }
  }

  /// Returns the name without a local prefix: `localhost/carrel/jupyterlab:latest` becomes `jupyterlab:latest`.
  private static func plainName(_ reference: String) -> String {
    for prefix in ["localhost/carrel/", "localhost/", "carrel/"] where reference.hasPrefix(prefix) {
      return String(reference.dropFirst(prefix.count))
    }
    return reference
  }
}

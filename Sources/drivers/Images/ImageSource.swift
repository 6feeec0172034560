// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import Linux

/// The source of an import: a layout directory, or an archive that has been unpacked into one.
struct ImageSource {
  /// A layer blob and its description in the image.
  struct Layer {
    let path: String
    /// The digest of the blob; nil for docker-archives, whose layers have only a diff_id.
    let digest: Digest?
    let size: UInt64?
    let diffID: Digest
  }

  let name: String?
  /// The digest of the manifest; for docker-archives that of the config.
  let digest: Digest
  let config: OCIConfig
  let configBytes: [UInt8]
  let layers: [Layer]

  static let documentLimit = 4 << 20
  static let layerLimit = 128

  init(root: borrowing Descriptor) throws {
    if root.exists("oci-layout") {
      try self.init(layout: root)
    } else if root.exists("manifest.json") {
      try self.init(dockerArchive: root)
    } else {
      throw DriverError(.failedPrecondition, "neither oci-layout nor manifest.json found; expected an OCI layout or a docker-archive")
    }
  }

  // ------------------------------------------------------------------- OCI

  private init(layout root: borrowing Descriptor) throws {
    struct Layout: Decodable { let imageLayoutVersion: String }
    let layout: Layout = try ImageSource.decode(try ImageSource.read(root, "oci-layout", limit: 4096), "oci-layout")
    guard layout.imageLayoutVersion == "1.0.0" else {
      throw DriverError(.failedPrecondition, "oci-layout: version \(layout.imageLayoutVersion); expected 1.0.0")
    }
    let index: OCIDocument = try ImageSource.decode(
      try ImageSource.read(root, "index.json", limit: ImageSource.documentLimit), "index.json")
    guard let entries = index.manifests, index.layers == nil else {
      throw DriverError(.invalid, "index.json: expected a list of manifests and no layers")
    }
    guard entries.count == 1 else {
      throw DriverError(.failedPrecondition, "index.json: names \(entries.count) images; expected one")
    }
    name = entries[0].annotations?["org.opencontainers.image.ref.name"]
    var chosen = entries[0]
    var document: OCIDocument = try ImageSource.document(root, chosen)
    if let platforms = document.manifests {
      let fitting = platforms.filter { $0.platform?.os == "linux" && $0.platform?.architecture == "amd64" }
      guard fitting.count == 1 else {
        throw DriverError(.failedPrecondition, "the image's index names \(fitting.count) manifests for linux/amd64; expected one")
      }
      chosen = fitting[0]
      document = try ImageSource.document(root, chosen)
    }
    guard let configEntry = document.config, let layerEntries = document.layers, document.manifests == nil else {
      throw DriverError(.invalid, "manifest \(chosen.digest): expected config and layers, and no manifests")
    }
    guard let manifestDigest = Digest(chosen.digest) else { throw ImageSource.badDigest(chosen.digest) }
    digest = manifestDigest
    if let type = configEntry.mediaType, !MediaType.configs.contains(type) {
      throw DriverError(.unimplemented, "config: media type \(type) is not that of an image config")
    }
    configBytes = try ImageSource.blob(root, configEntry)
    config = try ImageSource.decode(configBytes, "config \(configEntry.digest)")
    layers = try ImageSource.layers(layerEntries, config)
  }

  private static func layers(_ entries: [OCIDescriptor], _ config: OCIConfig) throws -> [Layer] {
    try checkCount(entries.count, config)
    return try zip(entries, config.rootfs.diff_ids).map { entry, diffID in
      if let type = entry.mediaType, !MediaType.layers.contains(type) {
        throw DriverError(.unimplemented, "layer \(entry.digest): media type \(type) is not supported; layers are never downloaded")
      }
      guard let digest = Digest(entry.digest) else { throw badDigest(entry.digest) }
      guard let diff = Digest(diffID) else { throw badDigest(diffID) }
      return Layer(path: "blobs/sha256/\(digest.hex)", digest: digest, size: entry.size, diffID: diff)
    }
  }

  private static func document(_ root: borrowing Descriptor, _ entry: OCIDescriptor) throws -> OCIDocument {
    let document: OCIDocument = try decode(try blob(root, entry), entry.digest)
    if document.layers != nil && document.manifests != nil {
      throw DriverError(.invalid, "\(entry.digest): contains both layers and manifests")
    }
    return document
  }

  private static func blob(_ root: borrowing Descriptor, _ entry: OCIDescriptor) throws -> [UInt8] {
    guard let digest = Digest(entry.digest) else { throw badDigest(entry.digest) }
    guard entry.size <= UInt64(ImageSource.documentLimit) else {
      throw DriverError(.resourceExhausted, "\(entry.digest): declares \(entry.size) bytes; at most \(ImageSource.documentLimit)")
    }
    let bytes = try read(root, "blobs/sha256/\(digest.hex)", limit: ImageSource.documentLimit)
    guard UInt64(bytes.count) == entry.size, Hasher256.digest(bytes) == digest else {
      throw DriverError(.dataLoss, "blob \(entry.digest): content does not match its digest and size")
    }
    return bytes
  }

  // ---------------------------------------------------------------- docker

  private init(dockerArchive root: borrowing Descriptor) throws {
    let manifests: [DockerManifest] = try ImageSource.decode(
      try ImageSource.read(root, "manifest.json", limit: ImageSource.documentLimit), "manifest.json")
    guard manifests.count == 1 else {
      throw DriverError(.failedPrecondition, "manifest.json: names \(manifests.count) images; expected one")
    }
    let manifest = manifests[0]
    name = manifest.RepoTags?.first
    configBytes = try ImageSource.read(root, manifest.Config, limit: ImageSource.documentLimit)
    config = try ImageSource.decode(configBytes, manifest.Config)
    digest = Hasher256.digest(configBytes)
    try ImageSource.checkCount(manifest.Layers.count, config)
    layers = try zip(manifest.Layers, config.rootfs.diff_ids).map { path, diffID in
      guard let diff = Digest(diffID) else { throw ImageSource.badDigest(diffID) }
      return Layer(path: path, digest: nil, size: nil, diffID: diff)
    }
  }

  // ----------------------------------------------------------------- parts

  private static func checkCount(_ count: Int, _ config: OCIConfig) throws {
    guard (1...layerLimit).contains(count) else {
      throw DriverError(count == 0 ? .failedPrecondition : .resourceExhausted, "the image has \(count) layers; expected 1 to \(layerLimit)")
    }
    guard count == config.rootfs.diff_ids.count else {
      throw DriverError(.invalid, "the manifest has \(count) layers, the config names \(config.rootfs.diff_ids.count)")
    }
    if let architecture = config.architecture, architecture != "amd64" {
      throw DriverError(.failedPrecondition, "the image is for \(architecture); this host runs amd64")
    }
  }

  private static func badDigest(_ text: String) -> DriverError {
    DriverError(.invalid, "\(text.prefix(100)) is not sha256: and 64 lower-case hex digits")
  }

  /// Opens a blob, which must be a regular file inside the layout. A symlink in its place is not followed, and a FIFO does not block.
  static func open(_ root: borrowing Descriptor, _ path: String) throws -> Descriptor {
    do throws(Errno) {
      let file = try root.open(path, [.readOnly, .nonBlocking, .noFollow], resolving: [.beneath, .noSymlinks])
      guard try file.status().kind == .regular else { throw .invalid }
      return file
    } catch {
      if error == .invalid || error == .loop { throw DriverError(.invalid, "\(path): is not a regular file inside the layout") }
      throw DriverError(path, error)
    }
  }

  private static func read(_ root: borrowing Descriptor, _ path: String, limit: Int) throws -> [UInt8] {
    let file = try open(root, path)
    do throws(Errno) {
      return try file.readAll(limit: limit)
    } catch {
      if error == .messageTooLong { throw DriverError(.resourceExhausted, "\(path): is larger than \(limit) bytes") }
      throw DriverError(path, error)
    }
  }

  private static func decode<T: Decodable>(_ bytes: [UInt8], _ what: String) throws -> T {
    do {
      return try JSONDecoder().decode(T.self, from: Data(bytes))
    } catch let error as DecodingError {
      throw DriverError(.invalid, "\(what): \(explain(error))")
    }
  }

  private static func explain(_ error: DecodingError) -> String {
    switch error {
    case .keyNotFound(let key, _): "\(key.stringValue) is missing"
    case .typeMismatch(_, let context), .valueNotFound(_, let context):
      "\(context.codingPath.map(\.stringValue).joined(separator: ".")): type differs from the specification"
    default: "is not JSON"
    }
  }
}

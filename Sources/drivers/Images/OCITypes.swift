// SPDX-License-Identifier: Apache-2.0

// The parts of the OCI image specification (1.1) that a host needs to run an image.

struct OCIDescriptor: Decodable {
  struct Platform: Decodable {
    let architecture: String
    let os: String
  }
  let mediaType: String?
  let digest: String
  let size: UInt64
  let platform: Platform?
  let annotations: [String: String]?
}

/// An index or a manifest. Its content decides which, and a document with the content of both is refused (CVE-2021-41190).
struct OCIDocument: Decodable {
  let schemaVersion: Int?
  let mediaType: String?
  let manifests: [OCIDescriptor]?
  let config: OCIDescriptor?
  let layers: [OCIDescriptor]?
}

struct OCIConfig: Codable {
  /// Of an image's process configuration only the variables are used: how an image is run is the tool's matter.
  struct Process: Codable {
    let Env: [String]?
  }
  struct RootFS: Codable {
    let diff_ids: [String]
  }
  let architecture: String?
  let os: String?
  let created: String?
  let config: Process?
  let rootfs: RootFS
}

struct DockerManifest: Decodable {
  let Config: String
  let RepoTags: [String]?
  let Layers: [String]
}

enum MediaType {
  static let layers: Set<String> = [
    "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
  ]
  static let configs: Set<String> = [
    "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json",
  ]
}

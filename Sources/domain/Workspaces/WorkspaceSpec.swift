// SPDX-License-Identifier: Apache-2.0

/// The workspace that a controller requests. YAML (`manifests/`) and protobuf (`carrel.v1.WorkspaceSpec`) have the same fields.
package struct WorkspaceSpec: Codable, Equatable, Sendable {
  package var id: String
  package var owner: Owner
  package var tool: String
  package var image: String
  package var resources = Resources()
  package var storage = Storage()
  /// Names of the credential files; their contents are part of the request and never of a spec.
  package var credentials: [String] = []
  /// The field is optional because records of an older agent lack it.
  package var aws: AWS?
  package var git: [GitHost]?
  /// Whether the workspace gets its owner's ssh-agent, which the node's configuration locates.
  package var sshAgent: Bool?
  package var environment: [String: String] = [:]
  package var labels: [String: String] = [:]
  package var lifecycle = Lifecycle()
  package var network: NetworkPolicy?
  /// The command, for tools that run the command of the spec (batch).
  package var command: [String] = []

  package struct Owner: Codable, Equatable, Sendable {
    package var name: String
    package var uid: UInt32
    package var gid: UInt32
    package init(name: String, uid: UInt32, gid: UInt32) {
      self.name = name
      self.uid = uid
      self.gid = gid
    }
  }

  /// Quantities as text, in Kubernetes' notation; nil for the default of the tool or the agent.
  package struct Resources: Codable, Equatable, Sendable {
    package var memory: String?
    package var cpu: String?
    package var pids: String?
    package var shm: String?
    package var scratch: String?
    package init() {}
  }

  package struct Storage: Codable, Equatable, Sendable {
    /// An absolute path on the host; nil for the owner's directory below the configured `homes`.
    package var home: String?
    /// The driver of the home; nil for the node's default.
    package var driver: HomeDriver?
    /// The limit of the home, a quantity; nil for the node's default.
    package var size: String?
    /// The file system of a new volume file; nil for the node's default.
    package var fileSystem: HomeFileSystem?
    /// Whether the home is a volume file whose files are encrypted, with a key that is part of each launch.
    package var encrypted: Bool?
    package var datasets: [Dataset] = []
    package init() {}
  }

  /// A directory of the host, or a volume file (`image`), whose size is a hard limit.
  package enum HomeDriver: String, Codable, CaseIterable, Sendable { case directory, image }

  package enum HomeFileSystem: String, Codable, CaseIterable, Sendable { case ext4, xfs, btrfs }

  package var hasEncryptedHome: Bool { storage.encrypted ?? false }
  /// Whether a start needs secrets, which are part of a request and are not stored.
  package var needsSecrets: Bool { !credentials.isEmpty || hasEncryptedHome }

  /// A dataset: a directory of the host by its path, or a registered dataset by its name.
  package struct Dataset: Codable, Equatable, Sendable {
    /// A path of the host; empty if the dataset is requested by name.
    package var source: String
    package var target: String
    package var writable: Bool
    /// NAME, for the newest version, or NAME@VERSION.
    package var name: String?
    /// A path below the registered directory; nil for all of it.
    package var path: String?
    package init(source: String = "", target: String, writable: Bool, name: String? = nil, path: String? = nil) {
      self.source = source
      self.target = target
      self.writable = writable
      self.name = name
      self.path = path
    }
  }

  package enum DatasetMode: String, CaseIterable, Sendable { case ro, rw }

  /// Roles whose short-lived credentials the workspace gets. The first is the default.
  package struct AWS: Codable, Equatable, Sendable {
    package var roles: [String]
    /// Whether the role is assumed with a token file (`AWS_WEB_IDENTITY_TOKEN_FILE`) instead of the broker.
    package var webIdentity: Bool?
    package init(roles: [String], webIdentity: Bool? = nil) {
      self.roles = roles
      self.webIdentity = webIdentity
    }
  }

  package var roles: [String] { aws?.roles ?? [] }
  package var hasWebIdentity: Bool { aws?.webIdentity ?? false }

  /// A git host, and the organisations there that a workspace may push to and pull from with the broker's tokens.
  package struct GitHost: Codable, Equatable, Sendable {
    package var host: String
    package var organisations: [String]
    package init(host: String, organisations: [String]) {
      self.host = host
      self.organisations = organisations
    }
  }

  package struct Lifecycle: Codable, Equatable, Sendable {
    /// The time between SIGTERM and SIGKILL; nil for the tool's default.
    package var gracePeriodSeconds: UInt32?
    /// The maximum lifetime of an attempt; nil for no limit.
    package var maxLifetimeSeconds: UInt64?
    package var restartPolicy: RestartPolicy = .never
    package init() {}
  }

  package enum RestartPolicy: String, Codable, CaseIterable, Sendable { case never, onFailure, always }
  package enum NetworkPolicy: String, Codable, CaseIterable, Sendable { case none, open }

  /// Returns the spec with the names of these credentials added.
  package func naming(_ credentials: [Credential]) -> WorkspaceSpec {
    var spec = self
    spec.credentials = Array(Set(self.credentials + credentials.map(\.name))).sorted()
    return spec
  }

  package init(id: String, owner: Owner, tool: String, image: String) {
    self.id = id
    self.owner = owner
    self.tool = tool
    self.image = image
  }
}

/// Secret material of a request. Its description never shows the content.
package struct Credential: Sendable, CustomStringConvertible {
  package let name: String
  package let content: [UInt8]
  /// The time after which the file is removed; nil for never.
  package let lifetimeSeconds: UInt64?

  package init(name: String, content: [UInt8], lifetimeSeconds: UInt64? = nil) {
    self.name = name
    self.content = content
    self.lifetimeSeconds = lifetimeSeconds
  }

  package var description: String { "credential \(name)" }
}

/// An error in a field: the path of the field, and what was expected.
package struct InvalidField: Error, Equatable, Sendable, CustomStringConvertible {
  package let path: String
  package let problem: String
  /// The line of the field, if the input was text.
  package let line: Int?

  package init(_ path: String, _ problem: String, line: Int? = nil) {
    self.path = path
    self.problem = problem
    self.line = line
  }

  package var description: String {
    (line.map { "line \($0): " } ?? "") + (path.isEmpty ? "" : "\(path): ") + problem
  }
}

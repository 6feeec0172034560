// SPDX-License-Identifier: Apache-2.0

/// What a workspace shall be, as its controller asks for it. The same fields as YAML (`manifests/`) and as
/// protobuf (`carrel.v1.WorkspaceSpec`).
package struct WorkspaceSpec: Codable, Equatable, Sendable {
  package var id: String
  package var owner: Owner
  package var tool: String
  package var image: String
  package var resources = Resources()
  package var storage = Storage()
  /// Names of the credential files; their contents come with the request and are never part of a spec.
  package var credentials: [String] = []
  /// Optional as a whole, since records of an older agent lack it.
  package var aws: AWS?
  package var git: [GitHost]?
  /// Its owner's ssh-agent, which the node's configuration says where to find.
  package var sshAgent: Bool?
  package var environment: [String: String] = [:]
  package var labels: [String: String] = [:]
  package var lifecycle = Lifecycle()
  package var network: NetworkPolicy?
  /// For tools that run what the spec says (batch).
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

  /// Quantities as text, in Kubernetes' notation; nil for the tool's or the agent's default.
  package struct Resources: Codable, Equatable, Sendable {
    package var memory: String?
    package var cpu: String?
    package var pids: String?
    package var shm: String?
    package var scratch: String?
    package init() {}
  }

  package struct Storage: Codable, Equatable, Sendable {
    /// An absolute path on the host; nil for the owner's folder among the configured homes.
    package var home: String?
    /// How homes are kept; nil for the node's own way.
    package var driver: HomeDriver?
    /// Its limit; nil for the node's. A quantity.
    package var size: String?
    /// Of an image that is to be made; nil for the node's.
    package var fileSystem: HomeFileSystem?
    /// An image whose files are encrypted with a key that comes with each request.
    package var encrypted: Bool?
    package var datasets: [Dataset] = []
    package init() {}
  }

  /// A directory of the host, or a file system in a file, with a hard limit.
  package enum HomeDriver: String, Codable, CaseIterable, Sendable { case directory, image }

  package enum HomeFileSystem: String, Codable, CaseIterable, Sendable { case ext4, xfs, btrfs }

  package var hasEncryptedHome: Bool { storage.encrypted ?? false }
  /// Whether a start needs what comes with a request and is not kept.
  package var needsSecrets: Bool { !credentials.isEmpty || hasEncryptedHome }

  /// A directory of the host, by its path or by what it is registered as.
  package struct Dataset: Codable, Equatable, Sendable {
    /// Empty where it is asked for by name.
    package var source: String
    package var target: String
    package var writable: Bool
    /// NAME or NAME@VERSION; without a version the newest.
    package var name: String?
    /// Below the registered directory; nil for all of it.
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

  /// Roles whose short-lived credentials the workspace gets, the first by default.
  package struct AWS: Codable, Equatable, Sendable {
    package var roles: [String]
    /// By a token file and a role's name (`AWS_WEB_IDENTITY_TOKEN_FILE`) instead of the broker.
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
    /// Between SIGTERM and SIGKILL; nil for the tool's.
    package var gracePeriodSeconds: UInt32?
    /// Nil for no end.
    package var maxLifetimeSeconds: UInt64?
    package var restartPolicy: RestartPolicy = .never
    package init() {}
  }

  package enum RestartPolicy: String, Codable, CaseIterable, Sendable { case never, onFailure, always }
  package enum NetworkPolicy: String, Codable, CaseIterable, Sendable { case none, open }

  /// With the names of these credentials among its own.
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
  /// After which its file is removed; nil: never.
  package let lifetimeSeconds: UInt64?

  package init(name: String, content: [UInt8], lifetimeSeconds: UInt64? = nil) {
    self.name = name
    self.content = content
    self.lifetimeSeconds = lifetimeSeconds
  }

  package var description: String { "credential \(name)" }
}

/// A field that is wrong: its path, and what was expected there.
package struct InvalidField: Error, Equatable, Sendable, CustomStringConvertible {
  package let path: String
  package let problem: String
  /// Where it stands, for specs that came as text.
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

// SPDX-License-Identifier: Apache-2.0

package import Workspaces

/// The agent's configuration: one YAML file, whose keys are documented in `manifests/carreld.yaml`.
package struct Configuration: Sendable {
  package var socket = "/run/carrel/carrel.sock"
  package var allowedUIDs: [UInt32] = []
  package var state = "/var/lib/carrel"
  package var homes = "/srv/carrel/homes"
  package var homeDriver = WorkspaceSpec.HomeDriver.directory
  /// The default limit of a home; if nil, a volume file has 10Gi and a directory has no limit.
  package var homeSize: String?
  package var homeFileSystem = WorkspaceSpec.HomeFileSystem.ext4
  /// The number of days for which a removed home can be recovered.
  package var removedHomesDays = 30
  package var tools = "/etc/carrel/tools"
  package var datasets = "/etc/carrel/datasets"
  package var helper = "/usr/libexec/carrel/carrel-shim"
  package var nodeName = ""
  package var maxWorkspaces = 500
  package var reservedMemory = "512Mi"
  package var firstID: UInt32 = 1_048_576
  package var subnet = Subnet("10.87.0.0/16")!
  package var networkDefault: WorkspaceSpec.NetworkPolicy = .open
  package var firewallTable = "carrel"
  package var linkPrefix = "crl"
  package var cgroupParent = "carrel"
  package var logSegment = "2Mi"
  package var logSegments: UInt32 = 8
  package var logRate = "8Mi"
  package var defaults = WorkspaceSpec.Resources()
  /// The number of launches that may be in progress at once.
  package var maxLaunching = 64
  package var journalLimit = "256Mi"
  /// The number of newest events that are retained even if they are acknowledged, for people.
  package var journalKeep = 10_000
  package var controllers: [Controller] = []
  /// The provider of credentials for AWS roles; nil for none.
  package var awsProvider: CredentialProvider?
  /// The provider of tokens for git, and the organisations that specs may name, by host.
  package var git: (provider: CredentialProvider, allowed: [String: [String]])?
  /// The provider of web identities, and the ARN of a role with the placeholder `{role}`.
  package var webIdentity: (provider: CredentialProvider, arn: String)?
  /// The path of the socket of an owner's ssh-agent, with the placeholder `{owner}`.
  package var sshAgent: String?

  /// A controller that the agent connects to.
  package struct Controller: Equatable, Sendable {
    package let name: String
    package let socket: String
    /// Whether events are trimmed after this controller has acknowledged them.
    package let owner: Bool
  }

  /// The controller that owns the acknowledgement, if one does.
  package var owner: Controller? { controllers.first { $0.owner } }
  /// The name whose acknowledgement trims events: the owner, or without one the caller that pulls.
  package var acknowledger: String { owner?.name ?? Configuration.puller }

  /// The name under which the acknowledgement of a caller that pulls is stored.
  package static let puller = "pull"

  /// The sizes of a home with its own file system, in bytes. The minimum is the least that mke2fs(8) makes a complete file system of.
  package static let homeSizes: ClosedRange<UInt64> = (16 << 20)...(1 << 46)

  package init() {}

  package init(yaml: String) throws(InvalidField) {
    var reader = try YAMLReader(text: yaml)
    socket = try Configuration.path(&reader, "socket") ?? socket
    for text in try reader.texts("allowedUIDs") ?? [] {
      guard let uid = UInt32(text), uid < UInt32(Int32.max) else {
        throw InvalidField("allowedUIDs", "\(printable(text)) is not a uid", line: reader.line(of: "allowedUIDs"))
      }
      allowedUIDs.append(uid)
    }
    state = try Configuration.path(&reader, "state") ?? state
    homes = try Configuration.path(&reader, "homes") ?? homes
    _ = try reader.section("storage") { (section: inout YAMLReader) throws(InvalidField) in
      homeDriver = try section.choice("driver", WorkspaceSpec.HomeDriver.self) ?? homeDriver
      homeSize = try Configuration.quantity(&section, "size", Configuration.homeSizes) ?? homeSize
      homeFileSystem = try section.choice("fileSystem", WorkspaceSpec.HomeFileSystem.self) ?? homeFileSystem
      removedHomesDays = Int(try section.number("removedHomesDays", in: 0...36_500) ?? UInt64(removedHomesDays))
    }
    tools = try Configuration.path(&reader, "tools") ?? tools
    datasets = try Configuration.path(&reader, "datasets") ?? datasets
    helper = try Configuration.path(&reader, "helper") ?? helper
    nodeName = try reader.text("nodeName") ?? nodeName
    maxWorkspaces = Int(try reader.number("maxWorkspaces", in: 1...10_000) ?? UInt64(maxWorkspaces))
    reservedMemory = try Configuration.quantity(&reader, "reservedMemory", 0...(1 << 50)) ?? reservedMemory
    // Ids below 100000 are the host's own users; the upper bound keeps 10,000 ranges below 2^32.
    firstID = UInt32(try reader.number("firstID", in: 100_000...3_000_000_000) ?? UInt64(firstID))
    _ = try reader.section("network") { (section: inout YAMLReader) throws(InvalidField) in try readNetwork(&section) }
    cgroupParent = try reader.text("cgroupParent") ?? cgroupParent
    guard !cgroupParent.isEmpty, cgroupParent.split(separator: "/").allSatisfy({ WorkspaceSpec.isID(String($0)) }) else {
      throw InvalidField("cgroupParent", "expected a relative path such as carrel", line: reader.line(of: "cgroupParent"))
    }
    _ = try reader.section("log") { (section: inout YAMLReader) throws(InvalidField) in try readLog(&section) }
    maxLaunching = Int(try reader.number("maxLaunching", in: 1...10_000) ?? UInt64(maxLaunching))
    _ = try reader.section("journal") { (section: inout YAMLReader) throws(InvalidField) in
      journalLimit = try Configuration.quantity(&section, "limit", (1 << 20)...(1 << 40)) ?? journalLimit
      journalKeep = Int(try section.number("keep", in: 0...100_000_000) ?? UInt64(journalKeep))
    }
    try readControllers(&reader)
    _ = try reader.section("credentials") { (section: inout YAMLReader) throws(InvalidField) in
      awsProvider = try section.section("aws", Configuration.readProvider)
      git = try section.section("git", Configuration.readGit)
      webIdentity = try section.section("webIdentity") { (section: inout YAMLReader) throws(InvalidField) in
        let arn = try section.requiredText("arn")
        return (try Configuration.readProvider(&section), arn)
      }
      sshAgent = try Configuration.path(&section, "sshAgent")
    }
    for case .controller(let name, _)? in [awsProvider, git?.provider, webIdentity?.provider]
    where !controllers.contains(where: { $0.name == name }) {
      throw InvalidField("credentials", "\(printable(name)) is none of the controllers", line: reader.line(of: "credentials"))
    }
    defaults = try reader.section("defaults", WorkspaceSpec.Resources.init(from:)) ?? defaults
    try reader.finish()
    guard UInt64(firstID) + UInt64(maxWorkspaces) * 65_536 <= UInt64(UInt32.max) else {
      throw InvalidField("firstID", "\(maxWorkspaces) ranges of 65536 ids do not fit below 4294967296; choose a lower firstID")
    }
    guard maxWorkspaces <= subnet.capacity else {
      throw InvalidField("maxWorkspaces", "\(maxWorkspaces) is more than the \(subnet.capacity) addresses of \(subnet)")
    }
  }

  private mutating func readNetwork(_ section: inout YAMLReader) throws(InvalidField) {
    if let text = try section.text("subnet") {
      guard let parsed = Subnet(text) else {
        throw InvalidField(
          "network.subnet", "expected ADDRESS/PREFIX with a prefix of 8 to 28, such as 10.87.0.0/16",
          line: section.line(of: "subnet"))
      }
      subnet = parsed
    }
    networkDefault = try section.choice("default", WorkspaceSpec.NetworkPolicy.self) ?? networkDefault
    firewallTable = try section.text("table") ?? firewallTable
    guard !firewallTable.isEmpty, firewallTable.utf8.allSatisfy({ (0x61...0x7A).contains($0) || $0 == 0x5F }) else {
      throw InvalidField("network.table", "expected lower-case letters and '_'", line: section.line(of: "table"))
    }
    linkPrefix = try section.text("linkPrefix") ?? linkPrefix
    // A link's name has at most 15 bytes, five of which number the workspace.
    guard (2...10).contains(linkPrefix.utf8.count), linkPrefix.utf8.allSatisfy({ (0x61...0x7A).contains($0) }) else {
      throw InvalidField("network.linkPrefix", "expected 2 to 10 lower-case letters", line: section.line(of: "linkPrefix"))
    }
  }

  private mutating func readControllers(_ reader: inout YAMLReader) throws(InvalidField) {
    controllers =
      try reader.sections("controllers") { (section: inout YAMLReader) throws(InvalidField) in
        guard let name = try section.text("name"), WorkspaceSpec.isID(name) else {
          throw InvalidField("name", "expected \(WorkspaceSpec.idRule)")
        }
        guard let socket = try Configuration.path(&section, "socket") else { throw InvalidField("socket", "is missing") }
        return Controller(name: name, socket: socket, owner: try section.flag("owner") ?? false)
      }
    guard Set(controllers.map(\.name)).count == controllers.count else { throw InvalidField("controllers", "names must be unique") }
    guard controllers.count(where: \.owner) <= 1 else { throw InvalidField("controllers", "only one can be the owner") }
    guard !controllers.contains(where: { $0.name == Configuration.puller }) else {
      throw InvalidField("controllers", "the name \(Configuration.puller) is reserved")
    }
  }

  private static func readProvider(_ section: inout YAMLReader) throws(InvalidField) -> CredentialProvider {
    let program = try section.texts("exec")
    let file = try path(&section, "file")
    let seconds = UInt32(try section.number("timeout", in: 1...60) ?? 10)
    let controller = try section.text("controller")
    switch (program, file, controller) {
    case (nil, nil, let controller?): return .controller(controller, timeoutSeconds: seconds)
    case (let program?, nil, nil):
      do throws(InvalidField) {
        guard let first = program.first else { throw InvalidField("exec", "is empty") }
        try WorkspaceSpec.validatePath(first, path: "exec")
        try WorkspaceSpec.validateCommand(program, path: "exec")
      } catch {
        throw InvalidField("exec", error.problem, line: section.line(of: "exec"))
      }
      return .program(program, timeoutSeconds: seconds)
    case (nil, let file?, nil): return .file(file)
    default: throw InvalidField("exec", "expected exactly one of exec, file and controller")
    }
  }

  private static func readGit(_ section: inout YAMLReader) throws(InvalidField) -> (CredentialProvider, [String: [String]]) {
    var allowed: [String: [String]] = [:]
    for (index, entry) in try section.sections(
      "allow",
      { (entry: inout YAMLReader) throws(InvalidField) in
        (host: try entry.requiredText("host"), organisations: try entry.texts("organisations") ?? [])
      }
    ).enumerated() {
      guard WorkspaceSpec.isGitHost(entry.host), !entry.organisations.isEmpty,
        entry.organisations.allSatisfy({ $0 == "*" || WorkspaceSpec.isCredentialName($0) })
      else { throw InvalidField("credentials.git.allow[\(index)]", "expected a host, and names of organisations or \"*\"") }
      allowed[entry.host] = entry.organisations
    }
    guard !allowed.isEmpty else { throw InvalidField("credentials.git.allow", "is missing") }
    return (try readProvider(&section), allowed)
  }

  private mutating func readLog(_ section: inout YAMLReader) throws(InvalidField) {
    logSegment = try Configuration.quantity(&section, "segment", 65_536...(1 << 30)) ?? logSegment
    logSegments = UInt32(try section.number("segments", in: 2...1000) ?? UInt64(logSegments))
    logRate = try Configuration.quantity(&section, "rate", 65_536...(1 << 30)) ?? logRate
  }

  private static func path(_ reader: inout YAMLReader, _ key: String) throws(InvalidField) -> String? {
    guard let value = try reader.text(key) else { return nil }
    do throws(InvalidField) {
      try WorkspaceSpec.validatePath(value, path: key)
    } catch {
      throw InvalidField(key, error.problem, line: reader.line(of: key))
    }
    return value
  }

  private static func quantity(_ reader: inout YAMLReader, _ key: String, _ range: ClosedRange<UInt64>) throws(InvalidField)
    -> String?
  {
    guard let text = try reader.text(key) else { return nil }
    guard let value = Quantity.whole(text), range.contains(value) else {
      throw InvalidField(
        key, "expected a quantity between \(range.lowerBound) and \(range.upperBound)", line: reader.line(of: key))
    }
    return text
  }
}

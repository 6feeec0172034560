// SPDX-License-Identifier: Apache-2.0

extension WorkspaceSpec {
  /// Reads and validates a spec written as YAML.
  package init(yaml: String) throws(InvalidField) {
    var reader = try YAMLReader(text: yaml)
    self.init(
      id: try reader.requiredText("id"), owner: Owner(name: "", uid: 0, gid: 0), tool: try reader.requiredText("tool"),
      image: try reader.requiredText("image"))
    let owner = try reader.section("owner") { (section: inout YAMLReader) throws(InvalidField) in
      Owner(
        name: try section.requiredText("name"),
        uid: UInt32(try section.number("uid", in: 1000...UInt64(Int32.max)) ?? 1000),
        gid: UInt32(try section.number("gid", in: 1000...UInt64(Int32.max)) ?? 1000))
    }
    guard let owner else { throw InvalidField("owner", "is missing") }
    self.owner = owner
    resources = try reader.section("resources", Resources.init(from:)) ?? Resources()
    storage =
      try reader.section("storage") { (section: inout YAMLReader) throws(InvalidField) in
        var storage = Storage()
        storage.home = try section.text("home")
        storage.driver = try section.choice("driver", HomeDriver.self)
        storage.size = try section.text("size")
        storage.fileSystem = try section.choice("fileSystem", HomeFileSystem.self)
        storage.encrypted = try section.flag("encrypted")
        storage.datasets = try section.sections("datasets") { (entry: inout YAMLReader) throws(InvalidField) in
          let mode = try entry.choice("mode", DatasetMode.self)
          return Dataset(
            source: try entry.text("source") ?? "", target: try entry.requiredText("target"),
            writable: try entry.flag("writable") ?? (mode == .rw), name: try entry.text("dataset"), path: try entry.text("path"))
        }
        return storage
      } ?? Storage()
    credentials = try reader.texts("credentials") ?? []
    aws = try reader.section("aws") { (section: inout YAMLReader) throws(InvalidField) in
      AWS(roles: try section.texts("roles") ?? [], webIdentity: try section.flag("webIdentity"))
    }
    let hosts = try reader.sections("git") { (entry: inout YAMLReader) throws(InvalidField) in
      GitHost(host: try entry.requiredText("host"), organisations: try entry.texts("organisations") ?? [])
    }
    git = hosts.isEmpty ? nil : hosts
    sshAgent = try reader.flag("sshAgent")
    environment = try reader.textMap("environment") ?? [:]
    labels = try reader.textMap("labels") ?? [:]
    lifecycle =
      try reader.section("lifecycle") { (section: inout YAMLReader) throws(InvalidField) in
        var lifecycle = Lifecycle()
        lifecycle.gracePeriodSeconds = try section.number("gracePeriodSeconds", in: 0...3600).map { UInt32($0) }
        lifecycle.maxLifetimeSeconds = try section.number("maxLifetimeSeconds", in: 1...31_536_000)
        lifecycle.restartPolicy = try section.choice("restartPolicy", RestartPolicy.self) ?? .never
        return lifecycle
      } ?? Lifecycle()
    network = try reader.choice("network", NetworkPolicy.self)
    command = try reader.texts("command") ?? []
    try reader.finish()
    do throws(InvalidField) {
      try validate()
    } catch {
      let top = error.path.split(whereSeparator: { $0 == "." || $0 == "[" }).first.map(String.init) ?? ""
      throw InvalidField(error.path, error.problem, line: reader.line(of: top))
    }
  }
}

extension WorkspaceSpec.Resources {
  package init(from section: inout YAMLReader) throws(InvalidField) {
    self.init()
    memory = try section.text("memory")
    cpu = try section.text("cpu")
    pids = try section.text("pids")
    shm = try section.text("shm")
    scratch = try section.text("scratch")
  }
}

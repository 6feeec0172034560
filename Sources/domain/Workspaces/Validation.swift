// SPDX-License-Identifier: Apache-2.0

/// The resources of a spec, validated and in units: bytes, thousandths of a CPU, processes.
package struct ResourceLimits: Codable, Equatable, Sendable {
  package var memoryBytes: UInt64
  package var milliCPUs: UInt64
  package var pids: UInt64
  package var shmBytes: UInt64
  package var scratchBytes: UInt64
}

/// The host's resources: the limit of what a workspace can have, and the basis of its default memory.
package struct ResourcePolicy: Sendable {
  package var hostMemoryBytes: UInt64
  package var hostMilliCPUs: UInt64

  package init(hostMemoryBytes: UInt64, hostMilliCPUs: UInt64) {
    self.hostMemoryBytes = hostMemoryBytes
    self.hostMilliCPUs = hostMilliCPUs
  }

  /// The least memory that a tool starts with: the C library, a shell and a reserve.
  package static let memoryFloor: UInt64 = 16 << 20
}

extension WorkspaceSpec {
  package static let idRule = "1 to 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"

  /// Validates every field that can be checked without access to the host. Throws the first error.
  package func validate() throws(InvalidField) {
    try require(WorkspaceSpec.isID(id), "id", "\(quoted(id)) is not \(WorkspaceSpec.idRule)")
    try require(WorkspaceSpec.isOwner(owner.name), "owner.name", "\(quoted(owner.name)) is not \(WorkspaceSpec.ownerRule)")
    for (field, value) in [("owner.uid", owner.uid), ("owner.gid", owner.gid)] {
      try require((1000...UInt32(Int32.max)).contains(value), field, "\(value) is not between 1000 and 2147483647")
    }
    try require(WorkspaceSpec.isID(tool), "tool", "\(quoted(tool)) is not the name of a tool definition")
    try require(WorkspaceSpec.isImageName(image), "image", "\(quoted(image)) is not NAME, NAME:TAG or sha256:DIGEST")
    for (key, value) in environment.sorted(by: { $0.key < $1.key }) {
      try WorkspaceSpec.validateVariable(key, value, path: "environment")
    }
    try require(
      environment.reduce(0) { $0 + $1.key.utf8.count + $1.value.utf8.count } <= 262_144, "environment",
      "must not exceed 262144 bytes")
    for (key, value) in labels {
      try require(
        !key.isEmpty && key.utf8.count <= 253 && value.utf8.count <= 253 && isPlain(key) && isPlain(value),
        "labels.\(printable(key))", "expected a key of 1 to 253 and a value of 0 to 253 printable bytes")
    }
    try validateStorage()
    try WorkspaceSpec.validateCredentialNames(credentials)
    try validateRoles()
    try validateGit()
    if let grace = lifecycle.gracePeriodSeconds {
      try require(grace <= 3600, "lifecycle.gracePeriodSeconds", "\(grace) is not between 0 and 3600")
    }
    if let lifetime = lifecycle.maxLifetimeSeconds {
      try require((1...31_536_000).contains(lifetime), "lifecycle.maxLifetimeSeconds", "\(lifetime) is not between 1 and 31536000")
    }
    try WorkspaceSpec.validateCommand(command, path: "command")
  }

  /// Variables that every SDK prefers to the broker, and that nothing renews.
  package static let staticAWSVariables = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"]

  private func validateRoles() throws(InvalidField) {
    guard let aws else { return }
    try require((1...16).contains(aws.roles.count), "aws.roles", "\(aws.roles.count) roles; expected 1 to 16")
    for (index, role) in aws.roles.enumerated() {
      try require(
        WorkspaceSpec.isCredentialName(role), "aws.roles[\(index)]",
        "expected 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit")
    }
    try require(Set(aws.roles).count == aws.roles.count, "aws.roles", "contains a role twice")
    try require(!hasWebIdentity || aws.roles.count == 1, "aws.webIdentity", "is for one role, and there are \(aws.roles.count)")
    for name in WorkspaceSpec.staticAWSVariables {
      try require(environment[name] == nil, "environment.\(name)", "hides the renewed credentials of aws.roles; remove it")
    }
  }

  package static func isGitHost(_ text: String) -> Bool {
    let bytes = Array(text.utf8)
    return (1...255).contains(bytes.count) && bytes[0] != 0x2E && bytes[0] != 0x2D
      && bytes.allSatisfy { (0x61...0x7A).contains($0) || (0x30...0x39).contains($0) || [0x2D, 0x2E, 0x3A].contains($0) }
  }

  private func validateGit() throws(InvalidField) {
    guard let git else { return }
    try require((1...8).contains(git.count) && Set(git.map(\.host)).count == git.count, "git", "expected 1 to 8 hosts, each once")
    for (index, host) in git.enumerated() {
      try require(WorkspaceSpec.isGitHost(host.host), "git[\(index)].host", "\(quoted(host.host)) is not a host name such as github.com")
      try require(
        (1...32).contains(host.organisations.count) && Set(host.organisations).count == host.organisations.count
          && host.organisations.allSatisfy(WorkspaceSpec.isCredentialName), "git[\(index)].organisations",
        "expected 1 to 32 names of organisations, each once")
    }
  }

  private func validateStorage() throws(InvalidField) {
    if let home = storage.home { try WorkspaceSpec.validatePath(home, path: "storage.home") }
    try require(
      !hasEncryptedHome || storage.fileSystem ?? .ext4 == .ext4, "storage.encrypted", "is for ext4 images; no other file system encrypts")
    var targets: Set<String> = []
    try require(storage.datasets.count <= 64, "storage.datasets", "\(storage.datasets.count) datasets; expected at most 64")
    for (index, dataset) in storage.datasets.enumerated() {
      let path = "storage.datasets[\(index)]"
      try dataset.validate(path: path)
      try require(targets.insert(dataset.target).inserted, path + ".target", "\(quoted(dataset.target)) is listed twice")
    }
  }

  /// Returns the amounts, with defaults for those that the spec does not set.
  package func amounts(defaults: Resources, policy: ResourcePolicy) throws(InvalidField) -> ResourceLimits {
    func bytes(_ own: String?, _ other: String?, _ fallback: UInt64, _ field: String, floor: UInt64) throws(InvalidField)
      -> UInt64
    {
      guard let text = own ?? other else { return fallback }
      let value = Quantity.whole(text)
      guard let value, value >= floor, value <= policy.hostMemoryBytes else {
        throw InvalidField(
          "resources.\(field)",
          "\(quoted(text)) is not a quantity between \(Quantity.describe(bytes: floor)) and \(Quantity.describe(bytes: policy.hostMemoryBytes)), this host's memory"
        )
      }
      return value
    }
    let memory = try bytes(
      resources.memory, defaults.memory, min(2 << 30, policy.hostMemoryBytes / 2), "memory",
      floor: ResourcePolicy.memoryFloor)
    let cpuText = resources.cpu ?? defaults.cpu ?? "1"
    guard let cpu = Quantity.thousandths(cpuText), (10...policy.hostMilliCPUs).contains(cpu) else {
      throw InvalidField(
        "resources.cpu", "\(quoted(cpuText)) is not a quantity between 10m and \(policy.hostMilliCPUs)m, this host's CPUs")
    }
    let pidsText = resources.pids ?? defaults.pids ?? "4096"
    guard let pids = Quantity.whole(pidsText), (2...65_536).contains(pids) else {
      throw InvalidField("resources.pids", "\(quoted(pidsText)) is not a whole number between 2 and 65536")
    }
    return ResourceLimits(
      memoryBytes: memory, milliCPUs: cpu, pids: pids,
      shmBytes: try bytes(resources.shm, defaults.shm, memory / 2, "shm", floor: 65_536),
      scratchBytes: try bytes(resources.scratch, defaults.scratch, memory / 2, "scratch", floor: 1 << 20))
  }

  // ------------------------------------------------------------- rules of parts

  package static func isID(_ text: String) -> Bool {
    let bytes = Array(text.utf8)
    guard (1...63).contains(bytes.count) else { return false }
    func alphanumeric(_ byte: UInt8) -> Bool { (0x61...0x7A).contains(byte) || (0x30...0x39).contains(byte) }
    guard alphanumeric(bytes[0]), alphanumeric(bytes[bytes.count - 1]) else { return false }
    // A careless tool would treat ".." as the parent directory, and no id needs it.
    return bytes.allSatisfy { alphanumeric($0) || $0 == 0x2D || $0 == 0x2E } && !text.contains("..")
  }

  package static let ownerRule = idRule + ", and without .img as a part"

  /// The home of an owner is a folder with this name; beside it are the volume files of others, `<name>.img`, with their locks.
  package static func isOwner(_ text: String) -> Bool { isID(text) && !text.split(separator: ".").dropFirst().contains("img") }

  package static func isVersion(_ text: String) -> Bool {
    isCredentialName(text) && text.utf8.count <= 64 && !text.contains("..")
  }

  package static func isImageName(_ text: String) -> Bool {
    let bytes = Array(text.utf8)
    guard (1...255).contains(bytes.count), !text.contains("..") else { return false }
    // What begins like a digest is one, and nothing else.
    guard !text.hasPrefix("sha256:") || text.utf8.count == 71 else { return false }
    return bytes[0] != 0x2D && bytes[0] != 0x2F
      && bytes.allSatisfy {
        (0x61...0x7A).contains($0) || (0x41...0x5A).contains($0) || (0x30...0x39).contains($0)
          || [0x2D, 0x2E, 0x2F, 0x3A, 0x40, 0x5F].contains($0)
      }
  }

  package static func isCredentialName(_ text: String) -> Bool {
    let bytes = Array(text.utf8)
    func alphanumeric(_ byte: UInt8) -> Bool {
      (0x61...0x7A).contains(byte) || (0x41...0x5A).contains(byte) || (0x30...0x39).contains(byte)
    }
    guard (1...128).contains(bytes.count), alphanumeric(bytes[0]) else { return false }
    return bytes.allSatisfy { alphanumeric($0) || $0 == 0x2D || $0 == 0x2E || $0 == 0x5F }
  }

  static func validateCredentialNames(_ names: [String]) throws(InvalidField) {
    guard names.count <= 64 else { throw InvalidField("credentials", "\(names.count) files; expected at most 64") }
    var seen: Set<String> = []
    for (index, name) in names.enumerated() {
      guard isCredentialName(name) else {
        throw InvalidField(
          "credentials[\(index)].name", "expected 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit")
      }
      guard !["token", "broker-token", "web-identity-token"].contains(name) else {
        throw InvalidField("credentials[\(index)].name", "\(quoted(name)) is reserved for the agent; choose another name")
      }
      guard seen.insert(name).inserted else { throw InvalidField("credentials[\(index)].name", "\(quoted(name)) is listed twice") }
    }
  }

  /// Validates names and contents. An error never contains any content.
  package static func validate(_ credentials: [Credential]) throws(InvalidField) {
    try validateCredentialNames(credentials.map(\.name))
    for (index, credential) in credentials.enumerated() {
      guard (1...65_536).contains(credential.content.count) else {
        throw InvalidField(
          "credentials[\(index)].data", "\(credential.content.count) bytes; expected 1 to 65536 (\(credential.name))")
      }
      guard credential.lifetimeSeconds.map({ (1...31_536_000).contains($0) }) ?? true else {
        throw InvalidField("credentials[\(index)].lifetime_seconds", "expected 1 to 31536000, or 0 for no expiry (\(credential.name))")
      }
    }
  }

  /// Validates the key of the home in a request. An error never contains any of it.
  package func validate(homeKey: [UInt8]?) throws(InvalidField) {
    guard hasEncryptedHome else { return try require(homeKey == nil, "home_key", "is for homes that are encrypted (storage.encrypted)") }
    try require(homeKey != nil, "home_key", "is missing; storage.encrypted requires a key of 32 to 64 bytes with each launch")
    try require((32...64).contains(homeKey?.count ?? 0), "home_key", "\(homeKey?.count ?? 0) bytes; expected 32 to 64")
  }

  package static func validateCommand(_ command: [String], path: String) throws(InvalidField) {
    guard command.reduce(0, { $0 + $1.utf8.count + 1 }) <= 131_072 else {
      throw InvalidField(path, "must not exceed 131072 bytes")
    }
    for (index, argument) in command.enumerated() {
      guard !argument.utf8.contains(0) else { throw InvalidField("\(path)[\(index)]", "holds a NUL byte") }
    }
    if let first = command.first, first.isEmpty { throw InvalidField("\(path)[0]", "is empty; expected a program") }
  }

  /// Validates an environment variable. Secrets are refused, because they belong in `credentials`: the environment is visible in
  /// every child, in /proc/PID/environ and in crash reports.
  package static func validateVariable(_ key: String, _ value: String, path: String) throws(InvalidField) {
    let bytes = Array(key.utf8)
    let valid =
      (1...255).contains(bytes.count) && !(0x30...0x39).contains(bytes[0])
      && bytes.allSatisfy {
        (0x61...0x7A).contains($0) || (0x41...0x5A).contains($0) || (0x30...0x39).contains($0) || $0 == 0x5F
      }
    guard valid else { throw InvalidField("\(path).\(printable(key))", "is not the name of an environment variable") }
    guard !value.utf8.contains(0) else { throw InvalidField("\(path).\(key)", "holds a NUL byte") }
    let secret = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "JUPYTER_TOKEN", "GITHUB_TOKEN"]
    guard !secret.contains(key) else {
      throw InvalidField("\(path).\(key)", "must not contain a secret; use a credential file")
    }
  }

  /// Validates a path of the host or workspace: absolute, no empty, "." or ".." part, no control character, not the root.
  package static func validatePath(_ value: String, path: String) throws(InvalidField) {
    let parts = value.split(separator: "/", omittingEmptySubsequences: false).dropFirst()
    let ok =
      value.hasPrefix("/") && value.utf8.count <= 4095 && !parts.isEmpty && isPlain(value)
      && parts.allSatisfy { !$0.isEmpty && $0 != "." && $0 != ".." }
    guard ok else {
      throw InvalidField(path, "\(quoted(value)) is not an absolute path without empty, '.' and '..' parts")
    }
  }
}

extension WorkspaceSpec.Dataset {
  /// Validates a dataset; `path` is its position in the request.
  package func validate(path field: String) throws(InvalidField) {
    if let name {
      try require(source.isEmpty, field + ".source", "is not for a dataset that is asked for by name")
      let parts = name.split(separator: "@", omittingEmptySubsequences: false).map(String.init)
      try require(
        parts.count <= 2 && WorkspaceSpec.isID(parts[0]) && (parts.count == 1 || WorkspaceSpec.isVersion(parts[1])),
        field + ".dataset", "\(quoted(name)) is not NAME or NAME@VERSION")
      if let path { try WorkspaceSpec.validatePath("/" + path, path: field + ".path") }
    } else {
      try require(path == nil, field + ".path", "is for datasets that are asked for by name")
      try require(!source.isEmpty, field, "expected a dataset (NAME@VERSION), or a source (a path of the host)")
      try WorkspaceSpec.validatePath(source, path: field + ".source")
    }
    try WorkspaceSpec.validatePath(target, path: field + ".target")
    let first = target.split(separator: "/").first ?? ""
    try require(
      !["proc", "sys", "dev", "run", "etc", "usr", "bin", "sbin", "lib", "lib64"].contains(String(first)), field + ".target",
      "\(quoted(target)) lies in a system folder; expected a path such as /data/NAME")
  }
}

private func require(_ condition: Bool, _ path: String, _ problem: String) throws(InvalidField) {
  if !condition { throw InvalidField(path, problem) }
}

private func isPlain(_ text: String) -> Bool { text.utf8.allSatisfy { $0 >= 0x20 && $0 != 0x7F } }

/// Returns `text` for a message: control characters are escaped, and what exceeds `limit` characters is cut.
package func printable(_ text: String, limit: Int = 80) -> String {
  var shown = ""
  for scalar in text.unicodeScalars.prefix(limit) {
    shown += isInvisible(scalar) ? "\\u{\(String(scalar.value, radix: 16))}" : String(scalar)
  }
  return text.unicodeScalars.count > limit ? shown + "…" : shown
}

/// Whether a terminal acts on a character instead of showing it: control characters (C0 and C1), line separators, and what changes the
/// direction of the text around it (CVE-2021-42574).
private func isInvisible(_ scalar: Unicode.Scalar) -> Bool {
  switch scalar.value {
  case 0..<0x20, 0x7F...0x9F, 0x061C, 0x200B...0x200F, 0x2028...0x202E, 0x2060...0x206F, 0xFEFF: true
  default: false
  }
}

private func quoted(_ text: String) -> String { "\"\(printable(text))\"" }

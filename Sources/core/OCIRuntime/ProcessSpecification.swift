// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import LaunchPlan
  internal import Linux
#endif

/// The `process` object (OCI runtime-spec, config.md, "Process"): the program, its user and its environment.
package struct ProcessSpecification {
  package var terminal = false
  package var rows: UInt32 = 0
  package var columns: UInt32 = 0
  package var arguments: [String] = []
  package var environment: [String] = []
  package var directory = "/"
  package var uid: UInt32 = 0
  package var gid: UInt32 = 0
  package var groups: [UInt32] = []
  package var mask: UInt32 = 0o022
  package var capabilities = CapabilitySets()
  package var limits: [(resource: UInt32, soft: UInt64, hard: UInt64)] = []
  package var forbidsNewPrivileges = false
  package var outOfMemoryScore: Int32?
  package var labels = SecurityLabels()
  var scheduling = Scheduling()

  package init(_ json: JSON) throws(RuntimeError) {
    terminal = try json.bool("terminal") ?? false
    if let size = try json.object("consoleSize") {
      rows = try size.number32("height") ?? 0
      columns = try size.number32("width") ?? 0
    }
    arguments = try json.strings("args")
    environment = try json.strings("env")
    for entry in environment where !entry.utf8.contains(UInt8(ascii: "=")) || entry.utf8.first == UInt8(ascii: "=") {
      throw json.error("env", "expected NAME=VALUE, found \(entry)")
    }
    directory = try json.string("cwd") ?? ""
    guard directory.utf8.first == UInt8(ascii: "/") else { throw json.error("cwd", "expected an absolute path") }
    if let user = try json.object("user") {
      uid = try ProcessSpecification.id(user, "uid") ?? 0
      gid = try ProcessSpecification.id(user, "gid") ?? 0
      mask = try user.number32("umask") ?? mask
      guard mask <= 0o777 else { throw user.error("umask", "expected at most 0777") }
      groups = try ProcessSpecification.groups(user)
    }
    if let sets = try json.object("capabilities") { capabilities = try Capabilities.sets(sets) }
    forbidsNewPrivileges = try json.bool("noNewPrivileges") ?? false
    if let score = try json.signed("oomScoreAdj") {
      guard (-1000...1000).contains(score) else { throw json.error("oomScoreAdj", "expected -1000 to 1000") }
      outOfMemoryScore = Int32(score)
    }
    for limit in try json.objects("rlimits") { limits.append(try ProcessSpecification.limit(limit, seen: limits.map { $0.resource })) }
    labels = try SecurityLabels(json)
    scheduling = try Scheduling(json)
  }

  /// Sets variables; a later value replaces one of the same name.
  mutating func override(environment more: [String]) {
    for entry in more {
      let name = Array(entry.utf8.prefix { $0 != UInt8(ascii: "=") }) + [UInt8(ascii: "=")]
      environment.removeAll { $0.utf8.starts(with: name) }
      environment.append(entry)
    }
  }

  /// Reads an id. 4294967295 means "no change" to the kernel, and tools disagree about ids from 2^31 up (CVE-2024-40635), so those
  /// are refused.
  static func id(_ json: JSON, _ name: String) throws(RuntimeError) -> UInt32? {
    guard let number = try json.unsigned(name) else { return nil }
    guard number < 1 << 31 else { throw json.error(name, "\(number): not a user or group id: expected less than 2147483648") }
    return UInt32(number)
  }

  private static func groups(_ user: JSON) throws(RuntimeError) -> [UInt32] {
    guard user.has("additionalGids") else { return [] }
    var groups: [UInt32] = []
    for text in try user.numbers("additionalGids") {
      guard text < 1 << 31 else { throw user.error("additionalGids", "\(text): not a group id: expected less than 2147483648") }
      groups.append(UInt32(text))
    }
    return groups
  }

  /// Names ordered by resource number on Linux (getrlimit(2)).
  private static let resources = [
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE",
    "RTPRIO", "RTTIME",
  ]

  private static func limit(_ json: JSON, seen: [UInt32]) throws(RuntimeError) -> (resource: UInt32, soft: UInt64, hard: UInt64) {
    let name = try json.string("type") ?? ""
    guard name.utf8.starts(with: "RLIMIT_".utf8), let index = resources.firstIndex(where: { "RLIMIT_" + $0 == name }) else {
      throw json.error("type", "\(name): not a resource limit of Linux")
    }
    guard !seen.contains(UInt32(index)) else { throw json.error("type", "\(name) occurs twice") }
    guard let soft = try json.unsigned("soft"), let hard = try json.unsigned("hard") else {
      throw json.error("expected soft and hard")
    }
    guard soft <= hard else { throw json.error("soft", "is above hard") }
    return (UInt32(index), soft, hard)
  }

  /// Returns the operations from the finished root to the program. `gate`: include the wait for `start`. `hooks`: operations right
  /// before the program.
  func operations(filter: [Operation], gate: Bool, hooks: [Operation], socket: String) -> [Operation] {
    var steps: [Operation] = scheduling.operations
    for limit in limits { steps.append(.resourceLimit(resource: limit.resource, soft: limit.soft, hard: limit.hard, strict: true)) }
    steps.append(.workingDirectory(path: directory))
    if terminal { steps.append(.terminal(socket: socket, rows: rows, columns: columns)) }
    steps += labels.operations
    // From here on no process inside can trace this one or see its descriptors (CVE-2016-9962).
    steps.append(.undumpable)
    if gate { steps.append(.awaitStart) }
    steps += hooks
    let user = Operation.user(uid: uid, gid: gid, groups: groups, mask: mask, capabilities: capabilities)
    if forbidsNewPrivileges {
      steps += [user, .undumpable, .noNewPrivileges] + filter
    } else {
      // Without no_new_privs, loading a filter needs CAP_SYS_ADMIN, which the change of user drops.
      steps += [.undumpable] + filter + [user]
    }
    return steps + [.execute(arguments: arguments, environment: environment, directory: directory)]
  }
}

/// Capabilities by name (capabilities(7)).
enum Capabilities {
  /// Names ordered by capability number.
  static let names = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
    "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
    "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
    "PERFMON", "BPF", "CHECKPOINT_RESTORE",
  ]

  /// Reads the capability sets. Capabilities that this process does not have cannot be granted: they are dropped, as in runc and
  /// crun.
  static func sets(_ json: JSON) throws(RuntimeError) -> CapabilitySets {
    func set(_ name: String) throws(RuntimeError) -> UInt64 {
      var bits: UInt64 = 0
      for text in try json.strings(name) {
        // config.md, "Linux Process": an unknown capability is a warning, not an error.
        guard let number = number(text) else {
          warn("\(name): \(text): unknown capability, ignored")
          continue
        }
        bits |= 1 << number
      }
      return bits
    }
    var sets = CapabilitySets()
    sets.bounding = try set("bounding")
    sets.effective = try set("effective")
    sets.permitted = try set("permitted")
    sets.inheritable = try set("inheritable")
    sets.ambient = try set("ambient")
    let held = Process.boundingCapabilities(
      among: sets.bounding | sets.effective | sets.permitted | sets.inheritable | sets.ambient)
    sets.bounding &= held
    sets.effective &= held
    sets.permitted &= held
    sets.inheritable &= held
    sets.ambient &= held
    guard sets.effective & ~sets.permitted == 0 else { throw json.error("effective", "contains capabilities that permitted does not") }
    // The kernel requires that an ambient capability is permitted and inheritable.
    sets.ambient &= sets.permitted & sets.inheritable
    return sets
  }

  static func number(_ text: String) -> UInt64? {
    guard text.utf8.starts(with: "CAP_".utf8) else { return nil }
    return names.firstIndex { "CAP_" + $0 == text }.map { UInt64($0) }
  }
}

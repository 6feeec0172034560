// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
  internal import Seccomp
#endif

/// The compiler of `linux.seccomp` (config-linux.md, "Seccomp") to a filter.
enum SeccompReader {
  /// Returns the operations that load the filter; none if the configuration has none. `state` is the container's state, in two
  /// parts around the pid, for the seccomp listener. `cache` stores compiled filters: an engine passes the same profile with every
  /// container, and compiling it takes longer than all other work together.
  static func operations(_ linux: JSON, _ state: [String], cache: FilterCache) throws(RuntimeError) -> [Operation] {
    guard let json = try linux.object("seccomp") else { return [] }
    let listener = try listener(json, state)
    // The key starts with the version of this compiler, because a cache outlives an upgrade.
    let text = "2" + json.encoded
    var flags: UInt64 = 0
    for name in try json.strings("flags") {
      guard let bit = flagBits.first(where: { $0.name == name })?.bit else { throw json.error("flags", "\(name) is not supported") }
      flags |= bit
    }
    if let program = cache.find(text) { return listener + [.seccomp(program: program, flags: flags)] }
    let program = try compile(json)
    cache.keep(text, program)
    return listener + [.seccomp(program: program, flags: flags)]
  }

  /// Returns the listener operation for SCMP_ACT_NOTIFY, with the container process state (config-linux.md, "The Container Process
  /// State") in parts around the pid.
  private static func listener(_ json: JSON, _ state: [String]) throws(RuntimeError) -> [Operation] {
    guard try json.string("defaultAction") != "SCMP_ACT_NOTIFY" else {
      throw json.error("defaultAction", "SCMP_ACT_NOTIFY: not allowed: the sendmsg that passes the listener would wait for it")
    }
    var asks = false
    for rule in try json.objects("syscalls") where try rule.string("action") == "SCMP_ACT_NOTIFY" {
      asks = true
      guard try !rule.strings("names").contains("sendmsg") else {
        throw rule.error("names", "sendmsg cannot be SCMP_ACT_NOTIFY: it passes the listener")
      }
    }
    guard asks else { return [] }
    guard let path = try json.string("listenerPath"), path.utf8.first == UInt8(ascii: "/") else {
      throw json.error("listenerPath", "SCMP_ACT_NOTIFY needs an absolute path")
    }
    let head = JSONText.object([
      ("ociVersion", .string(Features.specificationVersion)), ("fds", .array([.string("seccompFd")])),
      ("metadata", .string(try json.string("listenerMetadata") ?? "")),
    ]).encoded
    return [.seccompListener(socket: path, state: [String(head.dropLast()) + ",\"pid\":", ",\"state\":" + state[0], state[1] + "}"])]
  }

  /// Flags of seccomp(2).
  private static let flagBits: [(name: String, bit: UInt64)] = [
    ("SECCOMP_FILTER_FLAG_TSYNC", 1), ("SECCOMP_FILTER_FLAG_LOG", 2), ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", 4),
    ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", 32),
  ]

  private static let comparisons: [(name: String, comparison: SeccompFilter.Comparison)] = [
    ("SCMP_CMP_NE", .notEqual), ("SCMP_CMP_LT", .less), ("SCMP_CMP_LE", .lessOrEqual), ("SCMP_CMP_EQ", .equal),
    ("SCMP_CMP_GE", .greaterOrEqual), ("SCMP_CMP_GT", .greater), ("SCMP_CMP_MASKED_EQ", .maskedEqual),
  ]

  private static func compile(_ json: JSON) throws(RuntimeError) -> [UInt8] {
    let fallback = try action(json, "defaultAction", "defaultErrnoRet")
    let filter = try naming(json) { () throws(SeccompFilter.Failure) in try SeccompFilter(fallback: fallback) }
    for name in try json.strings("architectures") {
      guard name.utf8.starts(with: "SCMP_ARCH_".utf8) else { throw json.error("architectures", "\(name): expected SCMP_ARCH_…") }
      try naming(json) { () throws(SeccompFilter.Failure) in try filter.add(architecture: lowercased(name.utf8.dropFirst(10))) }
    }
    for rule in try json.objects("syscalls") { try add(rule, to: filter) }
    return try naming(json) { () throws(SeccompFilter.Failure) in try filter.program() }
  }

  private static func add(_ rule: JSON, to filter: SeccompFilter) throws(RuntimeError) {
    let action = try action(rule, "action", "errnoRet")
    var conditions: [SeccompFilter.Condition] = []
    var arguments: Set<UInt32> = []
    for entry in try rule.objects("args") {
      let name = try entry.string("op") ?? ""
      guard let comparison = comparisons.first(where: { $0.name == name })?.comparison else {
        throw entry.error("op", "\(name): expected SCMP_CMP_…")
      }
      guard let index = try entry.number32("index"), index < 6 else { throw entry.error("index", "expected 0 to 5") }
      arguments.insert(index)
      conditions.append(
        SeccompFilter.Condition(argument: index, comparison, try entry.unsigned("value") ?? 0, try entry.unsigned("valueTwo") ?? 0))
    }
    let names = try rule.strings("names")
    guard !names.isEmpty else { throw rule.error("names", "is empty") }
    for name in names {
      try naming(rule) { () throws(SeccompFilter.Failure) in
        // Several conditions on one argument are alternatives; conditions on different arguments must all hold.
        if arguments.count < conditions.count {
          for condition in conditions { try filter.add(action, name, [condition]) }
        } else {
          try filter.add(action, name, conditions)
        }
      }
    }
  }

  private static func action(_ json: JSON, _ name: String, _ errno: String) throws(RuntimeError) -> SeccompFilter.Action {
    let code = UInt16(clamping: try json.unsigned(errno) ?? 1)  // EPERM
    switch try json.string(name) ?? "" {
    case "SCMP_ACT_ALLOW": return .allow
    case "SCMP_ACT_ERRNO": return .errno(code)
    case "SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD": return .killThread
    case "SCMP_ACT_KILL_PROCESS": return .killProcess
    case "SCMP_ACT_TRAP": return .trap
    case "SCMP_ACT_TRACE": return .trace(code)
    case "SCMP_ACT_LOG": return .log
    case "SCMP_ACT_NOTIFY": return .notify
    case let other: throw json.error(name, "\(other) is not an action")
    }
  }

  private static func naming<T>(_ json: JSON, _ body: () throws(SeccompFilter.Failure) -> T) throws(RuntimeError) -> T {
    do throws(SeccompFilter.Failure) { return try body() } catch { throw json.error(error.message) }
  }

  private static func lowercased(_ bytes: Substring.UTF8View) -> String {
    String(decoding: bytes.map { (0x41...0x5A).contains($0) ? $0 + 0x20 : $0 }, as: UTF8.self)
  }
}

/// A cache of compiled filters. Each file is named by a hash of the profile and contains both, so that a lookup compares the whole
/// profile.
struct FilterCache {
  private let folder: Handle?

  /// Makes the directory `path` if it does not exist; if that fails, nothing is cached.
  init(_ path: String) {
    do throws(Errno) {
      do throws(Errno) { try Descriptor.makeDirectory(path, mode: 0o700) } catch { if error != .exists { throw error } }
      let opened = try Descriptor.open(path, [.readOnly, .directory, .noFollow])
      // A directory that other users can write to is not trusted.
      let status = try opened.status()
      let isOurs = status.uid == Process.effectiveUser && status.permissions & 0o022 == 0
      folder = isOurs ? Handle(opened) : nil
    } catch {
      folder = nil
    }
  }

  func find(_ profile: String) -> [UInt8]? {
    guard let folder else { return nil }
    do throws(Errno) {
      let bytes = try folder.descriptor.open(FilterCache.name(profile), [.readOnly, .noFollow]).readAll(limit: 8 << 20)
      var reader = Reader(bytes)
      do throws(PlanError) {
        guard try reader.counted() == Array(profile.utf8) else { return nil }
        let program = try reader.counted()
        return reader.position == bytes.count ? program : nil
      } catch {
        return nil
      }
    } catch {
      return nil
    }
  }

  func keep(_ profile: String, _ program: [UInt8]) {
    guard let folder else { return }
    var bytes: [UInt8] = []
    bytes.append(counted: Array(profile.utf8))
    bytes.append(counted: program)
    do throws(Errno) { try folder.descriptor.replace(FilterCache.name(profile), with: bytes, durable: false) } catch {}
  }

  /// Returns a file name by FNV-1a; a collision is detected by the comparison and costs a compilation.
  private static func name(_ profile: String) -> String {
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for byte in profile.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
    return "\(hash)"
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// The scheduling of a process: `scheduler`, `ioPriority` and `execCPUAffinity` (config.md, "Linux Process").
struct Scheduling {
  private var scheduler: Scheduler?
  private var ioPriority: UInt32?
  /// The CPUs of an `exec` process: `initial` before it joins the container's cgroup, `final` when it runs.
  let initialAffinity: [UInt8]
  let finalAffinity: [UInt8]

  init() { (initialAffinity, finalAffinity) = ([], []) }

  init(_ json: JSON) throws(RuntimeError) {
    if let entry = try json.object("scheduler") { scheduler = try Scheduling.scheduler(entry) }
    if let entry = try json.object("ioPriority") { ioPriority = try Scheduling.ioPriority(entry) }
    let affinity = try json.object("execCPUAffinity")
    initialAffinity = try Scheduling.affinity(affinity, "initial")
    finalAffinity = try Scheduling.affinity(affinity, "final")
  }

  var operations: [Operation] {
    (scheduler.map { [.scheduler($0)] } ?? []) + (ioPriority.map { [.ioPriority($0)] } ?? [])
  }

  /// Names ordered by policy number; 4 is reserved (sched(7)).
  private static let policies = ["SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE"]
  /// Names ordered by bit (sched_setattr(2)).
  private static let flags = [
    "SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_RECLAIM", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_KEEP_POLICY", "SCHED_FLAG_KEEP_PARAMS",
    "SCHED_FLAG_UTIL_CLAMP_MIN", "SCHED_FLAG_UTIL_CLAMP_MAX",
  ]

  private static func scheduler(_ json: JSON) throws(RuntimeError) -> Scheduler {
    var scheduler = Scheduler()
    let name = try json.string("policy") ?? ""
    guard let policy = policies.firstIndex(of: name), name != "SCHED_ISO" else {
      throw json.error("policy", "\(name): not a scheduling policy")
    }
    scheduler.policy = UInt32(policy)
    for name in try json.strings("flags") {
      guard let bit = flags.firstIndex(of: name) else { throw json.error("flags", "\(name): not a scheduler flag") }
      scheduler.flags |= 1 << UInt64(bit)
    }
    if let nice = try json.signed("nice") {
      guard (-20...19).contains(nice) else { throw json.error("nice", "expected -20 to 19") }
      scheduler.nice = Int32(nice)
    }
    let isRealtime = name == "SCHED_FIFO" || name == "SCHED_RR"
    if let priority = try json.number32("priority"), priority != 0 {
      guard isRealtime, priority <= 99 else { throw json.error("priority", "expected 1 to 99 with SCHED_FIFO or SCHED_RR, else 0") }
      scheduler.priority = priority
    }
    scheduler.runtime = try json.unsigned("runtime") ?? 0
    scheduler.deadline = try json.unsigned("deadline") ?? 0
    scheduler.period = try json.unsigned("period") ?? 0
    return scheduler
  }

  /// Encodes class and level for ioprio_set(2): three bits of class above 13 bits of level.
  private static func ioPriority(_ json: JSON) throws(RuntimeError) -> UInt32 {
    let classes = ["", "IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"]
    let name = try json.string("class") ?? ""
    guard !name.isEmpty, let number = classes.firstIndex(of: name) else { throw json.error("class", "\(name): not an I/O class") }
    guard let level = try json.signed("priority"), (0...7).contains(level) else { throw json.error("priority", "expected 0 to 7") }
    return UInt32(number) << 13 | UInt32(level)
  }

  /// Parses a CPU list in the format of cpuset(7), `0-3,7`, to a bit mask.
  private static func affinity(_ json: JSON?, _ name: String) throws(RuntimeError) -> [UInt8] {
    guard let json, let text = try json.string(name), !text.isEmpty else { return [] }
    var mask = [UInt8](repeating: 0, count: 128)
    for part in text.split(separator: ",", omittingEmptySubsequences: false) {
      let ends = part.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
      guard let first = Int(ends[0]), let last = ends.count > 1 ? Int(ends[1]) : first, first >= 0, first <= last, last < 1024 else {
        throw json.error(name, "\(text): expected a list of CPUs such as 0-3,7")
      }
      for cpu in first...last { mask[cpu / 8] |= 1 << UInt8(cpu % 8) }
    }
    return mask
  }
}

/// Labels of security modules: `apparmorProfile` and `selinuxLabel` (config.md, "Linux Process"). A label that the host cannot
/// enforce is refused.
package struct SecurityLabels {
  private(set) var profile = ""
  private(set) var context = ""

  package init() {}

  init(_ json: JSON) throws(RuntimeError) {
    profile = try json.string("apparmorProfile") ?? ""
    context = try json.string("selinuxLabel") ?? ""
    try check { (name, message) in json.error(name, message) }
  }

  /// Replaces labels by the options of `exec`.
  mutating func override(profile: String, context: String) throws(RuntimeError) {
    if !profile.isEmpty { self.profile = profile }
    if !context.isEmpty { self.context = context }
    try check { (name, message) in RuntimeError("\(name): \(message)") }
  }

  private mutating func check(_ error: (String, String) -> RuntimeError) throws(RuntimeError) {
    if profile == "unconfined" && !SecurityLabels.hasAppArmor { profile = "" }
    if !profile.isEmpty && !SecurityLabels.hasAppArmor { throw error("apparmorProfile", "\(profile): this host has no AppArmor") }
    if !context.isEmpty && !SecurityLabels.hasSELinux { throw error("selinuxLabel", "\(context): this host has no SELinux") }
  }

  var operations: [Operation] {
    (profile.isEmpty ? [] : [.label(file: "apparmor/exec", text: "exec " + profile)])
      + (context.isEmpty ? [] : [.label(file: "exec", text: context)])
  }

  static var hasSELinux: Bool { Process.exists("/sys/fs/selinux/enforce") }

  static var hasAppArmor: Bool {
    do throws(Errno) {
      return try Descriptor.open("/sys/module/apparmor/parameters/enabled", [.readOnly]).read(upTo: 1) == [UInt8(ascii: "Y")]
    } catch {
      return false
    }
  }
}

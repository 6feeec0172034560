// SPDX-License-Identifier: Apache-2.0

/// One command of the runtime's command line. Returns the exit code.
struct Command: Sendable {
  let name: String
  let usage: String
  let options: [Arguments.Option]
  let run: @Sendable (Containers, Arguments) throws(RuntimeError) -> Int32
}

private let creation: [Arguments.Option] = [
  .value("bundle", "b", help: "directory with config.json; default: the working directory"),
  .value("config", "f", help: "the configuration; default: config.json in the bundle"),
  .value("console-socket", help: "Unix socket that receives the terminal's other end"),
  .value("pid-file", help: "file for the pid of the first process"),
  .value("preserve-fds", help: "number of descriptors from 3 on that the program inherits"),
  .flag("no-pivot", help: "refused"),
  .flag("no-new-keyring", help: "accepted; a new session keyring is always made"),
]

let commands: [Command] = [
  Command(name: "create", usage: "[options] ID", options: creation) { (containers, arguments) throws(RuntimeError) in
    try containers.create(try arguments.operand(0, "a container id"), try creationOptions(arguments))
    return 0
  },
  Command(name: "start", usage: "ID", options: []) { (containers, arguments) throws(RuntimeError) in
    try containers.start(try arguments.operand(0, "a container id"))
    return 0
  },
  Command(
    name: "run", usage: "[options] ID",
    options: creation + [
      .flag("detach", "d", help: "return when the program runs"), .flag("keep", help: "do not delete the container when the program ends"),
    ], run: runContainer),
  Command(
    name: "exec", usage: "[options] ID [PROGRAM ARGUMENT...]",
    options: [
      .value("process", "p", help: "file with the process object"), .value("cwd", help: "working directory"),
      .value("env", "e", help: "NAME=VALUE, may be repeated"), .flag("tty", "t", help: "with a terminal"),
      .value("user", "u", help: "UID[:GID]"), .value("additional-gids", "g", help: "further group, may be repeated"),
      .value("cap", "c", help: "further capability, may be repeated"), .flag("detach", "d", help: "return when the program runs"),
      .flag("no-new-privs", help: "set no_new_privs"), .value("console-socket", help: "Unix socket that receives the terminal's other end"),
      .value("pid-file", help: "file for the pid"), .value("preserve-fds", help: "number of descriptors from 3 on that it inherits"),
      .value("apparmor", help: "AppArmor profile"), .value("process-label", help: "SELinux context"),
      .value("cgroup", help: "cgroup below the container's own; CONTROLLERS:PATH on v1; may be repeated"),
      .flag("ignore-paused", help: "start it even in a paused container"),
    ], run: execute),
  Command(name: "state", usage: "ID", options: []) { (containers, arguments) throws(RuntimeError) in
    StandardStream.output.write(try containers.state(try arguments.operand(0, "a container id")) + "\n")
    return 0
  },
  Command(name: "kill", usage: "[--all] ID [SIGNAL]", options: [.flag("all", "a", help: "signal every process of the container")]) {
    (containers, arguments) throws(RuntimeError) in
    let signal = arguments.operands.count > 1 ? arguments.operands[1] : "TERM"
    // Signal 0 only checks whether the process exists (kill(2)).
    guard let number = signal == "0" ? 0 : Signals.number(signal) else { throw RuntimeError("\(signal): not a signal") }
    try containers.kill(try arguments.operand(0, "a container id"), number, all: arguments.has("all"))
    return 0
  },
  Command(name: "delete", usage: "[--force] ID", options: [.flag("force", "f", help: "kill it first; no error if it does not exist")]) {
    (containers, arguments) throws(RuntimeError) in
    try containers.delete(try arguments.operand(0, "a container id"), force: arguments.has("force"))
    return 0
  },
  Command(
    name: "list", usage: "[--format table|json] [--quiet]",
    options: [.value("format", "f", help: "table or json"), .flag("quiet", "q", help: "ids only")], run: list),
  Command(name: "ps", usage: "[--format table|json] ID", options: [.value("format", "f", help: "table or json")]) {
    (containers, arguments) throws(RuntimeError) in
    let pids = try containers.processes(try arguments.operand(0, "a container id"))
    if arguments.value("format") == "json" {
      StandardStream.output.write(JSONText.array(pids.map { .number(Int64($0)) }).encoded + "\n")
    } else {
      var text = "PID\n"
      for pid in pids { text += "\(pid)\n" }
      StandardStream.output.write(text)
    }
    return 0
  },
  Command(name: "pause", usage: "ID", options: []) { (containers, arguments) throws(RuntimeError) in
    try containers.pause(try arguments.operand(0, "a container id"), true)
    return 0
  },
  Command(name: "resume", usage: "ID", options: []) { (containers, arguments) throws(RuntimeError) in
    try containers.pause(try arguments.operand(0, "a container id"), false)
    return 0
  },
  Command(
    name: "update", usage: "[options] ID",
    options: [.value("resources", "r", help: "file with a linux.resources object; - for standard input")] + updateOptions.map { $0.option },
    run: update),
  Command(
    name: "events", usage: "[--stats] ID",
    options: [
      .flag("stats", help: "print the resource usage once"),
      .value("interval", help: "between reports: 5s, 500ms, or seconds"),
    ]
  ) { (containers, arguments) throws(RuntimeError) in
    let id = try arguments.operand(0, "a container id")
    if arguments.has("stats") {
      StandardStream.output.write(statistics(id, try containers.usage(id)) + "\n")
      return 0
    }
    try containers.watch(id, milliseconds: try interval(arguments.value("interval") ?? "5s")) { news in
      switch news {
      case .usage(let usage): StandardStream.output.write(statistics(id, usage) + "\n")
      case .outOfMemory:
        StandardStream.output.write(JSONText.object([("type", .string("oom")), ("id", .string(id))]).encoded + "\n")
      }
    }
    return 0
  },
  Command(
    name: "spec", usage: "[--bundle DIR]",
    options: [.value("bundle", "b", help: "where config.json is written"), .flag("rootless", help: "refused")]
  ) { (_, arguments) throws(RuntimeError) in
    if arguments.has("rootless") { throw RuntimeError("--rootless: not supported") }
    try ExampleConfiguration.write(to: arguments.value("bundle") ?? ".")
    return 0
  },
  Command(name: "features", usage: "", options: []) { (_, _) throws(RuntimeError) in
    StandardStream.output.write(Features.text + "\n")
    return 0
  },
  Command(name: "checkpoint", usage: "", options: []) { (_, _) throws(RuntimeError) in throw RuntimeError("checkpoint: not supported") },
  Command(name: "restore", usage: "", options: []) { (_, _) throws(RuntimeError) in throw RuntimeError("restore: not supported") },
]

private func interval(_ text: String) throws(RuntimeError) -> UInt32 {
  let digits = text.utf8.prefix { (0x30...0x39).contains($0) }
  let unit = String(decoding: text.utf8.dropFirst(digits.count), as: UTF8.self)
  guard let number = UInt32(String(decoding: digits, as: UTF8.self)), number > 0, number <= 86_400, ["ms", "s", ""].contains(unit) else {
    throw RuntimeError("--interval \(text): expected a time such as 5s or 500ms")
  }
  return unit == "ms" ? number : number * 1000
}

/// Returns the number of sockets from a service manager, 0 if they are for another process (sd_listen_fds(3)).
private func listening() throws(RuntimeError) -> UInt32 {
  let all = Process.environment
  func value(_ name: String) -> String? { all.first { $0.utf8.starts(with: name.utf8) }.map { String($0.dropFirst(name.utf8.count)) } }
  guard let text = value("LISTEN_FDS="), value("LISTEN_PID=").map({ Int32($0) == Process.id }) ?? true else { return 0 }
  guard let count = UInt32(text), count <= Arguments.descriptorLimit else { throw RuntimeError("LISTEN_FDS \(text): expected a number") }
  return count
}

private func inherited(_ arguments: Arguments) throws(RuntimeError) -> UInt32 {
  let count = try arguments.number("preserve-fds") ?? 0
  guard count <= Arguments.descriptorLimit else {
    throw RuntimeError("--preserve-fds \(count): expected at most \(Arguments.descriptorLimit)")
  }
  return count
}

private func creationOptions(_ arguments: Arguments) throws(RuntimeError) -> CreateOptions {
  var options = CreateOptions()
  options.bundle = arguments.value("bundle") ?? "."
  options.pidFile = arguments.value("pid-file") ?? ""
  options.consoleSocket = arguments.value("console-socket") ?? ""
  options.configuration = arguments.value("config") ?? ""
  options.inherited = try inherited(arguments)
  options.listening = try listening()
  options.noPivot = arguments.has("no-pivot")
  return options
}

@Sendable private func runContainer(_ containers: Containers, _ arguments: Arguments) throws(RuntimeError) -> Int32 {
  let detached = arguments.has("detach")
  if !detached { try blockSignals() }
  return try containers.run(
    try arguments.operand(0, "a container id"), try creationOptions(arguments), detached: detached, keeps: arguments.has("keep"))
}

@Sendable private func execute(_ containers: Containers, _ arguments: Arguments) throws(RuntimeError) -> Int32 {
  var options = ExecOptions()
  options.processFile = arguments.value("process") ?? ""
  options.arguments = Array(arguments.operands.dropFirst())
  options.environment = arguments.values("env")
  options.directory = arguments.value("cwd") ?? ""
  options.user = arguments.value("user") ?? ""
  options.groups = arguments.values("additional-gids")
  options.capabilities = arguments.values("cap")
  options.terminal = arguments.has("tty")
  options.forbidsNewPrivileges = arguments.has("no-new-privs")
  options.consoleSocket = arguments.value("console-socket") ?? ""
  options.pidFile = arguments.value("pid-file") ?? ""
  options.profile = arguments.value("apparmor") ?? ""
  options.context = arguments.value("process-label") ?? ""
  options.inherited = try inherited(arguments)
  options.ignoresPause = arguments.has("ignore-paused")
  options.cgroups = arguments.values("cgroup").filter { !$0.isEmpty }
  let detached = arguments.has("detach")
  if !detached { try blockSignals() }
  let started = try containers.exec(try arguments.operand(0, "a container id"), options)
  return detached ? 0 : Foreground.wait(for: started)
}

/// Blocks signals, so that none is lost between the clone and the wait. The program starts with them unblocked.
private func blockSignals() throws(RuntimeError) {
  do throws(Errno) { try Signals.blockAll() } catch { throw RuntimeError("cannot block signals: \(error.sentence)") }
}

@Sendable private func list(_ containers: Containers, _ arguments: Arguments) throws(RuntimeError) -> Int32 {
  let all = try containers.list()
  if arguments.has("quiet") {
    for entry in all { StandardStream.output.write(entry.id + "\n") }
  } else if arguments.value("format") == "json" {
    let items = all.map { entry in
      JSONText.object([
        ("ociVersion", .string(Features.specificationVersion)), ("id", .string(entry.id)), ("pid", .number(Int64(entry.pid))),
        ("status", .string(entry.status.rawValue)), ("bundle", .string(entry.bundle)), ("created", .string(entry.created)),
        ("owner", .string(entry.owner)),
      ])
    }
    StandardStream.output.write(JSONText.array(items).encoded + "\n")
  } else {
    // The columns are those of runc, which engines and scripts read.
    var rows = [["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]]
    for entry in all { rows.append([entry.id, "\(entry.pid)", entry.status.rawValue, entry.bundle, entry.created, entry.owner]) }
    var text = ""
    for row in rows {
      for (column, field) in row.enumerated() {
        let width = rows.map { $0[column].utf8.count }.max() ?? 0
        text += field + String(repeating: " ", count: column == 5 ? 0 : max(width, 11) - field.utf8.count + 1)
      }
      text += "\n"
    }
    StandardStream.output.write(text)
  }
  return 0
}

private let updateOptions: [(option: Arguments.Option, section: String, field: String)] = [
  (.value("memory", help: "bytes"), "memory", "limit"), (.value("memory-swap", help: "bytes, memory and swap"), "memory", "swap"),
  (.value("memory-reservation", help: "bytes"), "memory", "reservation"),
  (.value("cpu-share", "cpu-shares", help: "2 to 262144"), "cpu", "shares"),
  (.value("cpu-quota", help: "microseconds in a period"), "cpu", "quota"), (.value("cpu-period", help: "microseconds"), "cpu", "period"),
  (.value("cpu-rt-runtime", help: "microseconds in a period"), "cpu", "realtimeRuntime"),
  (.value("cpu-rt-period", help: "microseconds"), "cpu", "realtimePeriod"),
  (.value("cpuset-cpus", help: "list"), "cpu", "cpus"), (.value("cpuset-mems", help: "list"), "cpu", "mems"),
  (.value("pids-limit", help: "processes"), "pids", "limit"), (.value("blkio-weight", help: "10 to 1000"), "blockIO", "weight"),
]

@Sendable private func update(_ containers: Containers, _ arguments: Arguments) throws(RuntimeError) -> Int32 {
  let id = try arguments.operand(0, "a container id")
  if let path = arguments.value("resources") {
    let text: [UInt8]
    do throws(Errno) {
      text = try Descriptor.open(path == "-" ? "/dev/stdin" : path, [.readOnly]).readAll(limit: JSON.sizeLimit)
    } catch {
      throw RuntimeError("--resources \(path): \(error.sentence)")
    }
    try containers.update(id, text)
    return 0
  }
  var sections: [(key: String, value: JSONText)] = []
  for entry in updateOptions {
    guard let text = arguments.value(entry.option.names[0]) else { continue }
    let value: JSONText
    if entry.field == "cpus" || entry.field == "mems" {
      value = .string(text)
    } else {
      guard let number = entry.section == "memory" ? bytes(text) : Int64(text) else {
        throw RuntimeError("--\(entry.option.names[0]) \(text): expected a number")
      }
      value = .number(number)
    }
    if let index = sections.firstIndex(where: { $0.key == entry.section }), case .object(let members) = sections[index].value {
      sections[index].value = .object(members + [(entry.field, value)])
    } else {
      sections.append((entry.section, .object([(entry.field, value)])))
    }
  }
  guard !sections.isEmpty else { throw RuntimeError("update: nothing to change") }
  try containers.update(id, Array(JSONText.object(sections).encoded.utf8))
  return 0
}

/// Parses bytes such as 52428800, 50M, 50m or 50MiB; -1 means no limit.
private func bytes(_ text: String) -> Int64? {
  let digits = text.utf8.prefix { (0x30...0x39).contains($0) || $0 == UInt8(ascii: "-") }
  guard let number = Int64(String(decoding: digits, as: UTF8.self)) else { return nil }
  let unit = String(decoding: text.utf8.dropFirst(digits.count), as: UTF8.self)
  let units: [[String]] = [["", "b", "B"], ["k", "K", "KiB"], ["m", "M", "MiB"], ["g", "G", "GiB"], ["t", "T", "TiB"]]
  guard let power = units.firstIndex(where: { $0.contains(unit) }) else { return nil }
  let (product, overflows) = number.multipliedReportingOverflow(by: 1 << (10 * Int64(power)))
  return overflows ? nil : product
}

/// Returns statistics in the form of `runc events --stats`, with a part of its fields.
private func statistics(_ id: String, _ usage: Usage) -> String {
  JSONText.object([
    ("type", .string("stats")), ("id", .string(id)),
    (
      "data",
      .object([
        ("cpu", .object([("usage", .object([("total", .unsigned(usage.cpuNanoseconds))]))])),
        (
          "memory",
          .object([
            (
              "usage",
              .object([
                ("limit", .unsigned(usage.memoryLimitBytes)), ("usage", .unsigned(usage.memoryBytes)),
                ("max", .unsigned(usage.memoryPeakBytes)),
                ("failcnt", .unsigned(usage.outOfMemoryKills)),
              ])
            )
          ])
        ), ("pids", .object([("current", .unsigned(usage.pids)), ("limit", .unsigned(usage.pidsLimit))])),
      ])
    ),
  ]).encoded
}

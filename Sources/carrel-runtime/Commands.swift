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
  .value("console-socket", help: "Unix socket that gets the terminal's other end"),
  .value("pid-file", help: "gets the pid of the first process"),
  .value("preserve-fds", help: "so many descriptors from 3 on are handed to the program"),
  .flag("no-pivot", help: "refused"),
  .flag("no-new-keyring", help: "accepted; a session keyring of its own is always made"),
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
      .flag("detach", "d", help: "return when the program runs"), .flag("keep", help: "do not delete it when the program has ended"),
    ], run: runContainer),
  Command(
    name: "exec", usage: "[options] ID [PROGRAM ARGUMENT...]",
    options: [
      .value("process", "p", help: "file with the process object"), .value("cwd", help: "working directory"),
      .value("env", "e", help: "NAME=VALUE, may be repeated"), .flag("tty", "t", help: "with a terminal"),
      .value("user", "u", help: "UID[:GID]"), .value("additional-gids", "g", help: "further group, may be repeated"),
      .value("cap", "c", help: "further capability, may be repeated"), .flag("detach", "d", help: "return when the program runs"),
      .flag("no-new-privs", help: "set no_new_privs"), .value("console-socket", help: "Unix socket that gets the terminal's other end"),
      .value("pid-file", help: "gets the pid"), .value("preserve-fds", help: "so many descriptors from 3 on are handed on"),
      .value("apparmor", help: "AppArmor profile"), .value("process-label", help: "SELinux context"),
      .value("cgroup", help: "refused"),
    ], run: execute),
  Command(name: "state", usage: "ID", options: []) { (containers, arguments) throws(RuntimeError) in
    StandardStream.output.write(try containers.state(try arguments.operand(0, "a container id")) + "\n")
    return 0
  },
  Command(name: "kill", usage: "[--all] ID [SIGNAL]", options: [.flag("all", "a", help: "every process of the container")]) {
    (containers, arguments) throws(RuntimeError) in
    let signal = arguments.operands.count > 1 ? arguments.operands[1] : "TERM"
    guard let number = Signals.number(signal) else { throw RuntimeError("\(signal): no signal") }
    try containers.kill(try arguments.operand(0, "a container id"), number, all: arguments.has("all"))
    return 0
  },
  Command(name: "delete", usage: "[--force] ID", options: [.flag("force", "f", help: "kill it first; no error where there is none")]) {
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
    options: [.value("resources", "r", help: "file as linux.resources; - for standard input")] + updateOptions.map { $0.option },
    run: update),
  Command(
    name: "events", usage: "[--stats] ID",
    options: [.flag("stats", help: "print the use of resources once"), .value("interval", help: "between reports: 5s, or seconds")]
  ) { (containers, arguments) throws(RuntimeError) in
    let id = try arguments.operand(0, "a container id")
    if arguments.has("stats") {
      StandardStream.output.write(statistics(id, try containers.usage(id)) + "\n")
      return 0
    }
    let interval = arguments.value("interval") ?? "5s"
    guard let seconds = UInt32(interval.utf8.last == UInt8(ascii: "s") ? String(interval.dropLast()) : interval), seconds > 0 else {
      throw RuntimeError("--interval \(interval): expected seconds, such as 5s")
    }
    try containers.watch(id, seconds: seconds) { news in
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

private func creationOptions(_ arguments: Arguments) throws(RuntimeError) -> CreateOptions {
  var options = CreateOptions()
  options.bundle = arguments.value("bundle") ?? "."
  options.pidFile = arguments.value("pid-file") ?? ""
  options.consoleSocket = arguments.value("console-socket") ?? ""
  options.inherited = try arguments.number("preserve-fds") ?? 0
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
  if let value = arguments.value("cgroup"), !value.isEmpty { throw RuntimeError("--cgroup: not supported") }
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
  options.inherited = try arguments.number("preserve-fds") ?? 0
  let detached = arguments.has("detach")
  if !detached { try blockSignals() }
  let started = try containers.exec(try arguments.operand(0, "a container id"), options)
  return detached ? 0 : Foreground.wait(for: started)
}

/// So that none is lost between the clone and the wait; the program gets them unblocked.
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
      ])
    }
    StandardStream.output.write(JSONText.array(items).encoded + "\n")
  } else {
    func pad(_ text: String, _ width: Int) -> String {
      let count = text.utf8.count
      return text + String(repeating: " ", count: max(width - count, 0) + 1)
    }
    let width = all.map { $0.id.utf8.count }.max() ?? 0
    var text = pad("ID", max(width, 2)) + pad("PID", 7) + pad("STATUS", 8) + pad("CREATED", 30) + "BUNDLE\n"
    for entry in all {
      text +=
        pad(entry.id, max(width, 2)) + pad("\(entry.pid)", 7) + pad(entry.status.rawValue, 8) + pad(entry.created, 30) + entry.bundle + "\n"
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
      guard let number = Int64(text) else { throw RuntimeError("--\(entry.option.names[0]) \(text): expected a number") }
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

/// In the form of `runc events --stats`, as far as it goes.
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

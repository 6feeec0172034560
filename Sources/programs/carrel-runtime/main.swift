// SPDX-License-Identifier: Apache-2.0
//
// carrel-runtime: the isolation core behind the command line of OCI runtimes. Each command is one process, and none stays.

let globalOptions: [Arguments.Option] = [
  .value("root", help: "directory of the containers' state; default: /run/carrel-runtime"),
  .value("log", help: "file for errors, besides standard error"), .value("log-format", help: "text or json"),
  .flag("debug", help: "accepted"), .flag("systemd-cgroup", help: "manage cgroups through systemd"),
  .value("cgroup-manager", help: "cgroupfs or systemd"),
  .value("rootless", help: "accepted"), .flag("version", "v", help: "print the version"), .flag("help", "h", help: "print this"),
]

func runCommandLine() -> Int32 {
  Signals.ignorePipe()
  Process.keepMemory()
  // Descriptors that an engine left open do not reach a container: the launch closes all but those that it requests by number.
  var log = ErrorLog()
  var failure: Int32 = 1
  do throws(RuntimeError) {
    let global = try Arguments(Process.arguments.dropFirst(), globalOptions)
    log = ErrorLog(path: global.value("log") ?? "", isJSON: global.value("log-format") == "json")
    if global.has("version") {
      StandardStream.output.write("carrel-runtime version 0.2.0\nspec: \(Features.specificationVersion)\n")
      return 0
    }
    guard let name = global.operands.first, !global.has("help"), name != "help" else {
      StandardStream.output.write(help())
      return global.operands.isEmpty && !global.has("help") ? 2 : 0
    }
    guard let command = commands.first(where: { $0.name == name }) else { throw RuntimeError("\(name): unknown command; see --help") }
    // As in runc and crun, this exit status distinguishes a program that could not be started from one that failed.
    if name == "exec" { failure = 255 }
    let usesSystemd = global.has("systemd-cgroup") || global.value("cgroup-manager") == "systemd"
    let arguments = try Arguments(
      global.operands.dropFirst(), command.options + [.flag("help", "h", help: "print this")], mixed: command.name != "exec")
    if arguments.has("help") {
      StandardStream.output.write(help(command))
      return 0
    }
    let store = try ContainerStore(global.value("root") ?? "/run/carrel-runtime")
    return try command.run(Containers(store, usesSystemd: usesSystemd), arguments)
  } catch {
    log.write(error.message)
    return failure
  }
}

/// The destinations of errors: standard error, and the file that an engine reads.
struct ErrorLog {
  var path = ""
  var isJSON = false

  func write(_ message: String) {
    StandardStream.error.write("carrel-runtime: \(message)\n")
    if path.isEmpty { return }
    let line = JSONText.object([("msg", .string(message)), ("level", .string("error")), ("time", .string(Timestamp.now))]).encoded
    let text = isJSON ? line : "time=\"\(Timestamp.now)\" level=error msg=\(JSONText.string(message).encoded)"
    do throws(Errno) {
      try Descriptor.open(path, [.writeOnly, .create, .append, .noFollow], mode: 0o644).write(Array((text + "\n").utf8))
    } catch {}
  }
}

func help() -> String {
  var text = "usage: carrel-runtime [global options] COMMAND [options] ...\n\ncommands:\n"
  for command in commands { text += "  \(command.name) \(command.usage)\n" }
  text += "\nglobal options:\n" + help(globalOptions)
  return text + "\ncarrel-runtime COMMAND --help: the options of a command\n"
}

func help(_ command: Command) -> String {
  "usage: carrel-runtime \(command.name) \(command.usage)\n" + (command.options.isEmpty ? "" : "\n" + help(command.options))
}

func help(_ options: [Arguments.Option]) -> String {
  var text = ""
  for option in options {
    let names = option.names.map { ($0.utf8.count > 1 ? "--" : "-") + $0 }.joined(separator: ", ")
    let left = names + (option.takesValue ? " VALUE" : "")
    text += "  " + left + String(repeating: " ", count: max(26 - left.utf8.count, 1)) + option.help + "\n"
  }
  return text
}

Process.exit(runCommandLine())

// SPDX-License-Identifier: Apache-2.0

/// The value of a field, for encoding and printing.
enum Field: Equatable {
  case number(UInt64)
  case text(String)
  case bytes([UInt8])
  case list([String])
}

/// The description of an operation for encoding and printing: its code in the encoding (whose meaning never changes), its name, and
/// its labelled fields in order.
struct Schema {
  let code: UInt8
  let name: String
  let fields: [(label: String, value: Field)]

  init(_ code: UInt8, _ name: String, _ fields: [(label: String, value: Field)] = []) {
    self.code = code
    self.name = name
    self.fields = fields
  }
}

extension Operation {
  var schema: Schema {
    switch self {
    case .cgroup(let path): Schema(1, "join cgroup", [("path", .text(path))])
    case .userNamespace(let owner, let uids, let gids):
      Schema(2, "new user namespace", [("owner", .number(UInt64(owner))), ("uids", .list(texts(uids))), ("gids", .list(texts(gids)))])
    case .namespaces(let flags): Schema(3, "new namespaces", [("flags", .number(flags))])
    case .layer(let path): Schema(4, "image layer", [("path", .text(path))])
    case .root(let bytes, let inodes):
      Schema(5, "overlay root", [("scratch", .number(bytes)), ("inodes", .number(inodes))])
    case .directory(let path, let mode, let uid, let gid):
      Schema(
        6, "directory",
        [
          ("path", .text(path)), ("mode", .number(UInt64(mode))), ("uid", .number(UInt64(uid))),
          ("gid", .number(UInt64(gid))),
        ])
    case .bind(let source, let target, let options):
      Schema(
        7, "bind",
        [("source", .text(source)), ("target", .text(target))] + fields(options.change) + [
          ("recursive", .number(options.recursive ? 1 : 0)), ("follows", .number(options.followsSource ? 1 : 0)),
          ("uids", .list(texts(options.uids))), ("gids", .list(texts(options.gids))),
          ("maps recursively", .number(options.mapsRecursively ? 1 : 0)),
        ])
    case .secrets(let target, let bytes):
      Schema(8, "secrets", [("target", .text(target)), ("bytes", .number(bytes))])
    case .fileSystem(let type, let source, let target, let options, let change, let copyUp):
      Schema(
        35, "mount",
        [("type", .text(type)), ("source", .text(source)), ("target", .text(target)), ("options", .list(options))] + fields(change)
          + [("copy up", .number(copyUp ? 1 : 0))])
    case .joinNamespace(let kind, let path): Schema(36, "join namespace", [("kind", .number(kind)), ("path", .text(path))])
    case .rootDirectory(let path): Schema(37, "root directory", [("path", .text(path))])
    case .attributes(let path, let change): Schema(38, "attributes", [("path", .text(path))] + fields(change))
    case .node(let path, let mode, let major, let minor, let uid, let gid):
      Schema(
        39, "device node",
        [
          ("path", .text(path)), ("mode", .number(UInt64(mode))), ("major", .number(UInt64(major))),
          ("minor", .number(UInt64(minor))), ("uid", .number(UInt64(uid))), ("gid", .number(UInt64(gid))),
        ])
    case .outerNode(let path, let mode, let major, let minor, let uid, let gid):
      Schema(
        52, "outer device node",
        [
          ("path", .text(path)), ("mode", .number(UInt64(mode))), ("major", .number(UInt64(major))),
          ("minor", .number(UInt64(minor))), ("uid", .number(UInt64(uid))), ("gid", .number(UInt64(gid))),
        ])
    case .domainname(let name): Schema(40, "domain name", [("name", .text(name))])
    case .rendezvous: Schema(41, "rendezvous")
    case .hook(let arguments, let environment, let seconds, let input):
      Schema(
        42, "hook",
        [
          ("arguments", .list(arguments)), ("environment", .list(environment)), ("seconds", .number(UInt64(seconds))),
          ("input", .list(input)),
        ])
    case .terminal(let socket, let rows, let columns):
      Schema(43, "terminal", [("socket", .text(socket)), ("rows", .number(UInt64(rows))), ("columns", .number(UInt64(columns)))])
    case .personality(let persona): Schema(44, "personality", [("persona", .number(persona))])
    case .workingDirectory(let path): Schema(46, "working directory", [("path", .text(path))])
    case .timeOffsets(let offsets): Schema(45, "time offsets", [("offsets", .list(offsets))])
    case .cgroupFileSystem(let hierarchies, let target, let attributes):
      Schema(
        11, "mount cgroup", [("hierarchies", .list(hierarchies)), ("target", .text(target)), ("attributes", .number(attributes))])
    case .device(let path, let major, let minor):
      Schema(
        13, "device",
        [("path", .text(path)), ("major", .number(UInt64(major))), ("minor", .number(UInt64(minor)))])
    case .symlink(let path, let target): Schema(16, "symlink", [("path", .text(path)), ("target", .text(target))])
    case .file(let path, let mode, let content):
      Schema(17, "file", [("path", .text(path)), ("mode", .number(UInt64(mode))), ("content", .bytes(content))])
    case .mask(let path): Schema(18, "mask", [("path", .text(path))])
    case .readOnly(let path): Schema(19, "make read-only", [("path", .text(path))])
    case .pivotRoot: Schema(20, "pivot root")
    case .hostname(let name): Schema(21, "hostname", [("name", .text(name))])
    case .sysctl(let key, let value): Schema(22, "sysctl", [("key", .text(key)), ("value", .text(value))])
    case .resourceLimit(let resource, let soft, let hard, let strict):
      Schema(
        23, "rlimit",
        [
          ("resource", .number(UInt64(resource))), ("soft", .number(soft)), ("hard", .number(hard)),
          ("strict", .number(strict ? 1 : 0)),
        ])
    case .outOfMemoryScore(let score): Schema(24, "oom score", [("score", .number(UInt64(bitPattern: Int64(score))))])
    case .sessionKeyring: Schema(25, "new session keyring")
    case .cgroupNamespace: Schema(26, "new cgroup namespace")
    case .awaitStart: Schema(27, "await start")
    case .user(let uid, let gid, let groups, let mask, let sets):
      Schema(
        29, "become user",
        [
          ("uid", .number(UInt64(uid))), ("gid", .number(UInt64(gid))), ("groups", .list(groups.map { "\($0)" })),
          ("mask", .number(UInt64(mask))), ("bounding", .number(sets.bounding)), ("effective", .number(sets.effective)),
          ("permitted", .number(sets.permitted)), ("inheritable", .number(sets.inheritable)), ("ambient", .number(sets.ambient)),
        ])
    case .undumpable: Schema(30, "become undumpable")
    case .noNewPrivileges: Schema(31, "no new privileges")
    case .label(let file, let text): Schema(47, "security label", [("file", .text(file)), ("text", .text(text))])
    case .scheduler(let scheduler):
      Schema(
        48, "scheduler",
        [
          ("policy", .number(UInt64(scheduler.policy))), ("flags", .number(scheduler.flags)),
          ("nice", .number(UInt64(bitPattern: Int64(scheduler.nice)))), ("priority", .number(UInt64(scheduler.priority))),
          ("runtime", .number(scheduler.runtime)), ("deadline", .number(scheduler.deadline)), ("period", .number(scheduler.period)),
        ])
    case .ioPriority(let value): Schema(49, "io priority", [("value", .number(UInt64(value)))])
    case .cpuAffinity(let mask): Schema(50, "cpu affinity", [("mask", .bytes(mask))])
    case .seccompListener(let socket, let state):
      Schema(51, "seccomp listener", [("socket", .text(socket)), ("state", .list(state))])
    case .seccomp(let program, let flags):
      Schema(32, "load seccomp filter", [("program", .bytes(program)), ("flags", .number(flags))])
    case .log(let segmentBytes, let segments, let rate):
      Schema(
        33, "keep output",
        [("segment", .number(segmentBytes)), ("segments", .number(UInt64(segments))), ("rate", .number(rate))])
    case .execute(let arguments, let environment, let directory):
      Schema(
        34, "execute",
        [("arguments", .list(arguments)), ("environment", .list(environment)), ("directory", .text(directory))])
    }
  }

  /// The operation's name in errors and in `carrel plan`.
  package var name: String { schema.name }

  /// A line for people. Modes are octal; of contents only the length is shown.
  package var description: String {
    let schema = schema
    var line = schema.name
    for (label, value) in schema.fields {
      line += "  \(label)="
      switch value {
      case .number(let number): line += label == "mode" || label == "mask" ? octal(number) : "\(number)"
      case .text(let text): line += text
      case .bytes(let bytes): line += "<\(bytes.count) bytes>"
      case .list(let list):
        line += "["
        for (index, item) in list.enumerated() { line += (index > 0 ? " " : "") + item }
        line += "]"
      }
    }
    return line
  }
}

private func fields(_ change: MountChange) -> [(label: String, value: Field)] {
  [
    ("attributes", .number(change.set)), ("cleared", .number(change.clear)), ("recursively", .number(change.recursiveSet)),
    ("cleared recursively", .number(change.recursiveClear)), ("propagation", .number(change.propagation)),
  ]
}

private func texts(_ ranges: [IDRange]) -> [String] { ranges.map { "\($0.inside) \($0.outside) \($0.count)" } }

private func octal(_ number: UInt64) -> String {
  var digits = ""
  var rest = number
  repeat {
    digits = "\(rest % 8)" + digits
    rest /= 8
  } while rest > 0
  return "0" + digits
}

// SPDX-License-Identifier: Apache-2.0

/// A value of an operation, as it is encoded and printed.
enum Field: Equatable {
  case number(UInt64)
  case text(String)
  case bytes([UInt8])
  case list([String])
}

/// Everything that encoding and printing need to know of an operation: its code on the wire (which never
/// changes its meaning), its name, and its labelled fields in order.
struct Shape {
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
  var shape: Shape {
    switch self {
    case .cgroup(let path): Shape(1, "join cgroup", [("path", .text(path))])
    case .userNamespace(let first, let count):
      Shape(2, "new user namespace", [("first", .number(UInt64(first))), ("count", .number(UInt64(count)))])
    case .namespaces(let flags): Shape(3, "new namespaces", [("flags", .number(flags))])
    case .layer(let path): Shape(4, "image layer", [("path", .text(path))])
    case .root(let bytes, let inodes):
      Shape(5, "overlay root", [("scratch", .number(bytes)), ("inodes", .number(inodes))])
    case .directory(let path, let mode, let uid, let gid):
      Shape(
        6, "directory",
        [
          ("path", .text(path)), ("mode", .number(UInt64(mode))), ("uid", .number(UInt64(uid))),
          ("gid", .number(UInt64(gid))),
        ])
    case .bind(let source, let target, let attributes, let ids):
      Shape(
        7, "bind",
        [
          ("source", .text(source)), ("target", .text(target)), ("attributes", .number(attributes)),
          ("mapped", .number(ids == nil ? 0 : 1)), ("from uid", .number(UInt64(ids?.fromUID ?? 0))),
          ("from gid", .number(UInt64(ids?.fromGID ?? 0))), ("to uid", .number(UInt64(ids?.toUID ?? 0))),
          ("to gid", .number(UInt64(ids?.toGID ?? 0))),
        ])
    case .secrets(let target, let bytes):
      Shape(8, "secrets", [("target", .text(target)), ("bytes", .number(bytes))])
    case .proc: Shape(9, "mount proc")
    case .sysfs: Shape(10, "mount sysfs")
    case .cgroupFileSystem(let hierarchies): Shape(11, "mount cgroup", [("hierarchies", .list(hierarchies))])
    case .tmpfs(let target, let bytes, let inodes, let mode, let attributes):
      Shape(
        12, "mount tmpfs",
        [
          ("target", .text(target)), ("bytes", .number(bytes)), ("inodes", .number(inodes)),
          ("mode", .number(UInt64(mode))), ("attributes", .number(attributes)),
        ])
    case .device(let path, let major, let minor):
      Shape(
        13, "device",
        [("path", .text(path)), ("major", .number(UInt64(major))), ("minor", .number(UInt64(minor)))])
    case .devpts: Shape(14, "mount devpts")
    case .mqueue: Shape(15, "mount mqueue")
    case .symlink(let path, let target): Shape(16, "symlink", [("path", .text(path)), ("target", .text(target))])
    case .file(let path, let mode, let content):
      Shape(17, "file", [("path", .text(path)), ("mode", .number(UInt64(mode))), ("content", .bytes(content))])
    case .mask(let path): Shape(18, "mask", [("path", .text(path))])
    case .readOnly(let path): Shape(19, "make read-only", [("path", .text(path))])
    case .pivotRoot: Shape(20, "pivot root")
    case .hostname(let name): Shape(21, "hostname", [("name", .text(name))])
    case .sysctl(let key, let value): Shape(22, "sysctl", [("key", .text(key)), ("value", .text(value))])
    case .resourceLimit(let resource, let soft, let hard):
      Shape(
        23, "rlimit",
        [("resource", .number(UInt64(resource))), ("soft", .number(soft)), ("hard", .number(hard))])
    case .outOfMemoryScore(let score): Shape(24, "oom score", [("score", .number(UInt64(score)))])
    case .sessionKeyring: Shape(25, "new session keyring")
    case .cgroupNamespace: Shape(26, "new cgroup namespace")
    case .awaitStart: Shape(27, "await start")
    case .capabilities: Shape(28, "drop all capabilities")
    case .user(let uid, let gid, let groups, let mask):
      Shape(
        29, "become user",
        [
          ("uid", .number(UInt64(uid))), ("gid", .number(UInt64(gid))), ("groups", .list(groups.map { "\($0)" })),
          ("mask", .number(UInt64(mask))),
        ])
    case .undumpable: Shape(30, "become undumpable")
    case .noNewPrivileges: Shape(31, "no new privileges")
    case .seccomp(let program): Shape(32, "load seccomp filter", [("program", .bytes(program))])
    case .log(let segmentBytes, let segments, let rate):
      Shape(
        33, "keep output",
        [("segment", .number(segmentBytes)), ("segments", .number(UInt64(segments))), ("rate", .number(rate))])
    case .execute(let arguments, let environment, let directory):
      Shape(
        34, "execute",
        [("arguments", .list(arguments)), ("environment", .list(environment)), ("directory", .text(directory))])
    }
  }

  /// The operation's name in errors and in `carrel plan`.
  package var name: String { shape.name }

  /// One line for people. Modes are octal; contents are shown by their length.
  package var description: String {
    let shape = shape
    var line = shape.name
    for (label, value) in shape.fields {
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

private func octal(_ number: UInt64) -> String {
  var digits = ""
  var rest = number
  repeat {
    digits = "\(rest % 8)" + digits
    rest /= 8
  } while rest > 0
  return "0" + digits
}

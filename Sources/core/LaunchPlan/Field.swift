// SPDX-License-Identifier: Apache-2.0

/// The value of a field, for encoding and printing.
enum Field: Equatable {
  case number(UInt64)
  case text(String)
  case bytes([UInt8])
  case list([String])
}

/// Passes the fields of an operation, in order: into a list, which is encoded or printed, or from bytes.
struct FieldCoder {
  /// The fields passed to the list.
  private(set) var fields: [(label: String, value: Field)] = []
  /// The number of fields passed.
  private(set) var count = 0
  private(set) var reader = Reader([])
  private let isReading: Bool

  /// Collects the fields.
  init() { isReading = false }

  /// Reads the fields.
  init(reading reader: Reader) {
    self.reader = reader
    isReading = true
  }

  private mutating func collects(_ label: String, _ value: Field) -> Bool {
    count += 1
    if !isReading { fields.append((label, value)) }
    return !isReading
  }

  mutating func number(_ label: String, _ value: inout UInt64) throws(PlanError) {
    if !collects(label, .number(value)) { value = try reader.number() }
  }

  mutating func number(_ label: String, _ value: inout UInt32) throws(PlanError) {
    if !collects(label, .number(UInt64(value))) { value = try reader.number32() }
  }

  mutating func number(_ label: String, _ value: inout Int32) throws(PlanError) {
    if !collects(label, .number(UInt64(bitPattern: Int64(value)))) { value = try reader.signed32() }
  }

  mutating func flag(_ label: String, _ value: inout Bool) throws(PlanError) {
    if !collects(label, .number(value ? 1 : 0)) { value = try reader.number() != 0 }
  }

  mutating func text(_ label: String, _ value: inout String) throws(PlanError) {
    if !collects(label, .text(value)) { value = try reader.text() }
  }

  mutating func bytes(_ label: String, _ value: inout [UInt8]) throws(PlanError) {
    if !collects(label, .bytes(value)) { value = try reader.content() }
  }

  mutating func list(_ label: String, _ value: inout [String]) throws(PlanError) {
    if !collects(label, .list(value)) { value = try reader.list() }
  }

  mutating func ranges(_ label: String, _ value: inout [IDRange]) throws(PlanError) {
    if !collects(label, .list(value.map { "\($0.inside) \($0.outside) \($0.count)" })) { value = try reader.ranges() }
  }

  mutating func ids(_ label: String, _ value: inout [UInt32]) throws(PlanError) {
    if collects(label, .list(value.map { "\($0)" })) { return }
    value = []
    for text in try reader.list() {
      guard let id = UInt32(text) else { throw reader.error(.numberOutOfRange) }
      value.append(id)
    }
  }

  mutating func node(
    _ path: inout String, _ mode: inout UInt32, _ major: inout UInt32, _ minor: inout UInt32, _ uid: inout UInt32, _ gid: inout UInt32
  ) throws(PlanError) {
    try text("path", &path)
    try number("mode", &mode)
    try number("major", &major)
    try number("minor", &minor)
    try number("uid", &uid)
    try number("gid", &gid)
  }

  mutating func change(_ value: inout MountChange) throws(PlanError) {
    try number("attributes", &value.set)
    try number("cleared", &value.clear)
    try number("recursively", &value.recursiveSet)
    try number("cleared recursively", &value.recursiveClear)
    try number("propagation", &value.propagation)
  }
}

extension Operation {
  /// Passes the fields of the operation, in the order of the encoding: the one definition for encoding, decoding and printing.
  mutating func code(_ coder: inout FieldCoder) throws(PlanError) {
    switch self {
    case .cgroup(var path):
      try coder.text("path", &path)
      self = .cgroup(path: path)
    case .userNamespace(var owner, var uids, var gids):
      try coder.number("owner", &owner)
      try coder.ranges("uids", &uids)
      try coder.ranges("gids", &gids)
      self = .userNamespace(owner: owner, uids: uids, gids: gids)
    case .namespaces(var flags):
      try coder.number("flags", &flags)
      self = .namespaces(flags)
    case .joinNamespace(var kind, var path):
      try coder.number("kind", &kind)
      try coder.text("path", &path)
      self = .joinNamespace(kind: kind, path: path)
    case .layer(var path):
      try coder.text("path", &path)
      self = .layer(path: path)
    case .root(var bytes, var inodes):
      try coder.number("scratch", &bytes)
      try coder.number("inodes", &inodes)
      self = .root(scratchBytes: bytes, scratchInodes: inodes)
    case .rootDirectory(var path):
      try coder.text("path", &path)
      self = .rootDirectory(path: path)
    case .attributes(var path, var change):
      try coder.text("path", &path)
      try coder.change(&change)
      self = .attributes(path: path, change: change)
    case .workingDirectory(var path):
      try coder.text("path", &path)
      self = .workingDirectory(path: path)
    case .directory(var path, var mode, var uid, var gid):
      try coder.text("path", &path)
      try coder.number("mode", &mode)
      try coder.number("uid", &uid)
      try coder.number("gid", &gid)
      self = .directory(path: path, mode: mode, uid: uid, gid: gid)
    case .bind(var source, var target, var options):
      try coder.text("source", &source)
      try coder.text("target", &target)
      try coder.change(&options.change)
      try coder.flag("recursive", &options.recursive)
      try coder.flag("follows", &options.followsSource)
      try coder.ranges("uids", &options.uids)
      try coder.ranges("gids", &options.gids)
      try coder.flag("maps recursively", &options.mapsRecursively)
      self = .bind(source: source, target: target, options: options)
    case .secrets(var target, var bytes):
      try coder.text("target", &target)
      try coder.number("bytes", &bytes)
      self = .secrets(target: target, bytes: bytes)
    case .fileSystem(var type, var source, var target, var options, var change, var copyUp):
      try coder.text("type", &type)
      try coder.text("source", &source)
      try coder.text("target", &target)
      try coder.list("options", &options)
      try coder.change(&change)
      try coder.flag("copy up", &copyUp)
      self = .fileSystem(type: type, source: source, target: target, options: options, change: change, copyUp: copyUp)
    case .cgroupFileSystem(var hierarchies, var target, var attributes):
      try coder.list("hierarchies", &hierarchies)
      try coder.text("target", &target)
      try coder.number("attributes", &attributes)
      self = .cgroupFileSystem(hierarchies: hierarchies, target: target, attributes: attributes)
    case .device(var path, var major, var minor):
      try coder.text("path", &path)
      try coder.number("major", &major)
      try coder.number("minor", &minor)
      self = .device(path: path, major: major, minor: minor)
    case .node(var path, var mode, var major, var minor, var uid, var gid):
      try coder.node(&path, &mode, &major, &minor, &uid, &gid)
      self = .node(path: path, mode: mode, major: major, minor: minor, uid: uid, gid: gid)
    case .outerNode(var path, var mode, var major, var minor, var uid, var gid):
      try coder.node(&path, &mode, &major, &minor, &uid, &gid)
      self = .outerNode(path: path, mode: mode, major: major, minor: minor, uid: uid, gid: gid)
    case .symlink(var path, var target):
      try coder.text("path", &path)
      try coder.text("target", &target)
      self = .symlink(path: path, target: target)
    case .file(var path, var mode, var content):
      try coder.text("path", &path)
      try coder.number("mode", &mode)
      try coder.bytes("content", &content)
      self = .file(path: path, mode: mode, content: content)
    case .mask(var path):
      try coder.text("path", &path)
      self = .mask(path: path)
    case .readOnly(var path):
      try coder.text("path", &path)
      self = .readOnly(path: path)
    case .hostname(var name):
      try coder.text("name", &name)
      self = .hostname(name)
    case .domainname(var name):
      try coder.text("name", &name)
      self = .domainname(name)
    case .sysctl(var key, var value):
      try coder.text("key", &key)
      try coder.text("value", &value)
      self = .sysctl(key: key, value: value)
    case .resourceLimit(var resource, var soft, var hard, var strict):
      try coder.number("resource", &resource)
      try coder.number("soft", &soft)
      try coder.number("hard", &hard)
      try coder.flag("strict", &strict)
      self = .resourceLimit(resource: resource, soft: soft, hard: hard, strict: strict)
    case .outOfMemoryScore(var score):
      try coder.number("score", &score)
      self = .outOfMemoryScore(score)
    case .personality(var persona):
      try coder.number("persona", &persona)
      self = .personality(persona)
    case .timeOffsets(var offsets):
      try coder.list("offsets", &offsets)
      self = .timeOffsets(offsets)
    case .hook(var arguments, var environment, var seconds, var input):
      try coder.list("arguments", &arguments)
      try coder.list("environment", &environment)
      try coder.number("seconds", &seconds)
      try coder.list("input", &input)
      self = .hook(arguments: arguments, environment: environment, seconds: seconds, input: input)
    case .terminal(var socket, var rows, var columns):
      try coder.text("socket", &socket)
      try coder.number("rows", &rows)
      try coder.number("columns", &columns)
      self = .terminal(socket: socket, rows: rows, columns: columns)
    case .user(var uid, var gid, var groups, var mask, var sets):
      try coder.number("uid", &uid)
      try coder.number("gid", &gid)
      try coder.ids("groups", &groups)
      try coder.number("mask", &mask)
      try coder.number("bounding", &sets.bounding)
      try coder.number("effective", &sets.effective)
      try coder.number("permitted", &sets.permitted)
      try coder.number("inheritable", &sets.inheritable)
      try coder.number("ambient", &sets.ambient)
      self = .user(uid: uid, gid: gid, groups: groups, mask: mask, capabilities: sets)
    case .label(var file, var text):
      try coder.text("file", &file)
      try coder.text("text", &text)
      self = .label(file: file, text: text)
    case .scheduler(var scheduler):
      try coder.number("policy", &scheduler.policy)
      try coder.number("flags", &scheduler.flags)
      try coder.number("nice", &scheduler.nice)
      try coder.number("priority", &scheduler.priority)
      try coder.number("runtime", &scheduler.runtime)
      try coder.number("deadline", &scheduler.deadline)
      try coder.number("period", &scheduler.period)
      self = .scheduler(scheduler)
    case .ioPriority(var value):
      try coder.number("value", &value)
      self = .ioPriority(value)
    case .cpuAffinity(var mask):
      try coder.bytes("mask", &mask)
      self = .cpuAffinity(mask)
    case .seccompListener(var socket, var state):
      try coder.text("socket", &socket)
      try coder.list("state", &state)
      self = .seccompListener(socket: socket, state: state)
    case .seccomp(var program, var flags):
      try coder.bytes("program", &program)
      try coder.number("flags", &flags)
      self = .seccomp(program: program, flags: flags)
    case .log(var segment, var segments, var rate):
      try coder.number("segment", &segment)
      try coder.number("segments", &segments)
      try coder.number("rate", &rate)
      self = .log(segmentBytes: segment, segments: segments, bytesPerSecond: rate)
    case .execute(var arguments, var environment, var directory):
      try coder.list("arguments", &arguments)
      try coder.list("environment", &environment)
      try coder.text("directory", &directory)
      self = .execute(arguments: arguments, environment: environment, directory: directory)
    case .fileMask(var mask):
      try coder.number("mask", &mask)
      self = .fileMask(mask)
    case .closeDescriptors(var first):
      try coder.number("from", &first)
      self = .closeDescriptors(from: first)
    case .pivotRoot, .sessionKeyring, .cgroupNamespace, .rendezvous, .awaitStart, .undumpable, .noNewPrivileges, .namespaceRoot,
      .slaveMounts, .followSymlinks:
      break
    }
  }

  /// The labelled fields, in the order of the encoding.
  var fields: [(label: String, value: Field)] {
    var (coder, copy) = (FieldCoder(), self)
    // Collecting does not throw.
    do throws(PlanError) { try copy.code(&coder) } catch {}
    return coder.fields
  }

  /// The operation's name in errors and in `carrel plan`.
  package var name: String { kind.definition.name }

  /// A line for people. Modes are octal; of contents only the length is shown.
  package var description: String {
    var line = name
    for (label, value) in fields {
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

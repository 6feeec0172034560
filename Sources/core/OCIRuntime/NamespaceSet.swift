// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Linux
#endif

/// The namespaces of a container: new ones, and existing ones that it joins (config-linux.md, "Namespaces").
struct NamespaceSet {
  private(set) var made: Namespaces = []
  private(set) var joined: [(kind: Namespaces, path: String)] = []
  private(set) var uids: [IDRange] = []
  private(set) var gids: [IDRange] = []
  private(set) var timeOffsets: [String] = []

  static let kinds: [(name: String, kind: Namespaces, file: String)] = [
    ("user", .user, "user"), ("mount", .mount, "mnt"), ("pid", .pid, "pid"), ("network", .network, "net"), ("ipc", .ipc, "ipc"),
    ("uts", .uts, "uts"), ("cgroup", .cgroup, "cgroup"), ("time", .time, "time"),
  ]

  init(_ linux: JSON) throws(RuntimeError) {
    for entry in try linux.objects("namespaces") {
      let name = try entry.string("type") ?? ""
      guard let kind = NamespaceSet.kinds.first(where: { $0.name == name })?.kind else {
        throw entry.error("type", "\(name) is not a kind of namespace")
      }
      guard !has(kind) else { throw entry.error("type", "\(name) occurs twice") }
      let path = try entry.string("path") ?? ""
      guard !path.isEmpty else {
        made.insert(kind)
        continue
      }
      guard path.utf8.first == UInt8(ascii: "/") else { throw entry.error("path", "expected an absolute path") }
      joined.append((kind, path))
    }
    guard made.contains(.mount) else { throw linux.error("namespaces", "a new mount namespace is needed") }
    uids = try MountReader.ranges(linux, "uidMappings")
    gids = try MountReader.ranges(linux, "gidMappings")
    if made.contains(.user) {
      guard !uids.isEmpty, !gids.isEmpty else { throw linux.error("uidMappings", "a user namespace needs uidMappings and gidMappings") }
    } else if !has(.user), !uids.isEmpty || !gids.isEmpty {
      throw linux.error("uidMappings", "there is no user namespace to map")
    }
    try readTimeOffsets(linux)
  }

  private mutating func readTimeOffsets(_ linux: JSON) throws(RuntimeError) {
    guard let offsets = try linux.object("timeOffsets") else { return }
    guard made.contains(.time) else { throw linux.error("timeOffsets", "there is no new time namespace") }
    for clock in offsets.names {
      guard clock == "monotonic" || clock == "boottime", let offset = try offsets.object(clock) else {
        throw offsets.error(clock, "expected monotonic or boottime with an object")
      }
      let nanoseconds = try offset.number32("nanosecs") ?? 0
      guard nanoseconds < 1_000_000_000 else { throw offset.error("nanosecs", "expected less than a second") }
      timeOffsets.append("\(clock) \(try offset.signed("secs") ?? 0) \(nanoseconds)")
    }
  }

  func has(_ kind: Namespaces) -> Bool { made.contains(kind) || joined.contains { $0.kind == kind } }

  /// True if the container's root is not the host's root.
  var isMapped: Bool { has(.user) }

  /// Returns the operations that create and join them, and that join these cgroups. The child enters the cgroup and time namespaces
  /// itself, after it has joined the cgroups.
  func operations(joining cgroups: [Operation]) -> [Operation] {
    var steps: [Operation] = []
    if made.contains(.user) { steps.append(.userNamespace(owner: 0, uids: uids, gids: gids)) }
    let cloned = made.subtracting([.user, .cgroup, .time])
    steps.append(.namespaces(cloned.rawValue))
    let joins = joined.map { Operation.joinNamespace(kind: $0.kind.rawValue, path: $0.path) }
    return steps + NamespaceSet.entering(joins, cgroups, isMapped: isMapped, ownsMounts: made.contains(.mount))
  }

  /// Returns the operations of a process that joins namespaces and cgroups. `isMapped`: it is in a user namespace other than the host's.
  static func entering(_ joins: [Operation], _ cgroups: [Operation], isMapped: Bool, ownsMounts: Bool) -> [Operation] {
    var (steps, last): ([Operation], [Operation]) = ([], [])
    for join in joins {
      if case .joinNamespace(Namespaces.cgroup.rawValue, _) = join { last.append(join) } else { steps.append(join) }
    }
    if isMapped { steps.append(.namespaceRoot) }
    if ownsMounts { steps.append(.slaveMounts) }
    return steps + [.fileMask(0)] + cgroups + last
  }
}

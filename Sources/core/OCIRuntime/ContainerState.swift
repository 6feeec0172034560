// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import Linux
  internal import Procfs
#endif

/// The status of a container (runtime.md, "State").
package enum ContainerStatus: String, Sendable {
  case creating, created, running, paused, stopped
}

/// The stored state of a container: `<root>/<id>/state.json`, with the members that the runtime-spec prescribes and those that this
/// runtime needs.
struct ContainerState {
  let id: String
  let bundle: String
  let version: String
  let annotations: [(key: String, value: String)]
  /// RFC 3339, UTC.
  let created: String
  var pid: Int32 = 0
  /// The start time of that process, in clock ticks since boot: the pid alone could have been reused.
  var processStart: UInt64 = 0
  var cgroup: Cgroup?
  /// True if the cgroup had other processes before; those must not be killed with the container.
  var sharesCgroup = false
  /// The systemd scope of the cgroup; empty if there is none.
  let scope: String

  init(id: String, configuration: Configuration, cgroup: Cgroup?, scope: String) {
    self.scope = scope
    self.id = id
    bundle = configuration.bundle
    version = configuration.version
    annotations = configuration.annotations
    created = Timestamp.now
    self.cgroup = cgroup
  }

  init(parsing bytes: [UInt8]) throws(RuntimeError) {
    let json = try JSON(parsing: bytes, name: "state.json")
    id = try json.string("id") ?? ""
    bundle = try json.string("bundle") ?? ""
    version = try json.string("ociVersion") ?? ""
    annotations = try json.object("annotations")?.stringMembers() ?? []
    created = try json.string("created") ?? ""
    pid = Int32(clamping: try json.signed("pid") ?? 0)
    processStart = try json.unsigned("processStart") ?? 0
    scope = try json.string("scope") ?? ""
    sharesCgroup = try json.bool("sharesCgroup") ?? false
    cgroup =
      if let place = try json.object("cgroup"), let layout = CgroupLayout(rawValue: try place.string("layout") ?? ""),
        let path = try place.string("path"), !path.isEmpty
      { Cgroup(layout: layout, path: path, controllers: try place.strings("controllers")) } else { nil }
  }

  func encoded() -> String {
    var members = specified(pid: .number(Int64(pid)), status: .created)
    members.append(("created", .string(created)))
    members.append(("processStart", .unsigned(processStart)))
    if !scope.isEmpty { members.append(("scope", .string(scope))) }
    if sharesCgroup { members.append(("sharesCgroup", .bool(true))) }
    if let cgroup {
      let place: [(key: String, value: JSONText)] = [
        ("layout", .string(cgroup.layout.rawValue)), ("path", .string(cgroup.path)),
        ("controllers", .array(cgroup.controllers.map { .string($0) })),
      ]
      members.append(("cgroup", .object(place)))
    }
    return JSONText.object(members).encoded
  }

  private func specified(pid: JSONText, status: ContainerStatus) -> [(key: String, value: JSONText)] {
    [
      ("ociVersion", .string(version)), ("id", .string(id)), ("status", .string(status.rawValue)), ("pid", pid),
      ("bundle", .string(bundle)), ("annotations", .object(annotations.map { ($0.key, .string($0.value)) })),
    ]
  }

  /// Returns the state as `state` prints it.
  func text(_ status: ContainerStatus) -> String {
    let alive = status != .stopped
    return JSONText.object(
      specified(pid: .number(alive ? Int64(pid) : 0), status: status) + [("created", .string(created))]
    ).encoded
  }

  /// Returns the state for hooks, in two parts around the pid, which is not known when a plan is made.
  func parts(_ status: ContainerStatus) -> [String] {
    let rest = JSONText.object(
      [("bundle", .string(bundle)), ("annotations", .object(annotations.map { ($0.key, .string($0.value)) }))]
    ).encoded
    let head = JSONText.object([("ociVersion", .string(version)), ("id", .string(id)), ("status", .string(status.rawValue))]).encoded
    return [String(head.dropLast()) + ",\"pid\":", "," + String(rest.dropFirst())]
  }

  /// Opens the first process if it lives; the pidfd cannot refer to another process later.
  func process() -> Handle? {
    guard pid > 0 else { return nil }
    do throws(Errno) {
      let handle = Handle(try Process.open(pid: pid))
      guard let stat = ProcessStat.read(pid), stat.start == processStart, !stat.isDead else { return nil }
      return handle
    } catch {
      return nil
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import LaunchPlan
#endif

/// `linux.resources` (config-linux.md, "Control groups"), and the file that `update --resources` reads.
enum ResourcesReader {
  static func read(_ json: JSON) throws(RuntimeError) -> Resources {
    var resources = Resources()
    if let memory = try json.object("memory") { try read(memory: memory, into: &resources) }
    if let cpu = try json.object("cpu") { try read(cpu: cpu, into: &resources) }
    if let pids = try json.object("pids") { resources.pids = try pids.signed("limit") }
    if let block = try json.object("blockIO") { try read(block: block, into: &resources) }
    for page in try json.objects("hugepageLimits") {
      let size = try page.string("pageSize") ?? ""
      // The kernel's file names have a number and KB, MB or GB.
      guard !size.isEmpty, size.utf8.allSatisfy({ (0x30...0x39).contains($0) || (0x41...0x5A).contains($0) }) else {
        throw page.error("pageSize", "expected a size such as 2MB, found \(size)")
      }
      resources.hugePages.append((size, try page.unsigned("limit") ?? 0))
    }
    if let network = try json.object("network") {
      resources.networkClass = try network.number32("classID")
      for entry in try network.objects("priorities") {
        resources.networkPriorities.append((try entry.string("name") ?? "", try entry.number32("priority") ?? 0))
      }
    }
    if let rdma = try json.object("rdma") {
      for device in rdma.names {
        guard let limits = try rdma.object(device) else { continue }
        var text = device
        if let handles = try limits.number32("hcaHandles") { text += " hca_handle=\(handles)" }
        if let objects = try limits.number32("hcaObjects") { text += " hca_object=\(objects)" }
        resources.rdma.append(text)
      }
    }
    if let unified = try json.object("unified") {
      for (file, text) in try unified.stringMembers() {
        guard !file.utf8.contains(UInt8(ascii: "/")), file.utf8.contains(UInt8(ascii: ".")), !file.utf8.starts(with: "cgroup.".utf8) else {
          throw unified.error(file, "is not a file of a controller")
        }
        resources.unified.append((file, text))
      }
    }
    return resources
  }

  private static func read(memory: JSON, into resources: inout Resources) throws(RuntimeError) {
    resources.memory = try memory.signed("limit")
    resources.memoryAndSwap = try memory.signed("swap")
    resources.memoryReservation = try memory.signed("reservation")
    resources.swappiness = try memory.unsigned("swappiness")
    resources.disablesOutOfMemoryKiller = try memory.bool("disableOOMKiller") ?? false
    if let swappiness = resources.swappiness, swappiness > 100 { throw memory.error("swappiness", "expected 0 to 100") }
    if let both = resources.memoryAndSwap, both >= 0, let limit = resources.memory, both < limit {
      throw memory.error("swap", "counts memory and swap together: expected at least the limit of \(limit)")
    }
    // These have no effect since Linux 5.11 and 5.7; the runtime-spec permits a runtime to ignore them.
    for name in ["kernel", "kernelTCP"] { _ = try memory.signed(name) }
  }

  private static func read(cpu: JSON, into resources: inout Resources) throws(RuntimeError) {
    resources.cpuShares = try cpu.unsigned("shares")
    resources.cpuQuota = try cpu.signed("quota")
    resources.cpuPeriod = try cpu.unsigned("period").flatMap { $0 == 0 ? nil : $0 }
    resources.cpuBurst = try cpu.unsigned("burst")
    resources.cpuIdle = try cpu.signed("idle")
    resources.cpus = try cpu.string("cpus").flatMap { $0.isEmpty ? nil : $0 }
    resources.memoryNodes = try cpu.string("mems").flatMap { $0.isEmpty ? nil : $0 }
    resources.realtimePeriod = try cpu.unsigned("realtimePeriod").flatMap { $0 == 0 ? nil : $0 }
    resources.realtimeRuntime = try cpu.signed("realtimeRuntime").flatMap { $0 == 0 ? nil : $0 }
  }

  private static func read(block: JSON, into resources: inout Resources) throws(RuntimeError) {
    resources.blockWeight = try block.unsigned("weight")
    if let leaf = try block.unsigned("leafWeight"), leaf != 0 {
      throw block.error("leafWeight", "not supported (no such file since Linux 5.0)")
    }
    for entry in try block.objects("weightDevice") {
      if let leaf = try entry.unsigned("leafWeight"), leaf != 0 {
        throw entry.error("leafWeight", "not supported (no such file since Linux 5.0)")
      }
      guard let weight = try entry.unsigned("weight") else { continue }
      resources.blockWeights.append("\(try entry.number32("major") ?? 0):\(try entry.number32("minor") ?? 0) \(weight)")
    }
    let kinds: [(String, Resources.BlockThrottle.Kind)] = [
      ("throttleReadBpsDevice", .readBytes), ("throttleWriteBpsDevice", .writeBytes), ("throttleReadIOPSDevice", .readOperations),
      ("throttleWriteIOPSDevice", .writeOperations),
    ]
    for (name, kind) in kinds {
      for entry in try block.objects(name) {
        let device = "\(try entry.number32("major") ?? 0):\(try entry.number32("minor") ?? 0)"
        resources.blockThrottles.append(Resources.BlockThrottle(kind: kind, device: device, rate: try entry.unsigned("rate") ?? 0))
      }
    }
  }

  /// Returns the device rules: those of the configuration, then the devices that every container may use (config-linux.md, "Default
  /// Devices"), and making any node, which does not open it.
  static func deviceRules(_ resources: JSON?) throws(RuntimeError) -> [DeviceRule] {
    var rules = [DeviceRule(allows: false, kind: .all, major: nil, minor: nil, access: "rwm")]
    for entry in try resources?.objects("devices") ?? [] {
      let kind: DeviceRule.Kind
      switch try entry.string("type") ?? "a" {
      case "a", "": kind = .all
      case "c", "u": kind = .character
      case "b": kind = .block
      default: throw entry.error("type", "expected a, b or c")
      }
      let access = try entry.string("access") ?? "rwm"
      guard !access.isEmpty, access.utf8.allSatisfy({ "rwm".utf8.contains($0) }) else {
        throw entry.error("access", "expected some of rwm")
      }
      rules.append(
        DeviceRule(
          allows: try entry.bool("allow") ?? false, kind: kind, major: try number(entry, "major"), minor: try number(entry, "minor"),
          access: access))
    }
    rules += [
      DeviceRule(allows: true, kind: .character, major: nil, minor: nil, access: "m"),
      DeviceRule(allows: true, kind: .block, major: nil, minor: nil, access: "m"),
      // These are pseudo-terminals, the container's console and /dev/ptmx.
      DeviceRule(allows: true, kind: .character, major: 136, minor: nil, access: "rwm"),
      DeviceRule(allows: true, kind: .character, major: 5, minor: 1, access: "rwm"),
      DeviceRule(allows: true, kind: .character, major: 5, minor: 2, access: "rwm"),
    ]
    for device in Device.defaults {
      rules.append(DeviceRule(allows: true, kind: .character, major: device.major, minor: device.minor, access: "rwm"))
    }
    return rules
  }

  /// Returns a device number; nil, for any number, if it is −1 or missing.
  private static func number(_ json: JSON, _ name: String) throws(RuntimeError) -> UInt32? {
    guard let number = try json.signed(name), number != -1 else { return nil }
    guard let small = UInt32(exactly: number) else { throw json.error(name, "\(number): not a device number") }
    return small
  }
}

/// An entry of `linux.devices`, or a default device.
struct Device {
  let path: String
  /// The mode with the file type, as for mknod(2).
  let mode: UInt32
  let major: UInt32
  let minor: UInt32
  var uid: UInt32 = 0
  var gid: UInt32 = 0

  private static func node(_ name: String, _ major: UInt32, _ minor: UInt32) -> Device {
    Device(path: "/dev/" + name, mode: character | 0o666, major: major, minor: minor)
  }
  private static let character: UInt32 = 0o020000
  private static let block: UInt32 = 0o060000
  private static let fifo: UInt32 = 0o010000

  static let defaults = [
    node("null", 1, 3), node("zero", 1, 5), node("full", 1, 7), node("random", 1, 8), node("urandom", 1, 9), node("tty", 5, 0),
  ]

  private init(path: String, mode: UInt32, major: UInt32, minor: UInt32) {
    self.path = path
    self.mode = mode
    self.major = major
    self.minor = minor
  }

  init(_ json: JSON) throws(RuntimeError) {
    path = try json.string("path") ?? ""
    guard path.utf8.first == UInt8(ascii: "/"), !path.split(separator: "/").contains(where: { $0 == ".." }) else {
      throw json.error("path", "expected an absolute path")
    }
    let kind: UInt32
    switch try json.string("type") ?? "" {
    case "c", "u": kind = Device.character
    case "b": kind = Device.block
    case "p": kind = Device.fifo
    default: throw json.error("type", "expected c, b, u or p")
    }
    let permissions = try json.number32("fileMode") ?? 0o666
    mode = kind | permissions & 0o7777
    major = try json.number32("major") ?? 0
    minor = try json.number32("minor") ?? 0
    uid = try ProcessSpecification.id(json, "uid") ?? 0
    gid = try ProcessSpecification.id(json, "gid") ?? 0
  }

  /// Returns the operation for the node. In a user namespace mknod(2) is not permitted: the default devices are the host's own,
  /// which any user may open; others are made outside, with the host ids of their owner inside.
  func operation(_ space: NamespaceSet) throws(RuntimeError) -> Operation {
    guard space.isMapped, mode & 0o170000 != Device.fifo else {
      return .node(path: path, mode: mode, major: major, minor: minor, uid: uid, gid: gid)
    }
    // The id map of a joined namespace is not known here.
    guard !space.uids.isEmpty, !Device.defaults.contains(where: { $0.path == path && $0.major == major && $0.minor == minor }) else {
      return .device(path: path, major: major, minor: minor)
    }
    guard let owner = space.uids.outside(uid), let group = space.gids.outside(gid) else {
      throw RuntimeError("linux.devices: \(path): uid \(uid) or gid \(gid) is not mapped")
    }
    return .outerNode(path: path, mode: mode, major: major, minor: minor, uid: owner, gid: group)
  }
}

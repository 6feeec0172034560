// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import LaunchPlan
  internal import Cgroups
  internal import Linux
#endif

/// One entry of `mounts` (runtime-spec, config.md, "Mounts"; options as in config.md, "Linux mount options").
struct MountReader {
  let target: String
  let type: String
  private(set) var source: String
  private(set) var change = MountChange()
  private(set) var data: [String] = []
  private(set) var isBind = false
  private(set) var isRecursive = false
  private(set) var copiesUp = false
  private(set) var isMapped = false
  private(set) var mapsRecursively = false
  private(set) var uids: [IDRange] = []
  private(set) var gids: [IDRange] = []

  init(_ json: JSON, bundle: String) throws(RuntimeError) {
    let destination = try json.string("destination") ?? ""
    guard !destination.isEmpty else { throw json.error("destination", "is missing") }
    // A relative destination is relative to the root, as in runc and crun.
    target = destination.utf8.first == UInt8(ascii: "/") ? destination : "/" + destination
    guard !target.split(separator: "/").contains(where: { $0 == ".." }) else {
      throw json.error("destination", "\(destination) leads upwards")
    }
    type = try json.string("type") ?? ""
    let from = try json.string("source") ?? ""
    isBind = type == "bind" || type == "rbind"
    source = from
    for option in try json.strings("options") {
      guard try read(option, json) else {
        data.append(option)
        continue
      }
    }
    if isBind {
      guard !from.isEmpty else { throw json.error("source", "is missing") }
      if from.utf8.first != UInt8(ascii: "/") { source = bundle + "/" + from }
      if let unknown = data.first { throw json.error("options", "\(unknown): not supported for a bind mount") }
    } else {
      guard !type.isEmpty else { throw json.error("type", "is missing") }
    }
    uids = try MountReader.ranges(json, "uidMappings")
    gids = try MountReader.ranges(json, "gidMappings")
    guard uids.isEmpty == gids.isEmpty else { throw json.error("uidMappings and gidMappings must be set together") }
    if !isBind && (isMapped || !uids.isEmpty) { throw json.error("uidMappings", "only a bind mount can be id-mapped") }
    if target == "/proc" && !isBind && type != "proc" { throw json.error("type", "only proc may be mounted at /proc, found \(type)") }
    if isBind && target.utf8.starts(with: "/proc/".utf8) && !MountReader.allowedBelowProc.contains(target) {
      throw json.error("destination", "\(target) is inside /proc")
    }
  }

  /// Files of /proc that lxcfs and similar programs cover; a mount elsewhere in /proc could redirect the runtime's own writes
  /// (CVE-2019-16884).
  private static let allowedBelowProc = [
    "/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime", "/proc/loadavg",
    "/proc/slabinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled", "/proc/sys/fs/binfmt_misc",
  ]

  /// Attributes by option name, and whether the option clears them.
  private static let attributes: [(name: String, bits: MountAttributes, clears: Bool)] = [
    ("ro", .readOnly, false), ("rw", .readOnly, true), ("nosuid", .noSetuid, false), ("suid", .noSetuid, true),
    ("nodev", .noDevices, false), ("dev", .noDevices, true), ("noexec", .noExec, false), ("exec", .noExec, true),
    ("nodiratime", .noDirectoryAccessTime, false), ("diratime", .noDirectoryAccessTime, true),
    ("nosymfollow", .noSymlinks, false), ("symfollow", .noSymlinks, true),
  ]
  /// Options for access times, which are the values of one field.
  private static let accessTimes: [(name: String, bits: MountAttributes)] = [
    ("noatime", .noAccessTime), ("strictatime", .strictAccessTime), ("relatime", []), ("norelatime", .strictAccessTime),
    ("atime", []), ("nostrictatime", []),
  ]
  /// MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED (mount(2)).
  static let propagations: [(name: String, bits: UInt64)] = [
    ("unbindable", 1 << 17), ("private", 1 << 18), ("slave", 1 << 19), ("shared", 1 << 20),
  ]
  static let recursive: UInt64 = 1 << 14

  /// Reads an option; returns false if it is an option of the file system itself.
  private mutating func read(_ option: String, _ json: JSON) throws(RuntimeError) -> Bool {
    switch option {
    case "bind": isBind = true
    case "rbind": (isBind, isRecursive) = (true, true)
    case "defaults": break
    case "tmpcopyup": copiesUp = true
    case "idmap": isMapped = true
    case "ridmap": (isMapped, mapsRecursively) = (true, true)
    case "remount": throw json.error("options", "remount: not supported")
    default: return readAttribute(option)
    }
    return true
  }

  private mutating func readAttribute(_ option: String) -> Bool {
    for entry in MountReader.attributes {
      if option == entry.name {
        if entry.clears { change.clear |= entry.bits.rawValue } else { change.set |= entry.bits.rawValue }
        if entry.clears { change.set &= ~entry.bits.rawValue } else { change.clear &= ~entry.bits.rawValue }
        return true
      }
      if option == "r" + entry.name {
        if entry.clears { change.recursiveClear |= entry.bits.rawValue } else { change.recursiveSet |= entry.bits.rawValue }
        return true
      }
    }
    for entry in MountReader.accessTimes {
      if option == entry.name {
        // The kernel requires that the whole field is cleared when one of its values is set.
        change.clear |= MountAttributes.accessTimes.rawValue
        change.set = change.set & ~MountAttributes.accessTimes.rawValue | entry.bits.rawValue
        return true
      }
      if option == "r" + entry.name {
        change.recursiveClear |= MountAttributes.accessTimes.rawValue
        change.recursiveSet = change.recursiveSet & ~MountAttributes.accessTimes.rawValue | entry.bits.rawValue
        return true
      }
    }
    if let bits = MountReader.propagation(option) {
      change.propagation = bits
      return true
    }
    return false
  }

  static func propagation(_ option: String) -> UInt64? {
    for entry in propagations {
      if option == entry.name { return entry.bits }
      if option == "r" + entry.name { return entry.bits | recursive }
    }
    return nil
  }

  static func ranges(_ json: JSON, _ name: String) throws(RuntimeError) -> [IDRange] {
    var ranges: [IDRange] = []
    for entry in try json.objects(name) {
      guard let inside = try entry.number32("containerID"), let outside = try entry.number32("hostID"),
        let count = try entry.number32("size")
      else { throw entry.error("expected containerID, hostID and size") }
      guard count > 0, !inside.addingReportingOverflow(count).overflow, !outside.addingReportingOverflow(count).overflow else {
        throw entry.error("size", "\(count): the range must not be empty or exceed 32 bits")
      }
      ranges.append(IDRange(inside: inside, outside: outside, count: count))
    }
    return ranges
  }

  var isOfCgroups: Bool { !isBind && (type == "cgroup" || type == "cgroup2") }
  var isReadOnly: Bool { change.set & MountAttributes.readOnly.rawValue != 0 }
  /// True if the mount must become read-only last, since devices, other mounts and the working directory may have to be made in it
  /// first.
  var isSealedLast: Bool { !isBind && type == "tmpfs" && isReadOnly }

  /// Returns the operation for it. Some file systems can be mounted only by the owner of the namespace that they show; if the
  /// container has no such namespace, the host's mount is bound instead.
  func operation(_ space: NamespaceSet, label: String) -> Operation {
    var bindSource = isBind ? source : nil
    if space.isMapped {
      if type == "sysfs" && !space.has(.network) { bindSource = "/sys" }
      if type == "proc" && !space.has(.pid) { bindSource = "/proc" }
      if type == "mqueue" && !space.has(.ipc) { bindSource = "/dev/mqueue" }
    }
    guard let bindSource else {
      // Files of other file systems have their own labels.
      let context = label.isEmpty || !["tmpfs", "devpts", "mqueue"].contains(type) ? [] : ["context=" + label]
      return .fileSystem(type: type, source: source, target: target, options: data + context, change: made, copyUp: copiesUp)
    }
    var options = BindOptions(change: change)
    options.recursive = isRecursive || !isBind
    options.followsSource = true
    options.uids = isMapped && uids.isEmpty ? space.uids : uids
    options.gids = isMapped && uids.isEmpty ? space.gids : gids
    options.mapsRecursively = mapsRecursively
    return .bind(source: bindSource, target: target, options: options)
  }

  /// The attributes of a new mount, which has none to clear.
  private var made: MountChange {
    MountChange(set: isSealedLast ? change.set & ~MountAttributes.readOnly.rawValue : change.set, propagation: change.propagation)
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import Linux
#endif

/// Which cgroup a container gets (config-linux.md, "Cgroups Path").
enum CgroupPath {
  static func cgroup(_ configuration: Configuration, id: String, _ scope: SystemdScope?) throws(RuntimeError) -> Cgroup {
    let layout: CgroupLayout
    do throws(Errno) { layout = try CgroupLayout.detect() } catch { throw RuntimeError("no cgroups on this host: \(error.sentence)") }
    if let scope { return Cgroup(layout: layout, path: scope.path, controllers: hierarchies(configuration.resources, layout)) }
    let asked = try configuration.linux.string("cgroupsPath") ?? ""
    guard !asked.split(separator: "/").contains(where: { $0 == ".." || $0 == "." }) else {
      throw configuration.linux.error("cgroupsPath", "\(asked) leads upwards")
    }
    // A relative one, and none, is this runtime's choice.
    let absolute = asked.utf8.first == UInt8(ascii: "/")
    let path = (absolute ? "" : "carrel-runtime/") + asked.split(separator: "/").joined(separator: "/") + (asked.isEmpty ? id : "")
    guard !path.isEmpty else { throw configuration.linux.error("cgroupsPath", "\(asked) is the root") }
    return Cgroup(layout: layout, path: path, controllers: hierarchies(configuration.resources, layout))
  }

  /// v1: the hierarchies that account, freeze and guard devices, and those that a limit was asked for in.
  private static func hierarchies(_ resources: Resources, _ layout: CgroupLayout) -> [String] {
    if layout == .unified { return [] }
    var present: [String] = []
    for hierarchy in layout.hierarchies { for name in hierarchy.split(separator: ",") { present.append(String(name)) } }
    var wanted = CgroupLayout.controllers + ["devices", "freezer"]
    for controller in resources.controllers where !wanted.contains(controller) { wanted.append(controller) }
    return wanted.filter { present.contains($0) }
  }

  /// v2: what has to be enabled above it.
  static func controllers(_ resources: Resources, _ layout: CgroupLayout) -> [String] {
    if layout != .unified { return [] }
    var wanted = ["memory", "cpu", "pids"]
    for value in resources.values(.unified) {
      guard let name = value.file.split(separator: ".").first.map(String.init), !wanted.contains(name), name != "cgroup" else { continue }
      wanted.append(name)
    }
    return wanted
  }
}

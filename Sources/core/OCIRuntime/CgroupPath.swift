// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Cgroups
  internal import Linux
#endif

/// The choice of a container's cgroup (config-linux.md, "Cgroups Path").
enum CgroupPath {
  static func cgroup(_ configuration: Configuration, id: String, _ scope: SystemdScope?) throws(RuntimeError) -> Cgroup {
    let layout: CgroupLayout
    do throws(Errno) { layout = try CgroupLayout.detect() } catch { throw RuntimeError("/sys/fs/cgroup: not usable: \(error.sentence)") }
    if let scope { return Cgroup(layout: layout, path: scope.path, controllers: hierarchies(configuration.resources, layout)) }
    let asked = try configuration.linux.string("cgroupsPath") ?? ""
    guard !asked.split(separator: "/").contains(where: { $0 == ".." || $0 == "." }) else {
      throw configuration.linux.error("cgroupsPath", "\(asked) leads upwards")
    }
    // The runtime chooses the location of a relative path, and the path if there is none.
    let absolute = asked.utf8.first == UInt8(ascii: "/")
    let path = (absolute ? "" : "carrel-runtime/") + asked.split(separator: "/").joined(separator: "/") + (asked.isEmpty ? id : "")
    guard !path.isEmpty else { throw configuration.linux.error("cgroupsPath", "\(asked): must not be the root cgroup") }
    return Cgroup(layout: layout, path: path, controllers: hierarchies(configuration.resources, layout))
  }

  /// Returns the v1 hierarchies for accounting, freezing and devices, and those that a limit needs.
  private static func hierarchies(_ resources: Resources, _ layout: CgroupLayout) -> [String] {
    if layout == .unified { return [] }
    var present: [String] = []
    for hierarchy in layout.hierarchies { for name in hierarchy.split(separator: ",") { present.append(String(name)) } }
    var wanted = CgroupLayout.controllers + ["devices", "freezer"]
    for controller in resources.controllers where !wanted.contains(controller) { wanted.append(controller) }
    return wanted.filter { present.contains($0) }
  }

  /// Returns the v2 controllers that must be enabled in its ancestors.
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

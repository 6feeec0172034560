// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Linux

/// A limit that could not be set, or that the kernel did not take as it was written.
package struct LimitsError: Error, Sendable, CustomStringConvertible {
  package let description: String
}

/// What a workspace may use.
package struct LimitValues: Sendable {
  package let memoryBytes: UInt64
  package let milliCPUs: UInt64
  package let pids: UInt64
  package init(memoryBytes: UInt64, milliCPUs: UInt64, pids: UInt64) {
    self.memoryBytes = memoryBytes
    self.milliCPUs = milliCPUs
    self.pids = pids
  }
}

/// What a workspace uses.
package struct Usage: Sendable {
  package var memoryBytes: UInt64 = 0
  package var memoryPeakBytes: UInt64 = 0
  package var memoryLimitBytes: UInt64 = 0
  package var cpuNanoseconds: UInt64 = 0
  package var pids: UInt64 = 0
  package var pidsLimit: UInt64 = 0
  package var outOfMemoryKills: UInt64 = 0

  package init() {}
}

/// The cgroups of one workspace, in every hierarchy that the host's layout asks for.
///
/// Each launch gets cgroups of a name that was never used before: after a write to cgroup.kill, kernel 6.18
/// kills at birth what is later cloned into the same cgroup.
package struct WorkspaceCgroup: Sendable {
  private let layout: CgroupLayout
  private let name: String
  /// The parent of all workspaces, relative to each hierarchy.
  private let parent: String

  package init(layout: CgroupLayout, parent: String, name: String) {
    self.layout = layout
    self.parent = parent
    self.name = name
  }

  /// The hierarchies: "" for the unified one of a pure v2 host.
  static func hierarchies(_ layout: CgroupLayout) -> [String] {
    switch layout {
    case .unified: [""]
    case .hybrid: CgroupLayout.controllers + ["unified"]
    case .legacy: CgroupLayout.controllers
    }
  }

  private func path(_ hierarchy: String) -> String {
    CgroupLayout.root + (hierarchy.isEmpty ? "" : "/" + hierarchy) + "/" + parent + "/" + name
  }

  /// The directories to join.
  package var paths: [String] { WorkspaceCgroup.hierarchies(layout).map(path) }

  /// Where cgroup.kill, cgroup.freeze and cgroup.events of the workspace are; nil on a legacy host.
  package var unifiedPath: String? {
    switch layout {
    case .unified: path("")
    case .hybrid: path("unified")
    case .legacy: nil
    }
  }

  /// Makes the parents once, with the controllers that children need.
  package static func prepare(layout: CgroupLayout, parent: String) throws {
    for hierarchy in hierarchies(layout) {
      var path = CgroupLayout.root + (hierarchy.isEmpty ? "" : "/" + hierarchy)
      for part in parent.split(separator: "/") {
        if layout == .unified { try enableControllers(in: path) }
        path += "/" + part
        try makeFolder(path)
      }
      if layout == .unified {
        try clear(path)
        try enableControllers(in: path)
      }
    }
  }

  /// Ancestors belong to the service manager: written only where a controller is missing.
  private static func enableControllers(in path: String) throws {
    let enabled = Set(try read(path + "/cgroup.subtree_control").split(separator: " "))
    for controller in ["memory", "cpu", "pids"] where !enabled.contains(Substring(controller)) {
      try write("+" + controller, to: path + "/cgroup.subtree_control")
    }
  }

  /// A cgroup with children that have controllers may hold no process itself (cgroups(7), "no internal processes").
  /// What is there is the process that a delegating unit keeps: it moves to a child that no workspace is called as.
  private static func clear(_ path: String) throws {
    for pid in try read(path + "/cgroup.procs").split(separator: "\n") {
      try makeFolder(path + "/" + holder)
      try write(String(pid), to: path + "/" + holder + "/cgroup.procs")
    }
  }

  private static let holder = ".holder"

  package func create() throws {
    for path in paths { try WorkspaceCgroup.makeFolder(path) }
  }

  /// Writes every limit and reads each back: a kernel that rounds or ignores is found out here.
  package func apply(_ values: LimitValues) throws {
    let period: UInt64 = 100_000
    let quota = max(values.milliCPUs * period / 1000, 1000)
    if layout == .unified {
      let folder = path("")
      try set(folder + "/memory.max", "\(values.memoryBytes)", tolerance: 4096)
      // Swap is counted apart on v2: none of it, so that the limit is the limit.
      if WorkspaceCgroup.exists(folder + "/memory.swap.max") { try set(folder + "/memory.swap.max", "0") }
      // One process out of memory ends the process and not the workspace: JupyterLab outlives its kernel.
      try set(folder + "/memory.oom.group", "0")
      try set(folder + "/cpu.max", "\(quota) \(period)")
      try set(folder + "/pids.max", "\(values.pids)")
    } else {
      try set(path("memory") + "/memory.limit_in_bytes", "\(values.memoryBytes)", tolerance: 4096)
      if WorkspaceCgroup.exists(path("memory") + "/memory.memsw.limit_in_bytes") {
        try set(path("memory") + "/memory.memsw.limit_in_bytes", "\(values.memoryBytes)", tolerance: 4096)
      }
      try set(path("cpu") + "/cpu.cfs_period_us", "\(period)")
      try set(path("cpu") + "/cpu.cfs_quota_us", "\(quota)")
      try set(path("pids") + "/pids.max", "\(values.pids)")
    }
  }

  package func usage() -> Usage {
    var usage = Usage()
    if layout == .unified {
      let folder = path("")
      usage.memoryBytes = number(folder + "/memory.current")
      usage.memoryPeakBytes = number(folder + "/memory.peak")
      usage.memoryLimitBytes = number(folder + "/memory.max")
      usage.cpuNanoseconds = value("usage_usec", in: folder + "/cpu.stat") * 1000
      usage.pids = number(folder + "/pids.current")
      usage.pidsLimit = number(folder + "/pids.max")
      usage.outOfMemoryKills = value("oom_kill", in: folder + "/memory.events")
    } else {
      let memory = path("memory")
      usage.memoryBytes = number(memory + "/memory.usage_in_bytes")
      usage.memoryPeakBytes = number(memory + "/memory.max_usage_in_bytes")
      usage.memoryLimitBytes = number(memory + "/memory.limit_in_bytes")
      usage.cpuNanoseconds = number(path("cpuacct") + "/cpuacct.usage")
      usage.pids = number(path("pids") + "/pids.current")
      usage.pidsLimit = number(path("pids") + "/pids.max")
      usage.outOfMemoryKills = value("oom_kill", in: memory + "/memory.oom_control")
    }
    return usage
  }

  /// Ends whatever is still in it, for workspaces whose supervisor is gone.
  package func kill() {
    guard let unified = unifiedPath, WorkspaceCgroup.exists(unified) else {
      for line in (try? WorkspaceCgroup.read(path("pids") + "/cgroup.procs"))?.split(separator: "\n") ?? [] {
        if let pid = Int32(line) { try? Process.kill(pid, Signals.kill) }
      }
      return
    }
    try? WorkspaceCgroup.write("1", to: unified + "/cgroup.kill")
  }

  /// Removes the directories. False while a process still dies in one: try again.
  package func remove() -> Bool {
    var gone = true
    for path in paths {
      do throws(Errno) {
        try WorkspaceCgroup.removeFolder(path)
      } catch {
        if error != .noEntry { gone = false }
      }
    }
    return gone
  }

  // ------------------------------------------------------------------- files

  private func set(_ path: String, _ text: String, tolerance: UInt64 = 0) throws {
    try WorkspaceCgroup.write(text, to: path)
    let seen = try WorkspaceCgroup.read(path)
    if seen == text { return }
    if tolerance > 0, let asked = UInt64(text), let got = UInt64(seen), asked >= got, asked - got < tolerance { return }
    throw LimitsError(description: "\(path): wrote \(text), read back \(seen)")
  }

  private func number(_ path: String) -> UInt64 { UInt64((try? WorkspaceCgroup.read(path)) ?? "") ?? 0 }

  private func value(_ key: String, in path: String) -> UInt64 {
    for line in ((try? WorkspaceCgroup.read(path)) ?? "").split(separator: "\n") {
      let parts = line.split(separator: " ")
      if parts.count == 2, parts[0] == key { return UInt64(parts[1]) ?? 0 }
    }
    return 0
  }

  private static func exists(_ path: String) -> Bool { Process.exists(path) }

  private static func makeFolder(_ path: String) throws {
    do throws(Errno) {
      try Descriptor.open("/", [.path, .directory]).makeDirectory(path, mode: 0o755)
    } catch {
      if error != .exists { throw LimitsError(description: "cannot make the cgroup \(path): \(error.sentence)") }
    }
  }

  private static func removeFolder(_ path: String) throws(Errno) {
    try Descriptor.open("/", [.path, .directory]).remove(path, directory: true)
  }

  private static func write(_ text: String, to path: String) throws {
    do throws(Errno) {
      try Descriptor.open(path, [.writeOnly]).write(Array(text.utf8))
    } catch {
      throw LimitsError(description: "cannot write \(text) to \(path): \(error.sentence)")
    }
  }

  private static func read(_ path: String) throws -> String {
    var bytes = try Descriptor.open(path, [.readOnly]).readAll(limit: 1 << 20)
    while let last = bytes.last, last == 0x0A || last == 0x20 { bytes.removeLast() }
    return String(decoding: bytes, as: UTF8.self)
  }
}

extension WorkspaceCgroup {
  /// Ends and removes every cgroup below the parent that is not in `names`.
  package static func sweep(layout: CgroupLayout, parent: String, keeping names: Set<String>) {
    for hierarchy in hierarchies(layout) {
      let folder = CgroupLayout.root + (hierarchy.isEmpty ? "" : "/" + hierarchy) + "/" + parent
      for name in (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? [] where !names.contains(name) && name != holder {
        guard isDirectory(folder + "/" + name) else { continue }
        let stray = WorkspaceCgroup(layout: layout, parent: parent, name: name)
        stray.kill()
        for _ in 0..<50 where !stray.remove() { Thread.sleep(forTimeInterval: 0.02) }
      }
    }
  }

  /// Removes the parent itself where nothing is left in it.
  package static func removeParent(layout: CgroupLayout, parent: String) {
    for hierarchy in hierarchies(layout) {
      try? removeFolder(CgroupLayout.root + (hierarchy.isEmpty ? "" : "/" + hierarchy) + "/" + parent)
    }
  }

  private static func isDirectory(_ path: String) -> Bool {
    (try? Descriptor.open(path, [.path, .noFollow]).status().kind) == .directory
  }
}

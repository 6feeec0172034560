// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// A cgroup that could not be changed or read, or a value that the kernel changed when it was written.
package struct CgroupError: Error, Sendable, CustomStringConvertible {
  /// The path of the file or the cgroup.
  package let path: String
  /// What was done to it, and what is wrong.
  package let problem: String
  /// The error of the system call, if one failed.
  package let cause: Errno?

  package init(_ path: String, _ problem: String, cause: Errno? = nil) {
    self.path = path
    self.problem = problem
    self.cause = cause
  }

  package var description: String { "\(path): \(problem)\(cause.map { ": " + $0.sentence } ?? "")" }
}

/// The resource usage of a cgroup, and its limits.
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

/// One cgroup, in every hierarchy that the host's layout and its resources need.
///
/// Each launch gets cgroups with a name that was never used before: after a write to cgroup.kill, kernel 6.18 kills every process
/// that is later cloned into the same cgroup.
package struct Cgroup: Sendable {
  package let layout: CgroupLayout
  /// The path relative to the root of each hierarchy, without a leading slash.
  package let path: String
  /// The v1 controllers in whose hierarchies it exists.
  package let controllers: [String]

  package init(layout: CgroupLayout, path: String, controllers: [String] = CgroupLayout.controllers) {
    self.layout = layout
    self.path = path
    switch layout {
    case .unified: self.controllers = []
    case .hybrid: self.controllers = controllers
    // Where systemd has a v1 hierarchy of its own, it uses it to find the processes that end with a unit.
    case .legacy:
      self.controllers =
        controllers.contains("systemd") || !Process.exists(CgroupLayout.root + "/systemd/cgroup.procs")
        ? controllers : controllers + ["systemd"]
    }
  }

  private var bases: [String] {
    switch layout {
    case .unified: [CgroupLayout.root]
    case .hybrid: controllers.map { CgroupLayout.root + "/" + $0 } + [CgroupLayout.root + "/unified"]
    case .legacy: controllers.map { CgroupLayout.root + "/" + $0 }
    }
  }

  /// Returns its directory in the hierarchy of a v1 controller, or in the unified hierarchy on a v2 host.
  package func folder(_ controller: String) -> String {
    CgroupLayout.root + (layout == .unified ? "" : "/" + controller) + "/" + path
  }

  /// The directories that a process must join.
  package var paths: [String] { bases.map { $0 + "/" + path } }

  /// The directory with cgroup.kill, cgroup.freeze and cgroup.events; nil on a legacy host.
  package var unifiedPath: String? {
    switch layout {
    case .unified: CgroupLayout.root + "/" + path
    case .hybrid: CgroupLayout.root + "/unified/" + path
    case .legacy: nil
    }
  }

  // ------------------------------------------------------------- creation

  /// Creates it as the parent of other cgroups, with the controllers that those need on v2.
  package func prepare(controllers wanted: [String] = ["memory", "cpu", "pids"]) throws(CgroupError) {
    try create(controllers: wanted)
    guard layout == .unified else { return }
    let folder = CgroupLayout.root + "/" + path
    // A cgroup whose children have controllers must not contain a process itself (cgroups(7), "no internal processes"). A
    // delegating unit keeps one there: it moves to a child with a name that no workspace can have.
    for pid in try Cgroup.read(folder + "/cgroup.procs").split(separator: "\n") {
      try Cgroup.makeFolder(folder + "/" + Cgroup.holder)
      try Cgroup.write(String(pid), to: folder + "/" + Cgroup.holder + "/cgroup.procs")
    }
    try Cgroup.enable(wanted, in: folder)
  }

  /// Creates it and moves a process into it, on v2 only.
  package func adopt(_ pid: Int32) throws(CgroupError) {
    guard let unifiedPath, layout == .unified else { return }
    try create()
    try Cgroup.write("\(pid)", to: unifiedPath + "/cgroup.procs")
  }

  private static let holder = ".holder"

  /// Creates its directories and their missing parents.
  package func create(controllers wanted: [String] = []) throws(CgroupError) {
    for base in bases {
      // Usually only the last directory is missing.
      do throws(Errno) {
        try Descriptor.makeDirectory(base + "/" + path, mode: 0o755)
        if wanted.isEmpty && base != CgroupLayout.root + "/cpuset" { continue }
      } catch {
        if error == .exists && wanted.isEmpty && base != CgroupLayout.root + "/cpuset" { continue }
      }
      var folder = base
      for part in path.split(separator: "/") {
        if layout == .unified && !wanted.isEmpty { try Cgroup.enable(wanted, in: folder) }
        folder += "/" + part
        try Cgroup.makeFolder(folder)
        if base == CgroupLayout.root + "/cpuset" { try Cgroup.inherit(folder) }
      }
    }
  }

  /// Enables controllers for the children of a cgroup. It writes only what is missing, because ancestors belong to the service
  /// manager.
  private static func enable(_ controllers: [String], in folder: String) throws(CgroupError) {
    let enabled = try read(folder + "/cgroup.subtree_control").split(separator: " ")
    for controller in controllers where !enabled.contains(where: { $0 == controller }) {
      try write("+" + controller, to: folder + "/cgroup.subtree_control")
    }
  }

  /// Copies the CPUs and memory nodes of the parent: a process cannot join a v1 cpuset that has none (cpuset(7)).
  private static func inherit(_ folder: String) throws(CgroupError) {
    guard let above = folder.split(separator: "/").last.map({ String(folder.dropLast($0.count + 1)) }) else { return }
    for file in ["/cpuset.cpus", "/cpuset.mems"] where try read(folder + file).isEmpty {
      try write(try read(above + file), to: folder + file)
    }
  }

  package var exists: Bool { paths.contains { Process.exists($0) } }

  /// Returns this cgroup with further v1 controllers, after moving its processes into those hierarchies.
  package func joining(_ further: [String]) throws(CgroupError) -> Cgroup {
    let wider = Cgroup(layout: layout, path: path, controllers: controllers + further)
    let processes = processes()
    try wider.create()
    for controller in further {
      for pid in processes { try Cgroup.write("\(pid)", to: wider.folder(controller) + "/cgroup.procs") }
    }
    return wider
  }

  // ------------------------------------------------------------- limits

  /// Writes every value and reads back those that the kernel could round or ignore.
  package func apply(_ values: [CgroupValue]) throws(CgroupError) {
    for value in values {
      let file = folder(value.controller) + "/" + value.file
      if value.ifPresent && !Process.exists(file) { continue }
      guard value.isReadBack else {
        try Cgroup.write(value.text, to: file)
        continue
      }
      let seen = try Cgroup.write(value.text, readingBack: file)
      if seen == value.text { continue }
      // The kernel rounds byte values down to pages.
      if let asked = UInt64(value.text), let got = UInt64(seen), asked >= got, asked - got < 4096 { continue }
      throw CgroupError(file, "wrote \(value.text), read back \(seen)")
    }
  }

  package func usage() -> Usage {
    var usage = Usage()
    let memory = folder("memory")
    if layout == .unified {
      usage.memoryBytes = number(memory + "/memory.current")
      usage.memoryPeakBytes = number(memory + "/memory.peak")
      usage.memoryLimitBytes = number(memory + "/memory.max")
      usage.cpuNanoseconds = value("usage_usec", in: memory + "/cpu.stat") * 1000
      usage.outOfMemoryKills = value("oom_kill", in: memory + "/memory.events")
    } else {
      usage.memoryBytes = number(memory + "/memory.usage_in_bytes")
      usage.memoryPeakBytes = number(memory + "/memory.max_usage_in_bytes")
      usage.memoryLimitBytes = number(memory + "/memory.limit_in_bytes")
      usage.cpuNanoseconds = number(folder("cpuacct") + "/cpuacct.usage")
      usage.outOfMemoryKills = value("oom_kill", in: memory + "/memory.oom_control")
    }
    usage.pids = number(folder("pids") + "/pids.current")
    usage.pidsLimit = number(folder("pids") + "/pids.max")
    return usage
  }

  // ------------------------------------------------------------- processes

  /// Returns the pids of the processes in it and below it, as seen from this process's pid namespace.
  package func processes() -> [Int32] {
    var found: [Int32] = []
    if let first = paths.first { Cgroup.collect(first, into: &found) }
    return found
  }

  private static func collect(_ folder: String, into found: inout [Int32]) {
    guard let text = try? read(folder + "/cgroup.procs") else { return }
    for line in text.split(separator: "\n") { if let pid = Int32(line) { found.append(pid) } }
    for name in children(folder) { collect(folder + "/" + name, into: &found) }
  }

  /// Freezes or thaws all its processes. Throws if that takes more than 500 ms, because a process waits in the kernel for a disk, say; those
  /// that are frozen by then are thawed.
  package func freeze(_ frozen: Bool) throws(CgroupError) {
    do throws(CgroupError) {
      try requestFreeze(frozen)
    } catch {
      do throws(CgroupError) { if frozen { try requestFreeze(false) } } catch {}
      throw error
    }
  }

  private func requestFreeze(_ frozen: Bool) throws(CgroupError) {
    let isV1 = layout != .unified && controllers.contains("freezer")
    let state = isV1 ? (frozen ? "FROZEN" : "THAWED") : frozen ? "1" : "0"
    guard let group = isV1 ? folder("freezer") : unifiedPath else {
      throw CgroupError(path, "cannot be frozen: no v1 freezer, no v2 hierarchy")
    }
    for _ in 0..<500 {
      // Written again each time: on v1, processes that were forked in the meantime may have missed it.
      try Cgroup.write(state, to: group + (isV1 ? "/freezer.state" : "/cgroup.freeze"))
      if isV1 ? try Cgroup.read(group + "/freezer.state") == state : value("frozen", in: group + "/cgroup.events") == (frozen ? 1 : 0) {
        return
      }
      Clock.sleep(milliseconds: 1)
    }
    throw CgroupError(group, "not \(frozen ? "frozen" : "thawed") after 500 ms")
  }

  /// Moves a process back to the v1 freezer of this cgroup, if another program moved it to another: frozen there it could not exit.
  package func returnToFreezer(_ pid: Int32) throws(CgroupError) {
    guard layout != .unified, controllers.contains("freezer") else { return }
    try Cgroup.write("\(pid)", to: folder("freezer") + "/cgroup.procs")
  }

  package var isFrozen: Bool {
    if layout != .unified, controllers.contains("freezer") {
      return (try? Cgroup.read(folder("freezer") + "/freezer.state")).map { $0 != "THAWED" } ?? false
    }
    guard let unified = unifiedPath else { return false }
    return number(unified + "/cgroup.freeze") == 1
  }

  /// Sends a signal to every process in it.
  package func signal(_ number: Int32) {
    if number == Signals.kill, let unified = unifiedPath, Process.exists(unified + "/cgroup.kill") {
      return (try? Cgroup.write("1", to: unified + "/cgroup.kill")) ?? ()
    }
    for pid in processes() { do throws(Errno) { try Process.kill(pid, number) } catch {} }
  }

  /// Removes it with all cgroups below. Returns false while a process in it is still exiting; retry then.
  package func remove() -> Bool {
    var gone = true
    for folder in paths where !Cgroup.removeTree(folder) { gone = false }
    return gone
  }

  private static func removeTree(_ folder: String) -> Bool {
    do throws(Errno) {
      try Descriptor.removeDirectory(folder)
      return true
    } catch {
      if error == .noEntry { return true }
    }
    for name in children(folder) { _ = removeTree(folder + "/" + name) }
    do throws(Errno) {
      try Descriptor.removeDirectory(folder)
      return true
    } catch {
      return error == .noEntry
    }
  }

  private static func children(_ folder: String) -> [String] {
    var found: [String] = []
    do throws(Errno) {
      let directory = try Descriptor.open(folder, [.readOnly, .directory, .noFollow])
      for name in try directory.entries() where try directory.open(name, [.path, .noFollow]).status().kind == .directory {
        found.append(name)
      }
    } catch {}
    return found
  }

  /// Kills and removes every direct child whose name is not known; returns the names of those removed.
  @discardableResult
  package func sweep(unless isKnown: (String) -> Bool) -> Set<String> {
    var swept: Set<String> = []
    for base in bases {
      for name in Cgroup.children(base + "/" + path) where name != Cgroup.holder && !isKnown(name) {
        let stray = Cgroup(layout: layout, path: path + "/" + name, controllers: controllers)
        stray.signal(Signals.kill)
        for _ in 0..<50 where !stray.remove() { Clock.sleep(milliseconds: 20) }
        swept.insert(name)
      }
    }
    return swept
  }

  /// Removes it if it has neither processes nor children.
  package func removeIfEmpty() {
    for folder in paths { do throws(Errno) { try Descriptor.removeDirectory(folder) } catch {} }
  }

  /// Removes it and its empty parents in some hierarchies.
  package func removeUpwards(in some: [String]) {
    for controller in controllers where some.contains(controller) {
      var parts = path.split(separator: "/")
      while !parts.isEmpty {
        let above = Cgroup(layout: layout, path: parts.joined(separator: "/"), controllers: [controller])
        do throws(Errno) { try Descriptor.removeDirectory(above.folder(controller)) } catch { if error != .noEntry { break } }
        parts.removeLast()
      }
    }
  }

  // ------------------------------------------------------------------- files

  private func number(_ path: String) -> UInt64 { UInt64((try? Cgroup.read(path)) ?? "") ?? 0 }

  private func value(_ key: String, in path: String) -> UInt64 {
    for line in ((try? Cgroup.read(path)) ?? "").split(separator: "\n") {
      let parts = line.split(separator: " ")
      if parts.count == 2, parts[0] == key { return UInt64(parts[1]) ?? 0 }
    }
    return 0
  }

  private static func makeFolder(_ path: String) throws(CgroupError) {
    do throws(Errno) {
      try Descriptor.makeDirectory(path, mode: 0o755)
    } catch {
      if error != .exists { throw CgroupError(path, "cannot create the cgroup", cause: error) }
    }
  }

  private static func write(_ text: String, to path: String) throws(CgroupError) {
    do throws(Errno) {
      try Descriptor.open(path, [.writeOnly]).write(Array(text.utf8))
    } catch {
      throw CgroupError(path, "cannot write \(text)", cause: error)
    }
  }

  /// Writes a value and returns what the kernel stored.
  private static func write(_ text: String, readingBack path: String) throws(CgroupError) -> String {
    do throws(Errno) {
      let file = try Descriptor.open(path, [.readWrite])
      try file.write(Array(text.utf8))
      return line(try file.read(at: 0, upTo: 4096))
    } catch {
      throw CgroupError(path, "cannot write \(text)", cause: error)
    }
  }

  private static func line(_ bytes: [UInt8]) -> String {
    var bytes = bytes
    while let last = bytes.last, last == 0x0A || last == 0x20 { bytes.removeLast() }
    return String(decoding: bytes, as: UTF8.self)
  }

  private static func read(_ path: String) throws(CgroupError) -> String {
    do throws(Errno) {
      return line(try Descriptor.open(path, [.readOnly]).readAll(limit: 1 << 20))
    } catch {
      throw CgroupError(path, "cannot read", cause: error)
    }
  }
}

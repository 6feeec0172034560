// SPDX-License-Identifier: Apache-2.0

import Foundation
import Isolation
import LaunchPlan
import Cgroups
import Linux
import ShimProtocol
import ShimClient

/// A box to test isolation in: the default plan over a root file system of busybox, with operations changed where a
/// test wants to see a defence missing. Everything it makes it takes away again.
final class Box: Sendable {
  struct Result {
    let record: ExitRecord?
    let output: String
    let usage: Usage
  }

  let path: String
  let firstID: UInt32
  let cgroup: Cgroup

  static let available = getuid() == 0 && FileManager.default.fileExists(atPath: "/bin/busybox")
  private static let parent = "carrel-test"

  init() throws {
    let name = "box-\(UInt32.random(in: .min ... .max))"
    path = "/tmp/carrel-\(name)"
    // Above the ranges that an agent on this machine would use.
    firstID = 2_000_000_000 + UInt32.random(in: 0..<1000) * 65_536
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    let layout = try CgroupLayout.detect()
    try Cgroup(layout: layout, path: Box.parent).prepare()
    cgroup = Cgroup(layout: layout, path: Box.parent + "/" + name)
    try cgroup.create()
    try limit(Resources(memoryBytes: 64 << 20, milliCPUs: 1000, pids: 64))
    try makeRoot()
  }

  deinit {
    cgroup.signal(Signals.kill)
    for _ in 0..<50 where !cgroup.remove() { usleep(20_000) }
    try? FileManager.default.removeItem(atPath: path)
  }

  func limit(_ resources: Resources) throws { try cgroup.apply(resources.values(cgroup.layout)) }

  private func makeRoot() throws {
    for folder in ["bin", "etc", "tmp", "proc", "sys", "dev", "run", "home", "var", "data"] {
      try FileManager.default.createDirectory(atPath: "\(path)/layer/\(folder)", withIntermediateDirectories: true)
    }
    try FileManager.default.copyItem(atPath: "/bin/busybox", toPath: "\(path)/layer/bin/busybox")
    for applet in [
      "sh", "cat", "ls", "id", "unshare", "mount", "grep", "head", "yes", "sleep", "dd", "touch", "stat", "hostname", "kill", "ps", "true",
      "ln", "chmod", "wc", "tr", "readlink", "env", "ulimit", "awk",
    ] {
      try? FileManager.default.createSymbolicLink(atPath: "\(path)/layer/bin/\(applet)", withDestinationPath: "busybox")
    }
  }

  func plan(_ script: String, directory: String = "/", uid: UInt32 = 1000, seccomp: Bool = true) throws -> Plan {
    var box = SandboxSpec()
    box.cgroups = cgroup.paths
    box.cgroupHierarchies = try CgroupLayout.detect().shownHierarchies
    box.firstID = firstID
    box.uid = uid
    box.gid = uid
    box.layers = [path + "/layer"]
    box.scratchBytes = 8 << 20
    box.shmBytes = 1 << 20
    box.arguments = ["sh", "-c", script]
    box.environment = ["PATH=/bin"]
    box.directory = directory
    box.logSegmentBytes = 65_536
    box.logSegments = 3
    return PlanCompiler.compile(box, seccomp: try SeccompCompiler.compileDefaultProfile())
  }

  /// Launches, waits for the end, and returns what was written. `onStart` runs when the program does, with PID 1's pid.
  func run(_ plan: Plan, secrets: [String: String] = [:], onStart: (ShimConnection, Int32) async throws -> Void = { _, _ in }) async throws
    -> Result
  {
    let (folder, link) = try await supervisor()
    let vault = try SecretVault()
    for (name, text) in secrets {
      try await link.request(.putSecret(name: name, content: []), passing: [try vault.file(Array(text.utf8))])
    }
    try folder.write(plan)
    try link.send(.launch)
    // It outlives its tool until nobody needs what it was entrusted with; one whose launch failed may have ended by now.
    try? link.send(.release)
    for await case .state(let state) in link.reports {
      switch state {
      case .waiting: try? link.send(.start)
      case .started(let pid): try await onStart(link, pid)
      default: break
      }
    }
    return try result(folder)
  }

  /// A supervisor that waits for its plan.
  func supervisor() async throws -> (SandboxDirectory, ShimConnection) {
    try? FileManager.default.removeItem(atPath: path + "/sandbox")
    let folder = try SandboxDirectory(path: path + "/sandbox", create: true)
    try? FileManager.default.removeItem(atPath: path + "/log")
    try FileManager.default.createDirectory(atPath: path + "/log", withIntermediateDirectories: true)
    let logs = try Descriptor.open(path + "/log", [.readOnly, .directory])
    let helper = ProcessInfo.processInfo.environment["CARREL_SHIM"] ?? Box.helper
    try folder.startSupervisor("test", workspace: "box", helper: helper, logs: logs, errors: 2)
    guard case .hello(let link) = try await ShimConnection.greet(try folder.connect(), within: .seconds(10)) else {
      throw Errno.invalid
    }
    return (folder, link)
  }

  func result(_ folder: SandboxDirectory) throws -> Result {
    var output = ""
    let log = try LogReader(path: path + "/log")
    var offset: UInt64 = 0
    while let chunk = try log.read(from: offset) {
      for line in String(decoding: chunk.bytes, as: UTF8.self).split(separator: "\n") {
        let fields = line.split(separator: " ", maxSplits: 3, omittingEmptySubsequences: false)
        output += (fields.last ?? "") + (fields[2] == "F" ? "\n" : "")
      }
      offset = chunk.offset + UInt64(chunk.bytes.count)
    }
    return Result(record: try folder.exitRecord, output: output, usage: cgroup.usage())
  }

  /// The program's output, with the default plan changed by `change`.
  func output(_ script: String, uid: UInt32 = 1000, changing change: (inout [LaunchPlan.Operation]) -> Void = { _ in }) async throws
    -> String
  {
    var plan = try plan(script, uid: uid)
    change(&plan.operations)
    return try await run(plan).output
  }

  static let helper: String = {
    // Beside the test bundle, where SwiftPM puts products.
    let bundle = URL(fileURLWithPath: CommandLine.arguments[0]).deletingLastPathComponent()
    return bundle.appendingPathComponent("carrel-shim").path
  }()
}

extension [LaunchPlan.Operation] {
  mutating func without(_ names: String...) { removeAll { names.contains($0.name) } }
}

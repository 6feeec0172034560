// SPDX-License-Identifier: Apache-2.0

internal import CCap
internal import Foundation
internal import Cgroups
internal import Linux

/// The properties of this host, and what it lacks, detected once when the agent starts.
package struct NodeFacts: Sendable {
  package let name: String
  package let kernel: String
  package let bootID: String
  let layout: CgroupLayout
  package var layoutName: String { layout.rawValue }
  let shownHierarchies: [String]
  package let memoryBytes: UInt64
  package let milliCPUs: UInt64
  /// The missing capabilities and their consequences, one sentence each.
  package let degraded: [String]

  package init(name: String) throws {
    kernel = NodeFacts.line("/proc/sys/kernel/osrelease")
    bootID = NodeFacts.line("/proc/sys/kernel/random/boot_id")
    self.name = name.isEmpty ? NodeFacts.line("/proc/sys/kernel/hostname") : name
    layout = try CgroupLayout.detect()
    shownHierarchies = layout.shownHierarchies
    milliCPUs = UInt64(max(ProcessInfo.processInfo.activeProcessorCount, 1)) * 1000
    memoryBytes = ProcessInfo.processInfo.physicalMemory
    var missing: [String] = []
    for (capability, consequence) in NodeFacts.capabilities where !NodeFacts.holds(capability) {
      missing.append("no \(NodeFacts.capabilityName(capability)): \(consequence)")
    }
    if layout != .unified {
      missing.append("cgroup v2 does not carry the controllers (\(layout.rawValue)): limits are set through v1")
    }
    if layout != .unified, !FileManager.default.fileExists(atPath: CgroupLayout.root + "/memory/memory.memsw.limit_in_bytes") {
      missing.append("swap is not accounted: memory limits do not count it")
    }
    degraded = missing
  }

  private static let capabilities: [(cap_value_t, String)] = [
    (21, "nothing can be isolated"),  // CAP_SYS_ADMIN
    (12, "workspaces get no network"),  // CAP_NET_ADMIN
    (24, "hard resource limits cannot be raised above the agent's own"),  // CAP_SYS_RESOURCE
  ]

  private static func holds(_ capability: cap_value_t) -> Bool {
    guard let set = cap_get_proc() else { return false }
    defer { cap_free(UnsafeMutableRawPointer(set)) }
    var value = cap_flag_value_t(rawValue: 0)
    return cap_get_flag(set, capability, CAP_EFFECTIVE, &value) == 0 && value.rawValue == 1
  }

  private static func capabilityName(_ capability: cap_value_t) -> String {
    guard let name = cap_to_name(capability) else { return "capability \(capability)" }
    defer { cap_free(name) }
    return String(cString: name).uppercased()
  }

  private static func line(_ path: String) -> String {
    (try? String(contentsOfFile: path, encoding: .utf8))?.trimmingCharacters(in: .whitespacesAndNewlines) ?? ""
  }
}

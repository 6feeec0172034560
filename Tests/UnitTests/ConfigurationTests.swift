// SPDX-License-Identifier: Apache-2.0

@testable import Configuration
import Foundation
import Testing
import Workspaces

@testable import Agent

@Suite("The configuration") struct ConfigurationTests {
  @Test("the documented file is valid and holds the defaults") func documented() throws {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    let text = try String(contentsOf: root.appendingPathComponent("manifests/carreld.yaml"), encoding: .utf8)
    let read = try Configuration(yaml: text)
    let plain = Configuration()
    // What is not set here is decided by the size of the host.
    let policy = ResourcePolicy(hostMemoryBytes: 64 << 30, hostMilliCPUs: 8000)
    let spec = Bench.spec()
    #expect(try spec.amounts(defaults: read.defaults, policy: policy) == spec.amounts(defaults: plain.defaults, policy: policy))
    for (documented, standard) in zip(Mirror(reflecting: read).children, Mirror(reflecting: plain).children)
    where documented.label != "defaults" {
      #expect("\(documented.value)" == "\(standard.value)", "\(documented.label ?? "")")
    }
  }

  @Test(
    "what is wrong is named with its line",
    arguments: [
      ("colour: red", "colour", 1), ("state: relative", "state", 1), ("\nfirstID: 5", "firstID", 2),
      ("network: {subnet: 1.2.3.4}", "network.subnet", 1),
      ("network:\n  default: maybe", "network.default", 2), ("allowedUIDs: [x]", "allowedUIDs", 1),
      ("log: {segments: 1}", "log.segments", 1),
      ("cgroupParent: ../x", "cgroupParent", 1), ("reservedMemory: lots", "reservedMemory", 1),
    ])
  func wrong(yaml: String, path: String, line: Int) {
    #expect { try Configuration(yaml: yaml) } throws: { error in
      guard let error = error as? InvalidField else { return false }
      return (error.path == path || path.hasSuffix(error.path)) && error.line == line
    }
  }

  @Test(
    "ranges that do not fit are refused together",
    arguments: ["firstID: 3000000000\nmaxWorkspaces: 30000", "maxWorkspaces: 300\nnetwork: {subnet: 10.0.0.0/24}"])
  func ranges(yaml: String) { #expect(throws: InvalidField.self) { try Configuration(yaml: yaml) } }
}

// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import Isolation
internal import Linux
internal import Networking
package import Supervision
internal import Workspaces

/// The sandbox's link, address and name service.
package struct NetworkFeature: WorkspaceFeature {
  package static let name = "network"

  let services: NodeServices
  let driver: NetworkDriver

  func policy(_ spec: WorkspaceSpec) -> WorkspaceSpec.NetworkPolicy { spec.network ?? services.configuration.networkDefault }

  func attachment(_ record: WorkspaceRecord) -> NetworkDriver.Attachment {
    NetworkDriver.Attachment(slot: record.slot, open: policy(record.spec) == .open, alias: record.sandbox?.id ?? "")
  }

  package func connect(_ workspace: Workspace, _ sandbox: SandboxProcess) async throws(Refusal) {
    let attachment = attachment(workspace.record)
    do {
      try await services.lanes.launch.run { [driver] in
        try driver.attach(attachment, namespace: try sandbox.namespace("net"))
      }
    } catch {
      throw Refusal(.network, describe(error))
    }
  }

  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    let hostname = draft.enclosure.hostname
    draft.enclosure.hosts = Array("127.0.0.1 localhost\n::1 localhost ip6-localhost\n\(record.address) \(hostname)\n".utf8)
    draft.enclosure.resolver = resolver(record.spec)
  }

  /// The host's name servers without those that listen on its loopback, which a workspace cannot reach.
  private func resolver(_ spec: WorkspaceSpec) -> [UInt8] {
    guard policy(spec) == .open, let text = try? String(contentsOfFile: "/etc/resolv.conf", encoding: .utf8) else {
      return Array("# No name service: the network policy is \"none\".\n".utf8)
    }
    let lines = text.split(separator: "\n").filter { line in
      let fields = line.split(whereSeparator: \.isWhitespace)
      guard fields.count >= 2 else { return false }
      if fields[0] == "nameserver" { return !fields[1].hasPrefix("127.") && fields[1] != "::1" }
      return ["search", "domain", "options"].contains(fields[0])
    }
    return Array((lines.joined(separator: "\n") + "\n").utf8)
  }
}

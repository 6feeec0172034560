// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Concurrency
internal import Foundation
internal import Isolation
internal import Linux
internal import Synchronization
internal import Networking
package import ShimClient
internal import Workspaces

/// The sandbox's link, address and name service.
package struct NetworkFeature: WorkspaceFeature {
  package static let name = "network"

  let services: NodeServices
  let driver: NetworkDriver
  private let resolver = HostResolver()

  init(services: NodeServices, driver: NetworkDriver) {
    self.services = services
    self.driver = driver
  }

  package func prepare(_ workspace: Workspace) async throws(Refusal) { await readResolver() }

  func readResolver() async { _ = try? await services.lanes.launch.run { [resolver] in resolver.read() } }

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
    let hostname = draft.sandbox.hostname
    draft.sandbox.hosts = Array("127.0.0.1 localhost\n::1 localhost ip6-localhost\n\(record.address) \(hostname)\n".utf8)
    draft.sandbox.resolver =
      policy(record.spec) == .open
      ? resolver.forWorkspaces : Array("# No name service: the network policy is \"none\".\n".utf8)
  }
}

/// The host's resolver configuration, as the last start read it.
private final class HostResolver: Sendable {
  private let text = Mutex("")

  func read() {
    let now = (try? String(contentsOfFile: "/etc/resolv.conf", encoding: .utf8)) ?? ""
    text.withLock { $0 = now }
  }

  /// The host's name servers without those that listen on its loopback, which a workspace cannot reach.
  var forWorkspaces: [UInt8] {
    let text = text.withLock { $0 }
    let lines = text.split(separator: "\n").filter { line in
      let fields = line.split(whereSeparator: \.isWhitespace)
      guard fields.count >= 2 else { return false }
      if fields[0] == "nameserver" { return !fields[1].hasPrefix("127.") && fields[1] != "::1" }
      return ["search", "domain", "options"].contains(fields[0])
    }
    return Array((lines.joined(separator: "\n") + "\n").utf8)
  }
}

// SPDX-License-Identifier: Apache-2.0

/// Where a sandbox is on its host: all that belongs to it is named by its own id, not by that of the workspace that occupies it. Its
/// network link is called after its address, for the firewall's sake, and has the id as its alias.
package struct SandboxPlace: Codable, Equatable, Hashable, Sendable {
  package let id: String
  /// The directory with its plan, socket and exit record, below the agent's state directory.
  package let folder: String
  /// Its cgroup, below the agent's parent cgroup.
  package let cgroup: String

  /// Of a new sandbox. `id`: from `SandboxPlace.freshID`.
  package init(id: String) {
    self.id = id
    folder = "sandboxes/\(id)"
    cgroup = id
  }

  /// Of a workspace that an agent of commit 7ede341 started, which named everything after the workspace.
  package init(legacyWorkspace workspace: String, cgroup: String) {
    id = workspace
    folder = "workspaces/\(workspace)"
    self.cgroup = cgroup
  }

  /// Its directory, below the agent's state directory.
  package func path(in state: String) -> String { "\(state)/\(folder)" }

  /// Its cgroup's path, below the agent's parent cgroup.
  package func cgroupPath(below parent: String) -> String { "\(parent)/\(cgroup)" }

  package var isLegacy: Bool { !folder.hasPrefix("sandboxes/") }

  /// 60 random bits in 12 characters of base 32 (RFC 4648), in lower case. Never used twice: after `cgroup.kill` a cgroup of the same
  /// name may end what is born in it.
  package static func freshID() -> String {
    let letters = Array("abcdefghijklmnopqrstuvwxyz234567")
    return String((0..<12).map { _ in letters[Int.random(in: 0..<32)] })
  }

  package static func isID(_ text: String) -> Bool {
    text.utf8.count == 12 && text.utf8.allSatisfy { (0x61...0x7A).contains($0) || (0x32...0x37).contains($0) }
  }
}

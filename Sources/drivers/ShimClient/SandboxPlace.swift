// SPDX-License-Identifier: Apache-2.0

/// The place of a sandbox on its host. Everything of a sandbox is named after its own id, not after the workspace that occupies it. The
/// exception is its link, which is named after its address, since the firewall rules name every link; the id is the link's alias.
package struct SandboxPlace: Codable, Equatable, Hashable, Sendable {
  package let id: String
  /// The sandbox directory, relative to the agent's state directory.
  package let folder: String
  /// The cgroup, relative to the agent's parent cgroup.
  package let cgroup: String

  /// Creates the place of a new sandbox. `id`: from `SandboxPlace.freshID`.
  package init(id: String) {
    self.id = id
    folder = "sandboxes/\(id)"
    cgroup = id
  }

  /// Creates the place of a sandbox from an agent of commit 7ede341, which named everything after the workspace.
  package init(legacyWorkspace workspace: String, cgroup: String) {
    id = workspace
    folder = "workspaces/\(workspace)"
    self.cgroup = cgroup
  }

  /// Returns the path of the sandbox directory, below the agent's state directory.
  package func path(in state: String) -> String { "\(state)/\(folder)" }

  /// Returns the path of the cgroup, below the agent's parent cgroup.
  package func cgroupPath(below parent: String) -> String { "\(parent)/\(cgroup)" }

  package var isLegacy: Bool { !folder.hasPrefix("sandboxes/") }

  /// Returns 60 random bits as 12 characters of base 32 (RFC 4648), in lower case. An id is never reused: after `cgroup.kill`, a new
  /// cgroup of the same name may kill the processes created in it.
  package static func freshID() -> String {
    let letters = Array("abcdefghijklmnopqrstuvwxyz234567")
    return String((0..<12).map { _ in letters[Int.random(in: 0..<32)] })
  }

  package static func isID(_ text: String) -> Bool {
    text.utf8.count == 12 && text.utf8.allSatisfy { (0x61...0x7A).contains($0) || (0x32...0x37).contains($0) }
  }
}

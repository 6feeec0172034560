// SPDX-License-Identifier: Apache-2.0

internal import Synchronization
internal import Workspaces

/// The homes of owners, and which of them may not be used at the moment.
package final class HomeRegistry: Sendable {
  private let root: String
  private let closed = Mutex<Set<String>>([])

  /// Creates a registry. `root`: the directory of homes, unless a spec names a path.
  init(root: String) { self.root = root }

  func home(_ spec: WorkspaceSpec) -> String { spec.storage.home ?? "\(root)/\(spec.owner.name)" }

  /// Returns whether a home is being replaced or removed.
  func isClosed(_ home: String) -> Bool { closed.withLock { $0.contains(home) } }

  /// Closes a home. Returns false if another call has closed it.
  func close(_ home: String) -> Bool { closed.withLock { $0.insert(home).inserted } }

  func open(_ home: String) { closed.withLock { _ = $0.remove(home) } }
}

// SPDX-License-Identifier: Apache-2.0

internal import Synchronization
internal import Workspaces

/// Which home is whose, and which may not be used just now.
package final class HomeRegistry: Sendable {
  private let root: String
  private let closed = Mutex<Set<String>>([])

  /// `root`: where homes are, unless a spec names a path.
  init(root: String) { self.root = root }

  func home(_ spec: WorkspaceSpec) -> String { spec.storage.home ?? "\(root)/\(spec.owner.name)" }

  /// Whether a home is being replaced or removed.
  func isClosed(_ home: String) -> Bool { closed.withLock { $0.contains(home) } }

  /// False where another call has closed it.
  func close(_ home: String) -> Bool { closed.withLock { $0.insert(home).inserted } }

  func open(_ home: String) { closed.withLock { _ = $0.remove(home) } }
}

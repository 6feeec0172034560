// SPDX-License-Identifier: Apache-2.0

internal import Logging
internal import Volumes
internal import Workspaces

/// The packages that the owner has installed, stored in the home apart for each image.
package struct PackagesFeature: WorkspaceFeature {
  package static let name = "packages"
  package static let phase: String? = "storage"

  let services: NodeServices
  let home: HomeFeature

  /// Returns the folders for packages of this image, as the workspace sees them.
  private func folders(_ record: WorkspaceRecord, _ tool: Tool) -> [String: String] {
    guard !tool.packages.isEmpty, !record.imageDigest.isEmpty else { return [:] }
    let base = "\(tool.home)/\(HomePackages.folder)/\(HomePackages.key(record.imageDigest))"
    return tool.packages.mapValues { "\(base)/\($0)" }
  }

  /// Makes the folders, and reports when there are packages for other images and none for this one.
  package func prepare(_ workspace: Workspace) async throws(Refusal) {
    let record = workspace.record
    guard let tool = services.tool(of: record.spec), !tool.packages.isEmpty else { return }
    let (path, key, folders) = (home.path(record), HomePackages.key(record.imageDigest), tool.packages.values.sorted())
    do {
      let others = try await services.lanes.onStorage(path, within: HomeFeature.limit) {
        try HomePackages(home: path).prepare(key, folders: folders)
      }
      guard !others.isEmpty else { return }
      let text =
        "packages installed for \(others.joined(separator: ", ")) are not visible with this image (\(key))"
      await workspace.setCondition(.imageChanged, text)
      try await workspace.commit(.imageChanged, ["image": key, "packagesFor": others.joined(separator: " ")])
    } catch {
      // A full home, or a file in the way, does not stop the tool from starting.
      services.logger.warning("cannot make the folders for packages", metadata: ["workspace": "\(record.spec.id)", "error": "\(error)"])
    }
  }

  /// Adds the owner's packages after those of the image: they replace nothing.
  package func contribute(to draft: inout AttemptDraft, of record: WorkspaceRecord) {
    let folders = folders(record, draft.tool)
    draft.environment.merge(folders) { _, new in new }
    if let base = folders["PYTHONUSERBASE"] { draft.environment["PATH"]? += ":\(base)/bin" }
  }
}

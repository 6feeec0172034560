// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Logging
internal import Storage
internal import Workspaces

/// That a workspace starts whatever its home holds, and that what its owner installed is there again.
extension NodeAgent {
  // ----------------------------------------------------------------- packages

  /// The folders that packages for this image go to, as the workspace sees them.
  func packageFolders(_ record: WorkspaceRecord, _ tool: Tool) -> [String: String] {
    guard !tool.packages.isEmpty, !record.imageDigest.isEmpty else { return [:] }
    let base = "\(tool.home)/\(HomePackages.folder)/\(HomePackages.key(record.imageDigest))"
    return tool.packages.mapValues { "\(base)/\($0)" }
  }

  /// Makes them, and says where there are packages for another image only.
  func preparePackages(_ managed: Managed, _ tool: Tool) async {
    guard !tool.packages.isEmpty else { return }
    let (path, key, folders) = (homePath(managed.record), HomePackages.key(managed.record.imageDigest), tool.packages.values.sorted())
    do {
      let others = try await blocking { try HomePackages(home: path).prepare(key, folders: folders) }
      guard !others.isEmpty else { return }
      let text =
        "this image is another than before: packages that were installed for \(others.joined(separator: ", ")) stay there, and are not seen from this one (\(key))"
      show(managed, "ImageChanged", text)
      try await commit(managed, .imageChanged, ["image": key, "packagesFor": others.joined(separator: " ")])
    } catch {
      // A full home, or a file in the way: the tool starts without.
      logger.warning("no folders for packages", metadata: ["workspace": "\(managed.record.spec.id)", "error": "\(error)"])
    }
  }

  // ------------------------------------------------------------------- rescue

  /// Before a start: saved sessions that would take longer to come back, or more memory, than anybody wants.
  func prepareRescue(_ managed: Managed, _ tool: Tool) async {
    guard let rescue = tool.rescue, !rescue.sessions.isEmpty else { return }
    let path = homePath(managed.record)
    guard let large = try? await blocking({ HomeRescue(home: path).larger(rescue.sessions, than: rescue.sessionBytes) }), !large.isEmpty
    else { return }
    await setAside(managed, large, "the saved session is larger than \(Quantity.describe(bytes: rescue.sessionBytes))")
  }

  /// Whether an end before the tool was ready may be its home's doing, and what there then is to set aside.
  func suspects(_ managed: Managed, _ reason: Reason) async -> [String] {
    guard let rescue = tool(managed.record.spec.tool)?.rescue, managed.record.isRescued != true, managed.record.stopRequestedBy == nil,
      drain == nil,
      managed.record.startedNanoseconds != nil, !managed.record.phases.contains(where: { $0.name == "ready" }),
      [.exited, .signalled, .readinessTimeout, .outOfMemory].contains(reason.code)
    else { return [] }
    let packages = "\(HomePackages.folder)/\(HomePackages.key(managed.record.imageDigest))"
    let paths = (rescue.suspects + rescue.sessions).map { Tool.fill($0, ["packages": packages]) }
    let path = homePath(managed.record)
    return (try? await blocking { HomeRescue(home: path).present(paths) }) ?? []
  }

  /// Whether the tool is to be started once more, without what was set aside when it ended.
  func rescue(_ managed: Managed) async -> Bool {
    guard !managed.suspects.isEmpty else { return false }
    defer { managed.suspects = [] }
    // Its cgroup is not empty yet perhaps, and its home still mounted.
    await managed.cleaning?.value
    guard workspaces[managed.record.spec.id] === managed, managed.record.stopRequestedBy == nil, drain == nil else { return false }
    managed.record.isRescued = true
    managed.credentials = managed.secondStart
    return true
  }

  func setAside(_ managed: Managed, _ paths: [String], _ why: String) async {
    let path = homePath(managed.record)
    do {
      guard let done = try await blocking({ try HomeRescue(home: path).setAside(paths, why: "Carrel: \(why).") }) else { return }
      let names = done.moved.map(\.from).joined(separator: ", ")
      await tellRescue(
        managed, "\(why); set aside: \(names). See ~/\(done.note)",
        ["setAside": done.moved.map { "\($0.from) to \($0.to)" }.joined(separator: "; "), "note": done.note])
    } catch {
      logger.warning("nothing could be set aside", metadata: ["workspace": "\(managed.record.spec.id)", "error": "\(error)"])
    }
  }

  func tellRescue(_ managed: Managed, _ why: String, _ attributes: [String: String]) async {
    show(managed, "Rescue", why)
    logger.notice("rescue", metadata: ["workspace": "\(managed.record.spec.id)", "why": "\(why)"])
    try? await commit(managed, .rescue, attributes.merging(["why": why]) { first, _ in first })
  }
}

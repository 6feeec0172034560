// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Logging
internal import Storage
internal import Workspaces

/// The homes that workspaces are given.
extension NodeAgent {
  /// Where a workspace's home is on the host while it runs.
  func homePath(_ record: WorkspaceRecord) -> String {
    let home = home(record.spec)
    return record.homeBytes == nil ? home : homes.path(home)
  }

  func home(_ spec: WorkspaceSpec) -> String { spec.storage.home ?? "\(configuration.homes)/\(spec.owner.name)" }

  func hasImage(_ spec: WorkspaceSpec) -> Bool { (spec.storage.driver ?? configuration.homeDriver) == .image }

  /// The limit of a spec's home in bytes: an image has one, a directory where somebody asks for it.
  func homeBytes(_ spec: WorkspaceSpec) throws(InvalidField) -> UInt64? {
    var sizes = HomeImages.sizes
    if hasImage(spec) {
      sizes = (imageFormat(spec)?.floor ?? sizes.lowerBound)...sizes.upperBound
    } else {
      let image = "is for homes kept as images (storage.driver: image)"
      guard spec.storage.fileSystem == nil else { throw InvalidField("storage.fileSystem", image) }
      guard !spec.hasEncryptedHome else { throw InvalidField("storage.encrypted", image) }
    }
    guard let text = spec.storage.size ?? configuration.homeSize ?? (hasImage(spec) ? "10Gi" : nil) else { return nil }
    guard let bytes = Quantity.whole(text), sizes.contains(bytes) else {
      throw InvalidField(
        "storage.size",
        "\(printable(text)) is not a quantity between \(Quantity.describe(bytes: sizes.lowerBound)) and \(Quantity.describe(bytes: sizes.upperBound))"
      )
    }
    // Whole blocks.
    return bytes / 4096 * 4096
  }

  /// As it was asked for; nil where it is the node's to say.
  private func imageFormat(_ spec: WorkspaceSpec) -> ImageFormat? {
    (spec.hasEncryptedHome ? .ext4 : spec.storage.fileSystem).flatMap { ImageFormat(rawValue: $0.rawValue) }
  }

  private func homeWish(_ spec: WorkspaceSpec, _ bytes: UInt64, _ key: [UInt8]?) -> HomeImages.Wish {
    HomeImages.Wish(
      bytes: bytes, isExact: spec.storage.size != nil,
      format: imageFormat(spec) ?? ImageFormat(rawValue: configuration.homeFileSystem.rawValue) ?? .ext4,
      isFormatExact: spec.storage.fileSystem != nil, isEncrypted: spec.hasEncryptedHome, key: key)
  }

  func openStorage(_ managed: Managed) async throws(Refusal) {
    do throws(InvalidField) {
      // What was attached stays attached in another attempt, as long as it may.
      let kept = (managed.record.datasets ?? []).filter { $0.isAttached && !$0.isOver && isGranted($0, to: managed.record.spec.owner.name) }
      managed.record.datasets = try resolve(managed.record.spec) + kept
    } catch {
      throw Refusal(.storage, "\(error)")
    }
    let record = managed.record
    let (spec, home) = (record.spec, home(record.spec))
    let owner = spec.owner
    guard !closedHomes.contains(home) else { throw Refusal(.storage, "home \(home) is being restored or removed; try again") }
    let wish = record.homeBytes.map { homeWish(spec, $0, managed.homeKey) }
    // An image may have to be checked, which takes as long as it takes.
    let limit: Duration? = wish == nil ? .seconds(30) : nil
    let isFull: Bool? = try await patiently(limit, "home \(home)") { [homes, datasetImages] in
      for dataset in record.datasets ?? [] { try NodeAgent.open(dataset, datasetImages, by: spec.id) }
      if let wish { return try homes.acquire(home, by: spec.id, wish, uid: owner.uid, gid: owner.gid) }
      try HostFolder.prepareHome(home, uid: owner.uid, gid: owner.gid)
      guard let bytes = record.homeQuota else { return false }
      do { return try HomeQuota.apply(home, bytes: bytes, uid: owner.uid, gid: owner.gid) } catch {
        // What the node gives where it can is no reason to refuse where it cannot.
        guard spec.storage.size == nil else { throw error }
        return nil
      }
    }
    if isFull == nil {
      managed.record.homeQuota = nil
      logger.notice("home without a limit", metadata: ["workspace": "\(spec.id)", "home": "\(home)"])
    }
    if isFull == true {
      await tellRescue(
        managed, "the home is full; the room that was kept for this was given to it, and files have to be deleted",
        ["limitBytes": "\(record.homeBytes ?? record.homeQuota ?? 0)"])
    }
  }

  /// On a thread of its own, and no longer than `limit`: a file system that does not answer holds up nobody else. What it does once it
  /// answers again is done in vain.
  private func patiently<T: Sendable>(
    _ limit: Duration?, _ what: String, _ body: @escaping @Sendable () throws -> T
  ) async throws(Refusal) -> T {
    let answer = Answer<T>()
    // A queue has a thread of its own and waits for one where the kernel refuses it; Foundation's Thread says nothing and never runs.
    DispatchQueue(label: "carrel.storage").async { answer.give(Result { try body() }) }
    do {
      return try await answer.value(
        within: limit,
        late: StorageError(description: "\(what): its file system does not answer within \(limit?.components.seconds ?? 0) s"))
    } catch {
      throw Refusal(.storage, "\(error)")
    }
  }

  /// What gives it back, when nothing of the workspace runs any more. May be done twice.
  func closingStorage(_ record: WorkspaceRecord) -> @Sendable () -> Void {
    let (home, id, isImage) = (home(record.spec), record.spec.id, record.homeBytes != nil)
    return { [homes, datasetImages] in
      datasetImages.release(by: id)
      if isImage { homes.release(home, by: id) }
    }
  }

  func adoptStorage(_ record: WorkspaceRecord) {
    if record.homeBytes != nil { homes.adopt(home(record.spec), by: record.spec.id) }
    for dataset in record.datasets ?? [] where dataset.isImage { datasetImages.adopt(dataset.source, by: record.spec.id) }
  }

  func homeUse(_ record: WorkspaceRecord) -> HomeImages.Use? {
    if record.homeBytes != nil { return homes.use(home(record.spec)) }
    return record.homeQuota == nil ? nil : HomeImages.Use(at: home(record.spec))
  }

  /// Looks at the homes with a limit of their own, once a second.
  func watchHomes() async {
    while !Task.isCancelled {
      try? await Task.sleep(for: .seconds(1))
      for managed in workspaces.values where managed.record.state.isUp {
        await watchHome(managed)
      }
    }
  }

  /// Tells when a home nears its limit, and when it is below again.
  private func watchHome(_ managed: Managed) async {
    guard let use = homeUse(managed.record) else { return }
    // Back below a mark only by five points, so that a home that hovers around one does not fill the journal as well.
    let told = managed.record.homeFilled ?? 0
    let reached = [100, 95, 80].first { use.percent >= $0 || told >= $0 && use.percent + 5 >= $0 }
    guard reached != managed.record.homeFilled else { return }
    managed.record.homeFilled = reached
    try? await commit(
      managed, .homeFilling,
      [
        "percent": "\(use.percent)", "usedBytes": "\(use.usedBytes)", "limitBytes": "\(use.limitBytes)", "usedInodes": "\(use.usedInodes)",
        "limitInodes": "\(use.limitInodes)",
      ])
  }
}

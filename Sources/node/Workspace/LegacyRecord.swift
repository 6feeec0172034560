// SPDX-License-Identifier: Apache-2.0

internal import ShimClient
internal import Workspaces

/// A record as an agent of commit 7ede341 wrote it. Remove it together with the legacy adapter (`LegacyShimConnection`).
struct LegacyRecord: Decodable {
  private let spec: WorkspaceSpec
  private let state: WorkspaceState
  private let reason: Reason?
  private let amounts: ResourceLimits
  private let slot: Int
  private let address: String
  private let firstID: UInt32
  private let created: String
  private let attempt: UInt32
  private let phases: [WorkspaceRecord.Phase]
  private let imageDigest: String
  private let bootID: String
  private let cgroup: String
  private let startedNanoseconds: Int64?
  private let homeBytes: UInt64?
  private let homeQuota: UInt64?
  private let homeFilled: UInt64?
  private let revoked: [String]?
  private let datasets: [MountedDataset]?
  private let conditions: [String: String]?
  private let credentialEnds: [String: CredentialExpiry]?
  private let isRescued: Bool?
  private let stopRequestedBy: String?
  private let outOfMemoryKills: UInt64

  var record: WorkspaceRecord {
    var record = WorkspaceRecord(
      spec: spec, amounts: amounts, slot: slot, address: address, firstID: firstID, created: created, imageDigest: imageDigest)
    record.state = state
    record.reason = reason
    record.attempt = attempt
    record.phases = phases
    record.bootID = bootID
    // A record with a cgroup has a sandbox with the name that commit 7ede341 gave it; a record without one has no sandbox.
    record.sandbox = cgroup.isEmpty ? nil : SandboxPlace(legacyWorkspace: spec.id, cgroup: cgroup)
    record.startedNanoseconds = startedNanoseconds
    record.outOfMemoryKills = outOfMemoryKills
    // The grace period was never on record, so it begins again.
    record.stop = stopRequestedBy.map { WorkspaceRecord.StopRequest(by: $0, killAt: 0, bootID: "") }
    for (name, message) in (conditions ?? [:]).sorted(by: { $0.key < $1.key }) {
      if let kind = Condition.Kind(rawValue: name) { record.setCondition(kind, message) }
    }
    record[HomeFeature.self] = HomeState(
      kind: homeBytes.map { .volume(bytes: $0) } ?? .directory(limit: homeQuota), filled: homeFilled ?? 0)
    record[BrokerFeature.self].revoked = revoked ?? []
    record[DatasetsFeature.self].mounted = datasets ?? []
    record[CredentialsFeature.self].ends = credentialEnds ?? [:]
    record[RescueFeature.self].isRescued = isRescued ?? false
    return record
  }
}

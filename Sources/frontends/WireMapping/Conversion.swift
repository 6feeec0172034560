// SPDX-License-Identifier: Apache-2.0

package import API
package import Agent
internal import Foundation
package import Images
package import Journal
internal import SwiftProtobuf
package import Workspaces

// Conversions between the wire types and the domain types. They make no decisions.

extension WorkspaceSpec {
  /// Converts a spec. Only enum values, which protobuf leaves open, are checked here; the agent then validates the spec as it does YAML.
  package init(_ wire: Carrel_V1_WorkspaceSpec) throws {
    self.init(
      id: wire.id, owner: Owner(name: wire.owner.name, uid: wire.owner.uid, gid: wire.owner.gid), tool: wire.tool,
      image: wire.image)
    func text(_ value: String) -> String? { value.isEmpty ? nil : value }
    resources.memory = text(wire.resources.memory)
    resources.cpu = text(wire.resources.cpu)
    resources.pids = text(wire.resources.pids)
    resources.shm = text(wire.resources.shm)
    resources.scratch = text(wire.resources.scratch)
    storage.home = text(wire.storage.home)
    storage.size = text(wire.storage.size)
    switch wire.storage.driver {
    case .unspecified: storage.driver = nil
    case .directory: storage.driver = .directory
    case .image: storage.driver = .image
    case .UNRECOGNIZED(let value): throw AgentError(field: "storage.driver", "\(value) is not a known value")
    }
    switch wire.storage.fileSystem {
    case .unspecified: storage.fileSystem = nil
    case .ext4: storage.fileSystem = .ext4
    case .xfs: storage.fileSystem = .xfs
    case .btrfs: storage.fileSystem = .btrfs
    case .UNRECOGNIZED(let value): throw AgentError(field: "storage.file_system", "\(value) is not a known value")
    }
    storage.encrypted = wire.storage.encrypted ? true : nil
    storage.datasets = wire.storage.datasets.map { Dataset($0) }
    credentials = wire.credentials
    if wire.hasAws { aws = AWS(roles: wire.aws.roles, webIdentity: wire.aws.webIdentity ? true : nil) }
    if !wire.git.isEmpty { git = wire.git.map { GitHost(host: $0.host, organisations: $0.organisations) } }
    if wire.sshAgent { sshAgent = true }
    environment = wire.environment
    labels = wire.labels
    command = wire.command
    if wire.lifecycle.gracePeriodSeconds > 0 { lifecycle.gracePeriodSeconds = wire.lifecycle.gracePeriodSeconds }
    if wire.lifecycle.maxLifetimeSeconds > 0 { lifecycle.maxLifetimeSeconds = wire.lifecycle.maxLifetimeSeconds }
    switch wire.lifecycle.restartPolicy {
    case .unspecified, .never: lifecycle.restartPolicy = .never
    case .onFailure: lifecycle.restartPolicy = .onFailure
    case .always: lifecycle.restartPolicy = .always
    case .UNRECOGNIZED(let value):
      throw AgentError(field: "lifecycle.restart_policy", "\(value) is not a known value")
    }
    switch wire.network {
    case .unspecified: network = nil
    case .none: network = WorkspaceSpec.NetworkPolicy.none
    case .open: network = .open
    case .UNRECOGNIZED(let value): throw AgentError(field: "network", "\(value) is not a known value")
    }
  }
}

extension Credential {
  package init(_ wire: Carrel_V1_Credential) {
    self.init(name: wire.name, content: [UInt8](wire.data), lifetimeSeconds: wire.lifetimeSeconds == 0 ? nil : wire.lifetimeSeconds)
  }
}

extension WorkspaceSpec.Dataset {
  package init(_ wire: Carrel_V1_Dataset) {
    self.init(
      source: wire.source, target: wire.target, writable: wire.writable, name: wire.dataset.isEmpty ? nil : wire.dataset,
      path: wire.path.isEmpty ? nil : wire.path)
  }
}

extension Carrel_V1_MountedDataset {
  package init(_ dataset: MountedDataset) {
    self.init()
    target = dataset.target
    self.dataset = dataset.reference ?? ""
    source = dataset.source
    path = dataset.path ?? ""
    writable = dataset.writable
    attached = dataset.isAttached
    if let end = dataset.expires { expires = wallTime(Date(timeIntervalSince1970: end)) }
  }
}

extension Carrel_V1_WorkspaceSpec {
  package init(_ spec: WorkspaceSpec) {
    self.init()
    id = spec.id
    owner = .with {
      $0.name = spec.owner.name
      $0.uid = spec.owner.uid
      $0.gid = spec.owner.gid
    }
    tool = spec.tool
    image = spec.image
    resources = .with {
      $0.memory = spec.resources.memory ?? ""
      $0.cpu = spec.resources.cpu ?? ""
      $0.pids = spec.resources.pids ?? ""
      $0.shm = spec.resources.shm ?? ""
      $0.scratch = spec.resources.scratch ?? ""
    }
    storage = .with {
      $0.home = spec.storage.home ?? ""
      $0.size = spec.storage.size ?? ""
      $0.driver =
        switch spec.storage.driver {
        case nil: .unspecified
        case .directory?: .directory
        case .image?: .image
        }
      $0.fileSystem =
        switch spec.storage.fileSystem {
        case nil: .unspecified
        case .ext4?: .ext4
        case .xfs?: .xfs
        case .btrfs?: .btrfs
        }
      $0.encrypted = spec.hasEncryptedHome
      $0.datasets = spec.storage.datasets.map { dataset in
        .with {
          $0.source = dataset.source
          $0.target = dataset.target
          $0.writable = dataset.writable
          $0.dataset = dataset.name ?? ""
          $0.path = dataset.path ?? ""
        }
      }
    }
    credentials = spec.credentials
    if let wanted = spec.aws {
      aws = .with {
        $0.roles = wanted.roles
        $0.webIdentity = wanted.webIdentity ?? false
      }
    }
    git = (spec.git ?? []).map { host in
      .with {
        $0.host = host.host
        $0.organisations = host.organisations
      }
    }
    sshAgent = spec.sshAgent ?? false
    environment = spec.environment
    labels = spec.labels
    command = spec.command
    lifecycle = .with {
      $0.gracePeriodSeconds = spec.lifecycle.gracePeriodSeconds ?? 0
      $0.maxLifetimeSeconds = spec.lifecycle.maxLifetimeSeconds ?? 0
      $0.restartPolicy =
        switch spec.lifecycle.restartPolicy {
        case .never: .never
        case .onFailure: .onFailure
        case .always: .always
        }
    }
    network =
      switch spec.network {
      case nil: .unspecified
      case WorkspaceSpec.NetworkPolicy.none?: .none
      case .open?: .open
      }
  }
}

extension Carrel_V1_State {
  package init(_ state: WorkspaceState) {
    self =
      switch state {
      case .pending: .pending
      case .preparing: .preparing
      case .starting: .starting
      case .ready: .ready
      case .stopping: .stopping
      case .stopped: .stopped
      case .failed: .failed
      }
  }

  package func domain() throws -> WorkspaceState {
    switch self {
    case .pending: .pending
    case .preparing: .preparing
    case .starting: .starting
    case .ready: .ready
    case .stopping: .stopping
    case .stopped: .stopped
    case .failed: .failed
    case .unspecified, .UNRECOGNIZED: throw AgentError(field: "states", "\(rawValue) is not a known state")
    }
  }
}

extension Carrel_V1_Reason {
  package init(_ reason: Reason) {
    self.init()
    code = reason.code.rawValue
    message = reason.message
    if let exit = reason.exitCode { exitCode = exit }
    if let number = reason.signal { signal = number }
    if let limit = reason.memoryLimitBytes { memoryLimitBytes = limit }
    if let peak = reason.memoryPeakBytes { memoryPeakBytes = peak }
    advice = reason.advice ?? ""
    logTail = reason.logTail ?? []
    if let ran = reason.ranMilliseconds { ranMilliseconds = ran }
    stoppedBy = reason.stoppedBy ?? ""
    step = reason.step ?? ""
    if let number = reason.errno { errno = number }
    if let process = reason.killed {
      killedProcess = .with {
        $0.pid = process.pid
        $0.name = process.name
        $0.residentBytes = process.residentBytes
      }
    }
  }
}

extension Carrel_V1_Workspace {
  package init(_ record: WorkspaceRecord, tool: Tool?, token: String?) {
    self.init()
    spec = Carrel_V1_WorkspaceSpec(record.spec)
    state = Carrel_V1_State(record.state)
    if let value = record.reason { reason = Carrel_V1_Reason(value) }
    address = record.address
    if let tool, let port = tool.port, record.state == .starting || record.state == .ready {
      url = "http://\(record.address):\(port)" + Tool.fill(tool.urlPath, ["token": token ?? ""])
    }
    self.token = token ?? ""
    phases = record.phases.map { Carrel_V1_Phase($0) }
    created = record.created
    attempt = record.attempt
    imageDigest = record.imageDigest
    hostIds = "\(record.firstID)-\(record.firstID + 65_535)"
    datasets = record[DatasetsFeature.self].mounted.map { Carrel_V1_MountedDataset($0) }
    conditions = record.conditions.sorted { $0.type.rawValue < $1.type.rawValue }.map { "\($0.type.rawValue): \($0.message)" }
  }
}

extension Carrel_V1_Phase {
  package init(_ phase: WorkspaceRecord.Phase) {
    self.init()
    name = phase.name
    milliseconds = phase.milliseconds
  }
}

extension Carrel_V1_Gap {
  package init(from: UInt64, to: UInt64, reason: String) {
    self.init()
    self.from = from
    self.to = to
    self.reason = reason
  }
}

extension Carrel_V1_SnapshotResponse {
  /// Reads all workspaces, as they are in the journal after one event.
  package init(_ journal: Journal) async throws {
    let found = try await journal.snapshot()
    self.init()
    streamID = journal.streamID
    sequence = UInt64(found.sequence)
    workspaces = try found.records.map { Carrel_V1_Workspace(try WorkspaceRecord($0), tool: nil, token: nil) }
  }
}

extension Carrel_V1_Event {
  package init(_ event: JournalEvent, stream: String) {
    self.init()
    streamID = stream
    generation = UInt32(clamping: event.generation)
    if let known = event.previous.flatMap(WorkspaceState.init(rawValue:)) { previousState = Carrel_V1_State(known) }
    if let text = event.phases, let value = try? JSONDecoder().decode([WorkspaceRecord.Phase].self, from: Data(text.utf8)) {
      phases = value.map { Carrel_V1_Phase($0) }
    }
    sequence = UInt64(event.sequence)
    type = event.type
    workspace = event.workspace
    if let known = WorkspaceState(rawValue: event.state) { state = Carrel_V1_State(known) }
    if let text = event.reason, let value = try? JSONDecoder().decode(Reason.self, from: Data(text.utf8)) {
      reason = Carrel_V1_Reason(value)
    }
    time = event.wallTime
    monotonicNanoseconds = UInt64(event.bootNanoseconds)
    bootID = event.bootID
    attributes = (try? JSONDecoder().decode([String: String].self, from: Data(event.attributes.utf8))) ?? [:]
  }
}

extension Carrel_V1_Image {
  package init(_ image: StoredImage, withConfig: Bool = false) {
    self.init()
    name = image.name
    digest = image.digest
    sizeBytes = image.sizeBytes
    layers = UInt32(image.layers.count)
    created = image.created
    if withConfig { configJson = image.configJSON }
  }
}

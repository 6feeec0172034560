// SPDX-License-Identifier: Apache-2.0

/// Where a workspace is in its life.
package enum WorkspaceState: String, Codable, CaseIterable, Sendable {
  case pending, preparing, starting, ready, stopping, stopped, failed

  package var isTerminal: Bool { self == .stopped || self == .failed }
  /// Whether the tool runs and nobody has asked it to stop.
  package var isUp: Bool { self == .starting || self == .ready }
  /// Whether a supervisor may exist.
  package var mayRun: Bool { !isTerminal && self != .pending }
}

/// Why a workspace stopped or failed.
package struct Reason: Codable, Equatable, Sendable {
  package enum Code: String, Codable, Sendable {
    /// The tool ended by itself with a status.
    case exited = "Exited"
    case signalled = "Signalled"
    case outOfMemory = "OutOfMemory"
    /// Someone asked.
    case requested = "Requested"
    case lifetime = "Lifetime"
    /// The host was rebooted.
    case lost = "Lost"
    /// Its supervisor was lost before the tool started, and with it what came with the launch.
    case credentialsLost = "CredentialsLost"
    /// The supervisor is gone and left no record.
    case unknown = "Unknown"
    // Failures, before Ready.
    case imageNotFound = "ImageNotFound"
    case storage = "StorageFailed"
    case network = "NetworkFailed"
    case limits = "LimitsFailed"
    /// The node is being drained.
    case drained = "Drained"
    case isolation = "IsolationFailed"
    case executable = "CannotExecute"
    case exitedEarly = "ExitedBeforeReady"
    case readinessTimeout = "NotReadyInTime"
    case `internal` = "Internal"
  }

  package var code: Code
  package var message: String
  package var exitCode: Int32?
  package var signal: Int32?
  package var memoryLimitBytes: UInt64?
  package var memoryPeakBytes: UInt64?
  // The rest of the certificate of a stop. Optional, as every field added later must be.
  /// One sentence on what to do.
  package var advice: String?
  /// The last lines of the tool's output.
  package var logTail: [String]?
  /// From the start of the tool.
  package var ranMilliseconds: UInt64?
  package var stoppedBy: String?
  /// Of a failed start, with its error number.
  package var step: String?
  package var errno: Int32?
  package var killed: KilledProcess?

  /// A process that the kernel ended for want of memory.
  package struct KilledProcess: Codable, Equatable, Sendable {
    /// As the host numbers it.
    package let pid: Int32
    package let name: String
    package let residentBytes: UInt64

    package init(pid: Int32, name: String, residentBytes: UInt64) {
      self.pid = pid
      self.name = name
      self.residentBytes = residentBytes
    }
  }

  package init(_ code: Code, _ message: String, exitCode: Int32? = nil, signal: Int32? = nil) {
    self.code = code
    self.message = message
    self.exitCode = exitCode
    self.signal = signal
  }
}

/// Something that happens to a workspace.
package enum Occurrence: Equatable, Sendable {
  case preparationBegan
  case launched
  case becameReady
  case stopRequested(by: String)
  case ended(Reason)
  case preparationFailed(Reason)
  /// Its supervisor is gone, and had nothing to start yet: the launch is tried again.
  case supervisorLost
  /// The restart policy asks for another attempt.
  case restartDecided
}

/// What an occurrence is called in the stream of events.
package enum EventType: String, Codable, CaseIterable, Sendable {
  case created = "Created"
  case preparing = "Preparing"
  case starting = "Starting"
  case ready = "Ready"
  case stopping = "Stopping"
  case stopped = "Stopped"
  case failed = "Failed"
  case restarting = "Restarting"
  /// Someone stopped it between two attempts: there will be no other.
  case restartsEnded = "RestartsEnded"
  case deleted = "Deleted"
  case outOfMemory = "OutOfMemory"
  /// A further program was asked for: by whom, and what, never its arguments.
  case execStarted = "ExecStarted"
  case execEnded = "ExecEnded"
  case credentialsUpdated = "CredentialsUpdated"
  /// Programs of the workspace were given credentials of a role.
  case credentialsIssued = "CredentialsIssued"
  /// The provider gave none; told once, until it gives some again.
  case credentialsFailed = "CredentialsFailed"
  case credentialsRevoked = "CredentialsRevoked"
  /// Credential files that soon end, and are then removed.
  case credentialsExpiring = "CredentialsExpiring"
  case credentialsRemoved = "CredentialsRemoved"
  /// AWS variables in a process of a workspace that hide the broker's credentials from it, and are renewed by nobody.
  case staleCredentials = "StaleCredentials"
  /// Something that kept the tool from its start was set aside, or room was made in a full home.
  case rescue = "Rescue"
  /// The owner has packages for another image than this one.
  case imageChanged = "ImageChanged"
  /// Its home has reached 80, 95 or 100 % of its blocks or inodes, or has come below all of them again.
  case homeFilling = "HomeFilling"
  /// While the workspace runs.
  case datasetAttached = "DatasetAttached"
  /// Its mode or its end.
  case datasetChanged = "DatasetChanged"
  case datasetDetached = "DatasetDetached"
  case adopted = "Adopted"
  /// Its record was lost with the journal and is back from its own folder.
  case recovered = "Recovered"
  /// A folder that no record knows and that has none of its own; it is left as it is, under another name.
  case quarantined = "Quarantined"
  /// What was left of a workspace that is no more: a folder or a cgroup.
  case swept = "Swept"
  // Of the node itself.
  case drainBegan = "DrainBegan"
  case drainEnded = "DrainEnded"
}

/// An occurrence that a state does not allow.
package struct IllegalTransition: Error, Equatable, Sendable {
  package let state: WorkspaceState
  package let occurrence: Occurrence
}

/// The life of a workspace as a function without effects.
package enum StateMachine {
  package struct Transition: Equatable, Sendable {
    package let state: WorkspaceState
    package let event: EventType
    package let reason: Reason?
  }

  package static func apply(_ occurrence: Occurrence, to state: WorkspaceState) throws(IllegalTransition) -> Transition {
    switch (state, occurrence) {
    case (.pending, .preparationBegan): return Transition(state: .preparing, event: .preparing, reason: nil)
    case (.preparing, .launched): return Transition(state: .starting, event: .starting, reason: nil)
    case (.starting, .becameReady): return Transition(state: .ready, event: .ready, reason: nil)
    case (.pending, .stopRequested(let by)):
      // Nothing runs yet: there is nothing to wait for.
      return Transition(state: .stopped, event: .stopped, reason: Reason(.requested, "stopped by \(by) before it was prepared"))
    case (.preparing, .stopRequested), (.starting, .stopRequested), (.ready, .stopRequested):
      return Transition(state: .stopping, event: .stopping, reason: nil)
    case (.starting, .ended(let reason)), (.ready, .ended(let reason)), (.stopping, .ended(let reason)),
      (.preparing, .ended(let reason)):
      return Transition(state: .stopped, event: .stopped, reason: reason)
    case (.pending, .preparationFailed(let reason)), (.preparing, .preparationFailed(let reason)),
      (.starting, .preparationFailed(let reason)):
      return Transition(state: .failed, event: .failed, reason: reason)
    case (.stopping, .preparationFailed(let reason)):
      return Transition(state: .stopped, event: .stopped, reason: reason)
    case (.preparing, .supervisorLost): return Transition(state: .pending, event: .restarting, reason: nil)
    case (.stopped, .restartDecided), (.failed, .restartDecided):
      return Transition(state: .pending, event: .restarting, reason: nil)
    default:
      throw IllegalTransition(state: state, occurrence: occurrence)
    }
  }
}

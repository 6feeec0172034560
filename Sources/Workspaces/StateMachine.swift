// SPDX-License-Identifier: Apache-2.0

/// Where a workspace is in its life.
package enum WorkspaceState: String, Codable, CaseIterable, Sendable {
  case pending, preparing, starting, ready, stopping, stopped, failed

  package var isTerminal: Bool { self == .stopped || self == .failed }
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
    /// The supervisor is gone and left no record.
    case unknown = "Unknown"
    // Failures, before Ready.
    case imageNotFound = "ImageNotFound"
    case storage = "StorageFailed"
    case network = "NetworkFailed"
    case limits = "LimitsFailed"
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
  case deleted = "Deleted"
  case outOfMemory = "OutOfMemory"
  case credentialsUpdated = "CredentialsUpdated"
  case adopted = "Adopted"
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
    case (.stopped, .restartDecided), (.failed, .restartDecided):
      return Transition(state: .pending, event: .restarting, reason: nil)
    default:
      throw IllegalTransition(state: state, occurrence: occurrence)
    }
  }
}

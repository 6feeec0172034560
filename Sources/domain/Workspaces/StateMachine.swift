// SPDX-License-Identifier: Apache-2.0

/// The state of a workspace in its life cycle.
package enum WorkspaceState: String, Codable, CaseIterable, Sendable {
  /// The workspace is recorded, and the preparation of its next attempt has not begun. A new workspace leaves this state in the
  /// transaction that records it; a restart passes through it.
  case pending
  /// The agent prepares the attempt: home, datasets, limits, launch plan, namespaces, mounts, network link and credentials. The tool does
  /// not run yet.
  case preparing
  /// The tool runs and has not replied to its readiness probe yet.
  case starting
  /// The tool has replied to its readiness probe, or runs and has no probe.
  case ready
  /// A stop was requested while the attempt was in progress. The tool got SIGTERM, if it was running, and the sandbox is killed with
  /// SIGKILL when the grace period is over.
  case stopping
  /// The attempt has ended, and the reason says how. The state is terminal, unless a restart or a rescue begins another attempt.
  case stopped
  /// The attempt failed before its tool was ready, and the reason says why. The state is terminal, unless a restart or a rescue begins
  /// another attempt.
  case failed

  package var isTerminal: Bool { self == .stopped || self == .failed }
  /// Whether the tool runs and no stop was requested.
  package var isUp: Bool { self == .starting || self == .ready }
  /// Whether a supervisor may exist.
  package var mayRun: Bool { !isTerminal && self != .pending }
}

/// Why a workspace stopped or failed.
package struct Reason: Codable, Equatable, Sendable {
  package enum Code: String, Codable, Sendable {
    /// The tool exited by itself; `exit_code` is its status. Status 0 is an ordinary end.
    case exited = "Exited"
    /// A signal killed the tool that neither the agent nor the OOM killer sent; `signal` is its number.
    case signalled = "Signalled"
    /// The tool was OOM-killed, because the workspace reached its memory limit. `killed_process` is the process that the kernel killed
    /// last, where the kernel's log names it.
    case outOfMemory = "OutOfMemory"
    /// A caller stopped the workspace; `stopped_by` names the caller.
    case requested = "Requested"
    /// The agent stopped the workspace because the attempt reached `lifecycle.maxLifetimeSeconds`. No restart follows.
    case lifetime = "Lifetime"
    /// The host was rebooted while the attempt was in progress, and the sandbox left no exit record.
    case lost = "Lost"
    /// The supervisor was lost before the tool started, and with it the credentials or the key of the home, which are stored nowhere
    /// else. The workspace has to be launched again.
    case credentialsLost = "CredentialsLost"
    /// The supervisor exited without an exit record, so it is not known how the tool ended.
    case unknown = "Unknown"
    /// The image was removed, or could not be read, between the acceptance of the launch and the preparation of the attempt. A launch
    /// that names an unknown image is refused instead.
    case imageNotFound = "ImageNotFound"
    /// The home or a dataset could not be prepared. Examples are a path that belongs to another user, a file system that does not reply,
    /// a size that cannot be enforced, and a home that is being restored.
    case storage = "StorageFailed"
    /// The network link of the sandbox, or its addresses and routes, could not be made.
    case network = "NetworkFailed"
    /// The cgroup of the sandbox could not be made, or a limit in it could not be set.
    case limits = "LimitsFailed"
    /// A drain with a deadline stopped the workspace.
    case drained = "Drained"
    /// The sandbox could not be made: its supervisor, its launch plan or its credential broker failed. `step` and `errno` name the
    /// operation of the plan that failed, if one did.
    case isolation = "IsolationFailed"
    /// The tool could not be executed: the program is not in the image, is not executable, or is not for this machine. `step` and `errno`
    /// say which.
    case executable = "CannotExecute"
    /// The tool did not reply to its readiness probe as `readiness` in its definition expects, within the time that is given there. The
    /// agent then killed it.
    case readinessTimeout = "NotReadyInTime"
    /// The agent could not go on with the attempt. Examples are a tool definition that no longer exists, and a supervisor that was lost
    /// five times before the tool started.
    case `internal` = "Internal"
  }

  package var code: Code
  package var message: String
  package var exitCode: Int32?
  package var signal: Int32?
  package var memoryLimitBytes: UInt64?
  package var memoryPeakBytes: UInt64?
  // The rest of the stop summary. Its fields are optional, as every field that is added later must be.
  /// What the user can do, in one sentence.
  package var advice: String?
  /// The last lines of the tool's output.
  package var logTail: [String]?
  /// The time since the start of the tool.
  package var ranMilliseconds: UInt64?
  package var stoppedBy: String?
  /// The operation of the launch plan that failed, and below its error number.
  package var step: String?
  package var errno: Int32?
  package var killed: KilledProcess?

  /// A process that was OOM-killed.
  package struct KilledProcess: Codable, Equatable, Sendable {
    /// The host pid.
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

/// An input of the state machine.
package enum StateMachineInput: Equatable, Sendable {
  case preparationBegan
  case launched
  case becameReady
  case stopRequested(by: String)
  case ended(Reason)
  case preparationFailed(Reason)
  /// The supervisor was lost before the tool started: the attempt is retried.
  case supervisorLost
  /// The restart policy or a rescue requires another attempt.
  case restartDecided
}

/// The type of an event. docs/events.md is generated from the comments; an `Attributes:` line names the keys of the event's attributes.
package enum EventType: String, Codable, CaseIterable, Sendable {
  /// The agent accepted a launch. The event `Preparing` of the first attempt is part of the same transaction.
  case created = "Created"
  /// The preparation of an attempt began: of the first one with `Created`, of a later one after `Restarting`.
  /// Attributes: attempt.
  case preparing = "Preparing"
  /// The tool was executed in its sandbox. It may not serve requests yet.
  /// Attributes: attempt.
  case starting = "Starting"
  /// The tool replied to its readiness probe with the expected status, or was started and has no probe. The event has the phases of the
  /// start.
  /// Attributes: attempt, milliseconds.
  case ready = "Ready"
  /// A stop was requested while an attempt was in progress: by a caller, by the maximum lifetime, or by a drain with a deadline. The
  /// reason of the `Stopped` event that follows names who requested it.
  /// Attributes: attempt.
  case stopping = "Stopping"
  /// The attempt ended: its tool ended or was killed, a stop was requested before the tool ran, or the sandbox was lost. The event has
  /// the reason and the phases of the start.
  /// Attributes: attempt, rescue.
  case stopped = "Stopped"
  /// The attempt failed before its tool was ready: the preparation, the isolation or the execution of the tool failed, or the tool was
  /// not ready in time. The event has the reason and the phases of the start. A tool that ends by itself before it is ready is `Stopped`.
  /// Attributes: attempt, rescue.
  case failed = "Failed"
  /// Another attempt follows, because the restart policy or a rescue requires one. Where the supervisor was lost before the tool started,
  /// the same attempt is retried instead: its number does not change, and `why` is set.
  /// Attributes: attempt, why.
  case restarting = "Restarting"
  /// An attempt that was due does not follow: a stop was requested between two attempts, the node was drained or the workspace deleted
  /// while a rescue was pending, or no sandbox could be made for a rescue attempt.
  /// Attributes: by, why.
  case restartsEnded = "RestartsEnded"
  /// A caller deleted the workspace, which had ended. Its record and its output are removed; its home and datasets stay.
  case deleted = "Deleted"
  /// The kernel OOM-killed a process of a workspace whose tool goes on, such as the kernel of a notebook. Kills within half a second are
  /// one event. Where the tool itself was killed, `Stopped` with the reason `OutOfMemory` reports it.
  /// Attributes: kills, limitBytes, peakBytes, process, pid, residentBytes.
  case outOfMemory = "OutOfMemory"
  /// A caller started a program in the workspace, as `carrel exec` does. Its arguments are counted and never recorded.
  /// Attributes: by, program, arguments, terminal.
  case execStarted = "ExecStarted"
  /// A program of `ExecStarted` ended. A program that could not be started has this event alone, with `outcome`.
  /// Attributes: by, program, arguments, terminal, client, exitCode, signal, outcome, milliseconds.
  case execEnded = "ExecEnded"
  /// A caller replaced or added credential files of the running workspace.
  /// Attributes: names.
  case credentialsUpdated = "CredentialsUpdated"
  /// Programs of the workspace got credentials from the broker. The first issue of a role is recorded at once, later ones of the next ten
  /// seconds together. After an agent was killed, issues can be counted twice.
  /// Attributes: role, count.
  case credentialsIssued = "CredentialsIssued"
  /// Credentials could not be fetched from their provider or handed to the supervisor. The agent retries with a backoff from 1 to 30 s;
  /// the retries that fail too have no events.
  /// Attributes: role, error.
  case credentialsFailed = "CredentialsFailed"
  /// A caller revoked credentials that the broker issues, for the rest of the workspace's life. Those that a program already has stay
  /// valid until they expire.
  /// Attributes: roles.
  case credentialsRevoked = "CredentialsRevoked"
  /// A credential file will expire and then be removed: the event comes a quarter of an hour before that, or a quarter of the file's
  /// lifetime if that is less.
  /// Attributes: name, ends.
  case credentialsExpiring = "CredentialsExpiring"
  /// A credential file was removed from the running workspace, because a caller requested it or because the file expired.
  /// Attributes: name, why.
  case credentialsRemoved = "CredentialsRemoved"
  /// A process of a workspace with AWS roles has a static AWS variable in its environment, which hides the credentials that are renewed.
  /// The event is not repeated while the condition `StaleCredentials` holds.
  /// Attributes: pid, process, variables, processes.
  case staleCredentials = "StaleCredentials"
  /// Files in the home were renamed, because they may keep the tool from becoming ready or because a saved session is too large; or the
  /// reserve of a full home was released.
  /// Attributes: why, setAside, note, limitBytes.
  case rescue = "Rescue"
  /// The home has packages for other images and had none for the image of this workspace, so the tool starts without packages.
  /// Attributes: image, packagesFor.
  case imageChanged = "ImageChanged"
  /// The use of a home with a limit reached 80, 95 or 100 % of its blocks or inodes, or fell more than five points below the threshold
  /// that was last reported.
  /// Attributes: percent, usedBytes, limitBytes, usedInodes, limitInodes.
  case homeFilling = "HomeFilling"
  /// A caller attached a dataset to the running workspace. Datasets of the spec have no such event.
  /// Attributes: target, dataset, mode, path, expires.
  case datasetAttached = "DatasetAttached"
  /// A caller changed the mode or the expiry of a dataset of the running workspace.
  /// Attributes: target, dataset, mode, path, expires.
  case datasetChanged = "DatasetChanged"
  /// A dataset was detached from the running workspace: a caller requested it, it expired, or a new agent completed a detachment that the
  /// previous one had begun.
  /// Attributes: target, dataset, mode, path, expires, why, holders.
  case datasetDetached = "DatasetDetached"
  /// A new agent took over a sandbox whose tool was already running.
  /// Attributes: pid, sandbox.
  case adopted = "Adopted"
  /// A workspace that the journal did not know was restored from the copy of its record: after the loss of the journal, or because its
  /// sandbox runs.
  /// Attributes: running.
  case recovered = "Recovered"
  /// A sandbox directory from which no workspace could be restored was moved to `<state>/quarantine`. What runs in the sandbox goes on
  /// untouched. This is an event of the node.
  /// Attributes: folder, running.
  case quarantined = "Quarantined"
  /// Leftovers of a workspace that no longer exists were removed: a directory, a mount or a cgroup. It also reports a removed home that
  /// was deleted after `storage.removedHomesDays`. This is an event of the node.
  /// Attributes: folder, mount, cgroup, removedHome.
  case swept = "Swept"
  /// A caller requested a drain: the node refuses launches from now on. Each further request, such as one with another deadline, is
  /// another event. This is an event of the node.
  /// Attributes: by, deadlineSeconds.
  case drainBegan = "DrainBegan"
  /// A caller ended the drain, as `carrel uncordon` does: the node accepts launches again. This is an event of the node.
  /// Attributes: by.
  case drainEnded = "DrainEnded"
}

/// An input that a state does not allow.
package struct IllegalTransition: Error, Equatable, Sendable {
  package let state: WorkspaceState
  package let input: StateMachineInput
}

/// The life cycle of a workspace, as a pure function.
package enum StateMachine {
  package struct Transition: Equatable, Sendable {
    package let state: WorkspaceState
    package let event: EventType
    package let reason: Reason?
  }

  package static func apply(_ input: StateMachineInput, to state: WorkspaceState) throws(IllegalTransition) -> Transition {
    switch (state, input) {
    case (.pending, .preparationBegan): return Transition(state: .preparing, event: .preparing, reason: nil)
    case (.preparing, .launched): return Transition(state: .starting, event: .starting, reason: nil)
    case (.starting, .becameReady): return Transition(state: .ready, event: .ready, reason: nil)
    case (.pending, .stopRequested(let by)):
      // Nothing runs yet, so there is no end to wait for.
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
      throw IllegalTransition(state: state, input: input)
    }
  }
}

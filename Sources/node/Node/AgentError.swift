// SPDX-License-Identifier: Apache-2.0

package import Errors
package import Workspaces

/// An error as a caller gets it.
package struct AgentError: Error, Sendable, CustomStringConvertible {
  package enum Code: Sendable {
    case invalidArgument, notFound, alreadyExists, failedPrecondition, resourceExhausted, outOfRange, dataLoss
    case unimplemented, deadlineExceeded, unavailable, `internal`
  }

  /// What a control plane decides by, beyond the code. The names are part of the API and never change (docs/compatibility.md).
  package enum Reason: String, CaseIterable, Sendable {
    /// A field of the request violates a rule; the field is in the error's details.
    case invalidField = "INVALID_FIELD"
    /// There is no workspace with this id.
    case workspaceNotFound = "WORKSPACE_NOT_FOUND"
    /// A workspace with this id exists, with another spec.
    case workspaceExists = "WORKSPACE_EXISTS"
    /// The call needs a workspace whose tool runs.
    case workspaceNotRunning = "WORKSPACE_NOT_RUNNING"
    /// The call needs a workspace that has ended.
    case workspaceRunning = "WORKSPACE_RUNNING"
    /// The node does not have the image.
    case imageNotFound = "IMAGE_NOT_FOUND"
    /// The node accepts no launches until it is uncordoned: launch on another node.
    case nodeDrained = "NODE_DRAINED"
    /// The node has no memory for the workspace: launch on another node.
    case memoryExhausted = "MEMORY_EXHAUSTED"
    /// The node has its limit of workspaces: launch on another node.
    case workspacesExhausted = "WORKSPACES_EXHAUSTED"
    /// Too many launches are in progress: retry.
    case launchesExhausted = "LAUNCHES_EXHAUSTED"
    /// Too many calls are in progress, or wait for the same storage: retry.
    case callsExhausted = "CALLS_EXHAUSTED"
    /// The journal has no room for further workspaces, because the controller does not acknowledge events.
    case journalFull = "JOURNAL_FULL"
    /// The supervisor of the workspace does not reply: retry.
    case supervisorUnreachable = "SUPERVISOR_UNREACHABLE"
    /// The call has no result within its limit. What it began may go on.
    case deadlineExceeded = "DEADLINE_EXCEEDED"

    package var code: Code {
      switch self {
      case .invalidField: .invalidArgument
      case .workspaceNotFound, .imageNotFound: .notFound
      case .workspaceExists: .alreadyExists
      case .workspaceNotRunning, .workspaceRunning, .nodeDrained: .failedPrecondition
      case .memoryExhausted, .workspacesExhausted, .launchesExhausted, .callsExhausted, .journalFull: .resourceExhausted
      case .supervisorUnreachable: .unavailable
      case .deadlineExceeded: .deadlineExceeded
      }
    }
  }

  package let code: Code
  package let reason: Reason?
  /// The path of the field in the request that is wrong; nil if none is.
  package let field: String?
  /// A sentence: the object, what is wrong, what was expected, what to do.
  package let message: String
  /// The error of the layer below that led to this one.
  package let cause: (any Error)?
  /// Where the error was created, for the agent's log.
  package let location: SourceLocation

  /// Creates an error that a control plane has no reason to tell from others with its code.
  package init(_ code: Code, _ message: String, cause: (any Error)? = nil, file: StaticString = #fileID, line: UInt = #line) {
    self.init(code, nil, message, field: nil, cause, SourceLocation(file: file, line: line))
  }

  package init(reason: Reason, _ message: String, cause: (any Error)? = nil, file: StaticString = #fileID, line: UInt = #line) {
    self.init(reason.code, reason, message, field: nil, cause, SourceLocation(file: file, line: line))
  }

  /// Creates the error of a field that violates a rule. `problem`: what is wrong and what was expected.
  package init(field: String, _ problem: String, file: StaticString = #fileID, line: UInt = #line) {
    self.init(InvalidField(field, problem), file: file, line: line)
  }

  package init(_ error: InvalidField, file: StaticString = #fileID, line: UInt = #line) {
    let field = error.path.isEmpty ? nil : error.path
    self.init(
      .invalidArgument, .invalidField, error.description, field: field, error, SourceLocation(file: file, line: line))
  }

  private init(
    _ code: Code, _ reason: Reason?, _ message: String, field: String?, _ cause: (any Error)?, _ location: SourceLocation
  ) {
    self.code = code
    self.reason = reason
    self.field = field
    self.message = message
    self.cause = cause
    self.location = location
  }

  package init(_ error: DriverError) {
    let code: Code =
      switch error.code {
      case .invalid: .invalidArgument
      case .notFound: .notFound
      case .alreadyExists: .alreadyExists
      case .dataLoss: .dataLoss
      case .failedPrecondition, .inUse: .failedPrecondition
      case .resourceExhausted: .resourceExhausted
      case .unimplemented: .unimplemented
      case .failed: .internal
      }
    self.init(code, nil, error.message, field: nil, error, error.location)
  }

  package var description: String { message }

  static func noWorkspace(_ id: String, file: StaticString = #fileID, line: UInt = #line) -> AgentError {
    AgentError(reason: .workspaceNotFound, "there is no workspace \(printable(id)); see `carrel ps`", file: file, line: line)
  }
}

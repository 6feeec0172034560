// SPDX-License-Identifier: Apache-2.0

internal import Agent
internal import Concurrency
internal import Errors
package import GRPCCore
internal import GRPCProtobuf
internal import Workspaces

/// Errors on the wire: a code and a sentence, and the details of the rich error model (google/rpc/error_details.proto): `ErrorInfo` with a
/// reason that a control plane decides by, and `BadRequest` with the field.
extension RPCError {
  /// The domain of `ErrorInfo`.
  package static let domain = "carrel"

  /// Converts any error. This is the only place that maps the agent's codes to gRPC's.
  package init(_ error: any Error) {
    switch error {
    case let known as RPCError: self = known
    case let known as AgentError: self.init(known)
    case let known as DriverError: self.init(AgentError(known))
    case let field as InvalidField: self.init(AgentError(field))
    case is DeadlineExceeded: self.init(AgentError(reason: .deadlineExceeded, "\(error)"))
    case is TooManyCalls, LaneError.full: self.init(AgentError(reason: .callsExhausted, "\(error)"))
    case LaneError.stuck, LaneError.slow: self.init(AgentError(.unavailable, "\(error)"))
    case is CancellationError: self.init(code: .cancelled, message: "\(error)")
    default: self.init(AgentError(.internal, "\(error)"))
    }
  }

  private init(_ error: AgentError) {
    let code: RPCError.Code =
      switch error.code {
      case .invalidArgument: .invalidArgument
      case .notFound: .notFound
      case .alreadyExists: .alreadyExists
      case .failedPrecondition: .failedPrecondition
      case .resourceExhausted: .resourceExhausted
      case .outOfRange: .outOfRange
      case .dataLoss: .dataLoss
      case .unimplemented: .unimplemented
      case .deadlineExceeded: .deadlineExceeded
      case .unavailable: .unavailable
      case .internal: .internalError
      }
    var details: [ErrorDetails] = []
    if let reason = error.reason { details.append(.errorInfo(reason: reason.rawValue, domain: RPCError.domain)) }
    if let field = error.field {
      details.append(.badRequest(violations: [.init(field: field, description: error.message)]))
    }
    let status = GoogleRPCStatus(code: code, message: error.message, details: details)
    self.init(code: code, message: error.message, metadata: details.isEmpty ? [:] : status.rpcErrorMetadata)
  }
}

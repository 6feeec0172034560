// SPDX-License-Identifier: Apache-2.0

package import Images
package import Workspaces

/// An error as a caller gets it: a gRPC code, and a sentence that names the object and what was expected.
package struct AgentError: Error, Equatable, Sendable, CustomStringConvertible {
  package enum Code: Sendable {
    case invalidArgument, notFound, alreadyExists, failedPrecondition, resourceExhausted, outOfRange, dataLoss
    case unimplemented, deadlineExceeded, unavailable, `internal`
  }

  package let code: Code
  package let description: String

  package init(_ code: Code, _ description: String) {
    self.code = code
    self.description = description
  }

  package init(_ error: InvalidField) { self.init(.invalidArgument, error.description) }

  package init(_ error: ImageError) {
    let code: Code =
      switch error.code {
      case .invalid: .invalidArgument
      case .notFound: .notFound
      case .alreadyExists: .alreadyExists
      case .dataLoss: .dataLoss
      case .failedPrecondition, .inUse: .failedPrecondition
      case .resourceExhausted: .resourceExhausted
      case .unimplemented: .unimplemented
      }
    self.init(code, error.description)
  }

  static func noWorkspace(_ id: String) -> AgentError {
    AgentError(.notFound, "there is no workspace \(printable(id)); see `carrel ps`")
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// What is wrong with an image, and where.
package struct ImageError: Error, Equatable, Sendable, CustomStringConvertible {
  package enum Code: Sendable {
    /// The image breaks the specification or tries to leave its place.
    case invalid
    case notFound
    case alreadyExists
    /// A blob is not what its digest or size says.
    case dataLoss
    /// What was given is no image layout.
    case failedPrecondition
    case resourceExhausted
    case unimplemented
    case inUse
  }

  package let code: Code
  package let description: String

  package init(_ code: Code, _ description: String) {
    self.code = code
    self.description = description
  }

  init(_ what: String, _ error: Errno) {
    let code: Code =
      switch error {
      case .noEntry, .notDirectory: .failedPrecondition
      case .noSpace: .resourceExhausted
      case .loop: .invalid
      default: .failedPrecondition
      }
    self.init(code, "\(what): \(error.sentence)")
  }
}

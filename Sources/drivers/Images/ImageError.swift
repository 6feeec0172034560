// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// An error of an image: a code, and a description with its location.
package struct ImageError: Error, Equatable, Sendable, CustomStringConvertible {
  package enum Code: Sendable {
    /// The image violates the specification or tries to escape from its directory.
    case invalid
    case notFound
    case alreadyExists
    /// A blob does not match its digest or size.
    case dataLoss
    /// The source is not an image layout.
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

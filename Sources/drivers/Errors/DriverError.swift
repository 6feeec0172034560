// SPDX-License-Identifier: Apache-2.0

package import Linux

/// The error of a driver. Where a caller has to tell cases apart that are no codes, a driver has a typed error of its own beside it
/// (`JournalError`, `LaneError`, `SupervisorError`).
package struct DriverError: Error, Sendable, CustomStringConvertible {
  /// What a caller can do about it.
  package enum Code: Sendable {
    /// The input violates a rule: an image that tries to escape from its directory, a provider's reply that cannot be read.
    case invalid
    case notFound
    case alreadyExists
    /// The content does not match its digest or size.
    case dataLoss
    /// The host, the disk or the source is not as expected.
    case failedPrecondition
    case resourceExhausted
    case unimplemented
    case inUse
    /// A program or the kernel failed.
    case failed
  }

  package let code: Code
  /// A sentence: the object, what is wrong, what was expected, what to do. It contains no secret.
  package let message: String
  /// The error of the layer below that led to this one.
  package let cause: (any Error)?
  /// Where the error was created, for the agent's log.
  package let location: SourceLocation

  package init(_ code: Code, _ message: String, cause: (any Error)? = nil, file: StaticString = #fileID, line: UInt = #line) {
    self.code = code
    self.message = message
    self.cause = cause
    location = SourceLocation(file: file, line: line)
  }

  /// Creates the error for a system call. `what`: the object and what was done to it.
  package init(_ what: String, _ error: Errno, file: StaticString = #fileID, line: UInt = #line) {
    let code: Code =
      switch error {
      case .noSpace: .resourceExhausted
      case .loop: .invalid
      default: .failedPrecondition
      }
    self.init(code, "\(what): \(error.sentence)", cause: error, file: file, line: line)
  }

  package var description: String { message }
}

extension DriverError: Equatable {
  /// The location and the cause are for people.
  package static func == (one: DriverError, other: DriverError) -> Bool { one.code == other.code && one.message == other.message }
}

/// A line of the source.
package struct SourceLocation: Sendable, CustomStringConvertible {
  package let file: StaticString
  package let line: UInt

  package init(file: StaticString, line: UInt) {
    self.file = file
    self.line = line
  }

  package var description: String { "\(file):\(line)" }
}

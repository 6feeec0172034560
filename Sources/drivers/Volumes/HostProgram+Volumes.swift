// SPDX-License-Identifier: Apache-2.0

internal import Errors
internal import Foundation
internal import HostPrograms

extension HostProgram {
  /// Runs a program to its end. A program that writes to a volume file holds flock(1) on it: if the agent exits in the meantime, the next
  /// agent waits for that program. Throws `DriverError` with `failure` if the exit status is above `tolerated`.
  static func run(_ command: [String], on volume: String? = nil, _ failure: String, upTo tolerated: Int = 0) throws {
    _ = try output(command, on: volume, failure, upTo: tolerated)
  }

  /// Runs a program in the same way, and returns its output without the final newline.
  static func output(_ command: [String], on volume: String? = nil, _ failure: String, upTo tolerated: Int = 0) throws -> String {
    let (status, data): (Int, Data)
    do throws(DriverError) {
      (status, data) = try run((volume.map { ["flock", $0] } ?? []) + command, errors: .merged)
    } catch {
      throw DriverError(.failedPrecondition, "\(failure): \(error.message)", cause: error)
    }
    let text = String(decoding: data, as: UTF8.self).trimmingCharacters(in: .newlines)
    guard status <= tolerated else {
      throw DriverError(.failedPrecondition, "\(failure): \(text.split(separator: "\n").joined(separator: "; ").prefix(500))")
    }
    return text
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Configuration
package import Errors
package import Foundation
internal import HostPrograms

extension CredentialProvider {
  /// Fetches the output of a program or the content of a file. Blocks, at most for the timeout. A controller is not fetched
  /// here: requests to it go over its connection.
  package func fetch(_ fill: (String) -> String) throws(DriverError) -> Data {
    switch self {
    case .file:
      guard let file = FileHandle(forReadingAtPath: name(fill)), let found = try? file.read(upToCount: CredentialProvider.sizeLimit) else {
        throw DriverError(.failed, "\(name(fill)) cannot be read")
      }
      return found
    case .program(let arguments, let seconds): return try CredentialProvider.run(arguments.map(fill), seconds)
    case .controller: throw DriverError(.failed, "\(name(fill)): a controller provides credentials over its connection only")
    }
  }

  private static func run(_ arguments: [String], _ seconds: UInt32) throws(DriverError) -> Data {
    let (status, data) = try HostProgram.run(
      arguments, path: "/usr/local/bin:/usr/bin:/bin", errors: .inherited, limit: sizeLimit, within: seconds)
    guard status == 0 else {
      throw DriverError(.failed, "\(arguments[0]): exited with status \(status); see its messages in the agent's log")
    }
    guard !data.isEmpty else { throw DriverError(.failed, "\(arguments[0]): printed nothing") }
    return data
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// The way a workspace's tool ended, which its supervisor writes before it reports it: lines of `key=value` in the file `exit` of
/// the sandbox directory, durable before the supervisor exits.
package enum ExitRecord: Equatable, Sendable {
  case ended(ExitStatus)
  case failed(StepFailure)

  package static let fileName = "exit"

  package func write(in folder: borrowing Descriptor) throws(Errno) {
    var text = "version=1\n"
    switch self {
    case .ended(.exited(let code)): text += "exited=\(code)\n"
    case .ended(.signalled(let signal)): text += "signalled=\(signal)\n"
    case .failed(let failure): text += "failed=\(failure.errno)\nstep=\(failure.step)\n"
    }
    text += "realtime=\(Clock.realtime)\nboottime=\(Clock.boottime)\n"
    let bytes = Array(text.utf8)
    guard folder.exists(ExitRecord.reserveName), bytes.count <= ExitRecord.reserveBytes else {
      return try folder.replace(ExitRecord.fileName, with: bytes)
    }
    do {
      let file = try folder.open(ExitRecord.reserveName, [.writeOnly, .noFollow])
      // A reader skips empty lines.
      try file.write(bytes + [UInt8](repeating: 0x0A, count: ExitRecord.reserveBytes - bytes.count))
      try file.sync()
    }
    try folder.rename(ExitRecord.reserveName, to: ExitRecord.fileName)
    try folder.sync()
  }

  private static let reserveName = ".exit"
  private static let reserveBytes = 4096

  /// Reserves the space for the record, so that the exit status is not lost if the disk is full later.
  package static func reserve(in folder: borrowing Descriptor) throws(Errno) {
    let file = try folder.open(reserveName, [.writeOnly, .create, .truncate, .noFollow], mode: 0o600)
    try file.write([UInt8](repeating: 0x0A, count: reserveBytes))
  }

  /// Reads the record; returns nil if there is none or it is incomplete, since an unknown exit status is never guessed.
  package static func read(in folder: borrowing Descriptor) throws(Errno) -> ExitRecord? {
    do throws(Errno) {
      let file = try folder.open(fileName, [.readOnly, .noFollow])
      return parse(String(decoding: try file.readAll(limit: 65_536), as: UTF8.self))
    } catch {
      // A record that cannot be read just now exists: the caller retries, and reports no other end in its place.
      guard error == .noEntry else { throw error }
      return nil
    }
  }

  static func parse(_ text: String) -> ExitRecord? {
    var found: ExitRecord?
    var errno: Int32?
    var complete = false
    for line in text.split(separator: "\n") {
      guard let equals = line.firstIndex(of: "=") else { return nil }
      let value = line[line.index(after: equals)...]
      switch line[..<equals] {
      case "version": if value != "1" { return nil }
      case "exited": if let code = Int32(value) { found = .ended(.exited(code)) }
      case "signalled": if let signal = Int32(value) { found = .ended(.signalled(signal)) }
      case "failed": errno = Int32(value)
      case "step": if let errno { found = .failed(StepFailure(String(value), Errno(errno))) }
      case "boottime": complete = true
      default: break
      }
    }
    return complete ? found : nil
  }
}

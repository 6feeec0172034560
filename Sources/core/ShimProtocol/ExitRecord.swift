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
    case .failed(let failure):
      text += "failed=\(failure.errno)\nkind=\(failure.kind.rawValue)\nsubject=\(failure.subject)\nstep=\(failure.step)\n"
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
    var (errno, kind, subject): (Int32?, StepFailure.Kind?, String) = (nil, nil, "")
    var complete = false
    for line in text.split(separator: "\n") {
      guard let equals = line.firstIndex(of: "=") else { return nil }
      let value = line[line.index(after: equals)...]
      switch line[..<equals] {
      case "version": if value != "1" { return nil }
      case "exited": if let code = Int32(value) { found = .ended(.exited(code)) }
      case "signalled": if let signal = Int32(value) { found = .ended(.signalled(signal)) }
      case "failed": errno = Int32(value)
      case "kind": kind = UInt8(value).flatMap { StepFailure.Kind(rawValue: $0) }
      case "subject": subject = String(value)
      case "step":
        guard let errno else { break }
        if let kind {
          found = .failed(StepFailure(String(value), Errno(errno), kind: kind, subject: subject))
        } else {
          found = .failed(StepFailure(legacy: String(value), Errno(errno)))
        }
      case "boottime": complete = true
      default: break
      }
    }
    return complete ? found : nil
  }
}

extension StepFailure {
  /// Creates the failure from its text, which is all that commit 7ede341 recorded and sent. It goes with `LegacyShimConnection`.
  package init(legacy step: String, _ error: Errno) {
    let bytes = step.utf8
    if bytes.starts(with: "find the interpreter".utf8) {
      self.init(step, error, kind: .interpreter)
    } else if bytes.starts(with: "execute".utf8) {
      self.init(step, error, kind: .execution)
    } else if bytes.starts(with: "bind /".utf8) {
      let path = step.dropFirst(5)
      // "bind SOURCE at TARGET".
      var end = path.startIndex
      while end < path.endIndex, !path[end...].utf8.starts(with: " at ".utf8) { end = path.index(after: end) }
      self.init(step, error, kind: .bind, subject: String(path[..<end]))
    } else {
      self.init(step, error)
    }
  }
}

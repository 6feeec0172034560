// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Held by the one agent that owns a state directory, for as long as it lives.
final class StateLock: Sendable {
  private let file: Handle

  /// Fails with the holder's pid where there is one.
  init(_ folder: String) throws {
    let file = Handle(try Descriptor.open(folder + "/lock", [.readWrite, .create, .noFollow], mode: 0o600))
    do throws(Errno) {
      try file.descriptor.lock()
    } catch {
      let line = (try? file.descriptor.read(at: 0, upTo: 32)) ?? []
      let holder = String(decoding: line.prefix { $0 != 0x0A }, as: UTF8.self)
      throw AgentError(.failedPrecondition, "another agent, pid \(holder.isEmpty ? "unknown" : holder), owns \(folder)")
    }
    // Never shorter than what stood there: it is written over.
    try file.descriptor.write(Array("\(Process.id)".utf8) + Array(repeating: 0x0A, count: 16))
    self.file = file
  }
}

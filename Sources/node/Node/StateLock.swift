// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The lock of the one agent that owns a state directory, held as long as the agent lives.
final class StateLock: Sendable {
  private let file: Handle

  /// Locks the directory; fails with the owner's pid if another agent has it.
  init(_ folder: String) throws {
    let file = Handle(try Descriptor.open(folder + "/lock", [.readWrite, .create, .noFollow], mode: 0o600))
    do throws(Errno) {
      try file.descriptor.lock()
    } catch {
      let line = (try? file.descriptor.read(at: 0, upTo: 32)) ?? []
      let holder = String(decoding: line.prefix { $0 != 0x0A }, as: UTF8.self)
      throw AgentError(.failedPrecondition, "another agent, pid \(holder.isEmpty ? "unknown" : holder), owns \(folder)")
    }
    // The padding keeps the text at least as long as an earlier pid: the file is overwritten, not truncated.
    try file.descriptor.write(Array("\(Process.id)".utf8) + Array(repeating: 0x0A, count: 16))
    self.file = file
  }
}

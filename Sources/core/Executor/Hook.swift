// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import ShimProtocol
  package import Linux
#endif

/// A program that runs at a defined point of a launch (OCI runtime-spec, "POSIX-platform hooks").
package struct Hook: Sendable {
  /// The program's path, then its argv, whose first element is the name that it sees.
  package let arguments: [String]
  package let environment: [String]
  /// The time limit in seconds; 0: none.
  package let seconds: UInt32

  package init(arguments: [String], environment: [String], seconds: UInt32) {
    self.arguments = arguments
    self.environment = environment
    self.seconds = seconds
  }

  /// Joins a text whose parts were made before the pid between them was known.
  static func joined(_ parts: [String], pid: Int32) -> String {
    var text = ""
    for (index, part) in parts.enumerated() { text += (index > 0 ? "\(pid)" : "") + part }
    return text
  }

  /// Runs the hook to completion, with the parts of `input`, joined by the pid, on its standard input. Throws `canceled` if the
  /// hook exceeded its time limit and was killed, `io` if it failed.
  package func run(_ input: [String], pid container: Int32) throws(Errno) {
    guard let path = arguments.first else { throw .invalid }
    let text = Handle(try Descriptor.memory("hook", Array(Hook.joined(input, pid: container).utf8)))
    let named = arguments.count > 1 ? Array(arguments.dropFirst()) : arguments
    let payload = Program(arguments: named, environment: environment, directory: "/", file: path)
    let pid: Int32
    do throws(StepFailure) {
      pid = try payload.start(Program.Streams(input: text, output: nil, errors: nil))
    } catch {
      throw Errno(error.errno)
    }
    let process = Handle(try Process.open(pid: pid))
    var poller = Poller()
    let ended = poller.add(process)
    let deadline = Clock.monotonic + Int64(seconds) * 1_000_000_000
    while !poller.isReady(ended) {
      let left = seconds == 0 ? -1 : Int32(clamping: (deadline - Clock.monotonic + 999_999) / 1_000_000)
      if seconds > 0 && left <= 0 {
        try Process.signal(process.descriptor, Signals.kill)
        _ = try Process.reap(pid, wait: true)
        throw .canceled
      }
      try poller.wait(milliseconds: left)
    }
    guard let status = try Process.reap(pid, wait: true)?.status, status == .exited(0) else { throw .io }
  }
}

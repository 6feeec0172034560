// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import ShimProtocol
  package import Linux
#endif

/// A program to execute in the workspace. All its memory is allocated before the fork.
package struct Program {
  /// The standard streams; a stream that is nil is inherited.
  package struct Streams {
    var input: Handle?
    var output: Handle?
    var errors: Handle?
    var isTerminal = false

    package init() {}

    package init(input: Handle?, output: Handle?, errors: Handle?) {
      self.input = input
      self.output = output
      self.errors = errors
    }

    /// Uses this terminal, which becomes the controlling terminal, for all three.
    package init(terminal: Handle) {
      self.init(input: terminal, output: terminal, errors: terminal)
      isTerminal = true
    }
  }

  private let candidates: [String]
  private let arguments: CStrings
  private let environment: CStrings
  private let directory: String

  /// `file`: the path of the program, if it is not the first argument.
  package init(arguments: [String], environment: [String], directory: String, file: String? = nil) {
    candidates = Program.candidates(file ?? arguments.first ?? "", environment)
    self.arguments = CStrings(arguments)
    self.environment = CStrings(environment)
    self.directory = directory
  }

  /// Returns the paths to try, like execvp(3): the name itself if it contains a slash, otherwise one in each directory of PATH.
  static func candidates(_ name: String, _ environment: [String]) -> [String] {
    if name.utf8.contains(UInt8(ascii: "/")) { return [name] }
    var search: Substring = "/usr/local/bin:/usr/bin:/bin"
    for entry in environment where entry.utf8.starts(with: "PATH=".utf8) { search = entry.dropFirst(5) }
    return search.split(separator: ":").map { String($0) + "/" + name }
  }

  /// A forked process that has not yet reported whether its program could be executed.
  package struct Forked: Sendable {
    package let pid: Int32
    /// Readable when the result is known.
    package let report: Handle

    /// Waits for the result; returns why the program could not be executed, or nil if it runs.
    package func outcome() -> StepFailure? {
      do throws(Errno) {
        let bytes = try report.descriptor.readAll(limit: 65_536)
        if bytes.isEmpty { return nil }  // close-on-exec: the program runs
        guard bytes.count > 1, let kind = StepFailure.Kind(rawValue: bytes[1]) else { throw .invalid }
        return StepFailure(String(decoding: bytes.dropFirst(2), as: UTF8.self), Errno(Int32(bytes[0])), kind: kind)
      } catch {
        return StepFailure("fork", error)
      }
    }
  }

  /// Forks and executes; returns when the program runs, throws if it cannot.
  package func start(_ streams: Streams) throws(StepFailure) -> Int32 {
    let forked = try fork(streams)
    if let failure = forked.outcome() { throw failure }
    return forked.pid
  }

  /// Forks; the child executes the program.
  package func fork(_ streams: Streams) throws(StepFailure) -> Forked {
    do throws(Errno) {
      let pipe = try Pipe()
      let pid = try Process.fork()
      if pid == 0 {
        let failure = become(streams)
        let report = [UInt8(truncatingIfNeeded: failure.errno), failure.kind.rawValue] + Array(failure.step.utf8)
        do throws(Errno) { try pipe.writing?.descriptor.write(report) } catch {}
        Process.exit(127)
      }
      // The read would never end while this process has the writing end open.
      pipe.closeWriting()
      return Forked(pid: pid, report: pipe.reading)
    } catch {
      throw StepFailure("fork", error)
    }
  }

  /// Replaces this process by the program; returns only if that fails.
  private func become(_ streams: Streams) -> StepFailure {
    do throws(StepFailure) {
      try Program.redirect(streams)
      try Program.closeDescriptors(from: 3)
      try enterDirectory()
    } catch {
      return error
    }
    return execute()
  }

  /// Starts a new session and redirects the standard streams.
  static func redirect(_ streams: Streams) throws(StepFailure) {
    do throws(Errno) {
      try Process.newSession()
      if let input = streams.input { try Process.place(input.descriptor.number, at: 0) }
      if let output = streams.output { try Process.place(output.descriptor.number, at: 1) }
      if let errors = streams.errors { try Process.place(errors.descriptor.number, at: 2) }
      if streams.isTerminal { try Process.setControllingTerminal(0) }
    } catch {
      throw StepFailure("set up standard streams", error)
    }
  }

  /// Marks every descriptor from `first` on close-on-exec, and resets signals to their defaults.
  static func closeDescriptors(from first: UInt32) throws(StepFailure) {
    do throws(Errno) {
      try Process.closeOnExec(from: first)
      Signals.resetAll()
      try Signals.unblockAll()
    } catch {
      throw StepFailure("close descriptors", error)
    }
  }

  func enterDirectory() throws(StepFailure) {
    do throws(Errno) {
      try Process.changeDirectory(directory)
      if !Process.workingDirectoryIsInsideRoot() && Defence.workingDirectory.isOn { throw .perm }
    } catch {
      throw StepFailure("enter directory " + directory, error)
    }
  }

  /// Executes the first possible candidate; returns only if none can be executed. Until then it calls only execve(2), so that a
  /// filter need not allow more.
  func execute() -> StepFailure {
    Defence.standExposed()
    var worst = Errno.noEntry
    for path in candidates {
      do throws(Errno) {
        try Process.execute(path, arguments, environment)
      } catch {
        // Like execvp(3), report a file that exists but cannot be executed rather than one that does not exist.
        if error != .noEntry && error != .notDirectory { worst = error }
      }
    }
    if worst == .noEntry, let path = candidates.first(where: { Process.exists($0) }) {
      return StepFailure("find the interpreter of " + path, worst, kind: .interpreter)
    }
    return StepFailure("execute " + (candidates.last ?? ""), worst, kind: .execution)
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
  package import Executor
#endif

/// The wait for a process in the foreground, with signals and a terminal's input and output forwarded.
package enum Foreground {
  /// Waits for the process and returns its exit code or, as shells do, 128 plus the number of the signal that killed it.
  package static func wait(for started: Launch.Started) -> Int32 {
    let raw = started.terminal.map { RawTerminal(copyingSizeTo: $0) }
    defer { raw?.restore() }
    let child = started.child
    var inputIsOpen = raw != nil
    do throws(Errno) {
      let signals = Handle(try Signals.descriptor())
      let input = Handle(try Descriptor.open("/dev/stdin", [.readOnly, .noTerminal]))
      var poller = Poller()
      while true {
        poller.removeAll()
        let fromChild = poller.add(child.handle)
        let fromSignals = poller.add(signals)
        let fromTerminal = started.terminal.map { poller.add($0) }
        let fromInput = inputIsOpen ? poller.add(input) : nil
        try poller.wait()
        if let fromTerminal, let terminal = started.terminal, poller.isReady(fromTerminal) { pass(terminal) }
        if let fromInput, let terminal = started.terminal, poller.isReady(fromInput) { inputIsOpen = feed(terminal, input) }
        if poller.isReady(fromSignals) {
          while let number = Signals.next(signals.descriptor) {
            if number == Signals.windowChange { raw?.copySize() } else if number != Signals.child { try? child.signal(number) }
          }
        }
        if poller.isReady(fromChild), let ended = try Process.reap(child.pid) {
          if let terminal = started.terminal { while pass(terminal) {} }
          switch ended.status {
          case .exited(let code): return code
          case .signalled(let number): return 128 + number
          }
        }
      }
    } catch {
      warn("cannot wait: \(error.sentence)")
      return 1
    }
  }

  /// Copies pending output of the terminal; returns false if there is no more.
  @discardableResult
  private static func pass(_ terminal: Handle) -> Bool {
    do throws(Errno) {
      try terminal.descriptor.makeNonBlocking()
      let bytes = try terminal.descriptor.read(upTo: 16_384)
      StandardStream.output.write(bytes)
      return !bytes.isEmpty
    } catch {
      // EIO means that no process has the other end open any more.
      return false
    }
  }

  private static func feed(_ terminal: Handle, _ input: Handle) -> Bool {
    do throws(Errno) {
      let bytes = try input.descriptor.read(upTo: 4096)
      if bytes.isEmpty { return false }
      try terminal.descriptor.write(bytes)
      return true
    } catch {
      return error == .again
    }
  }
}

/// The caller's terminal in raw mode.
private final class RawTerminal {
  private let other: Handle
  private let saved: TerminalMode?

  init(copyingSizeTo other: Handle) {
    self.other = other
    saved = TerminalMode.makeRaw(0)
    copySize()
  }

  func copySize() {
    if let size = Terminal.size(0) {
      do throws(Errno) { try Terminal.resize(other.descriptor, rows: size.rows, columns: size.columns) } catch {}
    }
  }

  func restore() { saved?.restore(0) }
}

// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import Linux
internal import SwiftProtobuf

struct Exec: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Run a program in a workspace, and exit with its exit code.")
  @OptionGroup var common: Common
  @Flag(name: [.short, .long], help: "Pass standard input to it.") var interactive = false
  @Flag(name: [.short, .long], help: "Allocate a terminal for it.") var tty = false
  @Option(name: [.short, .long], help: "NAME=VALUE: a variable of its environment.") var env: [String] = []
  @Option(name: [.short, .long], help: "Its working directory.") var workdir = ""
  @Argument var id: String
  @Argument(parsing: .captureForPassthrough, help: "The program and its arguments.") var command: [String]

  func run() async throws {
    try await reporting {
      var start = Carrel_V1_ExecRequest.Start()
      start.id = id
      start.command = command.first == "--" ? Array(command.dropFirst()) : command
      start.terminal = tty
      start.workingDirectory = workdir
      for text in env {
        guard let equals = text.firstIndex(of: "=") else { throw Failure(code: 2, message: "--env \(text): expected NAME=VALUE") }
        start.environment[String(text[..<equals])] = String(text[text.index(after: equals)...])
      }
      let raw = tty && isatty(0) == 1 ? RawTerminal() : nil
      if tty { start.size = RawTerminal.size() }
      defer { raw?.restore() }
      let (request, interactive) = (start, interactive)
      let code = try await common.withAgent { try await Exec.session($0, request, interactive) }
      raw?.restore()
      if code != 0 { throw ExitCode(code) }
    }
  }

  private static func session(_ client: Common.Client, _ start: Carrel_V1_ExecRequest.Start, _ interactive: Bool) async throws -> Int32 {
    let (input, continuation) = AsyncStream<Carrel_V1_ExecRequest>.makeStream()
    continuation.yield(.with { $0.start = start })
    if interactive {
      // The read has its own thread, because it blocks until the user types.
      Thread.detachNewThread {
        while true {
          let data = FileHandle.standardInput.availableData
          if data.isEmpty { break }
          continuation.yield(.with { $0.stdin = data })
        }
        continuation.yield(.with { $0.closeStdin = true })
      }
    } else {
      continuation.yield(.with { $0.closeStdin = true })
    }
    // The source is made only where it is resumed: Dispatch cannot release a source that was never resumed.
    var resize: (any DispatchSourceSignal)?
    if start.terminal {
      let source = DispatchSource.makeSignalSource(signal: SIGWINCH)
      source.setEventHandler { @Sendable in continuation.yield(.with { $0.resize = RawTerminal.size() }) }
      source.resume()
      resize = source
    }
    defer { resize?.cancel() }
    return try await Workspaces(wrapping: client).exec(
      requestProducer: { writer in for await message in input { try await writer.write(message) } },
      onResponse: { response in
        for try await message in response.messages {
          switch message.message {
          case .stdout(let data): FileHandle.standardOutput.write(data)
          case .stderr(let data): FileHandle.standardError.write(data)
          case .exit(let exit):
            continuation.finish()
            return exit.code
          case .started, nil: break
          }
        }
        continuation.finish()
        return 4
      })
  }
}

/// The caller's terminal in raw mode, which passes every key to the program.
final class RawTerminal {
  private let saved = TerminalMode.makeRaw(0)

  func restore() { saved?.restore(0) }

  static func size() -> Carrel_V1_TerminalSize {
    let size = Terminal.size(0) ?? (0, 0)
    return .with {
      $0.rows = UInt32(size.rows == 0 ? 24 : size.rows)
      $0.columns = UInt32(size.columns == 0 ? 80 : size.columns)
    }
  }
}

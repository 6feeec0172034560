// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import GRPCNIOTransportHTTP2

@main
struct Carrel: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "carrel", abstract: "Drives the node agent carreld through its socket.",
    discussion: """
      Exit codes: 0 done, 1 the agent refused or failed, 2 wrong usage, 3 no such object, 4 the agent cannot be
      reached; `exec` and `launch --wait` of a batch run pass on the program's own.
      Shell completion: carrel --generate-completion-script bash
      """,
    version: "0.2.0",
    subcommands: [
      Launch.self, List.self, Get.self, Explain.self, Logs.self, Exec.self, Stop.self, Remove.self, Events.self, Top.self,
      Node.self, DrainCommand.self, Uncordon.self, PlanCommand.self, Credentials.self, ImageCommand.self, DatasetCommand.self,
      HomeCommand.self,
      EnvironmentCommand.self,
    ])

  static func main() async {
    do {
      var command = try parseAsRoot()
      if var asynchronous = command as? any AsyncParsableCommand {
        try await asynchronous.run()
      } else {
        try command.run()
      }
    } catch {
      guard exitCode(for: error) == .validationFailure else { exit(withError: error) }
      FileHandle.standardError.write(Data((fullMessage(for: error) + "\n").utf8))
      // The exit code documented above replaces the library's 64 (EX_USAGE).
      Foundation.exit(2)
    }
  }
}

/// The options that every command has: where the agent is and how to print.
struct Common: ParsableArguments {
  @Option(name: .long, help: "The agent's socket (or CARREL_SOCKET).")
  var socket = ProcessInfo.processInfo.environment["CARREL_SOCKET"] ?? "/run/carrel/carrel.sock"

  @Option(name: [.short, .long], help: "table, json or yaml; cloudevents for events.")
  var output = OutputFormat.table

  @Option(name: .long, help: "Seconds to wait for a reply; streams, copies and stops have no limit.")
  var requestTimeout: UInt32 = 60

  typealias Client = GRPCClient<HTTP2ClientTransport.Posix>

  /// Connects, runs `body`, and converts errors to messages and exit codes.
  func withAgent<T: Sendable>(_ body: @Sendable @escaping (Client) async throws -> T) async throws -> T {
    var config = HTTP2ClientTransport.Posix.Config.defaults
    config.connection.flushCoalescing = nil
    guard FileManager.default.fileExists(atPath: socket) else {
      throw Failure(code: 4, message: "\(socket): agent not found; start carreld, or set its socket with --socket")
    }
    let begun = ContinuousClock.now
    do {
      let transport = try HTTP2ClientTransport.Posix(
        target: .unixDomainSocket(path: socket), transportSecurity: .plaintext, config: config,
        serviceConfig: deadlines)
      return try await withGRPCClient(transport: transport) { try await body($0) }
    } catch let error as RPCError {
      let code: Int32 =
        switch error.code {
        case .notFound: 3
        case .unavailable, .deadlineExceeded: 4
        default: 1
        }
      // The agent has a limit of its own, with a message that says more.
      if error.code == .deadlineExceeded, begun.duration(to: .now) >= .seconds(Int64(requestTimeout)) {
        throw Failure(code: code, message: "the agent did not reply within \(requestTimeout) s; the request may still be executed")
      }
      throw Failure(code: code, message: error.message.isEmpty ? "\(error.code)" : error.message)
    }
  }
}

extension Common {
  /// The deadline of every call, except streams, copies and waits for the end of a tool.
  private var deadlines: ServiceConfig {
    let workspaces = Carrel_V1_WorkspaceService.descriptor.fullyQualifiedService
    let unbound = ["Watch", "Logs", "Exec", "Stop"].map { MethodConfig.Name(service: workspaces, method: $0) }
    let images = MethodConfig.Name(service: Carrel_V1_ImageService.descriptor.fullyQualifiedService, method: "ImportImage")
    let storage = Carrel_V1_StorageService.descriptor.fullyQualifiedService
    let copies = ["SnapshotHome", "RestoreHome", "CloneHome", "ChangeEnvironment", "ListHomes", "ListEnvironments"].map {
      MethodConfig.Name(service: storage, method: $0)
    }
    return ServiceConfig(methodConfig: [
      MethodConfig(names: unbound + [images] + copies),
      MethodConfig(names: [MethodConfig.Name(service: "")], timeout: .seconds(Int64(requestTimeout))),
    ])
  }
}

/// A failure, with a message for people and an exit code for scripts.
struct Failure: Error {
  let code: Int32
  let message: String
}

extension AsyncParsableCommand {
  /// Prints a failure as one line and exits with its code.
  func reporting(_ body: () async throws -> Void) async throws {
    do {
      try await body()
    } catch let failure as Failure {
      Printer.note("carrel: \(failure.message)")
      throw ExitCode(failure.code)
    }
  }
}

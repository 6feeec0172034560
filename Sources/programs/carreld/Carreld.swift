// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import Agent
internal import ArgumentParser
internal import CLinux
internal import Foundation
internal import Linux
internal import Logging
internal import ServiceLifecycle
internal import ControllerClient
internal import GRPC
internal import UnixSignals
internal import Workspaces

/// The version that this build reports.
let version = "0.2.0"

@main
struct Carreld: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "carreld", abstract: "The node agent of Carrel: launches and supervises workspaces.",
    version: version)

  @Option(name: .long, help: "The configuration file.")
  var config = "/etc/carrel/carreld.yaml"

  @Flag(name: .long, help: "Check the configuration and exit: 0 if it is valid, 78 if not.")
  var checkConfig = false

  @Option(name: .long, help: "The lowest level to log: debug, info, notice, warning, error.")
  var logLevel = "info"

  func run() async throws {
    let settings: Configuration
    do {
      settings = try Carreld.read(config)
    } catch {
      Carreld.complain("\(config): \(error)")
      throw ExitCode(78)  // EX_CONFIG (sysexits.h)
    }
    if checkConfig {
      print("\(config): valid")
      return
    }
    Process.keepSecrets()
    LoggingSystem.bootstrap { _ in AgentLogHandler() }
    var logger = Logger(label: "carreld")
    logger.logLevel = Logger.Level(rawValue: logLevel) ?? .info
    // The kernel then reaps supervisors that exit; how a tool ended is in its exit record, not in the result of wait(2).
    signal(SIGCHLD, SIG_IGN)
    signal(SIGPIPE, SIG_IGN)
    do {
      try await serve(settings, logger)
    } catch {
      logger.critical("ended", metadata: ["error": "\(error)"])
      throw ExitCode(1)
    }
  }

  private func serve(_ settings: Configuration, _ logger: Logger) async throws {
    let node = try Node(configuration: settings, logger: logger)
    // The socket is bound before recovery, so that two agents never recover the same state, and served after it.
    let links = settings.controllers.map { ControllerClient(node: node, controller: $0, version: version, logger: logger) }
    let server = try Server(node: node, logger: logger, version: version, controllers: links.map { link in { try await link.status() } })
    for sentence in node.facts.degraded { logger.notice("degraded", metadata: ["what": "\(sentence)"]) }
    var services = ServiceGroupConfiguration(
      services: [
        .init(service: NodeRunner(node: node)),
        .init(service: ServerService(node: node, server: server, logger: logger)),
        .init(service: SystemdService(node: node)),
      ] + links.map { .init(service: LinkService(node: node, link: $0)) }, gracefulShutdownSignals: [.sigterm, .sigint], logger: logger)
    // The limit cuts off the calls of a client that does not read.
    services.maximumGracefulShutdownDuration = .seconds(5)
    // A suspended client keeps its connection open, and would delay the shutdown for ever.
    let patience = Task {
      for await _ in await UnixSignalsSequence(trapping: .sigterm, .sigint) {
        try await Task.sleep(for: .seconds(6))
        await node.retire()
        logger.notice("ended; workspaces go on, and a client did not close its connection")
        Foundation.exit(0)
      }
    }
    defer { patience.cancel() }
    do { try await ServiceGroup(configuration: services).run() } catch is CancellationError {}
    await node.retire()
    // Workspaces go on, and the next agent adopts them.
    logger.notice("ended; workspaces go on")
  }

  private static func read(_ path: String) throws -> Configuration {
    guard let text = try? String(contentsOfFile: path, encoding: .utf8) else {
      throw InvalidField("", "cannot be read")
    }
    return try Configuration(yaml: text)
  }

  private static func complain(_ text: String) {
    FileHandle.standardError.write(Data("carreld: \(text)\n".utf8))
  }
}

/// The first service, and therefore the last to end, because the others need it.
private struct NodeRunner: Service {
  let node: Node
  func run() async throws {
    try await cancelWhenGracefulShutdown {
      try await withThrowingTaskGroup(of: Void.self) { group in
        group.addTask { try await node.run() }
        group.addTask {
          do { try await node.untilJournalFails() } catch is CancellationError {} catch {
            // The process exits at once, because nothing that it would still do can be made durable.
            exit(1)
          }
        }
        defer { group.cancelAll() }
        try await group.next()
      }
    }
  }
}

private struct LinkService: Service {
  let node: Node
  let link: ControllerClient
  func run() async throws {
    try await cancelWhenGracefulShutdown {
      try await node.untilRecovered()
      await link.run()
    }
  }
}

private struct ServerService: Service {
  let node: Node
  let server: Server
  let logger: Logger
  func run() async throws {
    try await node.untilRecovered()
    logger.notice("serving", metadata: ["socket": "\(node.configuration.socket)", "version": "\(version)"])
    try await server.run()
  }
}

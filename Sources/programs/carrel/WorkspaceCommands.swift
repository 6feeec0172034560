// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import SwiftProtobuf

typealias Workspaces = Carrel_V1_WorkspaceService.Client

struct Launch: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Launch a workspace from a spec.")
  @OptionGroup var common: Common
  @Argument(help: "A spec as YAML; - for standard input.", completion: .file(extensions: ["yaml"])) var file: String
  @Option(name: .long, help: "NAME=FILE: the name of a credential file, and the file with its content.") var credential: [String] = []
  @Option(name: .long, help: "The key of an encrypted home: a file of 32 to 64 bytes.", completion: .file()) var homeKey: String?
  @Option(name: .long, help: "Use this id instead of the spec's.") var id: String?
  @Flag(inversion: .prefixedNo, help: "Follow the start until the workspace is ready, or a batch run has ended.") var wait = true

  func run() async throws {
    try await reporting {
      var manifest = try Launch.read(file)
      if let id {
        manifest = manifest.split(separator: "\n", omittingEmptySubsequences: false)
          .map { $0.hasPrefix("id:") ? "id: \(id)" : String($0) }.joined(separator: "\n")
      }
      let request = Carrel_V1_LaunchRequest.with {
        $0.manifest = manifest
        $0.credentials = (try? credential.map(Launch.credential)) ?? []
        $0.homeKey = homeKey.flatMap { FileManager.default.contents(atPath: $0) } ?? Data()
      }
      guard homeKey == nil || !request.homeKey.isEmpty else {
        throw Failure(code: 2, message: "--home-key \(homeKey ?? ""): cannot be read, or is empty")
      }
      guard request.credentials.count == credential.count else {
        throw Failure(code: 2, message: "--credential: expected NAME=FILE with a file that can be read")
      }
      let (format, wait) = (common.output, wait)
      let code = try await common.withAgent { client in
        let service = Workspaces(wrapping: client)
        let head = try await Carrel_V1_NodeService.Client(wrapping: client).info(.init()).head
        let answer = try await service.launch(request)
        let id = answer.workspace.spec.id
        if !answer.created { Printer.note("workspace \(id) already exists with this spec") }
        guard wait else {
          if format == .table { print(id) } else { try Printer.print([answer.workspace], as: format, single: true) }
          return Int32(0)
        }
        return try await Launch.follow(service, id, after: answer.created ? head : 0, format)
      }
      if code != 0 { throw ExitCode(code) }
    }
  }

  static func read(_ file: String) throws -> String {
    let data = file == "-" ? FileHandle.standardInput.readDataToEndOfFile() : FileManager.default.contents(atPath: file)
    guard let data else { throw Failure(code: 2, message: "\(file): cannot be read") }
    return String(decoding: data, as: UTF8.self)
  }

  static func credential(_ text: String) throws -> Carrel_V1_Credential {
    guard let equals = text.firstIndex(of: "="), let data = FileManager.default.contents(atPath: String(text[text.index(after: equals)...]))
    else { throw Failure(code: 2, message: "--credential \(text): expected NAME=FILE with a file that can be read") }
    return .with {
      $0.name = String(text[..<equals])
      $0.data = data
    }
  }

  /// Prints events as they happen. Returns the exit code: that of a batch run, 1 for a failure.
  private static func follow(_ service: Workspaces<some ClientTransport>, _ id: String, after cursor: UInt64, _ format: OutputFormat)
    async throws -> Int32
  {
    let code = try await service.watch(
      .with {
        $0.cursor = cursor
        $0.workspace = id
      }
    ) { response -> Int32 in
      for try await message in response.messages where message.hasEvent {
        if format == .table { Printer.note(Printer.event(message.event)) }
        // This is not the end: a rescue has set files aside, and another attempt follows.
        if message.event.attributes["rescue"] == "follows" { continue }
        switch message.event.state {
        case .ready, .failed, .stopped:
          let workspace = try await service.get(.with { $0.id = id }).workspace
          let batch = workspace.url.isEmpty && message.event.state == .ready
          if batch { continue }
          if format != .table { try Printer.print([workspace], as: format, single: true) }
          if message.event.state == .ready {
            if format == .table {
              for phase in workspace.phases { Printer.note(String(format: "  %-12@ %8.1f ms", phase.name as NSString, phase.milliseconds)) }
              print(workspace.url)
            }
            return 0
          }
          let reason = message.event.reason
          if reason.code == "Exited" { return reason.exitCode }
          Printer.note("carrel: workspace \(id): \(reason.code): \(reason.message); see `carrel logs \(id)`")
          return reason.hasSignal ? 128 + reason.signal : 1
        default: continue
        }
      }
      return 4
    }
    return code
  }
}

struct List: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "ps", abstract: "List workspaces.")
  @OptionGroup var common: Common
  @Option(name: .long, help: "Only this owner's.") var owner = ""
  @Option(name: [.short, .long], help: "KEY=VALUE; only those with this label.") var label: [String] = []
  @Option(name: .long, help: "Only those in this state.") var state: [String] = []

  func run() async throws {
    try await reporting {
      var request = Carrel_V1_ListRequest()
      request.owner = owner
      for text in label {
        guard let equals = text.firstIndex(of: "=") else { throw Failure(code: 2, message: "--label \(text): expected KEY=VALUE") }
        request.labels[String(text[..<equals])] = String(text[text.index(after: equals)...])
      }
      for text in state {
        guard let known = Carrel_V1_State.allCases.first(where: { Printer.state($0) == text }) else {
          throw Failure(code: 2, message: "--state \(text): expected pending, preparing, starting, ready, stopping, stopped or failed")
        }
        request.states.append(known)
      }
      let filter = request
      let found = try await common.withAgent { try await Workspaces(wrapping: $0).list(filter).workspaces }
      guard common.output == .table else { return try Printer.print(found, as: common.output) }
      Printer.table(
        ["ID", "OWNER", "TOOL", "STATE", "ADDRESS", "CREATED", "REASON"],
        found.map {
          [
            $0.spec.id, $0.spec.owner.name, $0.spec.tool, Printer.state($0.state), $0.address, $0.created,
            $0.hasReason ? $0.reason.message : "",
          ]
        })
    }
  }
}

struct Get: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Show one workspace, with its URL and token.")
  @OptionGroup var common: Common
  @Argument var id: String

  func run() async throws {
    try await reporting {
      let id = id
      let found = try await common.withAgent { try await Workspaces(wrapping: $0).get(.with { $0.id = id }).workspace }
      guard common.output == .table else { return try Printer.print([found], as: common.output, single: true) }
      var rows = [
        ["id", found.spec.id], ["owner", "\(found.spec.owner.name) (\(found.spec.owner.uid):\(found.spec.owner.gid))"],
        ["tool", found.spec.tool], ["image", "\(found.spec.image) \(found.imageDigest)"], ["state", Printer.state(found.state)],
        ["address", found.address], ["host ids", found.hostIds], ["created", found.created], ["attempt", "\(found.attempt)"],
      ]
      for dataset in found.datasets {
        rows.append([
          "dataset",
          "\(dataset.target) \(dataset.writable ? "rw" : "ro") \(dataset.dataset.isEmpty ? dataset.source : dataset.dataset)\(dataset.expires.isEmpty ? "" : " until " + dataset.expires)",
        ])
      }
      for condition in found.conditions { rows.append(["condition", condition]) }
      if found.hasReason { rows.append(["reason", "\(found.reason.code): \(found.reason.message)"]) }
      if !found.url.isEmpty { rows.append(["url", found.url]) }
      for phase in found.phases { rows.append(["phase", String(format: "%@ %.1f ms", phase.name, phase.milliseconds)]) }
      Printer.table(["FIELD", "VALUE"], rows)
    }
  }
}

struct Stop: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Stop workspaces: SIGTERM, and SIGKILL after the grace period.")
  @OptionGroup var common: Common
  @Argument var ids: [String]
  @Option(name: [.short, .long], help: "Seconds between SIGTERM and SIGKILL.") var time: UInt32?

  func run() async throws {
    try await reporting {
      let (ids, time) = (ids, time)
      let user = ProcessInfo.processInfo.environment["SUDO_USER"] ?? NSUserName()
      try await common.withAgent { client in
        for id in ids {
          let stopped = try await Workspaces(wrapping: client).stop(
            .with {
              $0.id = id
              if let time { $0.gracePeriodSeconds = time }
              $0.by = "\(user) (carrel stop)"
            })
          Printer.note("\(id): \(stopped.workspace.reason.message)")
        }
      }
    }
  }
}

struct Remove: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "rm", abstract: "Remove stopped workspaces. Homes stay.")
  @OptionGroup var common: Common
  @Argument var ids: [String]
  @Flag(name: [.short, .long], help: "Stop workspaces that still run first.") var force = false

  func run() async throws {
    try await reporting {
      let (ids, force) = (ids, force)
      try await common.withAgent { client in
        let service = Workspaces(wrapping: client)
        for id in ids {
          if force {
            _ = try await service.stop(
              .with {
                $0.id = id
                $0.by = "carrel rm --force"
              })
          }
          _ = try await service.delete(.with { $0.id = id })
        }
      }
    }
  }
}

struct PlanCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "plan", abstract: "Show the launch plan of a spec, operation by operation.")
  @OptionGroup var common: Common
  @Argument(help: "A spec as YAML; - for standard input.", completion: .file(extensions: ["yaml"])) var file: String

  func run() async throws {
    try await reporting {
      let manifest = try Launch.read(file)
      let plan = try await common.withAgent { try await Workspaces(wrapping: $0).plan(.with { $0.manifest = manifest }) }
      guard common.output == .table else { return try Printer.print([plan], as: common.output, single: true) }
      for (index, operation) in plan.operations.enumerated() { Printer.line(String(format: "%3d  %@", index + 1, operation)) }
    }
  }
}

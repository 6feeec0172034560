// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import SwiftProtobuf

struct Logs: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Show the output of a workspace's tool.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Flag(name: [.short, .long], help: "Follow the output until the tool ends.") var follow = false
  @Flag(name: [.short, .long], help: "Show time and stream of every line.") var timestamps = false
  @Option(name: .long, help: "Begin at this byte of the log.") var offset: UInt64 = 0

  func run() async throws {
    try await reporting {
      let request = Carrel_V1_LogsRequest.with {
        $0.id = id
        $0.offset = offset
        $0.follow = follow
      }
      let timestamps = timestamps
      try await common.withAgent { client in
        try await Workspaces(wrapping: client).logs(request) { response in
          for try await message in response.messages { Logs.show([UInt8](message.lines), timestamps) }
        }
      }
    }
  }

  /// Converts CRI lines to the tool's output: a `P` line continues in the next one, an `F` line ends.
  static func show(_ bytes: [UInt8], _ timestamps: Bool) {
    if timestamps { return FileHandle.standardOutput.write(Data(bytes)) }
    for line in bytes.split(separator: 0x0A, omittingEmptySubsequences: true) {
      let fields = line.split(separator: 0x20, maxSplits: 3, omittingEmptySubsequences: false)
      guard fields.count == 4 else { continue }
      let target = fields[1].elementsEqual("stderr".utf8) ? FileHandle.standardError : FileHandle.standardOutput
      target.write(Data(fields[3]) + (fields[2].elementsEqual("F".utf8) ? Data([0x0A]) : Data()))
    }
  }
}

struct Events: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Show the events of this node, in order.")
  @OptionGroup var common: Common
  @Flag(name: [.short, .long], help: "Follow events as they happen.") var follow = false
  @Option(name: .long, help: "Begin after this sequence number.") var cursor: UInt64 = 0
  @Option(name: .long, help: "Only this workspace's.") var workspace = ""

  func run() async throws {
    try await reporting {
      let request = Carrel_V1_WatchRequest.with {
        $0.cursor = cursor
        $0.workspace = workspace
        $0.untilHead = !follow
      }
      let format = common.output
      try await common.withAgent { client in
        let node = try await Carrel_V1_NodeService.Client(wrapping: client).info(.init()).node
        try await Workspaces(wrapping: client).watch(request) { response in
          for try await message in response.messages {
            switch format {
            case .table: Printer.line(message.hasGap ? Printer.gap(message.gap) : Printer.event(message.event))
            case .cloudevents: print(try CloudEvent.line(message, node))
            case .json, .yaml: print(try message.jsonString())
            }
            fflush(nil)
          }
        }
      }
    }
  }
}

struct Top: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Show the resource usage of workspaces.")
  @OptionGroup var common: Common
  @Argument var ids: [String] = []

  func run() async throws {
    try await reporting {
      let ids = ids
      let (before, after) = try await common.withAgent { client in
        let service = Workspaces(wrapping: client)
        let first = try await service.stats(.with { $0.ids = ids }).stats
        try await Task.sleep(for: .milliseconds(500))
        return (first, try await service.stats(.with { $0.ids = ids }).stats)
      }
      guard common.output == .table else { return try Printer.print(after, as: common.output) }
      let earlier = Dictionary(uniqueKeysWithValues: before.map { ($0.id, $0.cpuNanoseconds) })
      Printer.table(
        ["ID", "CPU", "OF", "MEMORY", "PEAK", "OF", "PROCESSES", "OF", "OOM KILLS", "HOME", "OF"],
        after.map { stats in
          let used = Double(stats.cpuNanoseconds - min(earlier[stats.id] ?? stats.cpuNanoseconds, stats.cpuNanoseconds)) / 5e8
          return [
            stats.id, String(format: "%.2f", used), String(format: "%.2f", stats.cpuLimit), Printer.bytes(stats.memoryBytes),
            Printer.bytes(stats.memoryPeakBytes), Printer.bytes(stats.memoryLimitBytes), "\(stats.pids)", "\(stats.pidsLimit)",
            "\(stats.oomKills)", stats.hasHome ? Printer.bytes(stats.home.usedBytes) : "-",
            stats.hasHome ? Printer.bytes(stats.home.limitBytes) : "-",
          ]
        })
    }
  }
}

struct ImageCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "image", abstract: "Manage the images of this node.",
    subcommands: [ListImages.self, Import.self, Inspect.self, Build.self, RemoveImage.self])

  typealias Images = Carrel_V1_ImageService.Client

  struct ListImages: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "ls", abstract: "List images.")
    @OptionGroup var common: Common
    func run() async throws {
      try await reporting {
        let found = try await common.withAgent { try await Images(wrapping: $0).listImages(.init()).images }
        guard common.output == .table else { return try Printer.print(found, as: common.output) }
        Printer.table(
          ["NAME", "DIGEST", "SIZE", "LAYERS"],
          found.map { [$0.name, String($0.digest.prefix(19)), Printer.bytes($0.sizeBytes), "\($0.layers)"] })
      }
    }
  }

  struct Import: AsyncParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Import an OCI layout directory, an oci-archive or a docker-archive.")
    @OptionGroup var common: Common
    @Argument(completion: .file()) var path: String
    @Option(name: .long, help: "The name of the image; default: the name in the archive.") var name = ""
    func run() async throws {
      try await reporting {
        let request = Carrel_V1_ImportImageRequest.with {
          $0.path = path.hasPrefix("/") ? path : FileManager.default.currentDirectoryPath + "/" + path
          $0.name = name
        }
        try await common.withAgent { client in
          try await Images(wrapping: client).importImage(request) { response in
            for try await message in response.messages {
              switch message.message {
              case .progress(let line): Printer.note(line)
              case .image(let image): Printer.line("\(image.name)  \(image.digest)")
              case nil: break
              }
            }
          }
        }
      }
    }
  }

  struct Inspect: AsyncParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show an image and its configuration.")
    @OptionGroup var common: Common
    @Argument var name: String
    func run() async throws {
      try await reporting {
        let name = name
        let image = try await common.withAgent { try await Images(wrapping: $0).inspectImage(.with { $0.name = name }).image }
        try Printer.print([image], as: common.output == .table ? .json : common.output, single: true)
      }
    }
  }

  struct Build: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Build an image of a source tree's images/ with its hack/build-image, and import it.")
    @OptionGroup var common: Common
    @Argument(help: "jupyterlab, r or rstudio.") var name: String
    @Option(name: .long, help: "The source tree.") var tree = FileManager.default.currentDirectoryPath
    @Argument(parsing: .captureForPassthrough, help: "Passed on to hack/build-image.") var options: [String] = []
    func run() async throws {
      try await reporting {
        let script = tree + "/hack/build-image"
        guard FileManager.default.isExecutableFile(atPath: script) else {
          throw Failure(code: 2, message: "\(script): not found; set the source tree with --tree")
        }
        let process = Foundation.Process()
        process.executableURL = URL(fileURLWithPath: script)
        process.arguments = [name] + options
        try process.run()
        process.waitUntilExit()
        guard process.terminationStatus == 0 else { throw Failure(code: 1, message: "hack/build-image \(name) failed") }
        var importing = Import()
        importing.common = common
        importing.path = "\(tree)/.cache/images/\(name).tar"
        importing.name = "\(name):latest"
        try await importing.run()
      }
    }
  }

  struct RemoveImage: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "rm", abstract: "Remove an image.")
    @OptionGroup var common: Common
    @Argument var name: String
    func run() async throws {
      try await reporting {
        let name = name
        _ = try await common.withAgent { try await Images(wrapping: $0).removeImage(.with { $0.name = name }) }
      }
    }
  }
}

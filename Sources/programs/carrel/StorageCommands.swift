// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import SwiftProtobuf

private typealias Storage = Carrel_V1_StorageService.Client

struct DatasetCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dataset", abstract: "List datasets and project folders, and attach them to running workspaces.",
    subcommands: [Datasets.self, Attach.self, Detach.self])
}

struct Datasets: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "ls", abstract: "List the datasets that are registered on the node.")
  @OptionGroup var common: Common
  @Option(name: .long, help: "Only what this owner may have.") var owner = ""

  func run() async throws {
    try await reporting {
      let owner = owner
      let found = try await common.withAgent { try await Storage(wrapping: $0).listDatasets(.with { $0.owner = owner }) }
      guard common.output == .table else { return try Printer.print([found], as: common.output, single: true) }
      Printer.table(
        ["NAME", "VERSION", "READERS", "WRITERS", "PATH"],
        found.datasets.map { dataset in
          let members = dataset.members.keys.sorted().joined(separator: " ")
          return [
            dataset.name, dataset.version, members.isEmpty ? dataset.readers.joined(separator: " ") : members,
            members.isEmpty ? dataset.writers.joined(separator: " ") : "the same", dataset.path,
          ]
        })
      for problem in found.problems { Printer.note("carrel: \(problem)") }
    }
  }
}

struct Attach: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Mount a dataset in a workspace that runs, or change its mode and end there.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Argument(help: "NAME or NAME@VERSION") var dataset: String
  @Argument(help: "The path in the workspace, such as /data/sales.") var target: String
  @Flag(name: .long, help: "Attach it writable.") var write = false
  @Option(name: .long, help: "Attach only this directory of it.") var path = ""
  @Option(name: .long, help: "Detach it after this time: 30m, 8h, 2d.") var expires: String?

  func run() async throws {
    try await reporting {
      let lifetime = try expires.map { try Printer.seconds($0, "--expires") } ?? 0
      let (id, dataset, target, write, path) = (id, dataset, target, write, path)
      let answer = try await common.withAgent {
        try await Storage(wrapping: $0).attachDataset(
          .with {
            $0.id = id
            $0.lifetimeSeconds = lifetime
            $0.dataset = .with {
              $0.dataset = dataset
              $0.target = target
              $0.writable = write
              $0.path = path
            }
          })
      }
      guard common.output == .table else { return try Printer.print([answer.workspace], as: common.output, single: true) }
    }
  }
}

struct Detach: AsyncParsableCommand {
  enum Policy: String, ExpressibleByArgument, CaseIterable { case refuse, lazy, stop }

  static let configuration = CommandConfiguration(abstract: "Detach a dataset from a running workspace.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Argument(help: "The path in the workspace.") var target: String
  @Option(name: .long, help: "If programs have files of it open: refuse, lazy (they keep them), stop (they are stopped).")
  var holders = Policy.refuse

  func run() async throws {
    try await reporting {
      let (id, target, holders) = (id, target, holders)
      let found = try await common.withAgent {
        try await Storage(wrapping: $0).detachDataset(
          .with {
            $0.id = id
            $0.target = target
            $0.holders =
              switch holders {
              case .refuse: .refuse
              case .lazy: .lazy
              case .stop: .stop
              }
          })
      }
      guard common.output == .table else { return try Printer.print([found], as: common.output, single: true) }
      for holder in found.holders { Printer.note("\(holder.name) (pid \(holder.pid)) had open: \(holder.what)") }
    }
  }
}

struct HomeCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "home", abstract: "Manage homes: snapshots, copies and removed homes.",
    subcommands: [Homes.self, SnapshotHome.self, RestoreHome.self, CloneHome.self, RemoveHome.self, RecoverHome.self, GrowHome.self])
}

struct Homes: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "ls", abstract: "List homes, their snapshots and removed homes.")
  @OptionGroup var common: Common
  @Argument(help: "Only this owner's.") var owner: String?

  func run() async throws {
    try await reporting {
      let owner = owner ?? ""
      let homes = try await common.withAgent { try await Storage(wrapping: $0).listHomes(.with { $0.owner = owner }).homes }
      guard common.output == .table else { return try Printer.print(homes, as: common.output) }
      var rows: [[String]] = []
      for home in homes {
        rows.append([home.owner, home.driver.isEmpty ? "-" : home.driver, Printer.bytes(home.bytes), home.inUse ? "in use" : "", ""])
        for entry in home.snapshots { rows.append([home.owner, "snapshot", Printer.bytes(entry.bytes), entry.name, entry.created]) }
        for entry in home.removed { rows.append([home.owner, "removed", Printer.bytes(entry.bytes), entry.name, entry.created]) }
      }
      Printer.table(["OWNER", "KIND", "SIZE", "NAME", "CREATED"], rows)
    }
  }
}

extension Common {
  /// Prints the progress of a copy; returns the snapshot that it made.
  fileprivate func following(
    _ call:
      @escaping @Sendable (
        Client, @escaping @Sendable (StreamingClientResponse<Carrel_V1_HomeProgress>) async throws -> Carrel_V1_HomeSnapshot
      )
      async throws -> Carrel_V1_HomeSnapshot
  ) async throws -> Carrel_V1_HomeSnapshot {
    let isTable = output == .table
    let done = try await withAgent { client in
      try await call(client) { response in
        var done = Carrel_V1_HomeSnapshot()
        for try await message in response.messages {
          if message.hasDone { done = message.done } else if isTable { Printer.note("\(Printer.bytes(message.bytes)) copied") }
        }
        return done
      }
    }
    if isTable { if !done.name.isEmpty { print(done.name) } } else { try Printer.print([done], as: output, single: true) }
    return done
  }
}

struct SnapshotHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "snapshot", abstract: "Make a snapshot of a home, also while it is in use.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Option(name: .long, help: "A part of the snapshot's name.") var label = ""

  func run() async throws {
    try await reporting {
      let (owner, label) = (owner, label)
      _ = try await common.following { client, read in
        try await Storage(wrapping: client).snapshotHome(
          .with {
            $0.owner = owner
            $0.label = label
          }, onResponse: read)
      }
    }
  }
}

struct RestoreHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "restore", abstract: "Replace a home by a snapshot. What it contained becomes a snapshot, whose name is printed.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Argument var snapshot: String

  func run() async throws {
    try await reporting {
      let (owner, snapshot) = (owner, snapshot)
      _ = try await common.following { client, read in
        try await Storage(wrapping: client).restoreHome(
          .with {
            $0.owner = owner
            $0.snapshot = snapshot
          }, onResponse: read)
      }
    }
  }
}

struct CloneHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "clone", abstract: "Copy a snapshot to an owner who has no home yet.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Argument var snapshot: String
  @Argument(help: "The other owner's name.") var other: String
  @Option(name: .long, help: "Storage uid of the other owner.") var uid: UInt32
  @Option(name: .long, help: "Storage gid; default: the uid.") var gid: UInt32?

  func run() async throws {
    try await reporting {
      let (owner, snapshot, other, uid, gid) = (owner, snapshot, other, uid, gid ?? uid)
      _ = try await common.following { client, read in
        try await Storage(wrapping: client).cloneHome(
          .with {
            $0.owner = owner
            $0.snapshot = snapshot
            $0.to = .with {
              $0.name = other
              $0.uid = uid
              $0.gid = gid
            }
          }, onResponse: read)
      }
    }
  }
}

struct RemoveHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "rm", abstract: "Remove a home. It can be recovered for some days (storage.removedHomesDays), then it is deleted.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Option(name: .long, help: "The owner's name once more, to confirm; prompted for on a terminal.") var again: String?

  func run() async throws {
    try await reporting {
      var again = again
      if again == nil, isatty(0) == 1 {
        Printer.note("to confirm, enter the name of the owner once more:")
        again = readLine()
      }
      let (owner, name) = (owner, again ?? "")
      let answer = try await common.withAgent {
        try await Storage(wrapping: $0).removeHome(
          .with {
            $0.owner = owner
            $0.again = name
          })
      }
      guard common.output == .table else { return try Printer.print([answer], as: common.output, single: true) }
      Printer.note("until \(answer.until): carrel home recover \(owner) \(answer.removed.name)")
      print(answer.removed.name)
    }
  }
}

struct RecoverHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "recover", abstract: "Recover a removed home.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Argument(help: "The removed home, if there are several; default: the last.") var name: String?

  func run() async throws {
    try await reporting {
      let (owner, name) = (owner, name ?? "")
      _ = try await common.withAgent {
        try await Storage(wrapping: $0).recoverHome(
          .with {
            $0.owner = owner
            $0.removed = name
          })
      }
    }
  }
}

struct GrowHome: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "grow", abstract: "Make an image home larger, also while it is in use where its file system can.")
  @OptionGroup var common: Common
  @Argument var owner: String
  @Argument(help: "The new size, such as 20Gi; a home can only grow.") var size: String

  func run() async throws {
    try await reporting {
      let (owner, size) = (owner, size)
      let answer = try await common.withAgent {
        try await Storage(wrapping: $0).growHome(
          .with {
            $0.owner = owner
            $0.size = size
          })
      }
      print(Printer.bytes(answer.bytes))
    }
  }
}

struct EnvironmentCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "env", abstract: "Packages that owners have installed, apart for each image.",
    subcommands: [Environments.self, SnapshotPackages.self, RestorePackages.self, ResetPackages.self])
}

struct Environments: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "ls", abstract: "List an owner's packages, by image.")
  @OptionGroup var common: Common
  @Argument var owner: String

  func run() async throws {
    try await reporting {
      let owner = owner
      let found = try await common.withAgent { try await Storage(wrapping: $0).listEnvironments(.with { $0.owner = owner }).environments }
      guard common.output == .table else { return try Printer.print(found, as: common.output) }
      Printer.table(
        ["IMAGE", "NAME", "SIZE", "SNAPSHOTS"],
        found.map { [$0.image, $0.name.isEmpty ? "(not found)" : $0.name, Printer.bytes($0.bytes), $0.snapshots.joined(separator: " ")] })
    }
  }
}

struct PackagesOf: ParsableArguments {
  @Argument var owner: String
  @Option(name: .long, help: "The image, by name or digest; optional if packages exist for one image only.") var image = ""

  fileprivate func change(_ common: Common, _ change: Carrel_V1_EnvironmentChange, _ snapshot: String = "") async throws {
    let (owner, image) = (owner, image)
    let name = try await common.withAgent {
      try await Storage(wrapping: $0).changeEnvironment(
        .with {
          $0.owner = owner
          $0.image = image
          $0.change = change
          $0.snapshot = snapshot
        }
      ).snapshot
    }
    print(name)
  }
}

struct SnapshotPackages: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "snapshot", abstract: "Copy the packages and print the copy's name.")
  @OptionGroup var common: Common
  @OptionGroup var packages: PackagesOf
  func run() async throws { try await reporting { try await packages.change(common, .snapshot) } }
}

struct RestorePackages: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "restore", abstract: "Put a copy in their place; prints the name of what they were before.")
  @OptionGroup var common: Common
  @OptionGroup var packages: PackagesOf
  @Argument var snapshot: String
  func run() async throws { try await reporting { try await packages.change(common, .restore, snapshot) } }
}

struct ResetPackages: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "reset", abstract: "Begin with none; prints the name of what they were before.")
  @OptionGroup var common: Common
  @OptionGroup var packages: PackagesOf
  func run() async throws { try await reporting { try await packages.change(common, .reset) } }
}

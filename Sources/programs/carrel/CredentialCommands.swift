// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import GRPCCore
internal import SwiftProtobuf

struct Credentials: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Replace, remove or revoke credentials of a workspace.", subcommands: [Put.self, RemoveCredentials.self, Revoke.self],
    defaultSubcommand: Put.self)
}

struct Revoke: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Take the credentials of AWS roles away, for the rest of the workspace's life.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Option(name: .long, help: "Only this role.") var role = ""

  func run() async throws {
    try await reporting {
      let (id, role) = (id, role)
      _ = try await common.withAgent {
        try await Workspaces(wrapping: $0).revokeCredentials(
          .with {
            $0.id = id
            $0.role = role
          })
      }
    }
  }
}

struct Put: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Replace credential files of a running workspace.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Argument(help: "NAME=FILE") var files: [String]
  @Option(name: .long, help: "Remove them after this time: 30m, 8h, 2d.") var expires: String?

  func run() async throws {
    try await reporting {
      let id = id
      let lifetime = try expires.map { try Printer.seconds($0, "--expires") } ?? 0
      let credentials = try files.map { file in
        var credential = try Launch.credential(file)
        credential.lifetimeSeconds = lifetime
        return credential
      }
      _ = try await common.withAgent {
        try await Workspaces(wrapping: $0).updateCredentials(
          .with {
            $0.id = id
            $0.credentials = credentials
          })
      }
    }
  }
}

struct RemoveCredentials: AsyncParsableCommand {
  static let configuration = CommandConfiguration(commandName: "rm", abstract: "Remove credential files of a running workspace.")
  @OptionGroup var common: Common
  @Argument var id: String
  @Argument(help: "NAME") var names: [String]

  func run() async throws {
    try await reporting {
      let (id, names) = (id, names)
      _ = try await common.withAgent {
        try await Workspaces(wrapping: $0).removeCredentials(
          .with {
            $0.id = id
            $0.names = names
          })
      }
    }
  }
}

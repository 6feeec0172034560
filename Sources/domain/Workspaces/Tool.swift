// SPDX-License-Identifier: Apache-2.0

/// The definition of how an image is run as a workspace: a file that a platform engineer can copy and change (`manifests/tools/`).
package struct Tool: Equatable, Sendable {
  package struct Probe: Equatable, Sendable {
    package let path: String
    package let status: Int
    package let timeoutSeconds: UInt64
  }

  package let name: String
  /// The command, with the placeholders `{port}`, `{home}`, `{token_file}`, `{id}`, `{owner}`. Empty for tools that run the spec's command.
  package let arguments: [String]
  /// The port that the tool listens on; nil for tools that do not listen.
  package let port: UInt16?
  /// The readiness probe; nil for tools that are ready when they have started.
  package let readiness: Probe?
  package let environment: [String: String]
  /// The name of the credential file that holds the token; nil for tools without a token.
  package let tokenFile: String?
  /// The part of the URL after address and port, with the placeholder `{token}`.
  package let urlPath: String
  package let home: String
  package let workingDirectory: String
  package let uid: UInt32
  package let gid: UInt32
  package let gracePeriodSeconds: UInt32
  package let resources: WorkspaceSpec.Resources
  /// Environment variables that name directories of packages, and the path of each below the image's packages in the home.
  package let packages: [String: String]
  /// The files to set aside if the tool does not become ready; nil for no rescue.
  package let rescue: Rescue?

  package struct Rescue: Equatable, Sendable {
    /// Paths below the home that are set aside for a second start if the tool does not become ready. `{packages}`: those of the image.
    package let suspects: [String]
    /// Paths below the home that are set aside before a start if they are larger than `sessionBytes`.
    package let sessions: [String]
    package let sessionBytes: UInt64
  }

  package init(yaml: String) throws(InvalidField) {
    var reader = try YAMLReader(text: yaml)
    name = try reader.requiredText("name")
    guard WorkspaceSpec.isID(name) else { throw InvalidField("name", "expected \(WorkspaceSpec.idRule)") }
    arguments = try reader.texts("arguments") ?? []
    try WorkspaceSpec.validateCommand(arguments, path: "arguments")
    port = try reader.number("port", in: 1...65_535).map { UInt16($0) }
    readiness = try reader.section("readiness") { (section: inout YAMLReader) throws(InvalidField) in
      Probe(
        path: try section.requiredText("path"), status: Int(try section.number("status", in: 100...599) ?? 200),
        timeoutSeconds: try section.number("timeoutSeconds", in: 1...3600) ?? 120)
    }
    environment = try reader.textMap("environment") ?? [:]
    tokenFile = try reader.text("tokenFile")
    urlPath = try reader.text("urlPath") ?? "/"
    home = try reader.requiredText("home")
    try WorkspaceSpec.validatePath(home, path: "home")
    workingDirectory = try reader.text("workingDirectory") ?? home
    try WorkspaceSpec.validatePath(workingDirectory, path: "workingDirectory")
    uid = UInt32(try reader.number("uid", in: 1...65_533) ?? 1000)
    gid = UInt32(try reader.number("gid", in: 1...65_533) ?? 1000)
    gracePeriodSeconds = UInt32(try reader.number("gracePeriodSeconds", in: 0...3600) ?? 10)
    resources = try reader.section("resources", WorkspaceSpec.Resources.init(from:)) ?? WorkspaceSpec.Resources()
    packages = try reader.textMap("packages") ?? [:]
    rescue = try reader.section("rescue") { (section: inout YAMLReader) throws(InvalidField) in
      let limit = try section.text("sessionLimit") ?? "1Gi"
      guard let bytes = Quantity.whole(limit) else { throw InvalidField("rescue.sessionLimit", "\(printable(limit)) is not a quantity") }
      return Rescue(
        suspects: try section.texts("suspects") ?? [], sessions: try section.texts("sessions") ?? [], sessionBytes: bytes)
    }
    try reader.finish()
    for (key, value) in packages {
      try WorkspaceSpec.validateVariable(key, value, path: "packages")
      try WorkspaceSpec.validatePath("/" + value, path: "packages.\(key)")
    }
    for path in (rescue?.suspects ?? []) + (rescue?.sessions ?? []) { try WorkspaceSpec.validatePath("/" + path, path: "rescue") }
    if let tokenFile, !WorkspaceSpec.isCredentialName(tokenFile) {
      throw InvalidField("tokenFile", "expected a file name", line: reader.line(of: "tokenFile"))
    }
    if readiness != nil && port == nil {
      throw InvalidField("readiness", "requires a port", line: reader.line(of: "readiness"))
    }
    for (key, value) in environment { try WorkspaceSpec.validateVariable(key, value, path: "environment") }
  }

  /// Returns the template with its placeholders filled.
  package static func fill(_ template: String, _ values: [String: String]) -> String {
    values.reduce(template) { text, entry in
      text.split(separator: "{\(entry.key)}", omittingEmptySubsequences: false).joined(separator: entry.value)
    }
  }
}

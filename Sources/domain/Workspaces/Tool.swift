// SPDX-License-Identifier: Apache-2.0

/// How an image is run as a workspace: a file that a platform engineer can copy and change (`manifests/tools/`).
package struct Tool: Equatable, Sendable {
  package struct Probe: Equatable, Sendable {
    package let path: String
    package let status: Int
    package let timeoutSeconds: UInt64
  }

  package let name: String
  /// May hold `{port}`, `{home}`, `{token_file}`, `{id}`, `{owner}`. Empty for tools that run the spec's command.
  package let arguments: [String]
  /// Nil for tools that listen nowhere.
  package let port: UInt16?
  /// Nil: ready when started.
  package let readiness: Probe?
  package let environment: [String: String]
  /// The file among the credentials that holds the token; nil for tools without one.
  package let tokenFile: String?
  /// Behind the address and port, with `{token}`.
  package let urlPath: String
  package let home: String
  package let workingDirectory: String
  package let uid: UInt32
  package let gid: UInt32
  package let gracePeriodSeconds: UInt32
  package let resources: WorkspaceSpec.Resources
  /// Variables that name folders of packages, and which: apart for each image, below the home.
  package let packages: [String: String]
  /// What is done where the tool does not come up; nil: nothing.
  package let rescue: Rescue?

  package struct Rescue: Equatable, Sendable {
    /// Below the home: set aside for a second start, if the tool does not come up. `{packages}`: those of this image.
    package let suspects: [String]
    /// Below the home: set aside before a start where they are larger than `sessionBytes`.
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
      guard let bytes = Quantity.whole(limit) else { throw InvalidField("rescue.sessionLimit", "\(printable(limit)) is no quantity") }
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
      throw InvalidField("readiness", "needs a port", line: reader.line(of: "readiness"))
    }
    for (key, value) in environment { try WorkspaceSpec.validateVariable(key, value, path: "environment") }
  }

  /// Fills the placeholders of a template.
  package static func fill(_ template: String, _ values: [String: String]) -> String {
    values.reduce(template) { text, entry in
      text.split(separator: "{\(entry.key)}", omittingEmptySubsequences: false).joined(separator: entry.value)
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation

/// One version of a dataset. A platform engineer registers it as a file `*.yaml` in the node's directory of datasets.
package struct RegisteredDataset: Equatable, Sendable {
  package let name: String
  package let version: String
  /// A directory of the host, or a file with a squashfs or EROFS file system, which is read-only.
  package let path: String
  /// Names of owners; "*" is every owner.
  package let readers: [String]
  package let writers: [String]
  /// Whether programs in it can be executed.
  package let executable: Bool
  /// The storage uid of each member of a project folder; every member reads and writes.
  package let members: [String: UInt32]
  /// The group that owns the files of a project folder; nil for other datasets.
  package let gid: UInt32?

  package var isProject: Bool { gid != nil }
  package var reference: String { "\(name)@\(version)" }

  package func grants(_ owner: String, writing: Bool) -> Bool {
    if isProject { return members[owner] != nil }
    return writers.contains(owner) || writers.contains("*") || !writing && (readers.contains(owner) || readers.contains("*"))
  }

  package init(yaml: String) throws(InvalidField) {
    var reader = try YAMLReader(text: yaml)
    name = try reader.requiredText("name")
    guard WorkspaceSpec.isID(name) else { throw InvalidField("name", "expected \(WorkspaceSpec.idRule)", line: reader.line(of: "name")) }
    version = try reader.text("version") ?? "1"
    guard WorkspaceSpec.isVersion(version) else {
      throw InvalidField("version", "expected 1 to 64 letters, digits, '.', '_' and '-'", line: reader.line(of: "version"))
    }
    path = try reader.requiredText("path")
    try WorkspaceSpec.validatePath(path, path: "path")
    readers = try RegisteredDataset.owners(&reader, "readers")
    writers = try RegisteredDataset.owners(&reader, "writers")
    executable = try reader.flag("executable") ?? false
    let project = try reader.section("project") { (section: inout YAMLReader) throws(InvalidField) in
      let ids: ClosedRange<UInt64> = 1000...UInt64(Int32.max)
      guard let gid = try section.number("gid", in: ids) else { throw InvalidField("project.gid", "is missing") }
      var members: [String: UInt32] = [:]
      for (name, text) in try section.textMap("members") ?? [:] {
        guard WorkspaceSpec.isID(name), let uid = UInt32(text), ids.contains(UInt64(uid)) else {
          throw InvalidField("project.members.\(printable(name))", "expected an owner and a storage uid of at least 1000")
        }
        members[name] = uid
      }
      guard (1...256).contains(members.count), Set(members.values).count == members.count else {
        throw InvalidField("project.members", "expected 1 to 256 owners with distinct uids")
      }
      return (gid: UInt32(gid), members: members)
    }
    (gid, members) = (project?.gid, project?.members ?? [:])
    try reader.finish()
    guard gid == nil || readers.isEmpty && writers.isEmpty else {
      throw InvalidField("project", "members read and write; readers and writers must not be set")
    }
  }

  private static func owners(_ reader: inout YAMLReader, _ key: String) throws(InvalidField) -> [String] {
    let names = try reader.texts(key) ?? []
    for name in names where name != "*" && !WorkspaceSpec.isID(name) {
      throw InvalidField(key, "\(printable(name)) is not an owner or \"*\"", line: reader.line(of: key))
    }
    return names
  }
}

/// The datasets that are registered on a node at one moment.
package struct DatasetRegistry: Sendable {
  package private(set) var datasets: [RegisteredDataset] = []
  /// Files that could not be registered, and why. They do not affect the others.
  package private(set) var problems: [String] = []

  package init(folder: String) {
    let files = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
    for file in files.sorted() where file.hasSuffix(".yaml") {
      do throws(InvalidField) {
        guard let text = try? String(contentsOfFile: "\(folder)/\(file)", encoding: .utf8) else { throw InvalidField("", "cannot be read") }
        let dataset = try RegisteredDataset(yaml: text)
        guard !datasets.contains(where: { $0.reference == dataset.reference }) else {
          throw InvalidField("", "\(dataset.reference) is registered by another file already")
        }
        datasets.append(dataset)
      } catch {
        problems.append("\(folder)/\(file): \(error)")
      }
    }
    // The order of versions is numeric: 10 is newer than 9.
    datasets.sort { $0.name == $1.name ? $0.version.compare($1.version, options: .numeric) == .orderedAscending : $0.name < $1.name }
  }

  /// Finds a dataset by NAME, in its newest version, or by NAME@VERSION. Datasets that the owner cannot read are hidden.
  package func find(_ reference: String, for owner: String, writing: Bool, field: String) throws(InvalidField) -> RegisteredDataset {
    let parts = reference.split(separator: "@", maxSplits: 1).map(String.init)
    let named = datasets.filter { $0.name == parts[0] && (parts.count == 1 || $0.version == parts[1]) && $0.grants(owner, writing: false) }
    guard let found = named.last else {
      let mine = Set(datasets.filter { $0.grants(owner, writing: false) }.map(\.reference)).sorted()
      throw InvalidField(
        field,
        "there is no dataset \(printable(reference)) for \(owner); there are: \(mine.isEmpty ? "none" : mine.joined(separator: ", "))")
    }
    guard found.grants(owner, writing: writing) else {
      throw InvalidField(field, "\(owner) may read \(found.reference), not write to it")
    }
    return found
  }
}

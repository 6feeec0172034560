// SPDX-License-Identifier: Apache-2.0

internal import Foundation

/// A version of a dataset as a platform engineer registers it: a file `*.yaml` in the node's folder of datasets.
package struct RegisteredDataset: Equatable, Sendable {
  package let name: String
  package let version: String
  /// A directory of the host, or a file with a squashfs or EROFS file system, which is read-only.
  package let path: String
  /// Names of owners; "*" is everybody.
  package let readers: [String]
  package let writers: [String]
  /// Whether programs may be run from it.
  package let executable: Bool
  /// Of a project's folder, the storage uid of each member; all of them read and write.
  package let members: [String: UInt32]
  /// The group that a project's files belong to.
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
        throw InvalidField("project.members", "expected 1 to 256 owners, each with a uid of its own")
      }
      return (gid: UInt32(gid), members: members)
    }
    (gid, members) = (project?.gid, project?.members ?? [:])
    try reader.finish()
    guard gid == nil || readers.isEmpty && writers.isEmpty else {
      throw InvalidField("project", "its members read and write; expected neither readers nor writers beside it")
    }
  }

  private static func owners(_ reader: inout YAMLReader, _ key: String) throws(InvalidField) -> [String] {
    let names = try reader.texts(key) ?? []
    for name in names where name != "*" && !WorkspaceSpec.isID(name) {
      throw InvalidField(key, "\(printable(name)) is no owner, nor \"*\"", line: reader.line(of: key))
    }
    return names
  }
}

/// What is registered on a node at one moment.
package struct DatasetRegistry: Sendable {
  package private(set) var datasets: [RegisteredDataset] = []
  /// Files that could not be read, and why; the others are there all the same.
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
    // 10 is newer than 9.
    datasets.sort { $0.name == $1.name ? $0.version.compare($1.version, options: .numeric) == .orderedAscending : $0.name < $1.name }
  }

  /// By NAME or NAME@VERSION, if this owner may have it. What an owner may not have, is not there for him.
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

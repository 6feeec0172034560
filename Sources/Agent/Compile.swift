// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Images
internal import Isolation
internal import LaunchPlan
internal import Limits
internal import Storage
internal import Workspaces

extension NodeAgent {
  static let secretsPath = "/run/carrel/credentials"

  /// From a record, its tool and its image to the launch plan. Looks nothing up but the host's resolver.
  func compile(_ record: WorkspaceRecord, _ tool: Tool, _ image: StoredImage) -> Plan {
    let spec = record.spec
    var box = Enclosure()
    box.cgroupHierarchies = facts.shownHierarchies
    box.cgroups = cgroup(of: record).paths
    box.firstID = record.firstID
    box.uid = tool.uid
    box.gid = tool.gid
    box.layers = images.layerPaths(image)
    // The owner's files on disk appear as the workspace's user, and what that user makes is the owner's.
    let ids = IDMapping(fromUID: spec.owner.uid, fromGID: spec.owner.gid, toUID: tool.uid, toGID: tool.gid)
    box.binds.append(
      Enclosure.Bind(source: homePath(record), target: tool.home, writable: true, executable: true, ids: ids))
    box.binds += (record.datasets ?? []).map { bind($0, of: record, tool) }
    box.binds += credentialBinds(spec, ids: ids)
    box.secretsPath = NodeAgent.secretsPath
    box.scratchBytes = record.amounts.scratchBytes
    box.shmBytes = record.amounts.shmBytes
    box.hostname = String(spec.id.map { $0 == "." ? "-" : $0 }.prefix(63))
    box.hosts = Array("127.0.0.1 localhost\n::1 localhost ip6-localhost\n\(record.address) \(box.hostname)\n".utf8)
    box.resolver = resolver(spec)
    let values = placeholders(spec, tool)
    box.arguments = (tool.arguments.isEmpty ? spec.command : tool.arguments).map { Tool.fill($0, values) }
    box.environment = environment(record, tool, image).sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }
    box.directory = tool.workingDirectory
    box.logSegmentBytes = Quantity.whole(configuration.logSegment) ?? box.logSegmentBytes
    box.logSegments = configuration.logSegments
    box.logBytesPerSecond = Quantity.whole(configuration.logRate) ?? box.logBytesPerSecond
    return PlanCompiler.compile(box, seccomp: seccomp)
  }

  func bind(_ dataset: MountedDataset, of record: WorkspaceRecord, _ tool: Tool) -> Enclosure.Bind {
    let owner = record.spec.owner
    let source = dataset.isImage ? datasetImages.path(dataset.source) : dataset.source
    // An image is read with the rights that everybody has: not every kernel shows one under other ids.
    let ids = IDMapping(
      fromUID: owner.uid, fromGID: dataset.gid ?? owner.gid, toUID: tool.uid, toGID: tool.gid,
      others: (dataset.members ?? []).filter { $0 != owner.uid })
    return Enclosure.Bind(
      source: source + (dataset.path.map { "/" + $0 } ?? ""), target: dataset.target, writable: dataset.writable,
      executable: dataset.executable, ids: dataset.isImage ? nil : ids)
  }

  private func placeholders(_ spec: WorkspaceSpec, _ tool: Tool) -> [String: String] {
    [
      "port": tool.port.map(String.init) ?? "", "home": tool.home, "id": spec.id, "owner": spec.owner.name,
      "credentials": NodeAgent.secretsPath,
      "token_file": tool.tokenFile.map { "\(NodeAgent.secretsPath)/\($0)" } ?? "",
    ]
  }

  /// The image's own, the tool's, the agent's, the spec's: a later one wins.
  func environment(_ record: WorkspaceRecord, _ tool: Tool, _ image: StoredImage) -> [String: String] {
    let spec = record.spec
    let values = placeholders(spec, tool)
    var all: [String: String] = ["PATH": "/usr/local/bin:/usr/bin:/bin"]
    for entry in image.environment {
      guard let equals = entry.firstIndex(of: "=") else { continue }
      let (key, value) = (String(entry[..<equals]), String(entry[entry.index(after: equals)...]))
      // An image is no control input: what would be refused in a spec is left out here.
      if (try? WorkspaceSpec.validateVariable(key, value, path: "image")) != nil { all[key] = value }
    }
    if !spec.roles.isEmpty { for name in WorkspaceSpec.staticAWSVariables { all[name] = nil } }
    all["HOME"] = tool.home
    all["CARREL_WORKSPACE"] = spec.id
    all.merge(brokerEnvironment(spec)) { _, new in new }
    // What its owner has installed comes after what the image has: it adds, and replaces nothing.
    let packages = packageFolders(record, tool)
    all.merge(packages) { _, new in new }
    if let base = packages["PYTHONUSERBASE"] { all["PATH"]? += ":\(base)/bin" }
    for (key, value) in tool.environment { all[key] = Tool.fill(value, values) }
    for (key, value) in spec.environment { all[key] = value }
    return all
  }

  /// The host's name servers without those that listen on its loopback, which a workspace cannot reach.
  private func resolver(_ spec: WorkspaceSpec) -> [UInt8] {
    guard networkPolicy(spec) == .open, let text = try? String(contentsOfFile: "/etc/resolv.conf", encoding: .utf8) else {
      return Array("# No name service: the network policy is \"none\".\n".utf8)
    }
    let lines = text.split(separator: "\n").filter { line in
      let fields = line.split(whereSeparator: \.isWhitespace)
      guard fields.count >= 2 else { return false }
      if fields[0] == "nameserver" { return !fields[1].hasPrefix("127.") && fields[1] != "::1" }
      return ["search", "domain", "options"].contains(fields[0])
    }
    return Array((lines.joined(separator: "\n") + "\n").utf8)
  }

  func networkPolicy(_ spec: WorkspaceSpec) -> WorkspaceSpec.NetworkPolicy { spec.network ?? configuration.networkDefault }
}

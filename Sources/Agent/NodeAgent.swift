// SPDX-License-Identifier: Apache-2.0

internal import Foundation
internal import Isolation
package import Images
package import Journal
internal import LaunchPlan
internal import Limits
internal import Linux
package import Logging
internal import NIOPosix
internal import Networking
internal import Sandbox
package import Storage
package import Supervision
package import Workspaces

/// The services of the node, behind every wire format: accepts workspaces, keeps their records, answers about them.
/// How one is brought up and down stands in `NodeAgent+Life.swift`, how a restart is survived in
/// `NodeAgent+Recovery.swift`.
package actor NodeAgent {
  /// A workspace in memory: its record, and what only lives as long as this process.
  final class Managed {
    var record: WorkspaceRecord
    let folder: WorkspaceFolder
    var link: SupervisorLink?
    var life: Task<Void, Never>?
    /// Giving back what the last attempt held.
    var cleaning: Task<Void, Never>?
    /// From the request; handed to the supervisor and then forgotten.
    var credentials: [Credential]
    var token: String?
    var endWaiters: [CheckedContinuation<Void, Never>] = []
    /// Why the agent itself ends the tool, if it does.
    var verdict: Reason?
    /// How many were ended for want of memory, as long as that waits to be told; and how far the kernel's log was read for it.
    var outOfMemory: UInt64?
    var kernelLogRead: UInt64 = 0
    /// Wait for the warnings and the ends of credential files.
    var expiries: [String: Task<Void, Never>] = [:]
    /// What came with the request, until the tool is up: it may need a second start.
    var secondStart: [Credential] = []
    /// Of an encrypted home, as long.
    var homeKey: [UInt8]?
    /// What of its home may be why the tool does not come up, as found when it ended.
    var suspects: [String] = []
    /// Its mounts are being changed.
    var isInjecting = false
    /// One for each role whose credentials are renewed.
    var keepers: [Task<Void, Never>] = []
    /// How often each role's credentials were given out and are not on record yet; and when they last were.
    var issues: [String: UInt32] = [:]
    var noted: [String: ContinuousClock.Instant] = [:]
    /// The state that the last event told.
    var told: WorkspaceState?

    init(record: WorkspaceRecord, folder: WorkspaceFolder, credentials: [Credential] = []) {
      self.record = record
      self.folder = folder
      self.credentials = credentials
    }

    func forgetSecrets() {
      secondStart = []
      homeKey = nil
    }
  }

  package nonisolated let configuration: Configuration
  package nonisolated let facts: NodeFacts
  package nonisolated let journal: Journal
  package nonisolated let images: ImageStore
  package nonisolated let feed = EventFeed()
  package nonisolated let desk = CredentialDesk()
  package nonisolated let started = wallTime()
  nonisolated let logger: Logger
  nonisolated let network: NetworkDriver
  /// The supervisor's program, with no link in its path.
  nonisolated let helper: String
  nonisolated let homes: HomeImages
  nonisolated let datasetImages: DatasetImages
  package nonisolated let homeStore: HomeStore
  nonisolated let seccomp: [UInt8]
  nonisolated let pool: NIOThreadPool
  /// Apart, since credential providers are not ours and may be slow: they delay nobody but each other.
  nonisolated let providers: NIOThreadPool
  /// Apart as well: copies of homes take as long as they take.
  nonisolated let copies: NIOThreadPool
  private(set) var tools: [String: Tool] = [:]
  var workspaces: [String: Managed] = [:]
  /// Commits that wait for the disk, in the order in which they were asked for.
  var waiting: [Commit] = []
  var isCommitting = false
  package internal(set) var drain: Drain?
  var trimming: Task<Void, Never>?
  /// The ids of what was set aside while it runs.
  var quarantined: Set<String> = []
  /// Homes that are being replaced or removed.
  var closedHomes: Set<String> = []
  private nonisolated let lock: StateLock
  /// Ids being accepted or removed right now: what is in memory, in the journal and on disk does not agree yet.
  private var unsettled: Set<String> = []

  package init(configuration: Configuration, logger: Logger) throws {
    self.configuration = configuration
    self.logger = logger
    facts = try NodeFacts(name: configuration.nodeName)
    for folder in [configuration.state, configuration.state + "/workspaces", configuration.homes] {
      try FileManager.default.createDirectory(
        atPath: folder, withIntermediateDirectories: true,
        attributes: [.posixPermissions: folder == configuration.homes ? 0o711 : 0o700])
    }
    helper = URL(fileURLWithPath: configuration.helper).resolvingSymlinksInPath().path
    lock = try StateLock(configuration.state)
    let folders = try FileManager.default.contentsOfDirectory(atPath: configuration.state + "/workspaces")
    journal = try Journal(path: configuration.state + "/journal.sqlite", hasHistory: !folders.isEmpty)
    homes = try HomeImages(root: configuration.state + "/homes", holder: facts.name)
    homeStore = HomeStore(root: configuration.homes, images: homes)
    datasetImages = try DatasetImages(root: configuration.state + "/datasets")
    images = try ImageStore(path: configuration.state + "/images")
    network = try NetworkDriver(
      subnet: configuration.subnet, slots: configuration.maxWorkspaces, table: configuration.firewallTable,
      linkPrefix: configuration.linkPrefix)
    seccomp = try SeccompCompiler.compileDefaultProfile()
    pool = NIOThreadPool(numberOfThreads: 4)
    pool.start()
    providers = NIOThreadPool(numberOfThreads: 4)
    providers.start()
    copies = NIOThreadPool(numberOfThreads: 2)
    copies.start()
    tools = try NodeAgent.loadTools(configuration.tools)
  }

  private static func loadTools(_ path: String) throws -> [String: Tool] {
    var tools: [String: Tool] = [:]
    for file in try FileManager.default.contentsOfDirectory(atPath: path).sorted() where file.hasSuffix(".yaml") {
      do throws(InvalidField) {
        let text = (try? String(contentsOfFile: "\(path)/\(file)", encoding: .utf8)) ?? ""
        let tool = try Tool(yaml: text)
        tools[tool.name] = tool
      } catch {
        throw AgentError(.invalidArgument, "tool definition \(path)/\(file): \(error)")
      }
    }
    return tools
  }

  // ----------------------------------------------------------------- launching

  /// Accepts a workspace: durable when this returns. The same spec again returns the same workspace.
  package func launch(
    _ spec: WorkspaceSpec, credentials: [Credential], homeKey: [UInt8]? = nil
  ) async throws -> (record: WorkspaceRecord, created: Bool) {
    let spec = spec.naming(credentials)
    let (tool, amounts) = try check(spec, credentials)
    do throws(InvalidField) { try spec.validate(homeKey: homeKey) } catch { throw AgentError(error) }
    guard unsettled.insert(spec.id).inserted else {
      throw AgentError(.unavailable, "workspace \(spec.id) is being accepted or deleted by another call; try again")
    }
    defer { unsettled.remove(spec.id) }
    if let present = workspaces[spec.id] {
      guard present.record.spec == spec else {
        throw AgentError(.alreadyExists, "workspace \(spec.id) exists with another spec (state \(present.record.state.rawValue))")
      }
      return (present.record, false)
    }
    try await checkJournal()
    _ = try await image(spec.image)
    // From here to where it is in memory nothing suspends: two launches never take the same room.
    try admit(amounts)
    let slot = try freeSlot()
    var record = try newRecord(spec, amounts, slot: slot)
    record.credentialEnds = NodeAgent.ends(credentials)
    let folder: WorkspaceFolder
    do throws(Errno) {
      folder = try WorkspaceFolder(path: folderPath(spec.id), create: true)
    } catch {
      throw AgentError(.internal, "cannot make \(folderPath(spec.id)): \(error.sentence)")
    }
    let managed = Managed(record: record, folder: folder, credentials: credentials)
    managed.homeKey = homeKey
    if tool.tokenFile != nil { managed.token = NodeAgent.freshToken() }
    // In memory before the first suspension, so that its slot and its memory count for the next caller.
    workspaces[spec.id] = managed
    let began: Step
    do {
      // One transaction, and one wait for the disk.
      let created = try entry(managed, .created)
      let (event, preparing) = try advance(managed, .preparationBegan)
      began = Step(event: event, done: submit([created, preparing], insist: false))
      try await began.done.value
      Fault.at("after Created")
    } catch {
      workspaces[spec.id] = nil
      try? FileManager.default.removeItem(atPath: folder.path)
      throw AgentError(.internal, "the journal cannot be written: \(error)")
    }
    begin(managed, with: .preparation(began))
    return (managed.record, true)
  }

  /// Everything that can be wrong with a request, before anything is done for it.
  func check(_ spec: WorkspaceSpec, _ credentials: [Credential]) throws -> (Tool, ResourceAmounts) {
    do throws(InvalidField) {
      try spec.validate()
      try WorkspaceSpec.validate(credentials)
      guard let tool = tools[spec.tool] else {
        throw InvalidField("tool", "there is no tool \(spec.tool); known: \(tools.keys.sorted().joined(separator: ", "))")
      }
      guard !tool.arguments.isEmpty || !spec.command.isEmpty else {
        throw InvalidField("command", "is missing; the tool \(tool.name) runs what the spec says")
      }
      try checkCredentials(spec)
      guard tool.arguments.isEmpty || spec.command.isEmpty else {
        throw InvalidField("command", "is not for the tool \(tool.name), which has its own")
      }
      var defaults = tool.resources
      defaults.memory = defaults.memory ?? configuration.defaults.memory
      defaults.cpu = defaults.cpu ?? configuration.defaults.cpu
      defaults.pids = defaults.pids ?? configuration.defaults.pids
      let policy = ResourcePolicy(hostMemoryBytes: facts.memoryBytes, hostMilliCPUs: facts.milliCPUs)
      _ = try homeBytes(spec)
      _ = try resolve(spec)
      return (tool, try spec.amounts(defaults: defaults, policy: policy))
    } catch {
      throw AgentError(error)
    }
  }

  private func checkJournal() async throws {
    guard journal.bytesInUse > journalRoom else { return }
    let used = try await journal.extent().bytes
    guard used <= journalRoom else {
      throw AgentError(
        .resourceExhausted,
        "journal: \(Quantity.describe(bytes: used)) of \(configuration.journalLimit) are in use, and the rest is kept for ends; the controller has to acknowledge"
      )
    }
  }

  private func admit(_ amounts: ResourceAmounts) throws {
    if let drain {
      throw AgentError(.failedPrecondition, "the node is being drained by \(drain.by) since \(drain.began); see `carrel resume`")
    }
    let launching = workspaces.values.filter { $0.record.state == .pending || $0.record.state == .preparing }.count
    guard launching < configuration.maxLaunching else {
      throw AgentError(.resourceExhausted, "launches: \(launching) are on their way, which is as many as may be; try again")
    }
    let reserve = Quantity.whole(configuration.reservedMemory) ?? 0
    let used = workspaces.values.filter { !$0.record.state.isTerminal }.reduce(0) { $0 + $1.record.amounts.memoryBytes }
    let room = facts.memoryBytes > reserve + used ? facts.memoryBytes - reserve - used : 0
    guard amounts.memoryBytes <= room else {
      throw AgentError(
        .resourceExhausted,
        "memory: asked \(Quantity.describe(bytes: amounts.memoryBytes)), free \(Quantity.describe(bytes: room)) of \(Quantity.describe(bytes: facts.memoryBytes))"
      )
    }
    guard workspaces.count < configuration.maxWorkspaces else {
      throw AgentError(.resourceExhausted, "workspaces: \(workspaces.count) of \(configuration.maxWorkspaces); delete stopped ones")
    }
  }

  private func newRecord(_ spec: WorkspaceSpec, _ amounts: ResourceAmounts, slot: Int) throws -> WorkspaceRecord {
    var record = WorkspaceRecord(
      spec: spec, amounts: amounts, slot: slot, address: network.address(slot).description,
      firstID: configuration.firstID + UInt32(slot) * PlanCompiler.idCount, created: wallTime())
    let bytes = try homeBytes(spec)
    if hasImage(spec) { record.homeBytes = bytes } else { record.homeQuota = bytes }
    return record
  }

  private func freeSlot() throws -> Int {
    let used = Set(workspaces.values.map(\.record.slot))
    guard let slot = (0..<configuration.maxWorkspaces).first(where: { !used.contains($0) }) else {
      throw AgentError(.resourceExhausted, "no id range and address is free")
    }
    return slot
  }

  func folderPath(_ id: String) -> String { "\(configuration.state)/workspaces/\(id)" }

  static func freshToken() -> String {
    // 192 bits from the system's generator.
    (0..<24).map { _ in UInt8.random(in: .min ... .max) }.map { byte in
      (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }.joined()
  }

  // ----------------------------------------------------------------- answering

  package func get(_ id: String) async throws -> (record: WorkspaceRecord, token: String?, tool: Tool?) {
    let managed = try find(id)
    let tool = tools[managed.record.spec.tool]
    if managed.token == nil, managed.record.state.isUp, let name = tool?.tokenFile {
      managed.token = try? await secret(name, of: managed)
    }
    return (managed.record, managed.record.state.isTerminal ? nil : managed.token, tool)
  }

  package func tool(_ name: String) -> Tool? { tools[name] }
  package var toolNames: [String] { tools.keys.sorted() }

  package func list(labels: [String: String] = [:], owner: String? = nil, states: Set<WorkspaceState> = []) -> [WorkspaceRecord] {
    workspaces.values.map(\.record).filter { record in
      (owner == nil || record.spec.owner.name == owner) && (states.isEmpty || states.contains(record.state))
        && labels.allSatisfy { record.spec.labels[$0.key] == $0.value }
    }.sorted { $0.spec.id < $1.spec.id }
  }

  package func usage(_ ids: [String]) throws -> [(id: String, usage: WorkspaceUsage)] {
    let chosen = ids.isEmpty ? workspaces.values.filter { $0.record.state.mayRun } : try ids.map { try find($0) }
    return chosen.map(\.record).sorted { $0.spec.id < $1.spec.id }.map { record in
      (record.spec.id, WorkspaceUsage(cgroup(of: record).usage(), milliCPUs: record.amounts.milliCPUs, home: homeUse(record)))
    }
  }

  package func log(_ id: String) throws -> LogReader {
    let folder = try find(id).folder
    do throws(Errno) {
      return try folder.log()
    } catch {
      throw AgentError(.internal, "log of \(id): \(error.sentence)")
    }
  }

  package func state(_ id: String) -> WorkspaceState? { workspaces[id]?.record.state }

  /// The launch plan that a spec would get, compiled with the first id range.
  package func plan(_ spec: WorkspaceSpec) async throws -> [String] {
    let (tool, amounts) = try check(spec, [])
    let image = try await image(spec.image)
    var record = try newRecord(spec, amounts, slot: 0)
    record.cgroup = "\(spec.id)-example"
    return compile(record, tool, image).operations.map(\.description)
  }

  // ------------------------------------------------------------------ removing

  /// Removes a workspace that has stopped. Its home and datasets stay, its output goes.
  package func delete(_ id: String) async throws {
    let managed = try find(id)
    guard managed.record.state.isTerminal else {
      throw AgentError(.failedPrecondition, "workspace \(id) is \(managed.record.state.rawValue); stop it first")
    }
    managed.life?.cancel()
    await managed.cleaning?.value
    guard workspaces[id] === managed, unsettled.insert(id).inserted else { throw AgentError.noWorkspace(id) }
    defer { unsettled.remove(id) }
    let entry = Journal.Entry(try event(.deleted, managed.record, after: managed.record.state), .deletion(of: id))
    workspaces[id] = nil
    Fault.at(.beforeDeleted)
    do {
      try await write(entry, insist: false)
    } catch {
      workspaces[id] = managed
      throw error
    }
    Fault.at(.afterDeleted)
    await removeFolder(folderPath(id))
    Fault.at(.folderRemoved)
  }

  /// The workspace is deleted already: what cannot be removed now goes when the next agent starts.
  private func removeFolder(_ path: String) async {
    for attempt in 1...10 {
      do {
        return try await blocking { try FileManager.default.removeItem(atPath: path) }
      } catch {
        logger.error("the folder of a deleted workspace cannot be removed", metadata: ["attempt": "\(attempt)", "error": "\(error)"])
        try? await Task.sleep(for: .milliseconds(100))
      }
    }
  }

  /// Runs image work on a thread that may wait.
  package nonisolated func imageWork<T: Sendable>(_ body: @escaping @Sendable (ImageStore) throws -> T) async throws -> T {
    try await blocking { [images] in try body(images) }
  }

  func image(_ reference: String) async throws -> StoredImage {
    if let image = images.known(reference) { return image }
    return try await blocking { [images] in try images.find(reference) }
  }

  package func removeImage(_ reference: String) async throws {
    let inUse = Set(workspaces.values.filter { !$0.record.state.isTerminal }.map(\.record.imageDigest))
    try await blocking { [images] in try images.remove(reference, inUse: inUse) }
  }

  // --------------------------------------------------------------------- tools

  func find(_ id: String) throws -> Managed {
    guard let managed = workspaces[id] else { throw AgentError.noWorkspace(id) }
    return managed
  }

  /// Runs a call that waits on a thread that may. Errors of the layers become the agent's.
  nonisolated func blocking<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
    do {
      return try await pool.runIfActive { try body() }
    } catch let error as ImageError {
      throw AgentError(error)
    }
  }

  func cgroup(of record: WorkspaceRecord) -> Cgroup {
    Cgroup(layout: facts.layout, path: configuration.cgroupParent + "/" + record.cgroup)
  }
}

/// What a workspace uses and may use.
package struct WorkspaceUsage: Sendable {
  package let memoryBytes: UInt64
  package let memoryPeakBytes: UInt64
  package let memoryLimitBytes: UInt64
  package let cpuNanoseconds: UInt64
  package let milliCPUs: UInt64
  package let pids: UInt64
  package let pidsLimit: UInt64
  package let outOfMemoryKills: UInt64
  /// Of a home with a limit of its own.
  package let home: HomeImages.Use?

  init(_ usage: Usage, milliCPUs: UInt64, home: HomeImages.Use?) {
    self.home = home
    memoryBytes = usage.memoryBytes
    memoryPeakBytes = usage.memoryPeakBytes
    memoryLimitBytes = usage.memoryLimitBytes
    cpuNanoseconds = usage.cpuNanoseconds
    self.milliCPUs = milliCPUs
    pids = usage.pids
    pidsLimit = usage.pidsLimit
    outOfMemoryKills = usage.outOfMemoryKills
  }
}

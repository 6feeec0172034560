// SPDX-License-Identifier: Apache-2.0

package import Configuration
package import Concurrency
internal import Errors
internal import Foundation
package import Images
internal import Isolation
package import Journal
internal import LaunchPlan
internal import Cgroups
internal import Linux
package import Logging
internal import Networking
package import Volumes
package import Procfs
package import ShimClient
package import Workspaces

/// The node behind every wire format: which workspaces exist, and whether another fits. `Workspace` has what happens to one of them.
package actor Node {
  package nonisolated let services: NodeServices
  package nonisolated let journal: Journal
  package nonisolated let images: ImageStore
  package nonisolated let feed: EventFeed
  package nonisolated let features: Features
  /// The calls in flight of all front ends.
  package nonisolated let calls = CallRegistry(limit: 1024)
  package nonisolated let started = wallTime()
  nonisolated let sink: JournalSink
  private nonisolated let lock: StateLock?
  /// Work that begins while the node runs, such as the lives of workspaces: each is a child task of `run`.
  private nonisolated let beginnings: AsyncStream<@Sendable () async -> Void>
  private nonisolated let beginning: AsyncStream<@Sendable () async -> Void>.Continuation
  /// Fulfilled when the state that a previous agent left has been recovered.
  private nonisolated let recovered = Promise<Void>()
  /// Wakes the trimming of events after acknowledgements.
  nonisolated let trims: AsyncStream<Void>
  nonisolated let trimming: AsyncStream<Void>.Continuation
  /// Every workspace that has a record or is being accepted.
  private(set) var workspaces: [String: Workspace] = [:]
  /// The launches and deletions in progress, for which later calls with the same id wait.
  private var accepting: [String: Promise<Void>] = [:]
  package internal(set) var drain: Drain?
  nonisolated let draining = AsyncLock()

  package nonisolated var configuration: Configuration { services.configuration }
  package nonisolated var controllers: ControllerProvider { features.broker.controllers }
  package nonisolated var facts: NodeFacts { services.facts }
  nonisolated var logger: Logger { services.logger }

  /// Creates the node of this host, with its real drivers.
  package init(configuration: Configuration, logger: Logger) throws {
    let facts = try NodeFacts(name: configuration.nodeName)
    for folder in [configuration.state, configuration.state + "/workspaces", configuration.state + "/sandboxes", configuration.homes] {
      try FileManager.default.createDirectory(
        atPath: folder, withIntermediateDirectories: true,
        attributes: [.posixPermissions: folder == configuration.homes ? 0o711 : 0o700])
    }
    let lock = try StateLock(configuration.state)
    let folders = try FileManager.default.contentsOfDirectory(atPath: configuration.state + "/workspaces")
    let journal = try Journal(path: configuration.state + "/journal.sqlite", hasHistory: !folders.isEmpty)
    let (lanes, feed) = (Lanes(), EventFeed())
    let sink = JournalSink(journal, feed, logger)
    let images = try ImageStore(path: configuration.state + "/images")
    let helper = URL(fileURLWithPath: configuration.helper).resolvingSymlinksInPath().path
    let services = NodeServices(
      configuration: configuration, facts: facts, logger: logger, tools: try Node.loadTools(configuration.tools), lanes: lanes,
      events: sink,
      sandboxes: HostSandboxes(
        state: configuration.state, helper: helper, layout: facts.layout, cgroupParent: configuration.cgroupParent, lanes: lanes),
      images: HostImages(store: images, lanes: lanes), helper: helper, seccomp: try SeccompCompiler.compileDefaultProfile(),
      vault: try Node.makeVault())
    self.init(services, journal, sink, feed, images, try Features(services), lock)
  }

  /// Creates a node with these drivers. `lock`: keeps another agent from using its state.
  init(
    _ services: NodeServices, _ journal: Journal, _ sink: JournalSink, _ feed: EventFeed, _ images: ImageStore, _ features: Features,
    _ lock: StateLock?
  ) {
    self.services = services
    self.journal = journal
    self.sink = sink
    self.feed = feed
    self.images = images
    self.features = features
    self.lock = lock
    (beginnings, beginning) = AsyncStream<@Sendable () async -> Void>.makeStream()
    (trims, trimming) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
  }

  private static func makeVault() throws -> SecretVault {
    do throws(Errno) { return try SecretVault() } catch {
      throw AgentError(.internal, "secrets: cannot create a file system in memory: \(error.sentence)")
    }
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

  // ------------------------------------------------------------------ running

  /// Recovers what a previous agent left, and then runs the lives of all workspaces and the node's own work until the task is cancelled.
  /// Workspaces continue without it. Throws if the state cannot be recovered, or if the journal's disk fails.
  package func run() async throws {
    defer { calls.cancelAll() }
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask { try await self.sink.run() }
      group.addTask {
        do { try await self.recover() } catch {
          self.recovered.fulfil(.failure(error))
          throw error
        }
        self.recovered.fulfil(.success(()))
        await self.runLives()
      }
      group.addTask { await self.homes.purge() }
      group.addTask { await self.trimWhenAcknowledged() }
      // None of these tasks ends by itself: the first that ends cancels the others.
      defer { group.cancelAll() }
      try await group.next()
    }
  }

  /// Throws when the journal's disk has failed: only a new process, which reads the file again, knows what is in it.
  package nonisolated func untilJournalFails() async throws { try await sink.untilFailure() }

  /// Returns when `run` has recovered what a previous agent left; throws if it cannot.
  package nonisolated func untilRecovered() async throws { try await recovered.value }

  nonisolated func runLives() async {
    await withDiscardingTaskGroup { lives in
      for await body in beginnings { lives.addTask { await body() } }
      lives.cancelAll()
    }
  }

  /// Runs `body` as a child task of the node.
  nonisolated func begin(_ body: @escaping @Sendable () async -> Void) { beginning.yield(body) }

  // ---------------------------------------------------------------- launching

  /// Accepts a workspace: when this returns, it is durable and its supervisor has the secrets of the request. Idempotent: the same spec
  /// returns the same workspace.
  package func launch(
    _ asked: WorkspaceSpec, credentials: [Credential], homeKey: [UInt8]? = nil
  ) async throws -> (record: WorkspaceRecord, created: Bool) {
    let spec = asked.naming(credentials)
    // This comes first, so that an existing workspace is found whatever has changed since its launch.
    while let other = accepting[spec.id] { try await other.value }
    if let present = workspaces[spec.id] {
      let record = present.record
      guard record.spec == spec else {
        throw AgentError(
          reason: .workspaceExists, "workspace \(spec.id) exists with another spec (state \(record.state.rawValue))")
      }
      return (record, false)
    }
    let accepted = Promise<Void>()
    accepting[spec.id] = accepted
    defer {
      accepting[spec.id] = nil
      accepted.fulfil(.success(()))
    }
    let (tool, amounts) = try await check(spec, credentials)
    do throws(InvalidField) { try spec.validate(homeKey: homeKey) } catch { throw AgentError(error) }
    try await checkJournal()
    let image = try await services.images.find(spec.image)
    // Nothing suspends from here until the workspace is in memory: two launches never get the same capacity.
    try admit(amounts)
    let request = LaunchRequest(spec: spec, tool: tool, credentials: credentials)
    let record = try newRecord(request, amounts, slot: try freeSlot(), digest: image.digest)
    let workspace = Workspace(record, services, features.list, isOnRecord: false)
    workspaces[spec.id] = workspace
    do {
      let token = tool.tokenFile.map { ($0, NodeServices.freshToken()) }
      let secrets = LaunchSecrets(credentials: credentials, token: token, homeKey: homeKey)
      // Continues if the caller is cancelled: a launch that has begun is either accepted or undone.
      let origin = try await uncancelled { try await workspace.accept(secrets) }
      begin { await workspace.runAttempts(origin) }
      try await workspace.untilAccepted(origin)
    } catch {
      workspaces[spec.id] = nil
      throw error
    }
    return (workspace.record, true)
  }

  /// Checks everything that can be wrong with a request, before anything is done for it.
  private func check(_ spec: WorkspaceSpec, _ credentials: [Credential]) async throws -> (Tool, ResourceLimits) {
    do {
      try spec.validate()
      try WorkspaceSpec.validate(credentials)
      guard let tool = services.tools[spec.tool] else {
        throw InvalidField("tool", "there is no tool \(spec.tool); known: \(services.tools.keys.sorted().joined(separator: ", "))")
      }
      guard !tool.arguments.isEmpty || !spec.command.isEmpty else {
        throw InvalidField("command", "is missing; the tool \(tool.name) has no command of its own")
      }
      guard tool.arguments.isEmpty || spec.command.isEmpty else {
        throw InvalidField("command", "must be empty for the tool \(tool.name), which has a command of its own")
      }
      for feature in features.list { try await feature.validate(spec, tool) }
      var defaults = tool.resources
      defaults.memory = defaults.memory ?? configuration.defaults.memory
      defaults.cpu = defaults.cpu ?? configuration.defaults.cpu
      defaults.pids = defaults.pids ?? configuration.defaults.pids
      let policy = ResourcePolicy(hostMemoryBytes: facts.memoryBytes, hostMilliCPUs: facts.milliCPUs)
      return (tool, try spec.amounts(defaults: defaults, policy: policy))
    } catch let error as InvalidField {
      throw AgentError(error)
    }
  }

  private func checkJournal() async throws {
    guard journal.bytesInUse > journalRoom else { return }
    // If no controller owns the acknowledgement, events need not wait for one.
    if configuration.owner == nil { try await trim() }
    let used = try await journal.extent().bytes
    guard used <= journalRoom else {
      throw AgentError(
        reason: .journalFull,
        "journal: \(Quantity.describe(bytes: used)) of \(configuration.journalLimit) are in use, and the rest is reserved for ends; the controller has to acknowledge"
      )
    }
  }

  private func admit(_ amounts: ResourceLimits) throws {
    if let drain {
      throw AgentError(
        reason: .nodeDrained, "the node is drained by \(drain.by) since \(drain.began); `carrel uncordon` ends this")
    }
    let records = workspaces.values.map(\.record)
    let launching = records.count { $0.state == .pending || $0.state == .preparing }
    guard launching < configuration.maxLaunching else {
      throw AgentError(
        reason: .launchesExhausted, "launches: \(launching) in progress (limit \(configuration.maxLaunching)); retry later")
    }
    let reserve = Quantity.whole(configuration.reservedMemory) ?? 0
    let used = records.filter { !$0.state.isTerminal }.reduce(0) { $0 + $1.amounts.memoryBytes }
    let room = facts.memoryBytes > reserve + used ? facts.memoryBytes - reserve - used : 0
    guard amounts.memoryBytes <= room else {
      throw AgentError(
        reason: .memoryExhausted,
        "memory: requested \(Quantity.describe(bytes: amounts.memoryBytes)), free \(Quantity.describe(bytes: room)) of \(Quantity.describe(bytes: facts.memoryBytes))"
      )
    }
    guard records.count < configuration.maxWorkspaces else {
      throw AgentError(
        reason: .workspacesExhausted, "workspaces: \(records.count) exist (limit \(configuration.maxWorkspaces)); delete stopped ones")
    }
  }

  private nonisolated func newRecord(
    _ request: LaunchRequest, _ amounts: ResourceLimits, slot: Int, digest: String
  ) throws -> WorkspaceRecord {
    var record = WorkspaceRecord(
      spec: request.spec, amounts: amounts, slot: slot, address: features.network.driver.address(slot).description,
      firstID: configuration.firstID + UInt32(slot) * PlanCompiler.idCount, created: wallTime(), imageDigest: digest)
    for feature in features.list { try feature.begin(&record, request) }
    return record
  }

  private func freeSlot() throws -> Int {
    let used = Set(workspaces.values.map(\.record.slot))
    guard let slot = (0..<configuration.maxWorkspaces).first(where: { !used.contains($0) }) else {
      throw AgentError(
        reason: .workspacesExhausted, "slots: no id range and address is free; delete stopped workspaces")
    }
    return slot
  }

  /// Returns the launch plan for a spec, compiled with the first id range.
  package func plan(_ spec: WorkspaceSpec) async throws -> [String] {
    let (tool, amounts) = try await check(spec, [])
    let image = try await services.images.find(spec.image)
    let request = LaunchRequest(spec: spec, tool: tool, credentials: [])
    var record = try newRecord(request, amounts, slot: 0, digest: image.digest)
    // Adds what else `prepare` would find out.
    try await features.datasets.describe(&record)
    await features.network.readResolver()
    return Workspace(record, services, features.list, isOnRecord: false).compile(record, tool, image).operations.map(\.description)
  }

  // ---------------------------------------------------------------- answering

  package func find(_ id: String) throws -> Workspace {
    guard let workspace = workspaces[id] else { throw AgentError.noWorkspace(id) }
    return workspace
  }

  package func get(_ id: String) async throws -> (record: WorkspaceRecord, token: String?, tool: Tool?) {
    let workspace = try find(id)
    let token = await workspace.token()
    let record = workspace.record
    return (record, record.state.isTerminal ? nil : token, services.tool(of: record.spec))
  }

  package nonisolated var toolNames: [String] { services.tools.keys.sorted() }

  package func list(labels: [String: String] = [:], owner: String? = nil, states: Set<WorkspaceState> = []) -> [WorkspaceRecord] {
    workspaces.values.map(\.record).filter { record in
      (owner == nil || record.spec.owner.name == owner) && (states.isEmpty || states.contains(record.state))
        && labels.allSatisfy { record.spec.labels[$0.key] == $0.value }
    }.sorted { $0.spec.id < $1.spec.id }
  }

  package func usage(_ ids: [String]) async throws -> [(id: String, usage: WorkspaceUsage)] {
    let chosen = ids.isEmpty ? workspaces.values.filter { $0.record.state.mayRun } : try ids.map { try find($0) }
    let records = chosen.map(\.record).sorted { $0.spec.id < $1.spec.id }
    let (services, home) = (services, features.home)
    return await withTaskGroup(of: (Int, WorkspaceUsage).self) { group in
      for (index, record) in records.enumerated() {
        group.addTask {
          let usage = if let place = record.sandbox { await services.sandboxes.usage(place) } else { Usage() }
          return (index, WorkspaceUsage(usage, milliCPUs: record.amounts.milliCPUs, home: await home.use(record)))
        }
      }
      var found = [WorkspaceUsage?](repeating: nil, count: records.count)
      for await (index, usage) in group { found[index] = usage }
      return zip(records, found).compactMap { record, usage in usage.map { (record.spec.id, $0) } }
    }
  }

  package func log(_ id: String) async throws -> LogReader {
    _ = try find(id)
    let path = HostSandboxes.logs(configuration.state, id)
    return try await services.lanes.inspect.run {
      do throws(Errno) { return try LogReader(path: path) } catch {
        throw AgentError(.internal, "output of \(id): \(error.sentence)")
      }
    }
  }

  /// Returns the next whole lines of a workspace's output.
  package nonisolated func read(_ reader: LogReader, from offset: UInt64) async throws -> LogReader.Chunk? {
    try await services.lanes.inspect.run { try reader.read(from: offset) }
  }

  /// Describes what is slow or stuck now, one sentence each.
  package nonisolated var congestion: [String] {
    let calls = calls.gauge
    let journal = sink.congestion.map { ["journal: \($0.commits) events wait for the disk, for up to \($0.seconds) s"] } ?? []
    let lanes = services.lanes.gauges.compactMap { gauge -> String? in
      if gauge.running == gauge.width, gauge.queued > 0 || gauge.oldestSeconds > 10 {
        return
          "\(gauge.name): all \(gauge.width) threads are busy, for up to \(Int(gauge.oldestSeconds)) s, and \(gauge.queued) requests wait"
      }
      guard gauge.isOverdue else { return nil }
      return "\(gauge.name): \(gauge.running) of \(gauge.width) threads are busy, for up to \(Int(gauge.oldestSeconds)) s"
    }
    return journal + lanes
      + (calls.overdue.isEmpty ? [] : ["calls whose time is over go on: \(calls.overdue.joined(separator: ", "))"])
  }

  package nonisolated func datasetRegistry() async throws -> DatasetRegistry { try await features.datasets.readRegistry() }

  package func state(_ id: String) -> WorkspaceState? { workspaces[id]?.record.state }

  // --------------------------------------------------------- acting on one

  /// Returns a workspace that is not being accepted or deleted.
  private func findSettled(_ id: String) async throws -> Workspace {
    while let other = accepting[id] { try await other.value }
    return try find(id)
  }

  package func stop(_ id: String, grace: UInt32?, by: String, reason: Reason? = nil) async throws -> WorkspaceRecord {
    try await findSettled(id).stop(grace: grace, by: by, reason: reason)
  }

  /// Deletes a workspace that has stopped, and its output. Its home and datasets remain.
  package func delete(_ id: String) async throws {
    let workspace = try await findSettled(id)
    // Another workspace with this id would have its output in the same directory, so it waits until that is removed.
    let removed = Promise<Void>()
    accepting[id] = removed
    defer {
      accepting[id] = nil
      removed.fulfil(.success(()))
    }
    try await workspace.delete()
    workspaces[id] = nil
    await uncancelled { await self.removeOutput(id) }
    Fault.at(.folderRemoved)
  }

  /// Removes the output of a workspace that is already deleted. What cannot be removed now is swept when the next agent starts.
  private func removeOutput(_ id: String) async {
    let path = HostSandboxes.folder(configuration.state, id)
    for attempt in 1...10 {
      do {
        return try await services.lanes.cleanup.run { try FileManager.default.removeItem(atPath: path) }
      } catch {
        logger.error("cannot remove the output of a deleted workspace", metadata: ["attempt": "\(attempt)", "error": "\(error)"])
        try? await Task.sleep(for: .milliseconds(100))
      }
    }
  }

  package func exec(_ id: String, _ asked: ExecAsked, by: String) async throws -> RunningProgram {
    try await features.exec.start(asked, in: find(id), by: by)
  }

  package func putCredentials(_ id: String, _ credentials: [Credential]) async throws {
    try await features.credentials.put(find(id), credentials)
  }

  package func removeCredentials(_ id: String, _ names: [String]) async throws { try await features.credentials.remove(find(id), names) }

  package func revokeCredentials(_ id: String, role: String?) async throws { try await features.broker.revoke(find(id), role: role) }

  package func attach(_ id: String, _ dataset: WorkspaceSpec.Dataset, seconds: UInt64?) async throws -> WorkspaceRecord {
    try await features.datasets.attach(find(id), dataset, seconds: seconds)
  }

  package func detach(_ id: String, _ target: String, _ policy: DatasetsFeature.UsePolicy) async throws -> [OpenFileUser] {
    try await features.datasets.detach(find(id), target, policy)
  }

  // ------------------------------------------------------------------- images

  /// Runs work on images in their lane, without a time limit.
  package nonisolated func onImages<T: Sendable>(_ body: @escaping @Sendable (ImageStore) throws -> T) async throws -> T {
    do {
      return try await services.lanes.images.run { [images] in try body(images) }
    } catch let error as DriverError {
      throw AgentError(error)
    }
  }

  /// Runs work that only reads images, in the lane for short reads.
  package nonisolated func readImages<T: Sendable>(_ body: @escaping @Sendable (ImageStore) throws -> T) async throws -> T {
    do {
      return try await services.lanes.inspect.run { [images] in try body(images) }
    } catch let error as DriverError {
      throw AgentError(error)
    }
  }

  package func removeImage(_ reference: String) async throws {
    let inUse = Set(workspaces.values.map(\.record).filter { !$0.state.isTerminal }.map(\.imageDigest))
    try await onImages { try $0.remove(reference, inUse: inUse) }
  }

  // -------------------------------------------------------------------- homes

  package nonisolated var homes: HomeAdministration {
    HomeAdministration(
      services: services, store: HomeStore(root: configuration.homes, images: features.home.volumes), volumes: features.home.volumes,
      registry: features.home.registry,
      images: { try await self.readImages { try $0.list() } }, workspaces: { await Array(self.workspaces.values) })
  }

  // -------------------------------------------------------- for recovery only

  func insert(_ workspace: Workspace) { workspaces[workspace.id] = workspace }
}

/// The resources that a workspace uses, and their limits.
package struct WorkspaceUsage: Sendable {
  package let memoryBytes: UInt64
  package let memoryPeakBytes: UInt64
  package let memoryLimitBytes: UInt64
  package let cpuNanoseconds: UInt64
  package let milliCPUs: UInt64
  package let pids: UInt64
  package let pidsLimit: UInt64
  package let outOfMemoryKills: UInt64
  /// The usage of a home that has a limit of its own.
  package let home: HomeVolumes.Usage?

  init(_ usage: Usage, milliCPUs: UInt64, home: HomeVolumes.Usage?) {
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

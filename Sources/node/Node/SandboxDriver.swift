// SPDX-License-Identifier: Apache-2.0

internal import Concurrency
internal import Foundation
internal import LaunchPlan
internal import Cgroups
internal import Linux
internal import ShimProtocol
internal import Procfs
internal import ShimClient

/// The operations on sandboxes that the life of a workspace needs. Each call does its blocking work in a lane.
protocol SandboxDriver: Sendable {
  /// Creates a sandbox for a workspace's next attempt: its directory, and a supervisor that waits for a plan.
  func create(_ place: SandboxPlace, for workspace: String) async throws -> any SandboxLink
  /// Connects to the supervisor of a sandbox; nil if it has exited.
  func connect(_ place: SandboxPlace) async throws -> (any SandboxLink)?
  /// Returns whether the sandbox has a plan: its supervisor may then have been requested to launch. Nil if there is no such sandbox.
  func hasPlan(_ place: SandboxPlace) async throws -> Bool?
  /// Writes a plan, and a copy of the workspace's record, where the supervisor and the next agent find them.
  func write(_ plan: Plan, record: String, to place: SandboxPlace) async throws
  /// Stores a copy of a workspace's record beside its output.
  func keep(_ record: String, of workspace: String) async
  /// Returns how the tool ended; nil if that is not on record.
  func exitRecord(_ place: SandboxPlace) async throws -> ExitRecord?
  func usage(_ place: SandboxPlace) async -> Usage
  /// Sends SIGKILL to everything in the sandbox. Returns true when its cgroup is empty, false if it is not within about 1 s.
  func kill(_ place: SandboxPlace) async -> Bool
  /// Sends SIGKILL to a supervisor that does not reply.
  func killSupervisor(_ place: SandboxPlace) async
  /// Removes the cgroup, and kills what is left in it.
  func removeCgroup(_ place: SandboxPlace) async
  /// Removes the sandbox directory, the last part that is left of a sandbox.
  func remove(_ place: SandboxPlace) async
}

/// The sandboxes of this host.
struct HostSandboxes: SandboxDriver {
  let state: String
  /// The path of `carrel-shim`, without symlinks.
  let helper: String
  let layout: CgroupLayout
  let cgroupParent: String
  let lanes: Lanes

  func path(_ place: SandboxPlace) -> String { place.path(in: state) }

  func cgroup(_ place: SandboxPlace) -> Cgroup { Cgroup(layout: layout, path: place.cgroupPath(below: cgroupParent)) }

  /// Returns a workspace's directory, which has its output.
  static func folder(_ state: String, _ workspace: String) -> String { "\(state)/workspaces/\(workspace)" }

  static func logs(_ state: String, _ workspace: String) -> String { folder(state, workspace) + "/log" }

  /// The time limit for a supervisor's hello.
  private static let helloLimit = Duration.seconds(10)

  func create(_ place: SandboxPlace, for workspace: String) async throws -> any SandboxLink {
    let (path, helper) = (path(place), helper)
    let (output, logs) = (HostSandboxes.folder(state, workspace), HostSandboxes.logs(state, workspace))
    let (connection, process) = try await lanes.launch.run { () -> (Handle, Handle) in
      let folder: SandboxDirectory
      do throws(Errno) {
        folder = try SandboxDirectory(path: path, create: true)
        let root = try Descriptor.open("/", [.path, .directory])
        for part in [output, logs] {
          do throws(Errno) { try root.makeDirectory(part, mode: 0o700) } catch { if error != .exists { throw error } }
        }
        let log = try Descriptor.open(logs, [.readOnly, .directory, .noFollow])
        let process: Handle
        do throws(StepFailure) {
          process = try folder.startSupervisor(place.id, workspace: workspace, helper: helper, logs: log, errors: 2)
        } catch {
          throw Errno(error.errno)
        }
        do throws(Errno) { return (try folder.connect(), process) } catch {
          try? Process.signal(process.descriptor, Signals.kill)
          throw error
        }
      } catch {
        throw AgentError(.internal, "sandbox \(path): cannot create it: \(error.sentence)")
      }
    }
    do {
      guard case .hello(let link) = try await ShimConnection.greet(connection, within: HostSandboxes.helloLimit) else {
        throw AgentError(.failedPrecondition, "\(helper): older than this agent; install both from one package")
      }
      return link
    } catch {
      // No other caller will connect to this supervisor.
      try? Process.signal(process.descriptor, Signals.kill)
      throw error
    }
  }

  func connect(_ place: SandboxPlace) async throws -> (any SandboxLink)? {
    let (path, cgroup) = (path(place), cgroup(place))
    let connection: Handle? = try await lanes.launch.run {
      do throws(Errno) {
        return try SandboxDirectory(path: path).connect()
      } catch {
        guard error == .noEntry || error == .connectionRefused else { throw error }
        return nil
      }
    }
    guard let connection else { return nil }
    // An error from here on does not mean that the sandbox has ended: if the supervisor has exited, the next connection is refused.
    switch try await ShimConnection.greet(connection, within: HostSandboxes.helloLimit) {
    case .hello(let link): return link
    case .legacy(let first):
      let pid = (try? await lanes.inspect.run { HostSandboxes.findInit(cgroup) }) ?? nil
      return try await LegacyShimConnection.adopt(
        connection, first: first, connect: { () throws(Errno) in try SandboxDirectory(path: path).connect() }, findInit: { pid })
    }
  }

  private static func findInit(_ cgroup: Cgroup) -> Int32? { cgroup.processes().first { ProcessDirectory($0).isInit } }

  func hasPlan(_ place: SandboxPlace) async throws -> Bool? {
    let path = path(place)
    return try await lanes.launch.run {
      do throws(Errno) { return try SandboxDirectory(path: path).hasPlan } catch {
        guard error == .noEntry else { throw error }
        return nil
      }
    }
  }

  func write(_ plan: Plan, record: String, to place: SandboxPlace) async throws {
    let path = path(place)
    try await lanes.launch.run {
      do throws(Errno) {
        let folder = try SandboxDirectory(path: path)
        try folder.keep(record: Array(record.utf8))
        try folder.write(plan)
      } catch {
        throw AgentError(.internal, "cannot write to \(path): \(error.sentence)")
      }
    }
  }

  func keep(_ record: String, of workspace: String) async {
    let path = HostSandboxes.folder(state, workspace)
    _ = try? await lanes.launch.run { try WorkspaceDirectory(path: path).keep(record: Array(record.utf8)) }
  }

  func exitRecord(_ place: SandboxPlace) async throws -> ExitRecord? {
    let path = path(place)
    return try await lanes.launch.run {
      do throws(Errno) { return try SandboxDirectory(path: path).exitRecord } catch {
        guard error == .noEntry else { throw error }
        return nil
      }
    }
  }

  func usage(_ place: SandboxPlace) async -> Usage {
    let cgroup = cgroup(place)
    return (try? await lanes.launch.run(within: .seconds(5)) { cgroup.usage() }) ?? Usage()
  }

  func kill(_ place: SandboxPlace) async -> Bool {
    let cgroup = cgroup(place)
    return
      (try? await lanes.cleanup.run {
        for attempt in 0..<100 {
          if cgroup.processes().isEmpty { return true }
          if attempt % 10 == 0 { cgroup.signal(Signals.kill) }
          Clock.sleep(milliseconds: 10)
        }
        return cgroup.processes().isEmpty
      }) ?? false
  }

  func killSupervisor(_ place: SandboxPlace) async {
    let path = path(place)
    _ = try? await lanes.launch.run {
      let folder = try SandboxDirectory(path: path)
      let pid = try Socket.peer(folder.connect().descriptor).pid
      let process = try Linux.Process.open(pid: pid)
      // The pid was not reused: the same process listens now as before its descriptor was opened.
      guard try Socket.peer(folder.connect().descriptor).pid == pid else { return }
      try Linux.Process.signal(process, Signals.kill)
    }
  }

  func removeCgroup(_ place: SandboxPlace) async {
    let cgroup = cgroup(place)
    // Dying processes leave a cgroup a little late; from the sixth attempt on the rest is killed. No lane is occupied between attempts.
    for attempt in 0..<50 {
      if (try? await lanes.cleanup.run { cgroup.remove() }) ?? true { return }
      if attempt >= 5 { _ = try? await lanes.cleanup.run { cgroup.signal(Signals.kill) } }
      do { try await Task.sleep(for: .milliseconds(20)) } catch { return }
    }
  }

  func remove(_ place: SandboxPlace) async {
    let path = path(place)
    let isLegacy = place.isLegacy
    // What cannot be removed within about 1 s is swept when the next agent starts.
    for _ in 0..<10 {
      let isGone = try? await lanes.cleanup.run {
        // Commit 7ede341 had the output in the same folder, where it remains.
        let names = isLegacy ? ((try? FileManager.default.contentsOfDirectory(atPath: path)) ?? []).filter { $0 != "log" } : []
        let gone = isLegacy ? names.map { "\(path)/\($0)" } : [path]
        for entry in gone { try? FileManager.default.removeItem(atPath: entry) }
        return !gone.contains { FileManager.default.fileExists(atPath: $0) }
      }
      if isGone ?? false { return }
      do { try await Task.sleep(for: .milliseconds(100)) } catch { return }
    }
  }
}

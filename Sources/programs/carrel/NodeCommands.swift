// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import SwiftProtobuf

struct Node: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show this node: capacity, what is in use, what is degraded, and its controllers.")
  @OptionGroup var common: Common
  @Flag(name: .long, help: "Read the whole journal and check its structure instead.") var checkJournal = false

  func run() async throws {
    try await reporting {
      if checkJournal {
        let events = try await common.withAgent { try await Carrel_V1_NodeService.Client(wrapping: $0).checkJournal(.init()).events }
        return print("the journal is sound: \(events) events")
      }
      let info = try await common.withAgent { try await Carrel_V1_NodeService.Client(wrapping: $0).info(.init()) }
      guard common.output == .table else { return try Printer.print([info], as: common.output, single: true) }
      var rows = [
        ["node", info.node + (info.draining ? " (draining)" : "")], ["version", info.version], ["kernel", info.kernel],
        ["cgroups", info.cgroupLayout],
        ["memory", "\(Printer.bytes(info.memoryReservedBytes)) of \(Printer.bytes(info.memoryBytes)) promised"],
        ["cpus", String(format: "%.2f of %.0f promised", info.cpusReserved, info.cpus)],
        ["workspaces", "\(info.workspacesRunning) running of \(info.workspaces)"], ["tools", info.tools.joined(separator: " ")],
        ["events", "\(info.oldest) to \(info.head) in stream \(info.streamID), acknowledged to \(info.acknowledged)"],
        ["journal", "\(Printer.bytes(info.journalBytes)) of \(Printer.bytes(info.journalLimitBytes))"],
        ["agent since", info.started], ["boot", info.bootID],
      ]
      for controller in info.controllers {
        let standing = controller.connected ? "connected" : "not connected: \(controller.problem)"
        rows.append([
          "controller",
          "\(controller.name) at \(controller.socket)\(controller.owner ? " (owner)" : ""), acknowledged to \(controller.acknowledged), \(standing)",
        ])
      }
      for sentence in info.degraded { rows.append(["degraded", sentence]) }
      Printer.table(["FIELD", "VALUE"], rows)
    }
  }
}

struct DrainCommand: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "drain", abstract: "Refuse launches from now on, also after a restart of the agent, until `carrel uncordon`.")
  @OptionGroup var common: Common
  @Option(name: .long, help: "Stop what runs: SIGTERM now, SIGKILL after this number of seconds. Default: workspaces go on.") var deadline:
    UInt32?
  @Flag(name: .long, help: "Return when no workspace runs.") var wait = false

  func run() async throws {
    try await reporting {
      let (deadline, wait) = (deadline, wait)
      let left = try await common.withAgent { client in
        let node = Carrel_V1_NodeService.Client(wrapping: client)
        var left = try await node.drain(
          .with {
            if let deadline { $0.deadlineSeconds = deadline }
            $0.by = NSUserName()
          }
        ).workspaces
        while wait && left > 0 {
          try await Task.sleep(for: .milliseconds(200))
          left = try await node.info(.init()).workspacesRunning
        }
        return left
      }
      print("draining; \(left) workspaces run")
    }
  }
}

struct Uncordon: AsyncParsableCommand {
  // `resume` is the former name, which is removed in 0.4.
  static let configuration = CommandConfiguration(abstract: "Accept launches again after `carrel drain`.", aliases: ["resume"])
  @OptionGroup var common: Common

  func run() async throws {
    try await reporting {
      _ = try await common.withAgent { try await Carrel_V1_NodeService.Client(wrapping: $0).uncordon(.with { $0.by = NSUserName() }) }
    }
  }
}

struct Explain: AsyncParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Explain the state of a workspace, also of a deleted one.")
  @OptionGroup var common: Common
  @Argument var id: String

  func run() async throws {
    try await reporting {
      let id = id
      let last = try await common.withAgent { client in
        try await Workspaces(wrapping: client).watch(
          .with {
            $0.workspace = id; $0.untilHead = true
          }
        ) { response in
          var last: Carrel_V1_Event?
          for try await message in response.messages where message.hasEvent {
            // `Deleted` follows the end and has no reason of its own.
            if message.event.type != "Deleted" || last == nil { last = message.event }
          }
          return last
        }
      }
      guard let last else { throw Failure(code: 3, message: "workspace \(id): no events found") }
      guard common.output == .table else { return try Printer.print([last], as: common.output, single: true) }
      var lines = Explain.lines(last)
      if [.pending, .preparing, .starting].contains(last.state) {
        let now = try await common.withAgent { client in try await Workspaces(wrapping: client).get(.with { $0.id = id }).workspace }
        lines += Explain.progress(now, since: last.time)
      }
      for line in lines { Printer.line(line) }
    }
  }

  /// Describes how far the start of a workspace has come.
  private static func progress(_ workspace: Carrel_V1_Workspace, since time: String) -> [String] {
    let done = workspace.phases.map { String(format: "%@ %.1f ms", $0.name, $0.milliseconds) }
    var rows = ["start      " + (done.isEmpty ? "no phase is finished" : "finished: " + done.joined(separator: ", "))]
    if let begun = try? Date(
      time, strategy: .iso8601.year().month().day().time(includingFractionalSeconds: true).timeZone(separator: .omitted))
    {
      rows.append(String(format: "waiting    %.1f s since its last event", Date.now.timeIntervalSince(begun)))
    }
    for condition in workspace.conditions { rows.append("condition  \(condition)") }
    return rows
  }

  static func lines(_ event: Carrel_V1_Event) -> [String] {
    var rows = [
      "\(event.workspace) is \(Printer.state(event.state)) since \(event.time) (attempt \(event.generation), event \(event.sequence))"
    ]
    guard event.hasReason else { return rows }
    let reason = event.reason
    rows.append("why        \(reason.code): \(reason.message)")
    if reason.hasExitCode { rows.append("exit code  \(reason.exitCode)") }
    if reason.hasSignal { rows.append("signal     \(reason.signal)") }
    if reason.hasErrno { rows.append("step       \(reason.step) (errno \(reason.errno))") }
    if !reason.stoppedBy.isEmpty { rows.append("stopped by \(reason.stoppedBy)") }
    if reason.hasKilledProcess {
      rows.append(
        "killed     \(reason.killedProcess.name) (pid \(reason.killedProcess.pid)), which held \(Printer.bytes(reason.killedProcess.residentBytes))"
      )
    }
    if reason.hasMemoryLimitBytes {
      rows.append("memory     peak \(Printer.bytes(reason.memoryPeakBytes)) of \(Printer.bytes(reason.memoryLimitBytes))")
    }
    if reason.hasRanMilliseconds { rows.append(String(format: "ran        %.1f s", Double(reason.ranMilliseconds) / 1000)) }
    if !event.phases.isEmpty {
      rows.append("start      " + event.phases.map { String(format: "%@ %.1f ms", $0.name, $0.milliseconds) }.joined(separator: ", "))
    }
    if !reason.logTail.isEmpty { rows.append("its last lines:") }
    for line in reason.logTail { rows.append("  | \(line)") }
    if !reason.advice.isEmpty { rows.append("what to do \(reason.advice)") }
    return rows
  }
}

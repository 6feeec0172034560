// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import API
internal import Agent
internal import Foundation
internal import GRPCCore
internal import Images
internal import Journal
internal import SwiftProtobuf
internal import Workspaces
internal import WireMapping

/// `carrel.v1.NodeService`.
struct NodeService: Carrel_V1_NodeService.SimpleServiceProtocol {
  let node: Node
  let version: String
  let controllers: [Server.ControllerStatus]

  func drain(request: Carrel_V1_DrainRequest, context: ServerContext) async throws -> Carrel_V1_DrainResponse {
    try await node.answer("Drain") { try await RequestHandler(node: node).handle(request) }
  }

  func uncordon(request: Carrel_V1_UncordonRequest, context: ServerContext) async throws -> Carrel_V1_UncordonResponse {
    try await node.answer("Uncordon") { try await RequestHandler(node: node).handle(request) }
  }

  func resume(request: Carrel_V1_ResumeRequest, context: ServerContext) async throws -> Carrel_V1_ResumeResponse {
    try await node.answer("Resume") { try await RequestHandler(node: node).handle(request) }
  }

  func checkJournal(request: Carrel_V1_CheckJournalRequest, context: ServerContext) async throws -> Carrel_V1_CheckJournalResponse {
    try await node.answer("CheckJournal", within: CallLimit.long) {
      do {
        let events = try await node.journal.check()
        return .with { $0.events = UInt64(events) }
      } catch {
        throw AgentError(.dataLoss, "\(error)")
      }
    }
  }

  func info(request: Carrel_V1_InfoRequest, context: ServerContext) async throws -> Carrel_V1_InfoResponse {
    try await node.answer("Info") {
      let records = await node.list()
      let alive = records.filter { !$0.state.isTerminal }
      let extent = try await node.journal.extent()
      var statuses: [Carrel_V1_ControllerStatus] = []
      for status in controllers { statuses.append(try await status()) }
      let acknowledged = try await node.journal.acknowledged(by: node.configuration.acknowledger) ?? 0
      let draining = await node.drain != nil
      let limit = Quantity.whole(node.configuration.journalLimit) ?? 0
      let tools = node.toolNames
      let facts = node.facts
      return .with {
        $0.version = version
        $0.node = facts.name
        $0.kernel = facts.kernel
        $0.bootID = facts.bootID
        $0.cgroupLayout = facts.layoutName
        $0.memoryBytes = facts.memoryBytes
        $0.memoryReservedBytes = alive.reduce(0) { $0 + $1.amounts.memoryBytes }
        $0.cpus = Double(facts.milliCPUs) / 1000
        $0.cpusReserved = Double(alive.reduce(0) { $0 + $1.amounts.milliCPUs }) / 1000
        $0.workspaces = UInt32(records.count)
        $0.workspacesRunning = UInt32(alive.count)
        $0.streamID = node.journal.streamID
        $0.head = UInt64(extent.head)
        $0.oldest = UInt64(extent.oldest)
        $0.acknowledged = UInt64(acknowledged)
        $0.draining = draining
        $0.journalBytes = extent.bytes
        $0.journalLimitBytes = limit
        $0.controllers = statuses
        $0.degraded = facts.degraded + node.congestion
        $0.tools = tools
        $0.started = node.started
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

package import Configuration
internal import Concurrency
internal import Errors
internal import Foundation
internal import Images
internal import Journal
internal import Linux
package import Logging
internal import Networking
internal import Volumes
package import Workspaces

/// The parts that the workspaces of a node share: its drivers, its lanes, and the sink that makes events durable. A class, because each
/// workspace and each feature refers to it.
package final class NodeServices: Sendable {
  package let configuration: Configuration
  package let facts: NodeFacts
  package let logger: Logger
  package let tools: [String: Tool]
  package let lanes: Lanes
  let events: any EventSink
  let sandboxes: any SandboxDriver
  let images: any ImageLookup
  /// The path of `carrel-shim`, without symlinks.
  let helper: String
  /// The compiled default profile.
  let seccomp: [UInt8]
  /// The vault whose files pass secrets to supervisors.
  let vault: any SecretFiles

  init(
    configuration: Configuration, facts: NodeFacts, logger: Logger, tools: [String: Tool], lanes: Lanes, events: any EventSink,
    sandboxes: any SandboxDriver, images: any ImageLookup, helper: String, seccomp: [UInt8], vault: any SecretFiles
  ) {
    self.configuration = configuration
    self.facts = facts
    self.logger = logger
    self.tools = tools
    self.lanes = lanes
    self.events = events
    self.sandboxes = sandboxes
    self.images = images
    self.helper = helper
    self.seccomp = seccomp
    self.vault = vault
  }

  func tool(of spec: WorkspaceSpec) -> Tool? { tools[spec.tool] }

  /// Returns a token of 192 bits from the system's random number generator.
  static func freshToken() -> String {
    (0..<24).map { _ in UInt8.random(in: .min ... .max) }.map { byte in (byte < 16 ? "0" : "") + String(byte, radix: 16) }.joined()
  }

  /// Creates an event of the node itself, as the journal stores it.
  func nodeEvent(_ type: EventType, _ attributes: [String: String]) throws -> JournalEvent {
    JournalEvent(
      type: type.rawValue, workspace: "", state: "", previous: nil, generation: 0, reason: nil,
      attributes: try encodedText(NodeServices.bounded(attributes)),
      wallTime: wallTime(), bootNanoseconds: Clock.boottime, bootID: facts.bootID, phases: nil)
  }

  /// The size limit of an attribute of an event, in characters.
  private static let attributeLimit = 2048

  /// Returns the attributes as every reader can take them. Their names are the agent's; their values may be a tenant's.
  private static func bounded(_ attributes: [String: String]) -> [String: String] {
    attributes.mapValues { printable($0, limit: attributeLimit) }
  }

  /// Records an event of the node itself.
  func record(_ type: EventType, _ attributes: [String: String]) async throws {
    let event = try nodeEvent(type, attributes)
    Fault.at("before \(type.rawValue)")
    defer { Fault.at("after \(type.rawValue)") }
    try await events.submit([Journal.Entry(event)], retriesUntilDurable: false).value
  }

  /// Records an event with the setting that it is about. Waits even if cancelled, because the caller has to know whether it is on disk.
  func recordWhateverHappens(_ type: EventType, _ attributes: [String: String], _ change: Journal.Entry.Change) async throws {
    let event = try nodeEvent(type, attributes)
    Fault.at("before \(type.rawValue)")
    defer { Fault.at("after \(type.rawValue)") }
    try await events.submit([Journal.Entry(event, change)], retriesUntilDurable: false).valueWhateverHappens
  }

  func event(
    _ type: EventType, _ record: WorkspaceRecord, after previous: WorkspaceState?, _ attributes: [String: String] = [:]
  ) throws -> JournalEvent {
    let phases = [.ready, .stopped, .failed].contains(type) && !record.phases.isEmpty ? record.phases : nil
    return JournalEvent(
      type: type.rawValue, workspace: record.spec.id, state: record.state.rawValue, previous: previous?.rawValue,
      generation: Int64(record.attempt), reason: try record.reason.map { try encodedText($0) },
      attributes: try encodedText(NodeServices.bounded(attributes)), wallTime: wallTime(),
      bootNanoseconds: Clock.boottime, bootID: facts.bootID,
      phases: try phases.map { try encodedText($0) })
  }
}

/// In-memory files that carry secrets to supervisors.
protocol SecretFiles: Sendable {
  func file(_ content: [UInt8]) throws(Errno) -> Handle
}

extension SecretVault: SecretFiles {}

/// The lookup of the images that workspaces run.
protocol ImageLookup: Sendable {
  /// Finds an image by name, by name without its tag `latest`, or by digest.
  func find(_ reference: String) async throws -> StoredImage
  /// Returns the directories of an image's layers, the topmost first.
  func layerPaths(_ image: StoredImage) -> [String]
}

/// The images of this host.
struct HostImages: ImageLookup {
  let store: ImageStore
  let lanes: Lanes

  func find(_ reference: String) async throws -> StoredImage {
    if let image = store.known(reference) { return image }
    let store = store
    do {
      return try await lanes.launch.run { try store.find(reference) }
    } catch let error as DriverError {
      throw error.code == .notFound ? AgentError(reason: .imageNotFound, error.message, cause: error) : AgentError(error)
    }
  }

  func layerPaths(_ image: StoredImage) -> [String] { store.layerPaths(image) }
}

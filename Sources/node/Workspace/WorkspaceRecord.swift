// SPDX-License-Identifier: Apache-2.0

package import Foundation
package import Journal
package import ShimClient
package import Workspaces

/// Everything that the agent knows about a workspace and stores across restarts. Holds no secret.
///
/// Every JSON field but `spec`, `state`, `amounts`, `slot`, `address` and `firstID` has a default, so that a record of an older agent can
/// be read; a record of a newer agent loses nothing that this one knows. Records without `schema` are of commit 7ede341 (`LegacyRecord`).
package struct WorkspaceRecord: Sendable {
  package struct Phase: Codable, Equatable, Sendable {
    package let name: String
    package let milliseconds: Double
  }

  /// The caller that requested the stop, and the time that the tool has to exit.
  package struct StopRequest: Codable, Equatable, Sendable {
    package let by: String
    /// The time of SIGKILL, in nanoseconds since the boot `bootID`.
    var killAt: Int64
    var bootID: String
  }

  static let schema = 2

  @Boxed package private(set) var spec: WorkspaceSpec
  package var state: WorkspaceState = .pending
  @Boxed package var reason: Reason? = nil
  @Boxed package private(set) var amounts: ResourceLimits
  /// The number of the workspace's id range and address.
  package let slot: Int
  package let address: String
  package let firstID: UInt32
  package let created: String
  package var attempt: UInt32 = 1
  package var phases: [Phase] = []
  package var imageDigest = ""
  /// The sandbox that the attempt occupies; nil before the first.
  package var sandbox: SandboxPlace?
  /// The boot in which the sandbox was made.
  package var bootID = ""
  /// The time at which the tool was started, in nanoseconds since boot; nil before.
  package var startedNanoseconds: Int64?
  package var conditions: [Condition] = []
  @Boxed package var stop: StopRequest? = nil
  /// The reason for which the agent itself ends the tool, if it does.
  @Boxed package var stopReason: Reason? = nil
  package var outOfMemoryKills: UInt64 = 0
  /// The number of times that the launch of this attempt was retried because its supervisor was lost before it had a plan.
  var supervisorsLost: UInt32 = 0
  /// The state of each feature, by the feature's name.
  private var features: [String: any FeatureState] = [:]
  /// The state of features that this agent does not know.
  private var unknownFeatures: [String: JSONValue] = [:]

  init(
    spec: WorkspaceSpec, amounts: ResourceLimits, slot: Int, address: String, firstID: UInt32, created: String, imageDigest: String = ""
  ) {
    self.spec = spec
    self.amounts = amounts
    self.slot = slot
    self.address = address
    self.firstID = firstID
    self.created = created
    self.imageDigest = imageDigest
  }

  /// The state of a feature for this workspace.
  package subscript<F: WorkspaceFeature>(_ feature: F.Type) -> F.State {
    get { features[F.name] as? F.State ?? F.State() }
    set { features[F.name] = newValue }
  }

  /// Records that the attempt now occupies this sandbox, which was made in this boot.
  mutating func occupy(_ place: SandboxPlace, _ boot: String) {
    sandbox = place
    bootID = boot
  }

  package var stopRequestedBy: String? { stop?.by }
  package var isReadied: Bool { phases.contains { $0.name == "ready" } }

  // -------------------------------------------------------------- conditions

  package func condition(_ type: Condition.Kind) -> Condition? { conditions.first { $0.type == type } }

  /// Sets a condition or, without a message, clears it. The next event makes the change durable.
  mutating func setCondition(_ type: Condition.Kind, _ text: String?) {
    let message = text.map { printable($0, limit: Condition.messageLimit) }
    let present = conditions.firstIndex { $0.type == type }
    switch (present, message) {
    case (let index?, nil): conditions.remove(at: index)
    case (let index?, let message?): conditions[index].message = message
    case (nil, let message?): conditions.append(Condition(type: type, message: message, since: wallTime()))
    case (nil, nil): break
    }
  }

  // ------------------------------------------------------------------ coding

  func encoded() throws -> String { try encodedText(self) }

  func journalRecord() throws -> JournalRecord {
    JournalRecord(id: spec.id, state: state.rawValue, slot: Int64(slot), body: try encoded())
  }

  package init(_ record: JournalRecord) throws { self = try JSONDecoder().decode(WorkspaceRecord.self, from: Data(record.body.utf8)) }

  /// Decodes the copy in a directory; nil if there is none, or it cannot be read.
  init?(copy: [UInt8]?) {
    guard let copy, let record = try? JSONDecoder().decode(WorkspaceRecord.self, from: Data(copy)) else { return nil }
    self = record
  }
}

/// A state beside the life cycle.
package struct Condition: Codable, Equatable, Sendable {
  /// The names that a controller can rely on.
  package enum Kind: String, Codable, CaseIterable, Sendable {
    /// At least one credential file will soon expire and then be removed. The condition ends when none is left that will: it was replaced
    /// or removed.
    case credentialsExpiring = "CredentialsExpiring"
    /// A process has a static AWS variable in its environment, which hides the credentials that are renewed. The processes are checked
    /// every ten seconds while the tool runs; the condition ends with the first check that finds none.
    case staleCredentials = "StaleCredentials"
    /// The start of the workspace needed a rescue: files in the home were renamed, or the reserve of a full home was released. The
    /// condition holds until the workspace is deleted.
    case rescue = "Rescue"
    /// The home has packages for other images, which are not visible with the image of this workspace. The condition holds until the
    /// workspace is deleted.
    case imageChanged = "ImageChanged"
    /// The supervisor is alive and does not reply. The tool goes on. The condition ends when the supervisor replies or has exited;
    /// neither its beginning nor its end is an event.
    case supervisorUnreachable = "SupervisorUnreachable"
  }

  /// The size limit of a message, in characters.
  static let messageLimit = 1024

  package let type: Kind
  package var message: String
  /// The wall time at which the condition began.
  package let since: String
}

/// The state that a feature stores for a workspace. Every field has a default, for records of releases that did not write the field.
package protocol FeatureState: Codable, Equatable, Sendable {
  init()
}

extension FeatureState {
  init(kept: JSONValue) throws {
    // The decoder that the compiler writes knows no defaults: missing fields are taken from a fresh state.
    var fields = try JSONDecoder().decode([String: JSONValue].self, from: JSONEncoder().encode(Self()))
    if case .object(let kept) = kept { fields.merge(kept) { _, kept in kept } }
    self = try JSONDecoder().decode(Self.self, from: JSONEncoder().encode(fields))
  }
}

/// The state of a feature that stores nothing.
package struct NoState: FeatureState {
  package init() {}
}

extension WorkspaceRecord: Codable {
  private enum Key: String, CodingKey {
    case schema, spec, state, reason, amounts, slot, address, firstID, created, attempt, phases, imageDigest, sandbox, bootID
    case startedNanoseconds, conditions, stop, outOfMemoryKills, supervisorsLost, features
    case stopReason = "verdict"
  }

  package init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: Key.self)
    guard values.contains(.schema) else {
      self = try LegacyRecord(from: decoder).record
      return
    }
    func value<T: Decodable>(_ key: Key, or standard: T) throws -> T { try values.decodeIfPresent(T.self, forKey: key) ?? standard }
    spec = try values.decode(WorkspaceSpec.self, forKey: .spec)
    amounts = try values.decode(ResourceLimits.self, forKey: .amounts)
    slot = try values.decode(Int.self, forKey: .slot)
    address = try values.decode(String.self, forKey: .address)
    firstID = try values.decode(UInt32.self, forKey: .firstID)
    created = try value(.created, or: "")
    state = try values.decode(WorkspaceState.self, forKey: .state)
    reason = try values.decodeIfPresent(Reason.self, forKey: .reason)
    attempt = try value(.attempt, or: 1)
    phases = try value(.phases, or: [])
    imageDigest = try value(.imageDigest, or: "")
    sandbox = try values.decodeIfPresent(SandboxPlace.self, forKey: .sandbox)
    bootID = try value(.bootID, or: "")
    startedNanoseconds = try values.decodeIfPresent(Int64.self, forKey: .startedNanoseconds)
    conditions = try value(.conditions, or: [])
    stop = try values.decodeIfPresent(StopRequest.self, forKey: .stop)
    stopReason = try values.decodeIfPresent(Reason.self, forKey: .stopReason)
    outOfMemoryKills = try value(.outOfMemoryKills, or: 0)
    supervisorsLost = try value(.supervisorsLost, or: 0)
    guard values.contains(.features) else { return }
    let kept = try values.nestedContainer(keyedBy: FeatureKey.self, forKey: .features)
    for key in kept.allKeys {
      if let type = featureStates[key.stringValue] {
        features[key.stringValue] = try WorkspaceRecord.state(type, key, kept)
      } else {
        unknownFeatures[key.stringValue] = try kept.decode(JSONValue.self, forKey: key)
      }
    }
  }

  private static func state<S: FeatureState>(
    _ type: S.Type, _ key: FeatureKey, _ kept: KeyedDecodingContainer<FeatureKey>
  ) throws -> S {
    // The detour over defaults is for records of other releases only, because an agent decodes every record when it starts.
    if let state = try? kept.decode(S.self, forKey: key) { return state }
    return try S(kept: try kept.decode(JSONValue.self, forKey: key))
  }

  package func encode(to encoder: any Encoder) throws {
    var values = encoder.container(keyedBy: Key.self)
    try values.encode(WorkspaceRecord.schema, forKey: .schema)
    try values.encode(spec, forKey: .spec)
    try values.encode(amounts, forKey: .amounts)
    try values.encode(slot, forKey: .slot)
    try values.encode(address, forKey: .address)
    try values.encode(firstID, forKey: .firstID)
    try values.encode(created, forKey: .created)
    try values.encode(state, forKey: .state)
    try values.encodeIfPresent(reason, forKey: .reason)
    try values.encode(attempt, forKey: .attempt)
    try values.encode(phases, forKey: .phases)
    try values.encode(imageDigest, forKey: .imageDigest)
    try values.encodeIfPresent(sandbox, forKey: .sandbox)
    try values.encode(bootID, forKey: .bootID)
    try values.encodeIfPresent(startedNanoseconds, forKey: .startedNanoseconds)
    if !conditions.isEmpty { try values.encode(conditions, forKey: .conditions) }
    try values.encodeIfPresent(stop, forKey: .stop)
    try values.encodeIfPresent(stopReason, forKey: .stopReason)
    try values.encode(outOfMemoryKills, forKey: .outOfMemoryKills)
    if supervisorsLost > 0 { try values.encode(supervisorsLost, forKey: .supervisorsLost) }
    guard !features.isEmpty || !unknownFeatures.isEmpty else { return }
    var kept = values.nestedContainer(keyedBy: FeatureKey.self, forKey: .features)
    for (name, state) in features { try state.encode(to: kept.superEncoder(forKey: FeatureKey(name))) }
    for (name, state) in unknownFeatures { try kept.encode(state, forKey: FeatureKey(name)) }
  }

  private struct FeatureKey: CodingKey {
    let stringValue: String
    var intValue: Int? { nil }
    init(_ name: String) { stringValue = name }
    init?(stringValue: String) { self.init(stringValue) }
    init?(intValue: Int) { nil }
  }
}

/// Any JSON value, for what is retained without being interpreted.
enum JSONValue: Codable, Equatable, Sendable {
  case null
  case flag(Bool)
  case integer(Int64)
  case number(Double)
  case text(String)
  case list([JSONValue])
  case object([String: JSONValue])

  init(from decoder: any Decoder) throws {
    let value = try decoder.singleValueContainer()
    if value.decodeNil() {
      self = .null
    } else if let flag = try? value.decode(Bool.self) {
      self = .flag(flag)
    } else if let integer = try? value.decode(Int64.self) {
      self = .integer(integer)
    } else if let number = try? value.decode(Double.self) {
      self = .number(number)
    } else if let text = try? value.decode(String.self) {
      self = .text(text)
    } else if let list = try? value.decode([JSONValue].self) {
      self = .list(list)
    } else {
      self = .object(try value.decode([String: JSONValue].self))
    }
  }

  func encode(to encoder: any Encoder) throws {
    var value = encoder.singleValueContainer()
    switch self {
    case .null: try value.encodeNil()
    case .flag(let flag): try value.encode(flag)
    case .integer(let integer): try value.encode(integer)
    case .number(let number): try value.encode(number)
    case .text(let text): try value.encode(text)
    case .list(let list): try value.encode(list)
    case .object(let object): try value.encode(object)
    }
  }
}

/// Encodes a value as the journal stores it: the same value always gives the same text.
func encodedText(_ value: some Encodable) throws -> String {
  let encoder = JSONEncoder()
  encoder.outputFormatting = [.sortedKeys]
  return String(decoding: try encoder.encode(value), as: UTF8.self)
}

/// Returns a time in the format of RFC 3339, with milliseconds, in UTC.
package func wallTime(_ moment: Date = .now) -> String {
  moment.formatted(
    .iso8601.year().month().day().timeZone(separator: .omitted).time(includingFractionalSeconds: true).timeSeparator(.colon))
}

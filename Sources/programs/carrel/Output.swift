// SPDX-License-Identifier: Apache-2.0

internal import API
internal import ArgumentParser
internal import Foundation
internal import SwiftProtobuf
internal import Workspaces
internal import Yams

enum OutputFormat: String, ExpressibleByArgument, CaseIterable { case table, json, yaml, cloudevents }

/// Prints messages for programs, tables for people.
enum Printer {
  static func print(_ messages: [any Message], as format: OutputFormat, single: Bool = false) throws {
    guard format != .cloudevents else { throw Failure(code: 2, message: "--output cloudevents: only valid for events") }
    var options = JSONEncodingOptions()
    options.preserveProtoFieldNames = true
    let objects = try messages.map { try JSONSerialization.jsonObject(with: Data(try $0.jsonString(options: options).utf8)) }
    let whole: Any = single ? (objects.first ?? [:]) : objects
    if format == .yaml {
      Swift.print(try Yams.dump(object: whole, sortKeys: true), terminator: "")
    } else {
      let data = try JSONSerialization.data(withJSONObject: whole, options: [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes])
      Swift.print(String(decoding: data, as: UTF8.self))
    }
  }

  /// Prints a line of text. What would act on a terminal is escaped, because labels, names and messages may be a tenant's.
  static func line(_ text: String) { Swift.print(printable(text, limit: .max)) }

  /// Prints columns that are as wide as their widest cell.
  static func table(_ header: [String], _ rows: [[String]]) {
    let clean = ([header] + rows).map { $0.map { printable($0, limit: .max) } }
    let widths = header.indices.map { column in clean.map { $0[column].count }.max() ?? 0 }
    for row in clean {
      let cells = row.enumerated().map { index, cell in
        index == row.count - 1 ? cell : cell.padding(toLength: widths[index], withPad: " ", startingAt: 0)
      }
      Swift.print(cells.joined(separator: "  "))
    }
  }

  static func bytes(_ value: UInt64) -> String {
    for (unit, size) in [("Gi", Double(1 << 30)), ("Mi", Double(1 << 20)), ("Ki", Double(1 << 10))] where Double(value) >= size {
      return String(format: "%.1f%@", Double(value) / size, unit)
    }
    return "\(value)"
  }

  /// Parses a time such as 90s, 30m, 8h or 2d.
  static func seconds(_ text: String, _ option: String) throws -> UInt64 {
    let units: [Character: UInt64] = ["s": 1, "m": 60, "h": 3600, "d": 86_400]
    guard let unit = text.last.flatMap({ units[$0] }), let number = UInt64(text.dropLast()), number > 0,
      !number.multipliedReportingOverflow(by: unit).overflow
    else { throw Failure(code: 2, message: "\(option) \(text): expected a time such as 90s, 30m, 8h or 2d") }
    return number * unit
  }

  static func state(_ state: Carrel_V1_State) -> String {
    switch state {
    case .pending: "pending"
    case .preparing: "preparing"
    case .starting: "starting"
    case .ready: "ready"
    case .stopping: "stopping"
    case .stopped: "stopped"
    case .failed: "failed"
    case .unspecified, .UNRECOGNIZED: "?"
    }
  }

  static func event(_ event: Carrel_V1_Event) -> String {
    var line = "\(event.sequence)  \(event.time)  \(event.workspace)  \(event.type)"
    if event.hasReason { line += "  \(event.reason.code): \(event.reason.message)" }
    for (key, value) in event.attributes.sorted(by: { $0.key < $1.key }) where key != "attempt" || value != "1" {
      line += "  \(key)=\(value)"
    }
    return line
  }

  static func gap(_ gap: Carrel_V1_Gap) -> String {
    "events \(gap.from) to \(gap.to == 0 ? "?" : "\(gap.to)") can no longer be had: \(gap.reason)"
  }

  static func note(_ text: String) {
    let lines = text.split(separator: "\n", omittingEmptySubsequences: false).map { printable(String($0), limit: .max) }
    FileHandle.standardError.write(Data((lines.joined(separator: "\n") + "\n").utf8))
  }
}

/// Events in the form of CloudEvents 1.0 (JSON format, with the `sequence` extension).
enum CloudEvent {
  static func line(_ message: Carrel_V1_WatchResponse, _ node: String) throws -> String {
    let event = message.event
    var options = JSONEncodingOptions()
    options.preserveProtoFieldNames = true
    let data: any Message = message.hasGap ? message.gap : event
    let subject = event.workspace.isEmpty ? "node" : "workspace"
    var object: [String: Any] = [
      "specversion": "1.0", "source": "/carrel/nodes/\(node)/streams/\(message.streamID)", "datacontenttype": "application/json",
      "data": try JSONSerialization.jsonObject(with: Data(try data.jsonString(options: options).utf8)),
    ]
    if message.hasGap {
      object["id"] = "gap-\(message.gap.from)-\(message.gap.to)"
      object["type"] = "carrel.v1.stream.gap"
    } else {
      object["id"] = "\(event.sequence)"
      object["type"] = "carrel.v1.\(subject).\(event.type.lowercased())"
      object["time"] = event.time
      // Sequences are padded to one length, so that they sort as text.
      object["sequence"] = String(repeating: "0", count: max(0, 20 - "\(event.sequence)".count)) + "\(event.sequence)"
      if !event.workspace.isEmpty { object["subject"] = event.workspace }
    }
    let bytes = try JSONSerialization.data(withJSONObject: object, options: [.sortedKeys, .withoutEscapingSlashes])
    return String(decoding: bytes, as: UTF8.self)
  }
}

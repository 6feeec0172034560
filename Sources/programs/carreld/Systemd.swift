// SPDX-License-Identifier: Apache-2.0

internal import Agent
internal import CSystemd
internal import Foundation
internal import Logging
internal import ServiceLifecycle

/// Notifies systemd that the agent serves, and its watchdog at half of the configured interval. Without systemd (no NOTIFY_SOCKET) it
/// only waits for the shutdown.
struct SystemdService: Service {
  let node: Node

  func run() async throws {
    try await node.untilRecovered()
    sd_notify(0, "READY=1\nSTATUS=Serving")
    var microseconds: UInt64 = 0
    let asked = sd_watchdog_enabled(0, &microseconds) > 0
    let watchdog = microseconds
    await cancelWhenGracefulShutdown {
      while !Task.isCancelled {
        if asked { sd_notify(0, "WATCHDOG=1") }
        try? await Task.sleep(for: asked ? .microseconds(watchdog / 2) : .seconds(3600))
      }
    }
    sd_notify(0, "STOPPING=1")
  }
}

/// Logs one line per message to stderr, followed by `key=value`; under systemd, it sends journal fields instead.
struct AgentLogHandler: LogHandler {
  var logLevel: Logger.Level = .info
  var metadata: Logger.Metadata = [:]
  private let journal = ProcessInfo.processInfo.environment["JOURNAL_STREAM"] != nil

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    let (level, message) = (event.level, event.message)
    let fields = metadata.merging(event.metadata ?? [:]) { _, new in new }.sorted { $0.key < $1.key }.filter { "\($0.value)" != "" }
    if journal {
      sendToJournal(level, "\(message)", fields)
    } else {
      var text = "\(Date.now.formatted(.iso8601)) \(level.rawValue) \(AgentLogHandler.escape("\(message)"))"
      for (key, value) in fields { text += " \(key)=\"\(AgentLogHandler.escape("\(value)"))\"" }
      FileHandle.standardError.write(Data((text + "\n").utf8))
    }
  }

  /// Escapes control characters, because a newline in a message would forge a log line.
  private static func escape(_ text: String) -> String {
    var escaped = ""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"", "\\": escaped += "\\\(scalar)"
      case _ where scalar.value < 0x20 || scalar.value == 0x7F: escaped += "\\u{\(String(scalar.value, radix: 16))}"
      default: escaped.unicodeScalars.append(scalar)
      }
    }
    return escaped
  }

  /// Priorities of syslog(3).
  private static let priorities: [Logger.Level: Int] = [
    .trace: 7, .debug: 7, .info: 6, .notice: 5, .warning: 4, .error: 3, .critical: 2,
  ]

  private func sendToJournal(_ level: Logger.Level, _ message: String, _ fields: [(key: String, value: Logger.MetadataValue)]) {
    var lines = ["MESSAGE=\(message)", "PRIORITY=\(AgentLogHandler.priorities[level] ?? 6)", "SYSLOG_IDENTIFIER=carreld"]
    lines += fields.map { "CARREL_\($0.key.uppercased())=\($0.value)" }
    let buffers = lines.map { Array($0.utf8) }
    // SAFETY: the vectors point into copies that live until sd_journal_sendv has returned.
    let copies = buffers.map { bytes in
      let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 1)
      copy.copyBytes(from: bytes)
      return copy
    }
    let vectors = copies.map { iovec(iov_base: $0.baseAddress, iov_len: $0.count) }
    sd_journal_sendv(vectors, Int32(vectors.count))
    for copy in copies { copy.deallocate() }
  }
}

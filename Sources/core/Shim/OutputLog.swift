// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// A tool's output on disk, in CRI's log format: `2026-01-02T03:04:05.000000006Z stdout F text`, with `P` in place of `F` for a
/// line that continues in the next.
///
/// The log is one stream of bytes in segment files, each named by the offset of its first byte, so a reader finds an offset by
/// name. The oldest segments are removed, so the disk space is bounded whatever the tool writes.
package final class OutputLog {
  package enum Stream: Int { case stdout = 0, stderr = 1 }

  private static let lineLimit = 16_384

  private let folder: Handle
  private let segmentBytes: UInt64
  private let segments: Int
  private let bytesPerSecond: Int64
  private var current: Handle?
  private var currentSize: UInt64 = 0
  private var offset: UInt64 = 0
  private var starts: [UInt64] = []
  private var partial: [[UInt8]] = [[], []]
  private var allowance: Int64
  private var refilled: Int64

  package init(in folder: Handle, segmentBytes: UInt64, segments: UInt32, bytesPerSecond: UInt64) {
    self.folder = folder
    self.segmentBytes = max(segmentBytes, 65_536)
    self.segments = Int(max(segments, 2))
    self.bytesPerSecond = Int64(clamping: max(bytesPerSecond, 65_536))
    allowance = self.bytesPerSecond
    refilled = Clock.monotonic
    // A previous attempt may have written here: its lines stay, and new lines follow them.
    do throws(Errno) {
      var last: (start: UInt64, size: UInt64) = (0, 0)
      for name in try folder.descriptor.entries() where name.utf8.count == 24 {
        guard let start = UInt64(name.prefix(20)) else { continue }
        starts.append(start)
        if start >= last.start { last = (start, UInt64(try folder.descriptor.open(name, [.path, .noFollow]).status().size)) }
      }
      starts.sort { $0 < $1 }
      offset = last.start + last.size
    } catch {}
    // The last segment, if it is empty, is used again.
    starts.removeAll { $0 == offset }
  }

  /// Returns the milliseconds to wait before more is read; 0: none. A flooding tool is slowed down, for a bounded time, so that
  /// none of its output is lost.
  package func pause() -> Int32 {
    let now = Clock.monotonic
    let elapsed = now - refilled
    if elapsed > 10_000_000 {
      let earned = min(elapsed, 1_000_000_000) / 1_000 * bytesPerSecond / 1_000_000
      allowance = min(bytesPerSecond, allowance + earned)
      refilled = now
    }
    return allowance > 0 ? 0 : 20
  }

  package func append(_ bytes: [UInt8], to stream: Stream) {
    var lines: [UInt8] = []
    let stamp = Timestamp.bytes(Clock.realtime)
    var rest = bytes[...]
    while !rest.isEmpty {
      // The time stamps make short lines up to twenty times longer: store them in parts, so that no segment exceeds its size by
      // much.
      if lines.count >= 65_536 {
        store(lines)
        lines = []
      }
      let room = OutputLog.lineLimit - partial[stream.rawValue].count
      let window = rest.prefix(room)
      if let newline = window.firstIndex(of: UInt8(ascii: "\n")) {
        partial[stream.rawValue] += rest[..<newline]
        flush(stream, full: true, stamp: stamp, into: &lines)
        rest = rest[(newline + 1)...]
      } else {
        partial[stream.rawValue] += window
        rest = rest.dropFirst(window.count)
        if window.count == room { flush(stream, full: false, stamp: stamp, into: &lines) }
      }
    }
    // Output without a final newline is written at once, since it may be a prompt or a progress bar.
    if !partial[stream.rawValue].isEmpty { flush(stream, full: false, stamp: stamp, into: &lines) }
    store(lines)
  }

  private func flush(_ stream: Stream, full: Bool, stamp: [UInt8], into lines: inout [UInt8]) {
    lines += stamp
    lines += Array(stream == .stdout ? " stdout ".utf8 : " stderr ".utf8)
    lines.append(full ? UInt8(ascii: "F") : UInt8(ascii: "P"))
    lines.append(UInt8(ascii: " "))
    lines += partial[stream.rawValue]
    lines.append(UInt8(ascii: "\n"))
    partial[stream.rawValue] = []
  }

  /// Writes lines to the current segment. Errors are ignored: a full disk loses log lines but never stops the tool.
  private func store(_ lines: [UInt8]) {
    // What is stored counts, not what was read: the time stamps make empty lines fifty times longer.
    allowance -= Int64(lines.count)
    do throws(Errno) {
      if current == nil || currentSize >= segmentBytes { try rotate() }
      try current?.descriptor.write(lines)
      currentSize += UInt64(lines.count)
      offset += UInt64(lines.count)
    } catch {
      current = nil
    }
  }

  private func rotate() throws(Errno) {
    current = Handle(
      try folder.descriptor.open(
        OutputLog.segmentName(offset), [.writeOnly, .create, .truncate, .noFollow], mode: 0o600))
    currentSize = 0
    starts.append(offset)
    while starts.count > segments {
      let oldest = starts.removeFirst()
      do throws(Errno) { try folder.descriptor.remove(OutputLog.segmentName(oldest)) } catch {}
    }
  }

  package static func segmentName(_ offset: UInt64) -> String {
    let digits = "\(offset)"
    return String(repeating: "0", count: 20 - digits.utf8.count) + digits + ".log"
  }
}

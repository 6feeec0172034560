// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Linux
internal import Shim

/// Reads the segments that a supervisor writes. Offsets count bytes since the log's beginning.
package struct LogReader: Sendable {
  private let folder: Handle
  private let path: String

  /// `path`: the folder of a workspace's output.
  package init(path: String) throws(Errno) {
    folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow]))
    self.path = path
  }

  package struct Chunk: Sendable {
    /// Where `bytes` begin: past the asked offset if what stood there was rotated away.
    package let offset: UInt64
    package let bytes: [UInt8]
  }

  /// Whole lines from `offset` on, up to about `limit` bytes; nil if there is nothing (yet).
  package func read(from offset: UInt64, limit: Int = 262_144) throws -> Chunk? {
    let starts = try segments()
    guard let first = starts.first else { return nil }
    let wanted = max(offset, first)
    guard let start = starts.last(where: { $0 <= wanted }) else { return nil }
    guard wanted - start <= UInt64(Int64.max) else { return nil }
    let file: Descriptor
    do throws(Errno) {
      file = try folder.descriptor.open(OutputLog.segmentName(start), [.readOnly, .noFollow])
    } catch {
      // Rotated away since the folder was listed: what is left begins later.
      if error == .noEntry, start < (try segments().first ?? 0) { return try read(from: offset, limit: limit) }
      throw error
    }
    var bytes = try file.read(at: wanted - start, upTo: limit)
    if bytes.isEmpty {
      // The end of this segment: go on in the next, if there is one.
      guard let next = starts.first(where: { $0 > wanted || ($0 == wanted && $0 != start) }) else { return nil }
      return try read(from: next, limit: limit)
    }
    // A writer may be in the middle of a line.
    guard let end = bytes.lastIndex(of: 0x0A) else { return nil }
    bytes.removeLast(bytes.count - end - 1)
    return Chunk(offset: wanted, bytes: bytes)
  }

  /// The last lines, without the prefix of the log format (`time stream flag text`).
  package func tail(lines: Int) -> [String] {
    var bytes: [UInt8] = []
    for start in ((try? segments()) ?? []).reversed() where bytes.count < 65_536 {
      guard let file = try? folder.descriptor.open(OutputLog.segmentName(start), [.readOnly, .noFollow]),
        let size = try? file.status().size,
        let part = try? file.read(at: size > 65_536 ? size - 65_536 : 0, upTo: 65_536)
      else { break }
      bytes = part + bytes
    }
    return bytes.split(separator: 0x0A).suffix(lines).map { line in
      String(decoding: line.split(separator: 0x20, maxSplits: 3, omittingEmptySubsequences: false).last ?? [], as: UTF8.self)
    }
  }

  private func segments() throws -> [UInt64] {
    try FileManager.default.contentsOfDirectory(atPath: path)
      .compactMap { $0.hasSuffix(".log") ? UInt64($0.dropLast(4)) : nil }.sorted()
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Foundation
package import Linux
internal import Shim

/// Reads the log segments that a supervisor writes. Offsets count bytes from the beginning of the log.
package struct LogReader: Sendable {
  private let folder: Handle
  private let path: String

  /// Opens the output directory of a workspace at `path`.
  package init(path: String) throws(Errno) {
    folder = Handle(try Descriptor.open(path, [.readOnly, .directory, .noFollow]))
    self.path = path
  }

  package struct Chunk: Sendable {
    /// The offset of `bytes`, which is past the requested offset if that part was rotated away.
    package let offset: UInt64
    package let bytes: [UInt8]
  }

  /// Reads whole lines from `offset`, up to about `limit` bytes. Returns nil if there are none (yet).
  package func read(from offset: UInt64, limit: Int = 262_144) throws -> Chunk? {
    let starts = try segments()
    guard let first = starts.first else { return nil }
    let wanted = max(offset, first)
    guard let start = starts.last(where: { $0 <= wanted }) else { return nil }
    // No segment is that long, and the kernel refuses what is near the end of its range.
    guard wanted - start <= UInt64(Int64.max / 2) else { return nil }
    let file: Descriptor
    do throws(Errno) {
      file = try folder.descriptor.open(OutputLog.segmentName(start), [.readOnly, .noFollow])
    } catch {
      // The segment was rotated away after the directory was listed: the remaining ones begin later.
      if error == .noEntry, start < (try segments().first ?? 0) { return try read(from: offset, limit: limit) }
      throw error
    }
    var bytes = try file.read(at: wanted - start, upTo: limit)
    if bytes.isEmpty {
      // This segment has no more: the next one continues it, if it exists.
      guard let next = starts.first(where: { $0 > wanted || ($0 == wanted && $0 != start) }) else { return nil }
      return try read(from: next, limit: limit)
    }
    // The writer may be in the middle of a line.
    guard let end = bytes.lastIndex(of: 0x0A) else { return nil }
    bytes.removeLast(bytes.count - end - 1)
    return Chunk(offset: wanted, bytes: bytes)
  }

  /// Returns the text of the last lines, without the prefix of the log format (`time stream flag text`).
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

// SPDX-License-Identifier: Apache-2.0

internal import CArchive
internal import Errors
internal import Linux

/// Limits on what an archive may unpack to (a 10 KB file can contain 10 GB).
package struct UnpackLimits: Sendable {
  package var bytes: UInt64 = 64 << 30
  package var entries = 2_000_000
  package var pathBytes = 4_096
  package var depth = 256
  package var ratio: UInt64 = 1_000
  package init() {}
}

/// A tar stream, possibly compressed with gzip or zstd, that is hashed while it is decompressed: the digest of the decompressed stream is
/// the layer's diff_id.
///
/// It is a chain of two libarchive readers: the outer one only decompresses, the inner one reads the tar.
final class ArchiveStream {
  struct Entry {
    enum Kind { case file, directory, symlink, hardlink, other }
    let path: String
    let kind: Kind
    let linkTarget: String
    let mode: UInt32
    let uid: Int64
    let gid: Int64
    let modified: Int64
    let attributes: [(name: String, value: [UInt8])]
  }

  private let outer: OpaquePointer
  private let inner: OpaquePointer
  private let hasher = Hasher256()
  private let limits: UnpackLimits
  private let compressedSize: UInt64
  private var produced: UInt64 = 0
  private var entries = 0
  private var failure: DriverError?
  private let name: String

  init(_ file: borrowing Descriptor, name: String, limits: UnpackLimits) throws {
    self.name = name
    self.limits = limits
    compressedSize = try file.status().size
    outer = archive_read_new()
    inner = archive_read_new()
    archive_read_support_filter_gzip(outer)
    archive_read_support_filter_zstd(outer)
    archive_read_support_format_raw(outer)
    archive_read_support_format_empty(outer)
    archive_read_support_format_tar(inner)
    archive_read_support_format_empty(inner)
    try succeed(archive_read_open_fd(outer, file.number, 1 << 17), outer)
    var entry: OpaquePointer?
    let header = archive_read_next_header(outer, &entry)
    if header != ARCHIVE_OK && header != ARCHIVE_EOF { try succeed(header, outer) }
    let me = Unmanaged.passUnretained(self).toOpaque()
    let opened = archive_read_open(
      inner, me, nil,
      { _, client, buffer in
        // SAFETY: `client` is the ArchiveStream that owns the reader, and lives at least as long.
        guard let client, let buffer else { return -1 }
        return Unmanaged<ArchiveStream>.fromOpaque(client).takeUnretainedValue().pull(into: buffer)
      }, nil)
    if let failure { throw failure }
    try succeed(opened, inner)
  }

  deinit {
    archive_read_free(inner)
    archive_read_free(outer)
  }

  private func pull(into buffer: UnsafeMutablePointer<UnsafeRawPointer?>) -> Int {
    var block: UnsafeRawPointer?
    var size = 0
    var offset: Int64 = 0
    let result = archive_read_data_block(outer, &block, &size, &offset)
    if result == ARCHIVE_EOF { return 0 }
    guard result == ARCHIVE_OK, let block else {
      failure = DriverError(.dataLoss, "\(name): \(message(outer))")
      return -1
    }
    produced += UInt64(size)
    if produced > limits.bytes || (produced > 1 << 26 && produced / limits.ratio > compressedSize) {
      failure = DriverError(.resourceExhausted, "\(name): unpacks to \(produced) bytes or more, which exceeds its limit")
      return -1
    }
    hasher.update(UnsafeRawBufferPointer(start: block, count: size))
    buffer.pointee = block
    return size
  }

  func next() throws -> Entry? {
    var raw: OpaquePointer?
    let result = archive_read_next_header(inner, &raw)
    if let failure { throw failure }
    if result == ARCHIVE_EOF { return nil }
    guard result == ARCHIVE_OK || result == ARCHIVE_WARN, let raw else {
      throw DriverError(.dataLoss, "\(name): \(message(inner))")
    }
    entries += 1
    if entries > limits.entries { throw DriverError(.resourceExhausted, "\(name): contains more than \(limits.entries) entries") }
    let path = text(archive_entry_pathname(raw))
    let link = archive_entry_hardlink(raw)
    let kind: Entry.Kind =
      if link != nil { .hardlink } else {
        switch archive_entry_filetype(raw) {
        case 0o100000: .file
        case 0o040000: .directory
        case 0o120000: .symlink
        default: .other
        }
      }
    return Entry(
      path: path, kind: kind, linkTarget: text(link ?? archive_entry_symlink(raw)),
      mode: UInt32(archive_entry_perm(raw)), uid: archive_entry_uid(raw), gid: archive_entry_gid(raw),
      modified: Int64(archive_entry_mtime(raw)), attributes: attributes(raw))
  }

  /// Passes the content of the present entry to `each`, in blocks with their offsets.
  func content(_ each: (UnsafeRawBufferPointer, UInt64) throws -> Void) throws {
    while true {
      var block: UnsafeRawPointer?
      var size = 0
      var offset: Int64 = 0
      let result = archive_read_data_block(inner, &block, &size, &offset)
      if let failure { throw failure }
      if result == ARCHIVE_EOF { return }
      guard result == ARCHIVE_OK || result == ARCHIVE_WARN else {
        throw DriverError(.dataLoss, "\(name): \(message(inner))")
      }
      try each(UnsafeRawBufferPointer(start: block, count: size), UInt64(offset))
    }
  }

  /// Reads the rest of the stream after the last entry, so that the digest covers all of it.
  func finish() throws -> Digest {
    var ignored: UnsafeRawPointer?
    while true {
      let count = pull(into: &ignored)
      if let failure { throw failure }
      if count <= 0 { return hasher.finish() }
    }
  }

  private func attributes(_ raw: OpaquePointer) -> [(name: String, value: [UInt8])] {
    var found: [(String, [UInt8])] = []
    archive_entry_xattr_reset(raw)
    var name: UnsafePointer<CChar>?
    var value: UnsafeRawPointer?
    var size = 0
    while archive_entry_xattr_next(raw, &name, &value, &size) == ARCHIVE_OK, let attribute = name {
      let content = UnsafeRawBufferPointer(start: value, count: size)
      found.append((String(cString: attribute), Array(content)))
    }
    return found
  }

  private func text(_ pointer: UnsafePointer<CChar>?) -> String { pointer.map { String(cString: $0) } ?? "" }

  private func message(_ archive: OpaquePointer) -> String { text(archive_error_string(archive)) }

  private func succeed(_ result: Int32, _ archive: OpaquePointer) throws {
    if result != ARCHIVE_OK && result != ARCHIVE_WARN {
      throw DriverError(.failedPrecondition, "\(name): is not a tar archive: \(message(archive))")
    }
  }
}

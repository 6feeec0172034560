// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// An open file descriptor that closes itself. Every descriptor is close-on-exec.
package struct Descriptor: ~Copyable, Sendable {
  package private(set) var number: Int32

  /// Takes ownership of a descriptor number that nothing else closes.
  package init(adopting number: Int32) { self.number = number }

  deinit {
    // Embedded Swift has no `discard self`: −1 marks a released descriptor.
    if number >= 0 { _ = clx_close(number) }
  }

  /// Returns the number without closing it; the caller closes it.
  package consuming func release() -> Int32 {
    var me = self
    let number = me.number
    me.number = -1
    return number
  }

  package func duplicate() throws(Errno) -> Descriptor {
    Descriptor(adopting: Int32(try check(clx_dup_cloexec(number, 10))))
  }

  /// Reads up to `limit` bytes; an empty array means the end of the file.
  package func read(upTo limit: Int) throws(Errno) -> [UInt8] {
    try filling(limit) { clx_read(number, $0, limit) }
  }

  /// Reads up to `limit` bytes at an offset; throws `invalid` for an offset that no file can have (pread(2)).
  package func read(at offset: UInt64, upTo limit: Int) throws(Errno) -> [UInt8] {
    guard let position = Int64(exactly: offset) else { throw .invalid }
    return try filling(limit) { clx_pread(number, $0, limit, position) }
  }

  /// Reads to the end of the file; throws `messageTooLong` after more than `limit` bytes.
  package func readAll(limit: Int) throws(Errno) -> [UInt8] {
    var all: [UInt8] = []
    while true {
      let part = try read(upTo: 65_536)
      if part.isEmpty { return all }
      all += part
      if all.count > limit { throw .messageTooLong }
    }
  }

  package func write(_ bytes: [UInt8]) throws(Errno) {
    var done = 0
    while done < bytes.count {
      done += try retrying {
        bytes.withUnsafeBytes { clx_write(number, $0.baseAddress! + done, bytes.count - done) }
      }
    }
  }

  /// Writes all of `bytes` at an offset.
  package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(Errno) {
    var done = 0
    while done < bytes.count {
      // SAFETY: `done` is less than the count, so the address is inside the caller's buffer.
      done += try retrying {
        clx_pwrite(number, bytes.baseAddress! + done, bytes.count - done, Int64(offset) + Int64(done))
      }
    }
  }

  /// Calls write(2) once, which may write fewer bytes than it is given; for non-blocking descriptors.
  package func writeSome(_ bytes: ArraySlice<UInt8>) throws(Errno) -> Int {
    try retrying { bytes.withUnsafeBytes { clx_write(number, $0.baseAddress, bytes.count) } }
  }

  /// Creates a file in memory with this content, positioned at its beginning (memfd_create(2)).
  package static func memory(_ name: String, _ content: [UInt8]) throws(Errno) -> Descriptor {
    let file = Descriptor(adopting: Int32(try check(name.withCString { clx_memfd_create($0) })))
    try file.write(content)
    try check(clx_rewind(file.number))
    return file
  }

  package func makeNonBlocking() throws(Errno) { try check(clx_set_nonblocking(number)) }
  package func sync() throws(Errno) { try retrying { clx_fsync(number) } }

  /// The path under which another system call finds this descriptor's object.
  package var procPath: String { "/proc/self/fd/\(number)" }
}

/// A descriptor with shared ownership; it is closed with its last reference.
package final class Handle: Sendable {
  package let descriptor: Descriptor
  package init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }
}

/// Standard output and error, which this process does not own.
package enum StandardStream: Int32, Sendable {
  case output = 1
  case error = 2

  package func write(_ text: String) { write(Array(text.utf8)) }

  package func write(_ bytes: [UInt8]) {
    var rest = bytes[...]
    while !rest.isEmpty {
      let count = rest.withUnsafeBytes { clx_write(rawValue, $0.baseAddress, $0.count) }
      if count == Int(-EINTR) { continue }
      if count <= 0 { return }
      rest = rest.dropFirst(count)
    }
  }
}

/// A pipe that is close-on-exec at both ends.
package final class Pipe {
  package let reading: Handle
  package private(set) var writing: Handle?

  package init() throws(Errno) {
    var pair: [Int32] = [-1, -1]
    try check(pair.withUnsafeMutableBufferPointer { clx_pipe2($0.baseAddress, 0) })
    reading = Handle(Descriptor(adopting: pair[0]))
    writing = Handle(Descriptor(adopting: pair[1]))
  }

  package func closeWriting() { writing = nil }
}

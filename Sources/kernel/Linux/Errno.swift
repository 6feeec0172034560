// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// The error number of a system call (errno(3)).
package struct Errno: Error, Equatable, Sendable {
  package let code: Int32

  package init(_ code: Int32) { self.code = code }

  /// The C library's description of the number. Do not call it inside a container root: it may load a locale from there.
  package var sentence: String { String(cString: clx_strerror(code)) }

  package static let perm = Errno(EPERM)
  package static let noEntry = Errno(ENOENT)
  package static let interrupted = Errno(EINTR)
  package static let io = Errno(EIO)
  package static let notExecutable = Errno(ENOEXEC)
  package static let again = Errno(EAGAIN)
  package static let access = Errno(EACCES)
  package static let exists = Errno(EEXIST)
  package static let noDevice = Errno(ENODEV)
  package static let notDirectory = Errno(ENOTDIR)
  package static let isDirectory = Errno(EISDIR)
  package static let invalid = Errno(EINVAL)
  package static let noSpace = Errno(ENOSPC)
  package static let readOnly = Errno(EROFS)
  package static let loop = Errno(ELOOP)
  package static let notEmpty = Errno(ENOTEMPTY)
  package static let notSupported = Errno(ENOTSUP)
  package static let noSuchProcess = Errno(ESRCH)
  package static let noChild = Errno(ECHILD)
  package static let brokenPipe = Errno(EPIPE)
  package static let connectionReset = Errno(ECONNRESET)
  package static let connectionRefused = Errno(ECONNREFUSED)
  package static let canceled = Errno(ECANCELED)
  package static let busy = Errno(EBUSY)
  package static let messageTooLong = Errno(EMSGSIZE)
  package static let noMemory = Errno(ENOMEM)
  package static let noBuffers = Errno(ENOBUFS)

  /// Whether a retry may succeed a moment later: the kernel was short of memory, or the other side has not read yet.
  package var isTransient: Bool { self == .again || self == .noMemory || self == .noBuffers || self == .interrupted }
}

/// Retries a call that has no fallback until the kernel has the resources for it.
package func persisting<T>(_ call: () throws(Errno) -> T) throws(Errno) -> T {
  while true {
    do throws(Errno) { return try call() } catch { guard error.isTransient else { throw error } }
    Clock.sleep(milliseconds: 5)
  }
}

/// Turns the kernel's convention (≥ 0, or −errno) into a value or an error.
@discardableResult
func check(_ result: Int) throws(Errno) -> Int {
  if result < 0 { throw Errno(Int32(-result)) }
  return result
}

/// Returns the bytes that a call writes to a buffer of `limit` bytes; the call returns their number. The buffer is not cleared
/// first, because the kernel would have to provide a page for each part of it, used or not.
func filling(_ limit: Int, _ call: (UnsafeMutableRawPointer?) -> Int) throws(Errno) -> [UInt8] {
  var result = 0
  // SAFETY: the call initialises as many bytes as it returns, and no more than the `limit` that its author passed to it.
  let bytes = [UInt8](unsafeUninitializedCapacity: limit) { buffer, count in
    repeat { result = call(UnsafeMutableRawPointer(buffer.baseAddress)) } while result == Int(-EINTR)
    count = max(result, 0)
  }
  try check(result)
  return bytes
}

/// Repeats a call that a signal interrupted.
@discardableResult
func retrying(_ call: () -> Int) throws(Errno) -> Int {
  while true {
    let result = call()
    if result != Int(-EINTR) { return try check(result) }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A queue that reports which of many descriptors are readable or writable (epoll(7)).
package struct ReadinessQueue: ~Copyable, Sendable {
  private let epoll: Descriptor

  package init() throws(Errno) { epoll = Descriptor(adopting: Int32(try check(clx_epoll_create()))) }

  package func add(_ file: borrowing Descriptor, writing: Bool) throws(Errno) {
    // EPOLLOUT is 4 and EPOLLIN is 1; the kernel always reports hang-up and error.
    try check(clx_epoll_add(epoll.number, file.number, writing ? 4 : 1))
  }

  package func remove(_ file: borrowing Descriptor) { _ = clx_epoll_remove(epoll.number, file.number) }

  /// Waits, then returns the numbers of the ready descriptors.
  package func wait() throws(Errno) -> [Int32] {
    var ready = [clx_ready](repeating: clx_ready(), count: 64)
    let count = try retrying { ready.withUnsafeMutableBufferPointer { clx_epoll_wait(epoll.number, $0.baseAddress, 64) } }
    return ready.prefix(count).map { $0.fd }
  }
}

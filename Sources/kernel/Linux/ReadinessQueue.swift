// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// epoll(7): which of many descriptors can be read or written.
package struct ReadinessQueue: ~Copyable, Sendable {
  private let epoll: Descriptor

  package init() throws(Errno) { epoll = Descriptor(adopting: Int32(try check(clx_epoll_create()))) }

  package func add(_ file: borrowing Descriptor, writing: Bool) throws(Errno) {
    // EPOLLOUT is 4, EPOLLIN 1; hang-up and error are always reported.
    try check(clx_epoll_add(epoll.number, file.number, writing ? 4 : 1))
  }

  package func remove(_ file: borrowing Descriptor) { _ = clx_epoll_remove(epoll.number, file.number) }

  /// Waits, and returns the numbers of the descriptors that are ready.
  package func wait() throws(Errno) -> [Int32] {
    var ready = [clx_ready](repeating: clx_ready(), count: 64)
    let count = try retrying { ready.withUnsafeMutableBufferPointer { clx_epoll_wait(epoll.number, $0.baseAddress, 64) } }
    return ready.prefix(count).map { $0.fd }
  }
}

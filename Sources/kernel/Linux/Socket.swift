// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Unix sockets that keep message boundaries (SOCK_SEQPACKET) and carry descriptors.
package enum Socket {
  package struct Peer: Sendable {
    package let pid: Int32
    package let uid: UInt32
  }

  package struct Message {
    package let bytes: [UInt8]
    package let descriptors: [Handle]
  }

  /// The largest message of the shim and init protocols, in bytes.
  package static let messageLimit = 131_072

  package static func pair() throws(Errno) -> (Handle, Handle) {
    var ends: [Int32] = [-1, -1]
    try check(ends.withUnsafeMutableBufferPointer { clx_socketpair(Int32(CLX_SOCK_SEQPACKET), $0.baseAddress) })
    return (Handle(Descriptor(adopting: ends[0])), Handle(Descriptor(adopting: ends[1])))
  }

  /// Listens at `name` in `folder`. It binds through the descriptor's path, because a socket address holds at most 107 bytes.
  package static func listen(_ name: String, in folder: borrowing Descriptor, stream: Bool = false) throws(Errno) -> Descriptor {
    let type = stream ? Int32(CLX_SOCK_STREAM) : Int32(CLX_SOCK_SEQPACKET)
    let socket = Descriptor(adopting: Int32(try check(clx_socket(type | Int32(CLX_SOCK_NONBLOCK)))))
    let number = socket.number
    let path = "\(folder.procPath)/\(name)"
    // The mode must be 0600 from the start: chmod after bind would leave a gap. The kernel takes the file's mode from the socket
    // itself; umask would change it for every thread of this process.
    try check(clx_fchmod(number, 0o600))
    try check(path.withCString { clx_bind(number, $0) })
    try check(clx_listen(number, 128))
    return socket
  }

  /// Listens on 127.0.0.1 in the network namespace of this thread.
  package static func listen(loopback port: UInt16) throws(Errno) -> Descriptor {
    let socket = Descriptor(adopting: Int32(try check(clx_bind_loopback(port))))
    try check(clx_listen(socket.number, 128))
    return socket
  }

  /// Connects to a port on 127.0.0.1.
  package static func connect(loopback port: UInt16) throws(Errno) -> Descriptor {
    Descriptor(adopting: Int32(try check(clx_connect_loopback(port))))
  }

  /// Connects to the socket `name` in `folder`. With `wait` it waits while the listener's queue is full; without, it throws
  /// `again`.
  package static func connect(
    _ name: String, in folder: borrowing Descriptor, stream: Bool = false, wait: Bool = true
  ) throws(Errno) -> Descriptor {
    let type = (stream ? Int32(CLX_SOCK_STREAM) : Int32(CLX_SOCK_SEQPACKET)) | (wait ? 0 : Int32(CLX_SOCK_NONBLOCK))
    let socket = Descriptor(adopting: Int32(try check(clx_socket(type))))
    let number = socket.number
    let path = "\(folder.procPath)/\(name)"
    try retrying { path.withCString { clx_connect(number, $0) } }
    return socket
  }

  /// Connects to a stream socket by its path.
  package static func connect(path: String) throws(Errno) -> Descriptor {
    let socket = Descriptor(adopting: Int32(try check(clx_socket(Int32(CLX_SOCK_STREAM)))))
    let number = socket.number
    try retrying { path.withCString { clx_connect(number, $0) } }
    return socket
  }

  /// Calls listen(2) again on an inherited socket, so that SO_PEERCRED reports this process to clients.
  package static func relisten(_ number: Int32) throws(Errno) { try check(clx_listen(number, 128)) }

  package static func accept(_ listener: borrowing Descriptor) throws(Errno) -> Descriptor {
    let number = listener.number
    return Descriptor(adopting: Int32(try retrying { clx_accept(number, Int32(CLX_SOCK_NONBLOCK)) }))
  }

  package static func peer(_ socket: borrowing Descriptor) throws(Errno) -> Peer {
    var raw = clx_peer()
    try check(clx_peer(socket.number, &raw))
    return Peer(pid: raw.pid, uid: raw.uid)
  }

  package static func send(
    _ socket: borrowing Descriptor, _ bytes: [UInt8], passing: [Handle] = [], wait: Bool = true
  ) throws(Errno) {
    let number = socket.number
    let passed = passing.map { $0.descriptor.number }
    try retrying {
      bytes.withUnsafeBytes { body in
        passed.withUnsafeBufferPointer {
          clx_send(number, body.baseAddress, body.count, $0.baseAddress, Int32($0.count), wait ? 0 : Int32(CLX_MSG_DONTWAIT))
        }
      }
    }
  }

  /// Receives one message; returns nil when the other side has closed.
  package static func receive(_ socket: borrowing Descriptor, wait: Bool = true) throws(Errno) -> Message? {
    let number = socket.number
    var passed: [Int32] = [-1, -1, -1, -1]
    var count: Int32 = 0
    func once() throws(Errno) -> [UInt8] {
      try filling(messageLimit) { body in
        passed.withUnsafeMutableBufferPointer {
          clx_receive(number, body, messageLimit, $0.baseAddress, &count, wait ? 0 : Int32(CLX_MSG_DONTWAIT))
        }
      }
    }
    let bytes: [UInt8]
    do throws(Errno) {
      bytes = try once()
    } catch {
      // The other side closed with a message of ours unread (unix(7)). The kernel reports that once, ahead of the messages that the
      // other side sent before; those must not be lost.
      guard error == .connectionReset else { throw error }
      bytes = try once()
    }
    let handles = passed.prefix(Int(count)).map { Handle(Descriptor(adopting: $0)) }
    if bytes.isEmpty { return nil }
    // A copy of the right size: one of these is kept for each connection, and the buffer has room for the largest message.
    var exact: [UInt8] = []
    exact.reserveCapacity(bytes.count)
    exact.append(contentsOf: bytes)
    return Message(bytes: exact, descriptors: handles)
  }
}

/// A wait for a set of descriptors (poll(2)).
package struct Poller {
  private var entries: [pollfd] = []

  package init() {}

  package mutating func removeAll() { entries.removeAll(keepingCapacity: true) }

  /// Adds a descriptor and returns its index for `isReady`. `changes`: wait for changes of a kernel file (POLLPRI) instead of data
  /// to read.
  package mutating func add(_ handle: Handle, changes: Bool = false) -> Int {
    entries.append(pollfd(fd: handle.descriptor.number, events: Int16(changes ? CLX_POLLPRI : CLX_POLLIN), revents: 0))
    return entries.count - 1
  }

  /// Waits until a descriptor is ready or the time has passed; −1 waits without a limit.
  package mutating func wait(milliseconds: Int32 = -1) throws(Errno) {
    let result = entries.withUnsafeMutableBufferPointer { clx_poll($0.baseAddress, UInt($0.count), milliseconds) }
    if result == Int(-EINTR) {
      for index in entries.indices { entries[index].revents = 0 }
      return
    }
    try check(result)
  }

  package func isReady(_ index: Int) -> Bool { entries[index].revents != 0 }
}

extension Descriptor {
  /// Creates a counter that the kernel increments (eventfd(2)); a read resets it to 0 and never waits.
  package static func counter() throws(Errno) -> Descriptor { Descriptor(adopting: Int32(try check(clx_eventfd()))) }

  /// Shuts a connection down in both directions, also for other processes that have it open.
  package func shutDown() { _ = clx_shutdown(number) }
}

package enum Terminal {
  /// Opens a new pseudo-terminal in the devpts of `ptmx`.
  package static func open(_ ptmx: String) throws(Errno) -> (master: Handle, slave: Handle) {
    let master = try Descriptor.open(ptmx, [.readWrite, .noTerminal])
    try check(clx_terminal_unlock(master.number))
    let slave = Descriptor(adopting: Int32(try check(clx_terminal_peer(master.number))))
    return (Handle(master), Handle(slave))
  }

  /// Returns the size of the terminal at a descriptor number; nil if there is no terminal.
  package static func size(_ number: Int32) -> (rows: UInt16, columns: UInt16)? {
    var (rows, columns): (UInt16, UInt16) = (0, 0)
    return clx_terminal_size(number, &rows, &columns) >= 0 ? (rows, columns) : nil
  }

  package static func resize(_ terminal: borrowing Descriptor, rows: UInt16, columns: UInt16) throws(Errno) {
    try check(clx_terminal_resize(terminal.number, rows, columns))
  }
}

/// The saved mode of a terminal (termios(3)).
package struct TerminalMode: Sendable {
  private let saved: clx_terminal_mode

  /// Switches the terminal at a descriptor number to raw mode; returns its previous mode, or nil if there is no terminal.
  package static func makeRaw(_ number: Int32) -> TerminalMode? {
    var saved = clx_terminal_mode()
    return clx_terminal_make_raw(number, &saved) >= 0 ? TerminalMode(saved: saved) : nil
  }

  package func restore(_ number: Int32) {
    var mode = saved
    _ = clx_terminal_restore(number, &mode)
  }
}

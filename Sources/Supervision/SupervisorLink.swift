// SPDX-License-Identifier: Apache-2.0

package import Linux
package import Sandbox
internal import Synchronization

/// A connection to a workspace's supervisor. Its messages come as an asynchronous sequence, which ends when the
/// supervisor does: the connection is the proof of life, with no pid that could be another's by now.
package final class SupervisorLink: Sendable {
  private let socket: MessageSocket
  private let closed = Mutex(false)
  package let messages: AsyncStream<MessageSocket.Received>

  init(_ connection: Handle) throws(Errno) {
    let socket = MessageSocket(connection)
    self.socket = socket
    let (stream, continuation) = AsyncStream<MessageSocket.Received>.makeStream()
    messages = stream
    try Readiness.shared.watch(socket.handle) {
      do throws(Errno) {
        guard let received = try socket.receive(wait: false) else {
          continuation.finish()
          return false
        }
        continuation.yield(received)
        return true
      } catch {
        if error == .again { return true }
        continuation.finish()
        return false
      }
    }
  }

  deinit { close() }

  package func send(_ message: Message, passing: [Handle] = []) throws(Errno) {
    try socket.send(message, passing: passing)
  }

  /// Ends the connection from this side; the messages end too.
  package func close() {
    closed.withLock { closed in
      if !closed { socket.handle.descriptor.shutDown() }
      closed = true
    }
  }
}

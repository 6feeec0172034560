// SPDX-License-Identifier: Apache-2.0

@preconcurrency internal import Dispatch
package import Linux
package import Sandbox

/// A connection to a workspace's supervisor. Its messages come as an asynchronous sequence, which ends when the
/// supervisor does: the connection is the proof of life, with no pid that could be another's by now.
package final class SupervisorLink: Sendable {
  private let socket: MessageSocket
  private let source: any DispatchSourceRead
  package let messages: AsyncStream<MessageSocket.Received>

  init(_ descriptor: consuming Descriptor) {
    let socket = MessageSocket(Handle(descriptor))
    self.socket = socket
    let (stream, continuation) = AsyncStream<MessageSocket.Received>.makeStream()
    messages = stream
    let source = DispatchSource.makeReadSource(fileDescriptor: socket.handle.descriptor.number, queue: SupervisorLink.queue)
    self.source = source
    source.setEventHandler { @Sendable in
      do throws(Errno) {
        guard let received = try socket.receive(wait: false) else {
          source.cancel()
          return
        }
        continuation.yield(received)
      } catch {
        if error != .again { source.cancel() }
      }
    }
    // The handle lives until here: closing a watched descriptor would hand its number to a stranger.
    source.setCancelHandler { @Sendable in
      _ = socket
      continuation.finish()
    }
    source.resume()
  }

  deinit { source.cancel() }

  private static let queue = DispatchQueue(label: "carrel.supervisors")

  package func send(_ message: Message, passing: [Handle] = []) throws(Errno) {
    try socket.send(message, passing: passing)
  }

  package func close() { source.cancel() }
}


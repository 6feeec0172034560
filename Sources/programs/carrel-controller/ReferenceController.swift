// SPDX-License-Identifier: Apache-2.0
//
// The smallest complete controller, for tests and as an example. It handles what nodes report, stores the cursor of each, acknowledges,
// and forwards the commands that it reads from its standard input. Its options make it misbehave.

internal import API
internal import ArgumentParser
internal import Foundation
internal import GRPCCore
internal import GRPCNIOTransportHTTP2
internal import SwiftProtobuf
internal import Synchronization

@main
struct ReferenceController: AsyncParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "carrel-controller",
    abstract: "A controller for tests: prints each message as a line of JSON, acknowledges, forwards commands.",
    discussion: """
      Commands on standard input, a line each: launch FILE, stop ID, delete ID, drain [SECONDS], uncordon, snapshot,
      acknowledge SEQUENCE. They go to every node that is connected.
      """)

  @Option(name: .long, help: "The socket to listen on; an existing file is replaced.") var socket: String
  @Option(name: .long, help: "The file in which to store stream and cursor of each node; default: none.") var state = ""
  @Option(name: .long, help: "The number of unacknowledged events that a node may send.") var window: UInt32 = 0
  @Option(name: .long, help: "Milliseconds to spend on each event.") var slow = 0
  @Option(name: .long, help: "Exit by SIGKILL after this number of events, before the last is stored.") var crashAfter = 0
  @Flag(name: .long, help: "Begin at 0, whatever is stored.") var forget = false
  @Flag(name: .long, help: "Never acknowledge, except by a command.") var silent = false
  @Option(name: .long, help: "The reply to requests for credentials: a JSON file, read again for each request.") var credentials = ""
  @Option(name: .long, help: "Send this cursor, even if it is not possible.") var cursor: UInt64?

  func run() async throws {
    let desk = ControllerState(self)
    unlink(socket)
    let previous = umask(0o177)
    let server = GRPCServer(
      transport: .http2NIOPosix(address: .unixDomainSocket(path: socket), transportSecurity: .plaintext),
      services: [ControllerService(desk: desk)])
    try await withThrowingTaskGroup(of: Void.self) { group in
      group.addTask { try await server.serve() }
      Thread.detachNewThread { while let line = readLine() { desk.order(line) } }
      _ = try await server.listeningAddress
      umask(previous)
      try await group.waitForAll()
    }
  }
}

/// The state that outlives a call: the cursor of each node, and the connected nodes.
private final class ControllerState: Sendable {
  struct Place: Codable {
    var stream: String
    var cursor: UInt64
  }
  private struct State {
    var places: [String: Place] = [:]
    var orders: [Int: AsyncStream<Carrel_Controller_V1_ControllerMessage>.Continuation] = [:]
    var next = 0
    var events = 0
  }

  let options: ReferenceController
  private let state = Mutex(State())

  init(_ options: ReferenceController) {
    self.options = options
    guard !options.state.isEmpty, let data = FileManager.default.contents(atPath: options.state) else { return }
    state.withLock { $0.places = (try? JSONDecoder().decode([String: Place].self, from: data)) ?? [:] }
  }

  func place(of node: String) -> Place {
    if let cursor = options.cursor { return Place(stream: state.withLock { $0.places[node]?.stream } ?? "", cursor: cursor) }
    return options.forget ? Place(stream: "", cursor: 0) : state.withLock { $0.places[node] } ?? Place(stream: "", cursor: 0)
  }

  /// Stores the cursor of a node. This precedes the acknowledgement, which promises that the event is stored.
  func remember(_ node: String, _ place: Place) throws {
    let places = state.withLock { state in
      state.places[node] = place
      return state.places
    }
    guard !options.state.isEmpty else { return }
    try JSONEncoder().encode(places).write(to: URL(fileURLWithPath: options.state), options: .atomic)
  }

  func count() {
    let events = state.withLock { state in
      state.events += 1
      return state.events
    }
    if events == options.crashAfter { kill(getpid(), SIGKILL) }
  }

  func credentials(for wanted: Carrel_Controller_V1_CredentialsWanted) -> Carrel_Controller_V1_CredentialsGiven {
    .with {
      $0.id = wanted.id
      $0.content = FileManager.default.contents(atPath: options.credentials) ?? Data()
      if $0.content.isEmpty { $0.error = "there are none for \(wanted.owner)" }
    }
  }

  /// Returns the commands for one node from now on.
  func orders() -> AsyncStream<Carrel_Controller_V1_ControllerMessage> {
    let (stream, continuation) = AsyncStream<Carrel_Controller_V1_ControllerMessage>.makeStream()
    let number = state.withLock { state in
      state.next += 1
      state.orders[state.next] = continuation
      return state.next
    }
    continuation.onTermination = { [self] _ in state.withLock { $0.orders[number] = nil } }
    return stream
  }

  func order(_ line: String) {
    let words = line.split(separator: " ").map(String.init)
    let argument = words.count > 1 ? words[1] : ""
    var message = Carrel_Controller_V1_ControllerMessage()
    var command = Carrel_Controller_V1_Command()
    command.id = UUID().uuidString
    switch words.first {
    case "launch":
      command.launch = .with { $0.manifest = (try? String(contentsOfFile: argument, encoding: .utf8)) ?? "" }
    case "stop": command.stop = .with { $0.id = argument }
    case "delete": command.delete = .with { $0.id = argument }
    case "drain": command.drain = .with { if let seconds = UInt32(argument) { $0.deadlineSeconds = seconds } }
    case "uncordon": command.uncordon = .init()
    case "resume": command.resume = .init()
    case "snapshot": message.snapshot = .init()
    case "acknowledge": message.acknowledge = .with { $0.sequence = UInt64(argument) ?? 0 }
    default: return
    }
    if message.message == nil { message.command = command }
    for node in state.withLock({ Array($0.orders.values) }) { node.yield(message) }
  }
}

/// `carrel.controller.v1.Controller`.
private struct ControllerService: Carrel_Controller_V1_Controller.SimpleServiceProtocol {
  let desk: ControllerState

  func connect(
    request: RPCAsyncSequence<Carrel_Controller_V1_NodeMessage, any Error>,
    response: RPCWriter<Carrel_Controller_V1_ControllerMessage>, context: ServerContext
  ) async throws {
    try await withThrowingTaskGroup(of: Void.self) { group in
      let orders = desk.orders()
      // One task writes all messages, because two tasks must not write at once.
      let (answers, answer) = AsyncStream<Carrel_Controller_V1_ControllerMessage>.makeStream()
      group.addTask { for await message in answers { try await response.write(message) } }
      group.addTask { for await message in orders { answer.yield(message) } }
      group.addTask {
        defer { answer.finish() }
        try await listen(request, answer)
      }
      try await group.next()
      group.cancelAll()
    }
  }

  private func listen(
    _ request: RPCAsyncSequence<Carrel_Controller_V1_NodeMessage, any Error>,
    _ answer: AsyncStream<Carrel_Controller_V1_ControllerMessage>.Continuation
  ) async throws {
    var node = ""
    var place = ControllerState.Place(stream: "", cursor: 0)
    for try await message in request {
      // Each message is printed at once and unbuffered, so that what arrived before a crash can be read.
      FileHandle.standardOutput.write(Data((try message.jsonString() + "\n").utf8))
      switch message.message {
      case .hello(let hello):
        node = hello.node
        place = desk.place(of: node)
        let said = place
        answer.yield(
          .with {
            $0.welcome = .with {
              $0.streamID = said.stream
              $0.cursor = said.cursor
              $0.window = desk.options.window
            }
          })
        place.stream = hello.streamID
      case .event(let event):
        if desk.options.slow > 0 { try await Task.sleep(for: .milliseconds(desk.options.slow)) }
        desk.count()
        // A repeated event is already stored; a skipped one is an error of the node.
        if event.sequence <= place.cursor { continue }
        guard event.sequence == place.cursor + 1 else {
          throw RPCError(code: .dataLoss, message: "event \(event.sequence) after \(place.cursor)")
        }
        place.cursor = event.sequence
        try acknowledge(node, place, answer)
      case .snapshot(let snapshot):
        guard snapshot.sequence > place.cursor || place.stream != snapshot.streamID else { continue }
        place = ControllerState.Place(stream: snapshot.streamID, cursor: snapshot.sequence)
        try acknowledge(node, place, answer)
      case .wanted(let wanted): answer.yield(.with { $0.given = desk.credentials(for: wanted) })
      case .gap, .result, .refusal, nil: break
      }
    }
  }

  private func acknowledge(
    _ node: String, _ place: ControllerState.Place, _ answer: AsyncStream<Carrel_Controller_V1_ControllerMessage>.Continuation
  ) throws {
    if desk.options.silent { return }
    try desk.remember(node, place)
    answer.yield(.with { $0.acknowledge = .with { $0.sequence = place.cursor } })
  }
}

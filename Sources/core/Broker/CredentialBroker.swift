// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// A server that issues short-lived credentials to the programs of one workspace, by the protocol of AWS container credentials: the
/// SDKs `GET` http://127.0.0.1:PORT/aws/ROLE with a token from a file, and again before the credentials expire. git's credential
/// helper gets /git/HOST/ORGANISATION in the same way.
///
/// It lives in the supervisor and replies from memory, so an agent that is down delays no program. It listens in the workspace's
/// own network namespace, which other workspaces and the host cannot reach.
package struct CredentialBroker {
  package struct Issue: Equatable, Sendable {
    package let role: String
    package var count: UInt32
  }

  private struct Role {
    let name: [UInt8]
    /// The body of the reply (JSON); empty once the role is revoked.
    var body: [UInt8]
    /// The expiry, in seconds since 1970.
    var expires: Int64
  }

  private struct Connection {
    let socket: Handle
    var request: [UInt8] = []
  }

  private let listener: Handle
  private let token: [UInt8]
  private var roles: [Role] = []
  private var connections: [Connection] = []
  /// The steps that may be taken now, and when they were last counted, in milliseconds. This process runs outside the workspace's
  /// limits, so the CPU time that a workspace can make it use is bounded here.
  private var budget = CredentialBroker.burst
  private var reckoned: Int64 = 0
  private static let burst: Int64 = 400
  private static let stepsPerMillisecond: Int64 = 1

  /// The credentials that were issued and are not yet recorded by the agent.
  package private(set) var issues: [Issue] = []

  /// The port on the workspace's own loopback. It is bound before the tool starts, so no other program can have it.
  package static let port: UInt16 = 15_170
  package static let tokenName = "broker-token"
  package static let prefix = "/aws/"
  /// The prefix of git's entries, which are named by their whole path; role names contain no slash.
  package static let gitPrefix = "git/"
  /// The limits of what a workspace can make its supervisor hold; the oldest connection is closed for a new one.
  private static let visitLimit = 32
  package static let requestLimit = 8192

  package init(listener: Handle, token: [UInt8]) {
    self.listener = listener
    self.token = token
  }

  /// Replaces the credentials of a role. An empty body revokes it.
  package mutating func put(_ name: String, _ body: [UInt8], expires: Int64) {
    let role = Role(name: Array(name.utf8), body: body, expires: expires)
    if let index = roles.firstIndex(where: { $0.name == role.name }) { roles[index] = role } else { roles.append(role) }
  }

  /// Handles that the agent has recorded `count` issues of a role; returns the rest, to be reported next.
  package mutating func note(_ role: String, _ count: UInt32) -> Issue? {
    guard let index = issues.firstIndex(where: { $0.role == role }) else { return nil }
    issues[index].count -= min(count, issues[index].count)
    if issues[index].count > 0 { return issues[index] }
    issues.remove(at: index)
    return nil
  }

  // ------------------------------------------------------------------ serving

  /// Returns the milliseconds for which no connection is served, because there were too many requests; 0: none.
  package mutating func pause() -> Int32 {
    let now = Clock.monotonic / 1_000_000
    budget = min(CredentialBroker.burst, budget + (now - reckoned) * CredentialBroker.stepsPerMillisecond)
    reckoned = now
    return budget > 0 ? 0 : 20
  }

  package func watch(_ poller: inout Poller) -> [Int] {
    [poller.add(listener)] + connections.map { poller.add($0.socket) }
  }

  /// Serves the ready connections; `slots` is the result of `watch`. Returns the issues to report: the first of each role since all
  /// were recorded.
  package mutating func serve(_ poller: borrowing Poller, _ slots: [Int]) -> [Issue] {
    let known = issues.count
    budget -= 1
    for (index, slot) in slots.dropFirst().enumerated().reversed() where poller.isReady(slot) {
      if !receive(index) { connections.remove(at: index) }
    }
    if poller.isReady(slots[0]) { accept() }
    return Array(issues[known...])
  }

  private mutating func accept() {
    do throws(Errno) {
      let socket = Handle(try Socket.accept(listener.descriptor))
      if connections.count == CredentialBroker.visitLimit { connections.removeFirst() }
      connections.append(Connection(socket: socket))
    } catch {}
  }

  /// Handles data on a connection; returns false when the connection is finished.
  private mutating func receive(_ index: Int) -> Bool {
    do throws(Errno) {
      let bytes = try connections[index].socket.descriptor.read(upTo: 4096)
      if bytes.isEmpty { return false }
      connections[index].request += bytes
      guard let answer = answer(connections[index].request, now: Clock.realtime / 1_000_000_000) else { return true }
      // The buffer of a new connection is empty, so the reply fits; a client for which it does not has caused that itself.
      _ = try connections[index].socket.descriptor.writeSome(answer[...])
      return false
    } catch {
      return error == .again
    }
  }

  // ---------------------------------------------------------------- answering

  /// Returns the reply to a request; nil until its head is complete.
  package mutating func answer(_ request: [UInt8], now: Int64) -> [UInt8]? {
    guard let head = Head(request) else {
      return request.count > CredentialBroker.requestLimit ? refusal("431 Request Header Fields Too Large", "request head too long") : nil
    }
    guard head.method.elementsEqual("GET".utf8) else { return refusal("405 Method Not Allowed", "expected GET") }
    guard let given = head.authorization, CredentialBroker.isSame(given, token) else {
      return refusal("401 Unauthorized", "expected the token of AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    }
    let isGit = head.path.starts(with: "/\(CredentialBroker.gitPrefix)".utf8)
    let asked = head.path.dropFirst(isGit ? 1 : CredentialBroker.prefix.utf8.count)
    let isKnown = isGit || head.path.starts(with: CredentialBroker.prefix.utf8) && !asked.contains(UInt8(ascii: "/"))
    guard isKnown, let index = roles.firstIndex(where: { $0.name.elementsEqual(asked) }) else {
      return refusal("404 Not Found", isGit ? gitRefusal : "role not found in this workspace, or its credentials have not arrived yet")
    }
    let role = roles[index]
    guard !role.body.isEmpty else { return refusal("403 Forbidden", isGit ? "git's access was revoked" : "this role was revoked") }
    guard role.expires > now else { return refusal("503 Service Unavailable", "the credentials have expired and were not renewed") }
    let name = String(decoding: role.name, as: UTF8.self)
    if let known = issues.firstIndex(where: { $0.role == name }) {
      issues[known].count &+= 1
    } else {
      issues.append(Issue(role: name, count: 1))
    }
    return response("200 OK", role.body)
  }

  private var gitRefusal: String {
    var places: [String] = []
    for role in roles {
      let name = String(decoding: role.name, as: UTF8.self)
      if name.utf8.starts(with: CredentialBroker.gitPrefix.utf8), !role.body.isEmpty {
        places.append(String(name.dropFirst(CredentialBroker.gitPrefix.utf8.count)))
      }
    }
    if places.isEmpty { return "no credentials for git in this workspace, or they have not arrived yet" }
    return "git has credentials for \(places.joined(separator: ", ")) here, and for nothing else"
  }

  private func refusal(_ status: String, _ message: String) -> [UInt8] {
    // The messages are from this file and need no escaping.
    response(status, Array("{\"code\":\"\(status)\",\"message\":\"\(message)\"}".utf8))
  }

  private func response(_ status: String, _ body: [UInt8]) -> [UInt8] {
    let head =
      "HTTP/1.1 \(status)\r\nContent-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: \(body.count)\r\nConnection: close\r\n\r\n"
    return Array(head.utf8) + body
  }

  /// Compares in constant time, so that a nearly right token takes no longer than any other.
  private static func isSame(_ given: ArraySlice<UInt8>, _ token: [UInt8]) -> Bool {
    guard given.count == token.count else { return false }
    var difference: UInt8 = 0
    for (a, b) in zip(given, token) { difference |= a ^ b }
    return difference == 0
  }

  /// The fields of an HTTP/1.1 request that are used here (RFC 9112).
  private struct Head {
    var method: ArraySlice<UInt8> = []
    var path: ArraySlice<UInt8> = []
    var authorization: ArraySlice<UInt8>?

    /// Returns nil until the empty line that ends the head has arrived.
    init?(_ bytes: [UInt8]) {
      var rest = bytes[...]
      var lines: [ArraySlice<UInt8>] = []
      while true {
        guard let end = rest.firstIndex(of: 0x0A) else { return nil }
        var line = rest[rest.startIndex..<end]
        if line.last == 0x0D { line.removeLast() }
        rest = rest[(end + 1)...]
        if line.isEmpty { break }
        lines.append(line)
      }
      guard let first = lines.first else { return }
      let words = first.split(separator: 0x20)
      if words.count == 3 { (method, path) = (words[0], words[1]) }
      let name = Array("authorization:".utf8)
      for line in lines.dropFirst() where line.count > name.count {
        // Header names are ASCII letters in either case.
        guard zip(line, name).allSatisfy({ $0 == $1 || $0 | 0x20 == $1 && $1 != 0x3A }) else { continue }
        authorization = line.dropFirst(name.count).drop { $0 == 0x20 || $0 == 0x09 }
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// Hands short-lived credentials to the programs of one workspace, by the protocol of AWS container credentials: the SDKs
/// `GET` http://127.0.0.1:PORT/aws/ROLE with a token from a file, and come again before what they got expires. In the same way
/// git's credential helper gets what is at /git/HOST/ORGANISATION.
///
/// It lives in the supervisor and answers from memory: an agent that is away delays no program. What it listens at is a
/// socket of the workspace's own network namespace, which no other workspace and nobody on the host can reach.
package struct CredentialBroker {
  package struct Issue: Equatable, Sendable {
    package let role: String
    package var count: UInt32
  }

  private struct Role {
    let name: [UInt8]
    /// The answer as it is sent (JSON); empty once the role is revoked.
    var body: [UInt8]
    /// Seconds since 1970.
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
  /// Steps that may be made now, and when that was last reckoned, in milliseconds. This process runs outside the workspace's
  /// limits: how much of it a workspace can make it spend is bounded here.
  private var budget = CredentialBroker.burst
  private var reckoned: Int64 = 0
  private static let burst: Int64 = 400
  private static let stepsPerMillisecond: Int64 = 1

  /// What was given out and is not on the agent's record yet.
  package private(set) var issues: [Issue] = []

  /// Of the workspace's own loopback, where nothing else can be: it is taken before the tool starts.
  package static let port: UInt16 = 15_170
  package static let tokenName = "broker-token"
  package static let prefix = "/aws/"
  /// What is for git is called by its whole path; no role has a slash in its name.
  package static let gitPrefix = "git/"
  /// Bounds on what a workspace can make its supervisor hold: the oldest connection goes when another comes.
  private static let visitLimit = 32
  package static let requestLimit = 8192

  package init(listener: Handle, token: [UInt8]) {
    self.listener = listener
    self.token = token
  }

  /// Replaces what a role's programs are given. An empty body revokes it.
  package mutating func put(_ name: String, _ body: [UInt8], expires: Int64) {
    let role = Role(name: Array(name.utf8), body: body, expires: expires)
    if let index = roles.firstIndex(where: { $0.name == role.name }) { roles[index] = role } else { roles.append(role) }
  }

  /// So many of a role's are on record. What is left of them, to be told next.
  package mutating func note(_ role: String, _ count: UInt32) -> Issue? {
    guard let index = issues.firstIndex(where: { $0.role == role }) else { return nil }
    issues[index].count -= min(count, issues[index].count)
    if issues[index].count > 0 { return issues[index] }
    issues.remove(at: index)
    return nil
  }

  // ------------------------------------------------------------------ serving

  /// Milliseconds in which nobody is heard, because too much was asked; 0: none.
  package mutating func pause() -> Int32 {
    let now = Clock.monotonic / 1_000_000
    budget = min(CredentialBroker.burst, budget + (now - reckoned) * CredentialBroker.stepsPerMillisecond)
    reckoned = now
    return budget > 0 ? 0 : 20
  }

  package func watch(_ poller: inout Poller) -> [Int] {
    [poller.add(listener)] + connections.map { poller.add($0.socket) }
  }

  /// `slots`: what `watch` returned for this turn. Returns what is to be told: the first of each role since all were noted.
  package mutating func serve(_ poller: borrowing Poller, _ slots: [Int]) -> [Issue] {
    let known = issues.count
    budget -= 1
    for (index, slot) in slots.dropFirst().enumerated().reversed() where poller.isReady(slot) {
      if !hear(index) { connections.remove(at: index) }
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

  /// False when the connection is over.
  private mutating func hear(_ index: Int) -> Bool {
    do throws(Errno) {
      let bytes = try connections[index].socket.descriptor.read(upTo: 4096)
      if bytes.isEmpty { return false }
      connections[index].request += bytes
      guard let answer = answer(connections[index].request, now: Clock.realtime / 1_000_000_000) else { return true }
      // Into the empty buffer of a new connection: it fits, or its reader has itself to blame.
      _ = try connections[index].socket.descriptor.writeSome(answer[...])
      return false
    } catch {
      return error == .again
    }
  }

  // ---------------------------------------------------------------- answering

  /// The answer to a request; nil while its head is not complete.
  package mutating func answer(_ request: [UInt8], now: Int64) -> [UInt8]? {
    guard let head = Head(request) else {
      return request.count > CredentialBroker.requestLimit ? refusal("431 Request Header Fields Too Large", "the request is too long") : nil
    }
    guard head.method.elementsEqual("GET".utf8) else { return refusal("405 Method Not Allowed", "expected GET") }
    guard let given = head.authorization, CredentialBroker.isSame(given, token) else {
      return refusal("401 Unauthorized", "expected the token of AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    }
    let isGit = head.path.starts(with: "/\(CredentialBroker.gitPrefix)".utf8)
    let asked = head.path.dropFirst(isGit ? 1 : CredentialBroker.prefix.utf8.count)
    let isKnown = isGit || head.path.starts(with: CredentialBroker.prefix.utf8) && !asked.contains(UInt8(ascii: "/"))
    guard isKnown, let index = roles.firstIndex(where: { $0.name.elementsEqual(asked) }) else {
      return refusal("404 Not Found", isGit ? gitRefusal : "this workspace has no such role, or its credentials are not there yet")
    }
    let role = roles[index]
    guard !role.body.isEmpty else { return refusal("403 Forbidden", isGit ? "git's access was revoked" : "this role was revoked") }
    guard role.expires > now else { return refusal("503 Service Unavailable", "the credentials have expired and no new ones came") }
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
    if places.isEmpty { return "this workspace has no credentials for git, or they are not there yet" }
    return "git has credentials for \(places.joined(separator: ", ")) here, and for nothing else"
  }

  private func refusal(_ status: String, _ message: String) -> [UInt8] {
    // The words are this file's own and need no escaping.
    response(status, Array("{\"code\":\"\(status)\",\"message\":\"\(message)\"}".utf8))
  }

  private func response(_ status: String, _ body: [UInt8]) -> [UInt8] {
    let head =
      "HTTP/1.1 \(status)\r\nContent-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: \(body.count)\r\nConnection: close\r\n\r\n"
    return Array(head.utf8) + body
  }

  /// Takes as long for a token that is nearly right as for any other.
  private static func isSame(_ given: ArraySlice<UInt8>, _ token: [UInt8]) -> Bool {
    guard given.count == token.count else { return false }
    var difference: UInt8 = 0
    for (a, b) in zip(given, token) { difference |= a ^ b }
    return difference == 0
  }

  /// The part of an HTTP/1.1 request that matters here (RFC 9112).
  private struct Head {
    var method: ArraySlice<UInt8> = []
    var path: ArraySlice<UInt8> = []
    var authorization: ArraySlice<UInt8>?

    /// Nil while the empty line that ends it is not there.
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
        // ASCII letters in either case.
        guard zip(line, name).allSatisfy({ $0 == $1 || $0 | 0x20 == $1 && $1 != 0x3A }) else { continue }
        authorization = line.dropFirst(name.count).drop { $0 == 0x20 || $0 == 0x09 }
      }
    }
  }
}

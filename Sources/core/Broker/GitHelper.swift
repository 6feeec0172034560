// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  package import Linux
#endif

/// Git's credential helper in a workspace (gitcredentials(7)): it requests the credentials for a repository's host and organisation
/// from the broker. It prints the broker's refusals to standard error, and tells git to ask no other helper.
package enum GitHelper {
  package static let name = "git-credential-carrel"

  /// Runs the helper; `arguments` are without the program's name, `input` is git's request. Returns the exit code.
  package static func run(_ arguments: [String], input: borrowing Descriptor, tokenFile: String) -> Int32 {
    // `store` and `erase` do nothing: the helper stores no credentials.
    guard arguments.first == "get" else { return 0 }
    do throws(Errno) {
      let said = try input.readAll(limit: 65_536)
      switch place(in: said) {
      case .refused(let why): return refuse(why)
      case .found(let path):
        let token = try Descriptor.open(tokenFile, [.readOnly]).readAll(limit: 4096)
        let (status, body) = try request(path, token)
        guard status == 200 else { return refuse(message(body)) }
        StandardStream.output.write(body)
        return 0
      }
    } catch {
      return refuse("cannot request credentials from the broker: \(error.sentence)")
    }
  }

  private static func refuse(_ why: String) -> Int32 {
    StandardStream.error.write("carrel: \(why)\n")
    StandardStream.output.write("quit=1\n")
    return 0
  }

  package enum Place: Equatable {
    case found(path: String)
    case refused(String)
  }

  /// Returns the broker's path for git's request, which is lines of `key=value`.
  package static func place(in said: [UInt8]) -> Place {
    var (scheme, host, path): ([UInt8], [UInt8], [UInt8]) = ([], [], [])
    for line in said.split(separator: UInt8(ascii: "\n")) {
      guard let equals = line.firstIndex(of: UInt8(ascii: "=")) else { continue }
      let value = Array(line[(equals + 1)...])
      let key = line[..<equals]
      if key.elementsEqual("protocol".utf8) { scheme = value }
      if key.elementsEqual("host".utf8) { host = value }
      if key.elementsEqual("path".utf8) { path = value }
    }
    let organisation = Array(path.split(separator: UInt8(ascii: "/")).first ?? [])
    guard isName(host), isName(organisation) else {
      return .refused("no credentials for this address: expected https://HOST/ORGANISATION/REPOSITORY")
    }
    let local = "127.0.0.1:"
    let isLocal =
      (host + [UInt8(ascii: ":")]).starts(with: local.utf8) && host.dropFirst(local.utf8.count).allSatisfy { (0x30...0x39).contains($0) }
    // A token is never sent over an unencrypted network.
    guard scheme.elementsEqual("https".utf8) || isLocal && scheme.elementsEqual("http".utf8) else {
      return .refused("credentials are issued for https only")
    }
    return .found(path: "/git/" + String(decoding: host, as: UTF8.self) + "/" + String(decoding: organisation, as: UTF8.self))
  }

  private static func isName(_ bytes: [UInt8]) -> Bool {
    !bytes.isEmpty && bytes.count <= 255 && bytes[0] != UInt8(ascii: ".")
      && bytes.allSatisfy { byte in
        (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
          || [0x2D, 0x2E, 0x3A, 0x5F].contains(byte)
      }
  }

  private static func request(_ path: String, _ token: [UInt8]) throws(Errno) -> (status: Int, body: [UInt8]) {
    let socket = try Socket.connect(loopback: CredentialBroker.port)
    let head = "GET \(path) HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nAuthorization: "
    try socket.write(Array(head.utf8) + token + Array("\r\n\r\n".utf8))
    let answer = try socket.readAll(limit: 131_072)
    var status = 0
    for byte in answer.dropFirst(9).prefix(3) where (0x30...0x39).contains(byte) { status = status * 10 + Int(byte - 0x30) }
    var at = 0
    while at + 4 <= answer.count {
      if answer[at..<(at + 4)].elementsEqual("\r\n\r\n".utf8) { return (status, Array(answer[(at + 4)...])) }
      at += 1
    }
    throw .invalid
  }

  /// Returns the broker's message, which contains no quotes.
  private static func message(_ body: [UInt8]) -> String {
    let text = String(decoding: body, as: UTF8.self)
    let mark = "\"message\":\""
    var rest = text[...]
    while !rest.isEmpty {
      if rest.utf8.starts(with: mark.utf8) {
        return String(rest.dropFirst(mark.utf8.count).prefix { $0 != "\"" })
      }
      rest = rest.dropFirst()
    }
    return "the credential broker gave no reason"
  }
}

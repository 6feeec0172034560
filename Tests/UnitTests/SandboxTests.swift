// SPDX-License-Identifier: Apache-2.0

@testable import Configuration
import Foundation
import LaunchPlan
import Linux
import Testing

@testable import Networking
@testable import Broker
@testable import Shim
@testable import ShimProtocol

@Suite("The credential broker") struct BrokerTests {
  static func broker() throws -> CredentialBroker {
    var broker = CredentialBroker(listener: try Pipe().reading, token: Array("secret".utf8))
    broker.put("reader", Array("{}".utf8), expires: 1000)
    broker.put("gone", [], expires: 0)
    return broker
  }

  @Test(
    "answers as the SDKs expect it",
    arguments: [
      ("GET /aws/reader HTTP/1.1\r\nAuthorization: secret\r\n\r\n", "200 OK"),
      ("GET /aws/reader HTTP/1.1\nHost: x\nauthorization:secret\n\n", "200 OK"),
      ("GET /aws/reader HTTP/1.1\r\nAuthorization: secreT\r\n\r\n", "401 Unauthorized"),
      ("GET /aws/reader HTTP/1.1\r\nXAuthorization: secret\r\n\r\n", "401 Unauthorized"),
      ("GET /aws/reader HTTP/1.1\r\n\r\n", "401 Unauthorized"),
      ("GET /aws/gone HTTP/1.1\r\nAuthorization: secret\r\n\r\n", "403 Forbidden"),
      ("GET /aws/reade HTTP/1.1\r\nAuthorization: secret\r\n\r\n", "404 Not Found"),
      ("POST /aws/reader HTTP/1.1\r\nAuthorization: secret\r\n\r\n", "405 Method Not Allowed"),
      ("\n", "405 Method Not Allowed"),
    ])
  func answers(request: String, status: String) throws {
    var broker = try Self.broker()
    let bytes = broker.answer(Array(request.utf8), now: 999)
    let answer = String(decoding: try #require(bytes), as: UTF8.self)
    #expect(answer.hasPrefix("HTTP/1.1 \(status)\r\n"))
    #expect(broker.issues == (status == "200 OK" ? [CredentialBroker.Issue(role: "reader", count: 1)] : []))
  }

  @Test("gives out nothing that has expired, waits for the whole head, and for no more than fits")
  func bounds() throws {
    var broker = try Self.broker()
    let request = Array("GET /aws/reader HTTP/1.1\r\nAuthorization: secret\r\n\r\n".utf8)
    #expect(String(decoding: broker.answer(request, now: 1000)!, as: UTF8.self).hasPrefix("HTTP/1.1 503"))
    for length in 0..<request.count - 2 { #expect(broker.answer(Array(request[..<length]), now: 1) == nil) }
    #expect(String(decoding: broker.answer([UInt8](repeating: 65, count: 9000), now: 1)!, as: UTF8.self).hasPrefix("HTTP/1.1 431"))
  }

  @Test("keeps count of what is not on record yet")
  func counts() throws {
    var broker = try Self.broker()
    let request = Array("GET /aws/reader HTTP/1.1\r\nAuthorization: secret\r\n\r\n".utf8)
    for _ in 0..<3 { _ = broker.answer(request, now: 1) }
    #expect(broker.note("reader", 2) == CredentialBroker.Issue(role: "reader", count: 1))
    #expect(broker.note("reader", 9) == nil && broker.issues.isEmpty && broker.note("other", 1) == nil)
  }
}

@Suite("What a supervisor leaves behind") struct RecordTests {
  @Test("a file is replaced whole or not at all, and what an end in the middle leaves can be removed") func replace() throws {
    let path = NSTemporaryDirectory() + "carrel-replace-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path + "/taken/x", withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: path) }
    let folder = try Descriptor.open(path, [.readOnly, .directory])
    #expect(throws: Errno.isDirectory) { try folder.replace("taken", with: [1]) }
    #expect(try FileManager.default.contentsOfDirectory(atPath: path) == ["taken"])
    try folder.replace("a", with: [1])
    try Data().write(to: URL(fileURLWithPath: path + "/.a.tmp"))
    try folder.removeTemporaries()
    #expect(try Set(FileManager.default.contentsOfDirectory(atPath: path)) == ["taken", "a"])
  }

  @Test(
    "an exit record is read back, and a part of one is not",
    arguments: [
      ExitRecord.ended(.exited(3)), .ended(.signalled(9)), .failed(StepFailure("mask /proc/x=y", .noSpace)),
      .failed(StepFailure("bind /a b at /c", .invalid, kind: .bind, subject: "/a b")),
    ])
  func exitRecord(record: ExitRecord) throws {
    let path = NSTemporaryDirectory() + "carrel-exit-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: path) }
    let folder = try Descriptor.open(path, [.readOnly, .directory])
    #expect(try ExitRecord.read(in: folder) == nil)
    try record.write(in: folder)
    #expect(try ExitRecord.read(in: folder) == record)
    let text = try String(contentsOfFile: path + "/exit", encoding: .utf8)
    for length in 0..<(text.count - text.split(separator: "\n").last!.count - 1) {
      #expect(ExitRecord.parse(String(text.prefix(length))) == nil)
    }
  }

  @Test("output is cut into bounded segments, in CRI lines, and what is lost is the oldest") func outputLog() throws {
    let path = NSTemporaryDirectory() + "carrel-log-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: path) }
    let log = OutputLog(
      in: Handle(try Descriptor.open(path, [.readOnly, .directory])), segmentBytes: 65_536, segments: 3, bytesPerSecond: 1 << 30)
    for index in 0..<40_000 { log.append(Array("line \(index)\n".utf8), to: index % 2 == 0 ? .stdout : .stderr) }
    log.append(Array("no newline \u{1b}[31m".utf8) + [0xFF, 0], to: .stdout)
    let names = try FileManager.default.contentsOfDirectory(atPath: path).sorted()
    #expect(names.count == 3)
    let sizes = try names.map { try Data(contentsOf: URL(fileURLWithPath: "\(path)/\($0)")).count }
    #expect(sizes.allSatisfy { $0 <= 65_536 + 16_500 })
    let starts = names.compactMap { Int($0.dropLast(4)) }
    #expect(starts[1] == starts[0] + sizes[0] && starts[2] == starts[1] + sizes[1])
    let last = try Data(contentsOf: URL(fileURLWithPath: "\(path)/\(names[2])")).split(separator: 0x0A)
    #expect(String(decoding: last[last.count - 2], as: UTF8.self).hasSuffix(" stderr F line 39999"))
    #expect(last[last.count - 1].suffix(2).elementsEqual([0xFF, 0]))
  }

  @Test(
    "moments print as RFC 3339",
    arguments: [
      (0, "1970-01-01T00:00:00.000000000Z"), (951_782_400_000_000_001, "2000-02-29T00:00:00.000000001Z"),
      (1_709_251_199_999_999_999, "2024-02-29T23:59:59.999999999Z"), (4_102_444_800_000_000_000, "2100-01-01T00:00:00.000000000Z"),
    ] as [(Int64, String)])
  func moments(nanoseconds: Int64, text: String) { #expect(Timestamp.text(nanoseconds) == text) }
}

@Suite("Addresses") struct AddressTests {
  @Test(
    "subnets",
    arguments: [
      ("10.87.0.0/16", true), ("10.87.0.1/16", false), ("10.87.0.0/29", false), ("10.87.0.0/7", false), ("10.87.0.0", false),
      ("256.0.0.0/8", false), ("a.b.c.d/16", false), ("10.87.0.0/16/1", false),
    ])
  func subnets(text: String, valid: Bool) { #expect((Subnet(text) != nil) == valid) }

  @Test("slots have distinct addresses inside the subnet") func slots() throws {
    let subnet = try #require(Subnet("10.87.0.0/24"))
    let all = (0..<subnet.capacity).map { subnet.address($0).description }
    #expect(Set(all).count == 253)
    #expect(all.first == "10.87.0.2" && all.last == "10.87.0.254" && subnet.gateway.description == "10.87.0.1")
  }
}

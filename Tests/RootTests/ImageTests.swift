// SPDX-License-Identifier: Apache-2.0

import Errors
import Foundation
import Linux
import Testing

@testable import Images

/// Writes tar archives byte by byte, so that they can be as wrong as a test wants.
struct Tar {
  private(set) var bytes: [UInt8] = []

  mutating func add(_ name: String, _ type: Character = "0", link: String = "", mode: Int = 0o644, uid: Int = 0, _ content: String = "") {
    var header = [UInt8](repeating: 0, count: 512)
    func put(_ text: String, _ at: Int, _ width: Int) {
      for (index, byte) in text.utf8.prefix(width).enumerated() { header[at + index] = byte }
    }
    put(name, 0, 100)
    put(String(format: "%07o", mode), 100, 7)
    put(String(format: "%07o", uid), 108, 7)
    put(String(format: "%07o", 0), 116, 7)
    put(String(format: "%011o", content.utf8.count), 124, 11)
    put(String(format: "%011o", 1_700_000_000), 136, 11)
    put(String(type), 156, 1)
    put(link, 157, 100)
    put("ustar\u{0}00", 257, 8)
    for index in 148..<156 { header[index] = 0x20 }
    put(String(format: "%06o\u{0} ", header.reduce(0) { $0 + Int($1) }), 148, 8)
    bytes += header + Array(content.utf8) + [UInt8](repeating: 0, count: (512 - content.utf8.count % 512) % 512)
  }

  var finished: [UInt8] { bytes + [UInt8](repeating: 0, count: 1024) }
}

private let breakages: [(@Sendable (inout [String: [UInt8]]) -> Void, DriverError.Code)] = [
  ({ $0["oci-layout"] = nil }, .failedPrecondition),
  ({ $0["oci-layout"] = Array(#"{"imageLayoutVersion":"9"}"#.utf8) }, .failedPrecondition),
  ({ $0["index.json"] = [] }, .invalid), ({ $0["index.json"] = Array(#"{"manifests":[]}"#.utf8) }, .failedPrecondition),
  ({ $0["index.json"] = [UInt8](repeating: 0x20, count: 5 << 20) }, .resourceExhausted),
  ({ $0["index.json"] = Array(#"{"manifests":[{"digest":"sha256:../../x","size":1}]}"#.utf8) }, .invalid),
  (
    {
      $0["index.json"] = Array(
        #"{"manifests":[{"digest":"sha256:\#(String(repeating: "a", count: 64))","size":9223372036854775807}]}"#.utf8)
    }, .resourceExhausted
  ),
  (
    { files in for name in files.keys where name.hasPrefix("blobs") && (files[name]?.count ?? 0) > 1000 { files[name]?[0] ^= 1 } },
    .dataLoss
  ),
  (
    { files in for name in files.keys where name.hasPrefix("blobs") && (files[name]?.count ?? 0) > 1000 { files[name] = nil } },
    .failedPrecondition
  ),
]

private let escapes: [@Sendable (inout Tar) -> Void] = [
  { $0.add("/etc/passwd", "0", "x") }, { $0.add("../canary", "0", "x") }, { $0.add("a/../../canary", "0", "x") },
  { $0.add("hard", "1", link: "../canary") }, { $0.add("hard", "1", link: "/etc/passwd") }, { $0.add("hard", "1", link: "later") },
  {
    $0.add("dir", "5"); $0.add("hard", "1", link: "dir")
  },
  {
    $0.add("link", "2", link: "/etc/passwd"); $0.add("hard", "1", link: "link")
  },
  {
    $0.add("link", "2", link: ".."); $0.add("hard", "1", link: "link/canary")
  },
  { $0.add(".wh..", "0") }, { $0.add(".wh...", "0") }, { $0.add(".wh.", "0") }, { $0.add("a/.wh..wh.x", "0") },
  { $0.add("big", "0", uid: 70_000) }, { $0.add("nothing", "2", link: "") },
  { $0.add((0..<50).map { _ in "d" }.joined(separator: "/") + "/f", "0", "x") },
]

@Suite("Images", .enabled(if: getuid() == 0)) struct ImageTests {
  private struct Layer {
    let path: String
    let report: LayerUnpacker.Report
    let digest: Digest
  }

  /// Unpacks into a fresh directory beside a canary that nothing may touch.
  private func unpack(_ bytes: [UInt8], limits: UnpackLimits = UnpackLimits(), _ check: (String) throws -> Void = { _ in }) throws
    -> LayerUnpacker.Report
  {
    let top = "/tmp/carrel-layer-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: top + "/layer", withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: top) }
    try "canary".write(toFile: top + "/canary", atomically: false, encoding: .utf8)
    defer {
      #expect((try? String(contentsOfFile: top + "/canary", encoding: .utf8)) == "canary")
      #expect((try? FileManager.default.contentsOfDirectory(atPath: top).count) == 3)
    }
    _ = FileManager.default.createFile(atPath: top + "/archive", contents: Data(bytes))
    let stream = try ArchiveStream(try Descriptor.open(top + "/archive", [.readOnly]), name: "test", limits: limits)
    var unpacker = LayerUnpacker(into: Handle(try Descriptor.open(top + "/layer", [.readOnly, .directory])), name: "test", limits: limits)
    try unpacker.unpack(stream)
    try check(top + "/layer")
    return unpacker.report
  }

  @Test("entries that leave the layer are refused", arguments: escapes)
  func refused(build: @Sendable (inout Tar) -> Void) throws {
    var tar = Tar()
    build(&tar)
    var limits = UnpackLimits()
    limits.depth = 40
    #expect(throws: DriverError.self) { _ = try unpack(tar.finished, limits: limits) }
  }

  @Test("a file through a link of the same layer stays in the layer") func throughLink() throws {
    var tar = Tar()
    tar.add("out", "2", link: "/")
    tar.add("up", "2", link: "../..")
    tar.add("out/canary", "0", "changed")
    tar.add("up/canary2", "0", "changed")
    _ = try unpack(tar.finished) { layer in
      #expect(FileManager.default.fileExists(atPath: layer + "/canary"))
      #expect(FileManager.default.fileExists(atPath: layer + "/canary2"))
    }
  }

  @Test("setuid bits, devices and steering attributes are left out and counted") func stripped() throws {
    var tar = Tar()
    tar.add("su", "0", mode: 0o4755, "x")
    tar.add("null", "3")
    tar.add("disk", "4")
    tar.add("fifo", "6")
    let report = try unpack(tar.finished) { layer in
      let mode = try Descriptor.open(layer + "/su", [.path]).status().permissions
      #expect(mode == 0o755)
      #expect(try FileManager.default.contentsOfDirectory(atPath: layer) == ["su"])
    }
    #expect(report.devices == 3 && report.setuidBits == 1)
  }

  @Test("deletions become what overlayfs reads") func whiteouts() throws {
    var tar = Tar()
    tar.add("a", "5", mode: 0o750)
    tar.add("a/.wh.gone")
    tar.add("b", "5")
    tar.add("b/.wh..wh..opq")
    _ = try unpack(tar.finished) { layer in
      let status = try Descriptor.open(layer + "/a", [.path]).status("gone")
      #expect(status.kind == .characterDevice && status.major == 0 && status.minor == 0)
      let opaque = try Descriptor.open(layer + "/b", [.readOnly]).extendedAttribute("user.overlay.opaque")
      let mode = try Descriptor.open(layer + "/a", [.path]).status().permissions
      #expect(opaque == [UInt8(ascii: "y")] && mode == 0o750)
    }
  }

  @Test("what unpacks to too much is stopped") func bombs() throws {
    var tar = Tar()
    tar.add("big", "0", String(repeating: "x", count: 300_000))
    var limits = UnpackLimits()
    limits.bytes = 100_000
    #expect { _ = try unpack(tar.finished, limits: limits) } throws: { ($0 as? DriverError)?.code == .resourceExhausted }
    var many = Tar()
    for index in 0..<100 { many.add("f\(index)") }
    limits = UnpackLimits()
    limits.entries = 50
    #expect { _ = try unpack(many.finished, limits: limits) } throws: { ($0 as? DriverError)?.code == .resourceExhausted }
  }

  @Test(
    "digests are 64 lower-case hex digits and nothing else",
    arguments: [
      "sha256:../../x", "sha256:" + String(repeating: "A", count: 64), "sha256:" + String(repeating: "a", count: 63), "md5:x", "",
      "sha256:" + String(repeating: "a", count: 65), "sha512:" + String(repeating: "a", count: 64),
    ])
  func digests(text: String) { #expect(Digest(text) == nil) }

  // ------------------------------------------------------------------- layouts

  /// A valid layout with one layer; `change` breaks it.
  private func layout(_ change: (inout [String: [UInt8]]) -> Void = { _ in }) throws -> (path: String, files: [String: [UInt8]]) {
    var tar = Tar()
    tar.add("hello", "0", "world")
    let layer = tar.finished
    let config = Array(
      #"{"architecture":"amd64","os":"linux","config":{"Env":["A=1"]},"rootfs":{"type":"layers","diff_ids":["\#(Hasher256.digest(layer))"]}}"#
        .utf8)
    let manifest = Array(
      #"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"\#(Hasher256.digest(config))","size":\#(config.count)},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"\#(Hasher256.digest(layer))","size":\#(layer.count)}]}"#
        .utf8)
    var files: [String: [UInt8]] = [
      "oci-layout": Array(#"{"imageLayoutVersion":"1.0.0"}"#.utf8),
      "index.json": Array(#"{"schemaVersion":2,"manifests":[{"digest":"\#(Hasher256.digest(manifest))","size":\#(manifest.count)}]}"#.utf8),
    ]
    for blob in [layer, config, manifest] { files["blobs/sha256/\(Hasher256.digest(blob).hex)"] = blob }
    change(&files)
    let path = "/tmp/carrel-layout-\(UUID().uuidString)"
    for (name, bytes) in files {
      let file = path + "/" + name
      try FileManager.default.createDirectory(
        atPath: String(file[..<(file.lastIndex(of: "/") ?? file.endIndex)]), withIntermediateDirectories: true)
      _ = FileManager.default.createFile(atPath: file, contents: Data(bytes))
    }
    return (path, files)
  }

  private func importing(_ path: String) throws -> StoredImage {
    let store = "/tmp/carrel-store-\(UUID().uuidString)"
    defer {
      try? FileManager.default.removeItem(atPath: store)
      try? FileManager.default.removeItem(atPath: path)
    }
    let images = try ImageStore(path: store)
    do {
      let image = try images.importImage(from: path, name: "test")
      #expect(try images.find("test") == image)
      let file = try #require(images.layerPaths(image).first) + "/hello"
      #expect(try String(contentsOfFile: file, encoding: .utf8) == "world")
      try images.remove("test", inUse: [])
      #expect(try FileManager.default.contentsOfDirectory(atPath: store + "/layers").allSatisfy { $0.hasSuffix(".size") })
      return image
    } catch {
      // What failed leaves nothing behind.
      #expect(try FileManager.default.contentsOfDirectory(atPath: store + "/layers").isEmpty)
      #expect(try FileManager.default.contentsOfDirectory(atPath: store + "/ingest").isEmpty)
      #expect(try images.list().isEmpty)
      throw error
    }
  }

  @Test("a valid layout is imported, found and removed") func valid() throws {
    #expect(try importing(try layout().path).environment == ["A=1"])
  }

  @Test("broken layouts are refused by their kind", arguments: breakages)
  func broken(change: @Sendable (inout [String: [UInt8]]) -> Void, code: DriverError.Code) throws {
    let made = try layout(change)
    #expect { _ = try importing(made.path) } throws: { ($0 as? DriverError)?.code == code }
  }

  @Test("a blob that is a FIFO is not waited for") func fifo() throws {
    let made = try layout()
    for name in made.files.keys where name.hasPrefix("blobs") && (made.files[name]?.count ?? 0) > 1000 {
      try FileManager.default.removeItem(atPath: made.path + "/" + name)
      mkfifo(made.path + "/" + name, 0o600)
    }
    #expect { _ = try importing(made.path) } throws: { ($0 as? DriverError)?.code == .invalid }
  }
}

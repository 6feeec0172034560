// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// The root's own /etc/passwd (passwd(5)). It belongs to the image and may be anything.
enum PasswordFile {
  private static let sizeLimit = 1 << 20

  /// The home of a user, for a program that is told of none; "/" where the file does not say.
  static func home(of uid: UInt32) -> String {
    do throws(Errno) {
      // Without waiting for who might write to a pipe there, and without a terminal that would become ours.
      let file = try Descriptor.open("/etc/passwd", [.readOnly, .nonBlocking, .noTerminal])
      guard try file.status().kind == .regular else { return "/" }
      return home(of: uid, in: try file.readAll(limit: sizeLimit)) ?? "/"
    } catch {
      return "/"
    }
  }

  /// name:password:uid:gid:comment:home:shell, a line each; the first with this uid counts.
  static func home(of uid: UInt32, in bytes: [UInt8]) -> String? {
    for line in bytes.split(separator: UInt8(ascii: "\n")) {
      let fields = line.split(separator: UInt8(ascii: ":"), omittingEmptySubsequences: false)
      guard fields.count >= 6, UInt32(String(decoding: fields[2], as: UTF8.self)) == uid else { continue }
      let home = fields[5]
      return home.first == UInt8(ascii: "/") && home.count < 4096 && !home.contains(0) ? String(decoding: home, as: UTF8.self) : nil
    }
    return nil
  }
}

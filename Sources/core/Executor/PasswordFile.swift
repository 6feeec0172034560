// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// The /etc/passwd of the new root (passwd(5)). It belongs to the image and may have any content.
enum PasswordFile {
  private static let sizeLimit = 1 << 20

  /// Returns the home of a user, for a program without HOME; "/" if the file has none.
  static func home(of uid: UInt32) -> String {
    do throws(Errno) {
      // Do not block on a FIFO there, and do not get a controlling terminal.
      let file = try Descriptor.open("/etc/passwd", [.readOnly, .nonBlocking, .noTerminal])
      guard try file.status().kind == .regular else { return "/" }
      return home(of: uid, in: try file.readAll(limit: sizeLimit)) ?? "/"
    } catch {
      return "/"
    }
  }

  /// Parses lines of name:password:uid:gid:comment:home:shell; the first line with the uid counts.
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

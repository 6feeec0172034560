// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The IPv4 routes of this network namespace (`/proc/net/route`).
package enum RouteTable {
  /// Returns the links of the default routes.
  package static func uplinks() -> Set<String> {
    do throws(Errno) {
      return uplinks(parsing: try Descriptor.open("/proc/net/route", [.readOnly]).readAll(limit: 1 << 20))
    } catch {
      return []
    }
  }

  static func uplinks(parsing bytes: [UInt8]) -> Set<String> {
    var found: Set<String> = []
    for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n").dropFirst() {
      let fields = line.split(whereSeparator: \.isWhitespace)
      if fields.count > 2, fields[1] == "00000000" { found.insert(String(fields[0])) }
    }
    return found
  }
}

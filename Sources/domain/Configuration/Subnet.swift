// SPDX-License-Identifier: Apache-2.0

/// The address range of the workspaces, such as 10.87.0.0/16.
package struct Subnet: Equatable, Sendable, CustomStringConvertible {
  package let base: IPv4Address
  package let prefix: Int

  /// Parses ADDRESS/PREFIX. Returns nil unless the prefix is 8 to 28 and no bit after it is set.
  package init?(_ text: String) {
    let parts = text.split(separator: "/", omittingEmptySubsequences: false)
    guard parts.count == 2, let base = IPv4Address(String(parts[0])), let prefix = Int(parts[1]), (8...28).contains(prefix),
      base.value & (UInt32.max >> UInt32(prefix)) == 0
    else { return nil }
    self.base = base
    self.prefix = prefix
  }

  /// The host's own address on every workspace's link.
  package var gateway: IPv4Address { IPv4Address(base.value + 1) }
  /// The number of addresses for workspaces: all but network, gateway and broadcast.
  package var capacity: Int { (1 << (32 - prefix)) - 3 }
  /// Returns the address of a slot; slots are counted from 0.
  package func address(_ slot: Int) -> IPv4Address { IPv4Address(base.value + 2 + UInt32(slot)) }
  package var description: String { "\(base)/\(prefix)" }
}

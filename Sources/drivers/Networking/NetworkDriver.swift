// SPDX-License-Identifier: Apache-2.0

package import Configuration
package import Linux
internal import Procfs

/// Gives workspaces their links, addresses and rules. Blocking: call it from a thread that may wait.
package final class NetworkDriver: Sendable {
  package struct Attachment: Sendable {
    /// Which address of the subnet, and which link name.
    package let slot: Int
    package let open: Bool
    /// What the link is also called, for people (IFLA_IFALIAS): the sandbox's id.
    package let alias: String
    package init(slot: Int, open: Bool, alias: String = "") {
      self.slot = slot
      self.open = open
      self.alias = alias
    }
  }

  package let subnet: Subnet
  private let firewall: Firewall
  private let linkPrefix: String
  private let slots: Int

  /// The group (IFLA_GROUP) of links whose workspaces reach the outside; the others stay in 0, as every link of a host does.
  private static let openGroup: UInt32 = 0xca88e1

  /// For `slots` workspaces at the most. Two agents on one host need tables, subnets and link prefixes of their own: the
  /// rules speak of every link with the prefix.
  package init(subnet: Subnet, slots: Int, table: String, linkPrefix: String) throws {
    self.subnet = subnet
    self.slots = slots
    self.linkPrefix = linkPrefix
    firewall = try Firewall(table: table, linkPrefix: linkPrefix)
  }

  package func address(_ slot: Int) -> IPv4Address { subnet.address(slot) }
  private func link(_ slot: Int) -> String { "\(linkPrefix)\(slot)" }
  private func group(_ attachment: Attachment) -> UInt32 { attachment.open ? NetworkDriver.openGroup : 0 }

  /// Puts the table in place, with these workspaces that already run, and lets packets pass to the uplinks.
  package func prepare(running: [Attachment]) throws {
    let host = try RouteSocket()
    // Whoever made their links. One that is gone needs no group.
    for attachment in running { try? host.setGroup(group(attachment), of: link(attachment.slot)) }
    // A slot above what an agent now gives is of one that gave more.
    let slots = max(slots, (running.map(\.slot).max() ?? 0) + 1)
    try firewall.replace(
      subnet: subnet, members: (0..<slots).map { Firewall.Member(link: link($0), address: address($0)) },
      openGroup: NetworkDriver.openGroup)
    // Per link and not the global switch, which would reset every other link's settings.
    for uplink in RouteTable.uplinks() { try? NetworkDriver.setSysctl("ipv4/conf/\(uplink)/forwarding", "1") }
  }

  /// Connects the network namespace of a workspace: link, address, routes. Its rules are there already. The link goes with the
  /// namespace: to remove it from here would cost a grace period of some 20 ms.
  package func attach(_ attachment: Attachment, namespace: borrowing Descriptor) throws {
    let (link, address) = (link(attachment.slot), address(attachment.slot))
    let host = try RouteSocket()
    // What an earlier workspace of this slot may have left: the kernel removes links a little after their namespace.
    if Process.exists("/sys/class/net/\(link)") { try? host.remove(link) }
    do {
      try host.addPair(link, group: group(attachment), alias: attachment.alias, peer: "eth0", in: namespace)
      try? NetworkDriver.setSysctl("ipv6/conf/\(link)/disable_ipv6", "1")
      try NetworkDriver.setSysctl("ipv4/conf/\(link)/rp_filter", "1")
      try NetworkDriver.setSysctl("ipv4/conf/\(link)/forwarding", "1")
      try host.addAddress(subnet.gateway, facing: address, to: try RouteSocket.index(of: link))

      let (inside, far) = try RouteSocket.inside(namespace, link: "eth0")
      try inside.setUp(1)
      try inside.setUp(far)
      try inside.addAddress(address, facing: subnet.gateway, to: far)
      try inside.addDefaultRoute(through: far, gateway: subnet.gateway)
    } catch {
      try? host.remove(link)
      throw error
    }
  }

  /// A socket that listens at 127.0.0.1 of a workspace.
  package func listen(loopback port: UInt16, namespace: borrowing Descriptor) throws -> Handle {
    Handle(try withNamespace(namespace) { try Socket.listen(loopback: port) })
  }

  package func destroy() throws { try firewall.destroy() }

  private static func setSysctl(_ path: String, _ value: String) throws {
    do throws(Errno) {
      try Descriptor.open("/proc/sys/net/\(path)", [.writeOnly]).write(Array(value.utf8))
    } catch {
      throw NetworkError(description: "cannot set net/\(path) to \(value): \(error.sentence)")
    }
  }
}

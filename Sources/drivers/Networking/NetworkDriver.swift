// SPDX-License-Identifier: Apache-2.0

package import Configuration
internal import Errors
package import Linux
internal import Procfs

/// Creates links, addresses and firewall rules for workspaces. Its functions block: call them on a lane.
package final class NetworkDriver: Sendable {
  package struct Attachment: Sendable {
    /// The number of the address in the subnet and of the link name.
    package let slot: Int
    package let open: Bool
    /// The alias of the link (IFLA_IFALIAS), for people: the sandbox's id.
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

  /// The group (IFLA_GROUP) of links with an open policy. The others stay in group 0, the default of every link.
  private static let openGroup: UInt32 = 0xca88e1

  /// Creates a driver for at most `slots` workspaces. Each agent on a host needs its own table, subnet and link prefix, since the rules
  /// match every link with the prefix.
  package init(subnet: Subnet, slots: Int, table: String, linkPrefix: String) throws {
    self.subnet = subnet
    self.slots = slots
    self.linkPrefix = linkPrefix
    firewall = try Firewall(table: table, linkPrefix: linkPrefix)
  }

  package func address(_ slot: Int) -> IPv4Address { subnet.address(slot) }
  private func link(_ slot: Int) -> String { "\(linkPrefix)\(slot)" }
  private func group(_ attachment: Attachment) -> UInt32 { attachment.open ? NetworkDriver.openGroup : 0 }

  /// Installs the table, which includes these running workspaces, and enables forwarding on the uplinks.
  package func prepare(running: [Attachment]) throws {
    let host = try RouteSocket()
    // Sets the groups whichever agent created the links. A link that no longer exists needs no group.
    for attachment in running { try? host.setGroup(group(attachment), of: link(attachment.slot)) }
    // A slot above the present limit was assigned by an agent with a higher limit.
    let slots = max(slots, (running.map(\.slot).max() ?? 0) + 1)
    try firewall.replace(
      subnet: subnet, members: (0..<slots).map { Firewall.Member(link: link($0), address: address($0)) },
      openGroup: NetworkDriver.openGroup)
    // Forwarding is set on each link: the global switch would reset the settings of every other link.
    for uplink in RouteTable.uplinks() { try? NetworkDriver.setSysctl("ipv4/conf/\(uplink)/forwarding", "1") }
  }

  /// Connects the network namespace of a workspace: link, address, routes. Its rules exist already. The kernel removes the link with the
  /// namespace; its removal here would cost a grace period of about 20 ms.
  package func attach(_ attachment: Attachment, namespace: borrowing Descriptor) throws {
    let (link, address) = (link(attachment.slot), address(attachment.slot))
    let host = try RouteSocket()
    // An earlier workspace of this slot may have left its link: the kernel removes links a little after their namespace.
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

  /// Returns a socket that listens at 127.0.0.1 in the network namespace of a workspace.
  package func listen(loopback port: UInt16, namespace: borrowing Descriptor) throws -> Handle {
    Handle(try withNamespace(namespace) { try Socket.listen(loopback: port) })
  }

  package func destroy() throws { try firewall.destroy() }

  private static func setSysctl(_ path: String, _ value: String) throws {
    do throws(Errno) {
      try Descriptor.open("/proc/sys/net/\(path)", [.writeOnly]).write(Array(value.utf8))
    } catch {
      throw DriverError(.failed, "cannot set net/\(path) to \(value): \(error.sentence)")
    }
  }
}

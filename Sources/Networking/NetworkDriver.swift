// SPDX-License-Identifier: Apache-2.0

package import Linux

/// Gives workspaces their links, addresses and rules. Blocking: call it from a thread that may wait.
package final class NetworkDriver: Sendable {
  package struct Attachment: Sendable {
    /// Which address of the subnet, and which link name.
    package let slot: Int
    package let open: Bool
    package init(slot: Int, open: Bool) {
      self.slot = slot
      self.open = open
    }
  }

  package let subnet: Subnet
  private let firewall: Firewall
  private let linkPrefix: String

  /// Two agents on one host need tables, subnets and link prefixes of their own: the rules speak of every link with
  /// the prefix.
  package init(subnet: Subnet, table: String, linkPrefix: String) throws {
    self.subnet = subnet
    self.linkPrefix = linkPrefix
    firewall = try Firewall(table: table, linkPrefix: linkPrefix)
  }

  package func address(_ slot: Int) -> IPv4Address { subnet.address(slot) }
  private func link(_ slot: Int) -> String { "\(linkPrefix)\(slot)" }

  private func member(_ attachment: Attachment) -> Firewall.Member {
    Firewall.Member(
      link: link(attachment.slot), address: address(attachment.slot), open: attachment.open)
  }

  /// Puts the table in place, for these workspaces that already run, and lets packets pass to the uplinks.
  package func prepare(running: [Attachment]) throws {
    try firewall.replace(subnet: subnet, members: running.map(member))
    // Per link and not the global switch, which would reset every other link's settings.
    for uplink in NetworkDriver.uplinks() { try? NetworkDriver.setSysctl("ipv4/conf/\(uplink)/forwarding", "1") }
  }

  /// Connects the network namespace of a workspace: link, address, routes, rules.
  package func attach(_ attachment: Attachment, namespace: borrowing Descriptor) throws {
    let link = self.link(attachment.slot)
    let host = try RouteSocket()
    // What an earlier workspace of this slot may have left: the kernel removes links a little after their namespace.
    if Process.exists("/sys/class/net/\(link)") { try? host.remove(link) }
    // The rule first: there is no moment in which packets pass unfiltered.
    try firewall.add(member(attachment))
    do {
      try host.addPair(link, peer: "eth0", in: namespace)
      try? NetworkDriver.setSysctl("ipv6/conf/\(link)/disable_ipv6", "1")
      try NetworkDriver.setSysctl("ipv4/conf/\(link)/rp_filter", "1")
      try NetworkDriver.setSysctl("ipv4/conf/\(link)/forwarding", "1")
      let near = try host.index(of: link)
      try host.addAddress(subnet.gateway, to: near)
      try host.addRoute(to: address(attachment.slot), through: near)

      let inside = try RouteSocket.inside(namespace)
      try inside.setUp(1)
      let far = try inside.index(of: "eth0")
      try inside.addAddress(address(attachment.slot), to: far)
      try inside.setUp(far)
      try inside.addRoute(to: subnet.gateway, through: far)
      try inside.addRoute(to: nil, through: far, gateway: subnet.gateway)
    } catch {
      detach(attachment)
      try? host.remove(link)
      throw error
    }
  }

  /// A socket that listens at 127.0.0.1 of a workspace.
  package func listen(loopback port: UInt16, namespace: borrowing Descriptor) throws -> Handle {
    Handle(try withNamespace(namespace) { try Socket.listen(loopback: port) })
  }

  /// Takes the rules away. The link goes with the workspace's namespace; to remove it here as well would cost a
  /// grace period of some 20 ms.
  package func detach(_ attachment: Attachment) {
    firewall.remove(member(attachment))
  }

  package func destroy() throws { try firewall.destroy() }

  /// The links that default routes go through.
  private static func uplinks() -> Set<String> {
    guard let table = try? Descriptor.open("/proc/net/route", [.readOnly]).readAll(limit: 1 << 20) else { return [] }
    var found: Set<String> = []
    for line in String(decoding: table, as: UTF8.self).split(separator: "\n").dropFirst() {
      let fields = line.split(whereSeparator: \.isWhitespace)
      if fields.count > 2, fields[1] == "00000000" { found.insert(String(fields[0])) }
    }
    return found
  }

  private static func setSysctl(_ path: String, _ value: String) throws {
    do throws(Errno) {
      try Descriptor.open("/proc/sys/net/\(path)", [.writeOnly]).write(Array(value.utf8))
    } catch {
      throw NetworkError(description: "cannot set net/\(path) to \(value): \(error.sentence)")
    }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import CLinux
internal import CNetlink
internal import Errors
internal import Linux

/// Creates a socket in the network namespace of `file`. A socket stays in the namespace in which it was created, so this thread enters the
/// namespace only for `make` and returns, without a suspension in between.
func withNamespace<T: ~Copyable>(_ file: borrowing Descriptor, _ make: () throws -> T) throws -> T {
  let home = try Descriptor.open("/proc/thread-self/ns/net", [.readOnly])
  let target = file.number
  guard clx_setns(target, Int32(CLX_NEWNET)) == 0 else {
    throw DriverError(.failed, "cannot enter the workspace's network namespace")
  }
  defer {
    // A crash is better than work in the wrong namespace: the agent is restarted and recovers.
    if clx_setns(home.number, Int32(CLX_NEWNET)) != 0 { fatalError("cannot return to the host's network namespace") }
  }
  return try make()
}

/// A route netlink socket, possibly in another network namespace.
final class RouteSocket {
  private let socket: OpaquePointer

  init() throws {
    guard let socket = nl_socket_alloc() else { throw DriverError(.failed, "netlink: out of memory") }
    self.socket = socket
    try succeed(nl_connect(socket, 0 /* NETLINK_ROUTE */), "connect to netlink")
  }

  deinit { nl_socket_free(socket) }

  /// Returns a socket in the namespace of `file`, and the index of a link there.
  static func inside(_ file: borrowing Descriptor, link: String) throws -> (socket: RouteSocket, index: Int32) {
    try withNamespace(file) { (try RouteSocket(), try RouteSocket.index(of: link)) }
  }

  /// Creates a veth pair whose peer is in the namespace of `file`.
  func addPair(_ name: String, group: UInt32, alias: String, peer peerName: String, in file: borrowing Descriptor) throws {
    guard let link = rtnl_link_veth_alloc(), let peer = rtnl_link_veth_get_peer(link) else {
      throw DriverError(.failed, "netlink: out of memory")
    }
    defer {
      rtnl_link_put(peer)
      rtnl_link_veth_release(link)
    }
    rtnl_link_set_name(link, name)
    rtnl_link_set_group(link, group)
    if !alias.isEmpty { rtnl_link_set_ifalias(link, alias) }
    rtnl_link_set_flags(link, 1 /* IFF_UP */)
    rtnl_link_set_name(peer, peerName)
    rtnl_link_set_ns_fd(peer, file.number)
    try succeed(rtnl_link_add(socket, link, 0x400 | 0x200 /* CREATE | EXCL */), "create the link \(name)")
  }

  /// Sets the group of an existing link.
  func setGroup(_ group: UInt32, of name: String) throws {
    let index = try RouteSocket.index(of: name)
    try change("put the link \(name) into group \(group)") { present, change in
      rtnl_link_set_ifindex(present, index)
      rtnl_link_set_group(change, group)
    }
  }

  /// Returns the index of a link in the namespace of this thread.
  static func index(of name: String) throws -> Int32 {
    // Netlink is not used here: it replies with every attribute of the link.
    let index = if_nametoindex(name)
    guard index != 0 else { throw DriverError(.failed, "cannot find the link \(name)") }
    return Int32(index)
  }

  func setUp(_ index: Int32) throws {
    try change("set link \(index) up") { present, change in
      rtnl_link_set_ifindex(present, index)
      rtnl_link_set_flags(change, 1)
    }
  }

  private func change(_ what: String, _ describe: (_ present: OpaquePointer, _ change: OpaquePointer) -> Void) throws {
    guard let present = rtnl_link_alloc(), let change = rtnl_link_alloc() else {
      throw DriverError(.failed, "netlink: out of memory")
    }
    defer {
      rtnl_link_put(present)
      rtnl_link_put(change)
    }
    describe(present, change)
    try succeed(rtnl_link_change(socket, present, change, 0), what)
  }

  func remove(_ name: String) throws {
    guard let link = rtnl_link_alloc() else { return }
    defer { rtnl_link_put(link) }
    rtnl_link_set_name(link, name)
    let result = rtnl_link_delete(socket, link)
    // The kernel may have removed the link with its namespace already.
    if result != -12 /* NLE_OBJ_NOTFOUND */ && result != -31 /* NLE_NODEV */ { try succeed(result, "remove the link \(name)") }
  }

  /// Assigns an address to a link, which also adds the route to the address of its peer.
  func addAddress(_ address: IPv4Address, facing peer: IPv4Address, to index: Int32) throws {
    guard let entry = rtnl_addr_alloc() else { throw DriverError(.failed, "netlink: out of memory") }
    defer { rtnl_addr_put(entry) }
    let local = try netlinkAddress(address, 32)
    let other = try netlinkAddress(peer, 32)
    defer {
      nl_addr_put(local)
      nl_addr_put(other)
    }
    rtnl_addr_set_ifindex(entry, index)
    rtnl_addr_set_local(entry, local)
    rtnl_addr_set_peer(entry, other)
    try succeed(rtnl_addr_add(socket, entry, 0), "assign address \(address) to link \(index)")
  }

  /// Adds the default route through a gateway on a link.
  func addDefaultRoute(through index: Int32, gateway: IPv4Address) throws {
    guard let route = rtnl_route_alloc(), let hop = rtnl_route_nh_alloc() else {
      throw DriverError(.failed, "netlink: out of memory")
    }
    defer { rtnl_route_put(route) }
    let everywhere = try netlinkAddress(IPv4Address(0), 0)
    let via = try netlinkAddress(gateway, 32)
    defer {
      nl_addr_put(everywhere)
      nl_addr_put(via)
    }
    rtnl_route_set_family(route, 2 /* AF_INET */)
    rtnl_route_set_dst(route, everywhere)
    rtnl_route_nh_set_ifindex(hop, index)
    rtnl_route_nh_set_gateway(hop, via)
    rtnl_route_add_nexthop(route, hop)
    try succeed(rtnl_route_add(socket, route, 0x400 | 0x100 /* CREATE | REPLACE */), "add a route through link \(index)")
  }

  private func netlinkAddress(_ address: IPv4Address, _ prefix: Int32) throws -> OpaquePointer {
    var bytes = address.bytes
    guard let built = nl_addr_build(2, &bytes, 4) else { throw DriverError(.failed, "netlink: out of memory") }
    nl_addr_set_prefixlen(built, prefix)
    return built
  }

  private func succeed(_ result: Int32, _ what: String) throws {
    if result < 0 { throw DriverError(.failed, "cannot \(what): \(String(cString: nl_geterror(result)))") }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Configuration
internal import CNftables
internal import Errors
internal import Synchronization

/// The agent's own nftables table. It is replaced in one transaction, and nothing outside it is changed.
///
/// A workspace can send only from its own address on its own link. It can never reach another workspace, the host, a link-local or a
/// metadata address; it can reach every other address if its policy is open, which the group of its link encodes. The host can reach
/// every workspace.
///
/// The rules cover every link that may exist, so that no change is needed when a workspace starts or stops: a link never exists without
/// its rules.
final class Firewall: Sendable {
  struct Member: Sendable {
    let link: String
    let address: IPv4Address
  }

  /// SAFETY: libnftables has no thread-bound state, and the lock admits one caller to the context at a time.
  private struct Context: @unchecked Sendable { let pointer: OpaquePointer }
  private let context: Mutex<Context>
  private let table: String
  private let linkPrefix: String

  init(table: String, linkPrefix: String) throws {
    guard let pointer = nft_ctx_new(0) else { throw DriverError(.failed, "libnftables: cannot create a context") }
    nft_ctx_buffer_output(pointer)
    nft_ctx_buffer_error(pointer)
    context = Mutex(Context(pointer: pointer))
    self.table = table
    self.linkPrefix = linkPrefix
  }

  deinit { context.withLock { nft_ctx_free($0.pointer) } }

  /// Replaces the whole table with these members. `openGroup`: the group of the links with an open policy.
  func replace(subnet: Subnet, members: [Member], openGroup: UInt32) throws {
    let links = "\"\(linkPrefix)*\""
    let sources = members.map { "\"\($0.link)\" . \($0.address)" }.joined(separator: ", ")
    // A counter precedes the verdict, which ends the rule, so that it counts every packet.
    try run(
      """
      add table inet \(table)
      delete table inet \(table)
      table inet \(table) {
        set sources { type ifname . ipv4_addr; elements = { \(sources) } }
        chain forward {
          type filter hook forward priority filter; policy accept;
          iifname \(links) jump outbound
          oifname \(links) jump inbound
        }
        chain outbound {
          meta nfproto ipv6 counter drop
          iifname . ip saddr != @sources counter drop
          ip daddr 169.254.0.0/16 counter drop
          oifname \(links) counter drop
          iifgroup \(openGroup) accept
          ct state established,related accept
          counter drop
        }
        chain inbound {
          ct state established,related accept
          counter drop
        }
        chain input {
          type filter hook input priority filter; policy accept;
          iifname \(links) jump host
        }
        chain host {
          iifname . ip saddr @sources ct state established,related accept
          ip6 daddr fd00:ec2::254 counter drop
          counter drop
        }
        chain postrouting {
          type nat hook postrouting priority srcnat; policy accept;
          ip saddr \(subnet) oifname != \(links) masquerade
        }
      }
      """)
  }

  func destroy() throws { try run("add table inet \(table)\ndelete table inet \(table)\n") }

  private func run(_ commands: String) throws {
    try context.withLock { context in
      guard nft_run_cmd_from_buffer(context.pointer, commands) == 0 else {
        let message = nft_ctx_get_error_buffer(context.pointer).map { String(cString: $0) } ?? ""
        throw DriverError(.failed, "nftables: \(message.split(separator: "\n").first.map(String.init) ?? "refused")")
      }
    }
  }
}

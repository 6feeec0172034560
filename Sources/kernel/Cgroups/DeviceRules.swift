// SPDX-License-Identifier: Apache-2.0

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// A rule that allows or denies processes of a cgroup to open or make device nodes.
package struct DeviceRule: Equatable, Sendable {
  package enum Kind: Sendable { case all, character, block }
  package let allows: Bool
  package let kind: Kind
  /// Nil matches any number.
  package let major: UInt32?
  package let minor: UInt32?
  package let reads: Bool
  package let writes: Bool
  package let makes: Bool

  package init(allows: Bool, kind: Kind, major: UInt32?, minor: UInt32?, access: String) {
    self.allows = allows
    self.kind = kind
    self.major = major
    self.minor = minor
    reads = access.utf8.contains(UInt8(ascii: "r"))
    writes = access.utf8.contains(UInt8(ascii: "w"))
    makes = access.utf8.contains(UInt8(ascii: "m"))
  }

  /// The rule in the format of devices.allow and devices.deny of cgroup v1.
  var text: String {
    let letter =
      switch kind {
      case .all: "a"
      case .character: "c"
      case .block: "b"
      }
    return
      "\(letter) \(major.map { "\($0)" } ?? "*"):\(minor.map { "\($0)" } ?? "*") \(reads ? "r" : "")\(writes ? "w" : "")\(makes ? "m" : "")"
  }

  var isAll: Bool { kind == .all && major == nil && minor == nil && reads && writes && makes }
}

extension Cgroup {
  /// Sets the rules; a later rule overrides an earlier one. A device that no rule matches is denied on v2, and on v1 has the
  /// parent's rule, so a list must start with a rule for all devices.
  package func restrict(_ rules: [DeviceRule]) throws(CgroupError) {
    guard layout == .unified else {
      let (allow, deny) = (try open("devices.allow"), try open("devices.deny"))
      for (index, rule) in rules.enumerated() where index == 0 || rule != rules[index - 1] {
        let text = rule.isAll ? "a" : rule.text
        do throws(Errno) { try (rule.allows ? allow : deny).descriptor.write(Array(text.utf8)) } catch {
          throw CgroupError(path, "cannot write the device rule \(text)", cause: error)
        }
      }
      return
    }
    do throws(Errno) {
      let folder = try Descriptor.open(CgroupLayout.root + "/" + path, [.readOnly, .directory])
      try Filter.attachDeviceProgram(DeviceProgram.compile(rules), to: folder)
    } catch {
      throw CgroupError(path, "cannot attach the device program", cause: error)
    }
  }

  private func open(_ file: String) throws(CgroupError) -> Handle {
    let name = folder("devices") + "/" + file
    do throws(Errno) { return Handle(try Descriptor.open(name, [.writeOnly])) } catch {
      throw CgroupError(name, "cannot open", cause: error)
    }
  }
}

/// A compiler of rules to a BPF program of type cgroup-device (kernel documentation, "BPF_PROG_TYPE_CGROUP_DEVICE"). The first word
/// of the context has the device type in its low half and the access in its high half; major and minor follow.
enum DeviceProgram {
  private static let exit: UInt64 = 0x95

  static func compile(_ rules: [DeviceRule]) -> [UInt64] {
    var program: [UInt64] = [
      instruction(0x61, 2, 1, 0, 0),  // r2 = *(u32 *)(r1 + 0)
      instruction(0xBF, 3, 2, 0, 0),  // r3 = r2
      instruction(0x57, 2, 0, 0, 0xFFFF),  // r2 &= 0xffff: the kind
      instruction(0x77, 3, 0, 0, 16),  // r3 >>= 16: the access
      instruction(0x61, 4, 1, 4, 0),  // r4 = major
      instruction(0x61, 5, 1, 8, 0),  // r5 = minor
    ]
    // The last rule that matches decides, so they are tested in reverse order.
    for rule in rules.reversed() {
      let test = tests(rule)
      for (index, line) in test.enumerated() {
        let isJump = line & 0x7 == 0x5
        // A test that fails jumps over the remaining tests and the verdict of its rule.
        program.append(isJump ? line | UInt64(test.count - index - 1 + 2) << 16 : line)
      }
      program += [instruction(0xB7, 0, 0, 0, rule.allows ? 1 : 0), exit]
      // The kernel refuses a program with unreachable instructions.
      if test.isEmpty { return program }
    }
    return program + [instruction(0xB7, 0, 0, 0, 0), exit]
  }

  private static func tests(_ rule: DeviceRule) -> [UInt64] {
    var lines: [UInt64] = []
    if rule.kind != .all { lines.append(instruction(0x55, 2, 0, 0, rule.kind == .block ? 1 : 2)) }  // if r2 != kind
    let access = (rule.makes ? 1 : 0) | (rule.reads ? 2 : 0) | (rule.writes ? 4 : 0)
    if access != 7 {
      lines.append(instruction(0xBF, 1, 3, 0, 0))  // r1 = r3
      lines.append(instruction(0x57, 1, 0, 0, UInt32(access)))  // r1 &= access
      // A rule that allows must cover all of the requested access; a rule that denies matches any part of it.
      lines.append(rule.allows ? instruction(0x5D, 1, 3, 0, 0) : instruction(0x15, 1, 0, 0, 0))
    }
    if let major = rule.major { lines.append(instruction(0x55, 4, 0, 0, major)) }
    if let minor = rule.minor { lines.append(instruction(0x55, 5, 0, 0, minor)) }
    return lines
  }

  /// struct bpf_insn: code, registers, offset, immediate.
  private static func instruction(_ code: UInt8, _ to: UInt8, _ from: UInt8, _ offset: UInt16, _ value: UInt32) -> UInt64 {
    UInt64(code) | UInt64(to | from << 4) << 8 | UInt64(offset) << 16 | UInt64(value) << 32
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import Seccomp

/// The compiler of the default profile, for the native architecture only.
package enum SeccompCompiler {
  private static let notPermitted: UInt16 = 1  // EPERM
  private static let notImplemented: UInt16 = 38  // ENOSYS

  package static func compileDefaultProfile() throws -> [UInt8] {
    let filter = try SeccompFilter(fallback: .errno(notPermitted))
    // 32-bit and x32 calls have other numbers, so they fail with EPERM before they are compared with this table.
    try filter.setActionForOtherArchitectures(.errno(notPermitted))

    // A call that is newer than the installed libseccomp gets the fallback.
    for name in SyscallProfile.allowed { try filter.add(.allow, name) }
    for name in SyscallProfile.absent { try filter.add(.errno(notImplemented), name) }
    try filter.add(.allow, "clone", [masked(0, SyscallProfile.namespaceBits, 0)])
    // The kernel reads only the low 32 bits of these arguments, and so must the filter.
    for family in SyscallProfile.socketFamilies { try filter.add(.allow, "socket", [masked(0, 0xFFFF_FFFF, family)]) }
    try filter.add(
      .allow, "socket", [masked(0, 0xFFFF_FFFF, SyscallProfile.netlink.family), masked(2, 0xFFFF_FFFF, SyscallProfile.netlink.protocol)])
    for persona in SyscallProfile.personalities { try filter.add(.allow, "personality", [masked(0, 0xFFFF_FFFF, persona)]) }
    for rule in ioctlRules() { try filter.add(.allow, "ioctl", [rule]) }
    return try filter.program()
  }

  /// Returns rules that allow every request but two. They are masked comparisons, because libseccomp's "not equal" compares all
  /// 64 bits and would allow `TIOCSTI | 1 << 32`: a request is allowed if one of its upper bits differs from those of the two, or
  /// if its last four bits are those of neither.
  private static func ioctlRules() -> [SeccompFilter.Condition] {
    let (common, last) = SyscallProfile.terminalInjection
    let upper = (4..<32).map { bit in masked(1, 1 << bit, ~common & (1 << bit)) }
    let lower = (UInt64(0)..<16).filter { !last.contains($0) }.map { masked(1, 0xF, $0) }
    return upper + lower
  }

  private static func masked(_ argument: UInt32, _ mask: UInt64, _ value: UInt64) -> SeccompFilter.Condition {
    SeccompFilter.Condition(argument: argument, .maskedEqual, mask, value)
  }
}

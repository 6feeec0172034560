// SPDX-License-Identifier: Apache-2.0

internal import CSeccomp
internal import Linux

package struct SeccompError: Error, Sendable {
  package let message: String
}

/// Compiles the default profile once into BPF, for the native architecture only and tree-shaped: loading such a
/// filter costs an eighth of a linear one (reference: libseccomp, SCMP_FLTATR_CTL_OPTIMIZE).
package enum SeccompCompiler {
  package static func compileDefaultProfile() throws -> [UInt8] {
    guard let context = seccomp_init(cseccomp_errno(EPERM)) else {
      throw SeccompError(message: "libseccomp: no context for a filter")
    }
    defer { seccomp_release(context) }
    try succeed(seccomp_attr_set(context, SCMP_FLTATR_CTL_OPTIMIZE, 2), "set the optimisation")
    // 32-bit and x32 calls get an error of their own and do not reach a differently numbered table.
    try succeed(seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, cseccomp_errno(EPERM)), "set the action for other architectures")

    for name in SyscallProfile.allowed { try add(context, cseccomp_allow(), name, []) }
    for name in SyscallProfile.absent { try add(context, cseccomp_errno(ENOSYS), name, []) }
    try add(context, cseccomp_allow(), "clone", [cseccomp_masked(0, SyscallProfile.namespaceBits, 0)])
    // The kernel looks at the low 32 bits of these arguments, and so must the filter.
    for family in SyscallProfile.socketFamilies {
      try add(context, cseccomp_allow(), "socket", [cseccomp_masked(0, 0xFFFF_FFFF, family)])
    }
    for persona in SyscallProfile.personalities {
      try add(context, cseccomp_allow(), "personality", [cseccomp_masked(0, 0xFFFF_FFFF, persona)])
    }
    for rule in ioctlRules() { try add(context, cseccomp_allow(), "ioctl", [rule]) }
    return try export(context)
  }

  /// "Neither of two requests", said with masked comparisons, since libseccomp's "not equal" compares all 64
  /// bits and would let `TIOCSTI | 1 << 32` through: a request is allowed if one of its upper bits differs
  /// from theirs, or if its last four bits are neither's.
  private static func ioctlRules() -> [scmp_arg_cmp] {
    let (common, last) = SyscallProfile.terminalInjection
    let upper = (4..<32).map { bit in cseccomp_masked(1, 1 << bit, ~common & (1 << bit)) }
    let lower = (UInt64(0)..<16).filter { !last.contains($0) }.map { cseccomp_masked(1, 0xF, $0) }
    return upper + lower
  }

  private static func add(_ context: scmp_filter_ctx, _ action: UInt32, _ name: String, _ conditions: [scmp_arg_cmp]) throws {
    let number = seccomp_syscall_resolve_name(name)
    // A call newer than the installed libseccomp stays at the default: EPERM.
    if number == __NR_SCMP_ERROR { return }
    let result = conditions.withUnsafeBufferPointer {
      seccomp_rule_add_array(context, action, number, UInt32($0.count), $0.baseAddress)
    }
    try succeed(result, "add a rule for \(name)")
  }

  private static func export(_ context: scmp_filter_ctx) throws -> [UInt8] {
    // A filter has at most 4,096 instructions of 8 bytes: it fits the 64 KiB of a pipe.
    let pipe = try Pipe()
    guard let writing = pipe.writing else { throw Errno.invalid }
    try succeed(seccomp_export_bpf(context, writing.descriptor.number), "export the filter")
    return try pipe.reading.descriptor.read(upTo: 65_536)
  }

  private static func succeed(_ result: Int32, _ what: String) throws {
    if result < 0 { throw SeccompError(message: "libseccomp: cannot \(what): \(Errno(-result).sentence)") }
  }
}

// SPDX-License-Identifier: Apache-2.0

internal import CSeccomp

#if !hasFeature(Embedded)
  internal import Linux
#endif

/// A filter under construction by libseccomp.
///
/// It is compiled to a tree: loading and running that costs an eighth of a linear filter (seccomp_attr_set(3),
/// SCMP_FLTATR_CTL_OPTIMIZE).
package final class SeccompFilter {
  /// The action for a system call, with libseccomp's values.
  package struct Action: Equatable, Sendable {
    let number: UInt32
    package static let allow = Action(number: cseccomp_allow())
    package static let killThread = Action(number: cseccomp_kill_thread())
    package static let killProcess = Action(number: cseccomp_kill_process())
    package static let trap = Action(number: cseccomp_trap())
    package static let log = Action(number: cseccomp_log())
    package static let notify = Action(number: cseccomp_notify())
    package static func errno(_ code: UInt16) -> Action { Action(number: cseccomp_errno(Int32(code))) }
    package static func trace(_ code: UInt16) -> Action { Action(number: cseccomp_trace(Int32(code))) }
  }

  package enum Comparison: Equatable, Sendable { case notEqual, less, lessOrEqual, equal, greaterOrEqual, greater, maskedEqual }

  /// A condition on one argument of a system call. For `maskedEqual`, `first` is the mask and `second` the value.
  package struct Condition: Equatable, Sendable {
    let argument: UInt32
    let comparison: Comparison
    let first: UInt64
    let second: UInt64
    package init(argument: UInt32, _ comparison: Comparison, _ first: UInt64, _ second: UInt64 = 0) {
      self.argument = argument
      self.comparison = comparison
      self.first = first
      self.second = second
    }
  }

  package struct Failure: Error, Sendable {
    package let message: String
  }

  private let context: scmp_filter_ctx
  private let fallback: Action
  /// The highest system call number of this machine's architecture that a rule names.
  private var newest: Int32 = -1

  package init(fallback: Action) throws(Failure) {
    guard let context = seccomp_init(fallback.number) else { throw Failure(message: "libseccomp: cannot create a filter") }
    self.context = context
    self.fallback = fallback
    try succeed(seccomp_attr_set(context, SCMP_FLTATR_CTL_OPTIMIZE, 2), "set the optimisation")
  }

  deinit { seccomp_release(context) }

  /// Sets the action for system calls of architectures that were not added.
  package func setActionForOtherArchitectures(_ action: Action) throws(Failure) {
    try succeed(seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, action.number), "set the action for other architectures")
  }

  /// Adds an architecture by libseccomp's name for it: `x86_64`, `x86`, `x32`, `aarch64` …
  package func add(architecture name: String) throws(Failure) {
    let token = name.withCString { seccomp_arch_resolve_name($0) }
    guard token != 0 else { throw Failure(message: "libseccomp: unknown architecture \(name)") }
    let result = seccomp_arch_add(context, token)
    if result != -Errno.exists.code { try succeed(result, "add the architecture \(name)") }
  }

  /// Adds a rule. Returns false if this libseccomp does not know the system call, which then has the default action. A rule with
  /// the default action is left out, because libseccomp refuses it.
  @discardableResult
  package func add(_ action: Action, _ name: String, _ conditions: [Condition] = []) throws(Failure) -> Bool {
    let number = name.withCString { seccomp_syscall_resolve_name($0) }
    guard number != __NR_SCMP_ERROR else { return false }
    newest = max(newest, number)
    if action == fallback { return true }
    let raw = conditions.map { condition in
      let operation =
        switch condition.comparison {
        case .notEqual: SCMP_CMP_NE
        case .less: SCMP_CMP_LT
        case .lessOrEqual: SCMP_CMP_LE
        case .equal: SCMP_CMP_EQ
        case .greaterOrEqual: SCMP_CMP_GE
        case .greater: SCMP_CMP_GT
        case .maskedEqual: SCMP_CMP_MASKED_EQ
        }
      return scmp_arg_cmp(arg: condition.argument, op: operation, datum_a: condition.first, datum_b: condition.second)
    }
    let result = raw.withUnsafeBufferPointer {
      seccomp_rule_add_array(context, action.number, number, UInt32($0.count), $0.baseAddress)
    }
    try succeed(result, "add a rule for \(name)")
    return true
  }

  /// Compiles the filter to classic BPF, eight bytes per instruction.
  package func program() throws(Failure) -> [UInt8] {
    // libseccomp exports to a file in memory, because a filter for several architectures can exceed the capacity of a pipe.
    do throws(Errno) {
      let file = try Descriptor.memory("filter", [])
      let result = seccomp_export_bpf(context, file.number)
      if result < 0 { throw Errno(-result) }
      var program: [UInt8] = []
      while true {
        let part = try file.read(at: UInt64(program.count), upTo: 65_536)
        if part.isEmpty { return stub + program }
        program += part
      }
    } catch {
      throw Failure(message: "libseccomp: cannot export the filter: \(error.sentence)")
    }
  }

  /// Instructions before the filter that make a system call newer than all those in the profile fail with ENOSYS, so that a C
  /// library falls back to an older call; on EPERM it would give up. Other architectures, and filters that allow unknown calls, are
  /// unchanged.
  private var stub: [UInt8] {
    let lets = [Action.allow, .log, .notify].contains(fallback) || fallback.number & 0xFFFF_0000 == Action.trace(0).number
    guard newest >= 0, !lets else { return [] }
    func instruction(_ code: UInt16, _ ifTrue: UInt8, _ ifFalse: UInt8, _ value: UInt32) -> [UInt8] {
      [UInt8(code & 0xFF), UInt8(code >> 8), ifTrue, ifFalse] + (0..<4).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
    }
    // struct seccomp_data has the system call number at 0 and the architecture at 4 (seccomp(2)).
    return instruction(0x20, 0, 0, 4) + instruction(0x15, 0, 4, seccomp_arch_native()) + instruction(0x20, 0, 0, 0)
      // System call numbers of x32 have this bit set.
      + instruction(0x35, 2, 0, 0x4000_0000) + instruction(0x25, 0, 1, UInt32(newest)) + instruction(0x06, 0, 0, 0x0005_0000 | 38)
  }

  private func succeed(_ result: Int32, _ what: String) throws(Failure) {
    if result < 0 { throw Failure(message: "libseccomp: cannot \(what): \(Errno(-result).sentence)") }
  }
}

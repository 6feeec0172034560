// SPDX-License-Identifier: Apache-2.0

#if WITHOUT_DEFENCES
  internal import CLinux
#endif

/// Defences that a test build can switch off one by one, to see the attack that each of them stops. In any other build they are
/// always on and this type costs nothing.
package enum Defence: String, Sendable {
  /// The runtime runs from a read-only mount while a container with the host's root can reach its executable (CVE-2019-5736).
  case readOnlyExecutable = "read-only-executable"
  /// A working directory outside the root is detected (CVE-2024-21626).
  case workingDirectory = "working-directory"
  /// A container that waits for its start has no descriptor of the host open (CVE-2024-21626).
  case closedDescriptors = "closed-descriptors"
  /// Paths inside a root never lead out of it (CVE-2021-30465 and similar).
  case resolveInRoot = "resolve-in-root"
  /// A process that joins a container cannot be traced from inside (CVE-2016-9962).
  case undumpable = "undumpable"
  /// The size of a configuration file that is read is bounded.
  case boundedConfiguration = "bounded-configuration"

  package var isOn: Bool {
    #if WITHOUT_DEFENCES
      guard let off = clx_environment("CARREL_WITHOUT") else { return true }
      return !String(cString: off).split(separator: ",").contains { $0 == rawValue }
    #else
      return true
    #endif
  }

  /// When `undumpable` is off, also reverts the kernel's own protection and waits 20 ms, so that an attack has time to see the
  /// process: the state of a program that changes no ids and has more to do before it executes another.
  package static func standExposed() {
    #if WITHOUT_DEFENCES
      if undumpable.isOn { return }
      _ = clx_prctl(Int32(CLX_PR_SET_DUMPABLE), 1, 0)
      var now = Clock.monotonic
      let end = now + 20_000_000
      while now < end { now = Clock.monotonic }
    #endif
  }
}

// SPDX-License-Identifier: Apache-2.0

#if WITHOUT_DEFENCES
  internal import CLinux
#endif

/// Defences that a test build can switch off one by one, to see the attack bite that each is there for. In any other build
/// they are always on, and this is nothing.
package enum Defence: String, Sendable {
  /// The runtime runs from a read-only mount while it is in reach of a container with the host's root (CVE-2019-5736).
  case readOnlyExecutable = "read-only-executable"
  /// A working directory outside the root is found out (CVE-2024-21626).
  case workingDirectory = "working-directory"
  /// While a container waits for its start, nothing of the host is open in it (CVE-2024-21626).
  case closedDescriptors = "closed-descriptors"
  /// Paths of a root never lead out of it (CVE-2021-30465 and its kin).
  case resolveInRoot = "resolve-in-root"
  /// What joins a container cannot be traced from inside (CVE-2016-9962).
  case undumpable = "undumpable"
  /// What is read of a configuration is bounded.
  case boundedConfiguration = "bounded-configuration"

  package var isOn: Bool {
    #if WITHOUT_DEFENCES
      guard let off = clx_environment("CARREL_WITHOUT") else { return true }
      return !String(cString: off).split(separator: ",").contains { $0 == rawValue }
    #else
      return true
    #endif
  }

  /// Where `undumpable` is off, what the kernel does for it is off as well, and for long enough to be looked at: as in a program that
  /// changes no ids and has more to do before it executes another.
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

// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// Kinds of namespace (namespaces(7)).
package struct Namespaces: OptionSet, Sendable {
  package let rawValue: UInt64
  package init(rawValue: UInt64) { self.rawValue = rawValue }
  package static let mount = Namespaces(rawValue: UInt64(CLX_NEWNS))
  package static let cgroup = Namespaces(rawValue: UInt64(CLX_NEWCGROUP))
  package static let uts = Namespaces(rawValue: UInt64(CLX_NEWUTS))
  package static let ipc = Namespaces(rawValue: UInt64(CLX_NEWIPC))
  package static let user = Namespaces(rawValue: UInt64(CLX_NEWUSER))
  package static let pid = Namespaces(rawValue: UInt64(CLX_NEWPID))
  package static let network = Namespaces(rawValue: UInt64(CLX_NEWNET))
  package static let time = Namespaces(rawValue: UInt64(CLX_NEWTIME))
}

/// The exit status of a process.
package enum ExitStatus: Equatable, Sendable {
  case exited(Int32)
  case signalled(Int32)
}

package struct Child: Sendable {
  package let pid: Int32
  package let handle: Handle

  package init(pid: Int32, handle: Handle) {
    self.pid = pid
    self.handle = handle
  }

  package func signal(_ number: Int32) throws(Errno) { try Process.signal(handle.descriptor, number) }
}

/// Calls on the calling process. Those that fork need a single-threaded caller: `carrel-shim` or `carrel-runtime`.
package enum Process {
  /// Calls clone3(2) with new namespaces; returns nil in the child and the child in the parent.
  package static func clone(into namespaces: Namespaces, cgroup: Handle? = nil) throws(Errno) -> Child? {
    var pidfd: Int32 = -1
    let pid = try check(clx_clone3(namespaces.rawValue, &pidfd, cgroup?.descriptor.number ?? -1))
    return pid == 0 ? nil : Child(pid: Int32(pid), handle: Handle(Descriptor(adopting: pidfd)))
  }

  /// Clones a child of the caller's parent; returns nil in the child and its pid in the caller. For a caller that has joined
  /// namespaces and is about to exit.
  package static func cloneSibling(into namespaces: Namespaces, cgroup: Handle? = nil) throws(Errno) -> Int32? {
    let pid = try check(clx_clone3_sibling(namespaces.rawValue, cgroup?.descriptor.number ?? -1))
    return pid == 0 ? nil : Int32(pid)
  }

  /// Joins the namespace of a file in /proc/PID/ns (setns(2)).
  package static func join(_ namespace: borrowing Descriptor, _ kind: Namespaces = []) throws(Errno) {
    try check(clx_setns(namespace.number, Int32(truncatingIfNeeded: kind.rawValue)))
  }

  /// Forks by clone(2): the filter of a workspace makes clone3 fail with ENOSYS, so that C libraries fall back to clone.
  package static func fork() throws(Errno) -> Int32 { Int32(try check(clx_fork())) }

  package static func unshare(_ namespaces: Namespaces) throws(Errno) {
    try check(clx_unshare(UInt(namespaces.rawValue)))
  }

  /// Reaps one child that has exited; returns nil if none has.
  package static func reap(_ pid: Int32 = -1, wait: Bool = false) throws(Errno) -> (pid: Int32, status: ExitStatus)? {
    var status: Int32 = 0
    let ended = try retrying { clx_wait4(pid, &status, wait ? 0 : Int32(CLX_WNOHANG)) }
    if ended == 0 { return nil }
    let signal = clx_exit_signal(status)
    return (Int32(ended), signal >= 0 ? .signalled(signal) : .exited(clx_exit_code(status)))
  }

  /// Returns whether a process has exited, from its descriptor (pidfd_open(2)).
  package static func hasEnded(_ process: Handle) throws(Errno) -> Bool {
    var poller = Poller()
    let slot = poller.add(process)
    try poller.wait(milliseconds: 0)
    return poller.isReady(slot)
  }

  package static var id: Int32 { Int32(clx_getpid()) }
  package static var effectiveUser: UInt32 { UInt32(clx_geteuid()) }
  package static func kill(_ pid: Int32, _ signal: Int32) throws(Errno) { try check(clx_kill(pid, signal)) }
  package static func open(pid: Int32) throws(Errno) -> Descriptor {
    Descriptor(adopting: Int32(try check(clx_pidfd_open(pid))))
  }
  package static func signal(_ process: borrowing Descriptor, _ number: Int32) throws(Errno) {
    try check(clx_pidfd_send_signal(process.number, number))
  }
  package static func exit(_ code: Int32) -> Never { clx_exit(code) }

  /// Makes malloc get memory in large pieces and never return it: for a process that runs a few milliseconds.
  package static func keepMemory() { clx_keep_memory() }
  /// Returns free memory to the kernel: for a process that has done most of its work and will run for long.
  package static func trimMemory() { clx_trim_memory() }

  package static func setName(_ name: String) { _ = name.withCString { clx_set_process_name($0) } }
  package static func becomeUndumpable() throws(Errno) { try check(clx_prctl(Int32(CLX_PR_SET_DUMPABLE), 0, 0)) }
  /// Keeps the memory of this process out of swap and core files from now on. Only pages that are used are locked (MCL_ONFAULT);
  /// children and executed programs do not inherit the lock. Where the host does not permit it, memory stays unlocked.
  package static func keepSecrets() {
    _ = clx_mlockall_on_fault()
    _ = clx_prctl(Int32(CLX_PR_SET_DUMPABLE), 0, 0)
  }
  package static func forbidNewPrivileges() throws(Errno) {
    try check(clx_prctl(Int32(CLX_PR_SET_NO_NEW_PRIVS), 1, 0))
  }
  /// Makes set*id calls keep the capabilities, so that root can act under another effective id.
  package static func keepCapabilitiesAcrossSetID() throws(Errno) {
    try check(clx_prctl(Int32(CLX_PR_SET_SECUREBITS), UInt(CLX_SECBIT_NO_SETUID_FIXUP), 0))
  }
  package static func setEffectiveIDs(_ uid: UInt32, _ gid: UInt32) throws(Errno) {
    try check(clx_setresgid(.max, gid, .max))
    try check(clx_setresuid(.max, uid, .max))
  }
  package static func setIDs(uid: UInt32, gid: UInt32, groups: [UInt32]) throws(Errno) {
    try check(groups.withUnsafeBufferPointer { clx_setgroups($0.count, $0.baseAddress) })
    try check(clx_setresgid(gid, gid, gid))
    try check(clx_setresuid(uid, uid, uid))
  }
  /// Keeps the permitted set across the next setresuid; execve(2) reverts that.
  package static func keepPermittedCapabilities() throws(Errno) { try check(clx_prctl(Int32(CLX_PR_SET_KEEPCAPS), 1, 0)) }
  package static func limitBoundingCapabilities(to kept: UInt64) throws(Errno) {
    for capability in 0..<64 where kept >> UInt64(capability) & 1 == 0 {
      let result = clx_prctl(Int32(CLX_PR_CAPBSET_DROP), UInt(capability), 0)
      if result == Int(-EINVAL) { return }  // past the kernel's last capability
      try check(result)
    }
  }
  /// Returns the subset of `capabilities` (one bit each) that is in this process's bounding set.
  package static func boundingCapabilities(among capabilities: UInt64) -> UInt64 {
    var bits: UInt64 = 0
    // PR_CAPBSET_READ
    for capability in 0..<64 where capabilities >> UInt64(capability) & 1 == 1 && clx_prctl(23, UInt(capability), 0) == 1 {
      bits |= 1 << UInt64(capability)
    }
    return bits
  }
  /// Sets all capability sets but the bounding one. Capabilities that are not in the permitted set cannot be gained.
  package static func setCapabilities(effective: UInt64, permitted: UInt64, inheritable: UInt64, ambient: UInt64) throws(Errno) {
    try check(clx_prctl(Int32(CLX_PR_CAP_AMBIENT), 4, 0))
    try check(clx_capset(effective, permitted, inheritable))
    for capability in 0..<64 where ambient >> UInt64(capability) & 1 == 1 {
      try check(clx_prctl3(Int32(CLX_PR_CAP_AMBIENT), 2, UInt(capability), 0))
    }
  }
  package static func setPersonality(_ persona: UInt64) throws(Errno) { try check(clx_personality(UInt(persona))) }
  package static func setDomainname(_ name: String) throws(Errno) {
    try check(name.withCString { clx_setdomainname($0, name.utf8.count) })
  }
  /// Sets the scheduling policy (sched_setattr(2)); times are in nanoseconds.
  package static func setScheduler(
    policy: UInt32, flags: UInt64, nice: Int32, priority: UInt32, runtime: UInt64, deadline: UInt64, period: UInt64
  ) throws(Errno) {
    try check(clx_sched_setattr(policy, flags, nice, priority, runtime, deadline, period))
  }
  package static func setIOPriority(_ value: UInt32) throws(Errno) { try check(clx_ioprio_set(value)) }
  package static func setAffinity(_ mask: [UInt8]) throws(Errno) {
    try check(mask.withUnsafeBytes { clx_sched_setaffinity($0.baseAddress, $0.count) })
  }
  /// Loads a filter with a listener and returns the listener's descriptor (seccomp_unotify(2)).
  package static func loadAskingFilter(_ program: [UInt8], flags: UInt64) throws(Errno) -> Handle {
    // Set SECCOMP_FILTER_FLAG_NEW_LISTENER; it excludes TSYNC, which has no effect in a process with one thread.
    let flags = UInt(flags & ~1 | 8)
    let number = try check(program.withUnsafeBytes { clx_seccomp_load($0.baseAddress, UInt16($0.count / 8), flags) })
    return Handle(Descriptor(adopting: Int32(number)))
  }
  /// Loads a compiled classic BPF program (eight bytes per instruction) with the flags of seccomp(2).
  package static func loadFilter(_ program: [UInt8], flags: UInt64) throws(Errno) {
    try check(program.withUnsafeBytes { clx_seccomp_load($0.baseAddress, UInt16($0.count / 8), UInt(flags)) })
  }
  package static func setLimit(_ resource: Int32, soft: UInt64, hard: UInt64) throws(Errno) {
    try check(clx_setrlimit(resource, soft, hard))
  }
  package static func limit(_ resource: Int32) throws(Errno) -> (soft: UInt64, hard: UInt64) {
    var pair: [UInt64] = [0, 0]
    try check(pair.withUnsafeMutableBufferPointer { clx_getrlimit(resource, $0.baseAddress) })
    return (pair[0], pair[1])
  }
  package static func newSessionKeyring() throws(Errno) { try check(clx_new_session_keyring()) }
  package static func setHostname(_ name: String) throws(Errno) {
    try check(name.withCString { clx_sethostname($0, name.utf8.count) })
  }
  package static func changeDirectory(_ path: String) throws(Errno) { try check(path.withCString { clx_chdir($0) }) }
  package static func changeDirectory(_ folder: borrowing Descriptor) throws(Errno) { try check(clx_fchdir(folder.number)) }
  /// Returns whether the working directory is inside the root: outside it, getcwd(2) returns a path that starts with
  /// "(unreachable)" (CVE-2024-21626).
  package static func workingDirectoryIsInsideRoot() -> Bool {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = bytes.withUnsafeMutableBytes { clx_getcwd($0.baseAddress!.assumingMemoryBound(to: CChar.self), 4096) }
    return count > 0 && bytes[0] == UInt8(ascii: "/")
  }
  package static func setFileMask(_ mask: UInt32) { _ = clx_umask(mask) }
  package static func newSession() throws(Errno) { try check(clx_setsid()) }
  package static func setControllingTerminal(_ number: Int32) throws(Errno) { try check(clx_set_controlling_terminal(number)) }
  package static func place(_ number: Int32, at target: Int32) throws(Errno) { try check(clx_dup3(number, target)) }
  /// Marks every descriptor from `first` up close-on-exec, whichever code opened it, so that none leaks.
  package static func closeOnExec(from first: UInt32) throws(Errno) {
    try check(clx_close_range(first, .max, UInt32(CLX_CLOSE_RANGE_CLOEXEC)))
  }

  /// Closes every descriptor from `first` up except `kept`.
  package static func closeAll(from first: UInt32 = 3, except kept: [Handle]) throws(Errno) {
    var next = first
    for number in kept.map({ UInt32($0.descriptor.number) }).sorted() where number >= first {
      if number > next { try check(clx_close_range(next, number - 1, 0)) }
      next = number + 1
    }
    try check(clx_close_range(next, .max, 0))
  }

  package static func exists(_ path: String) -> Bool {
    path.withCString { clx_access(Int32(CLX_AT_FDCWD), $0, 0) } == 0
  }

  /// Calls execve(2); returns only by throwing.
  package static func execute(_ path: String, _ arguments: CStrings, _ environment: CStrings) throws(Errno) {
    try check(path.withCString { clx_execve($0, arguments.pointers, environment.pointers) })
  }

  /// Starts a program by posix_spawn(3) with `first`, `second` and `third` at descriptors 3, 4 and 5, in its own session.
  package static func spawn(
    _ path: String, _ arguments: CStrings, _ environment: CStrings,
    _ first: borrowing Descriptor, _ second: borrowing Descriptor, _ third: borrowing Descriptor, errors: Int32
  ) throws(Errno) -> Int32 {
    // Duplicate them to numbers above 5: a dup2 to 3, 4 or 5 must not overwrite a descriptor that is still to be moved.
    let (one, two, three) = (Handle(try first.duplicate()), Handle(try second.duplicate()), Handle(try third.duplicate()))
    let (a, b, c) = (one.descriptor.number, two.descriptor.number, three.descriptor.number)
    return Int32(
      try check(path.withCString { clx_spawn3($0, arguments.pointers, environment.pointers, a, b, c, errors) }))
  }

  /// Executes this program again with the same arguments from a read-only mount of its own file, unless it runs from one already: a
  /// process that opens /proc/PID/exe then never gets a file that it could write to (CVE-2019-5736). The mount is not attached, so
  /// that nothing can change it either.
  package static func executeFromReadOnlyMount() throws(Errno) {
    let own = try Descriptor.open("/proc/self/exe", [.path])
    if try Mount.isReadOnly(own) { return }
    let mount = try Mount.clone(own)
    try Mount.setAttributes(mount, [.readOnly])
    let strings = CStrings(arguments)
    _ = try withExtendedLifetime(strings) { () throws(Errno) in try check(clx_execute_again(mount.number, strings.pointers)) }
  }

  /// The environment variables that this program was started with, as NAME=VALUE.
  package static var environment: [String] {
    var found: [String] = []
    guard var entry = clx_environ() else { return found }
    while let text = entry.pointee {
      found.append(String(cString: text))
      entry += 1
    }
    return found
  }

  /// The arguments that this program was started with.
  package static var arguments: [String] {
    (0..<clx_argument_count()).map { String(cString: clx_argument($0)) }
  }
}

/// A NULL-terminated array of C strings for execve(2), built before the fork.
package final class CStrings {
  package let pointers: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>
  private let count: Int

  package init(_ strings: [String]) {
    count = strings.count
    pointers = .allocate(capacity: count + 1)
    for (index, string) in strings.enumerated() { pointers[index] = string.withCString { strdup($0) } }
    pointers[count] = nil
  }

  deinit {
    // SAFETY: each pointer came from strdup, the array from allocate, and both are freed once, here.
    for index in 0..<count { free(pointers[index]) }
    pointers.deallocate()
  }
}

package enum Signals {
  package static let kill: Int32 = SIGKILL
  package static let terminate: Int32 = SIGTERM
  package static let hangUp: Int32 = SIGHUP
  package static let goOn: Int32 = SIGCONT
  package static let child: Int32 = SIGCHLD
  package static let windowChange: Int32 = SIGWINCH

  /// Names without SIG, ordered by signal number, which is the same on x86-64 and arm64 (signal(7)).
  private static let names = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT", "CHLD",
    "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
  ]

  /// Returns the number of a signal from its name (with or without SIG) or its number; nil if it does not exist.
  package static func number(_ text: String) -> Int32? {
    if let number = Int32(text) { return (1...64).contains(number) ? number : nil }
    let name = text.utf8.starts(with: "SIG".utf8) ? String(text.dropFirst(3)) : text
    if name.utf8.starts(with: "RTMIN+".utf8) { return Int32(name.dropFirst(6)).flatMap { (0...30).contains($0) ? 34 + $0 : nil } }
    return names.firstIndex(of: name).map { Int32($0) + 1 }
  }

  package static func blockAll() throws(Errno) { try check(clx_block_all_signals()) }
  package static func unblockAll() throws(Errno) { try check(clx_unblock_all_signals()) }
  package static func resetAll() { clx_default_signals() }
  package static func ignorePipe() { _ = clx_ignore_sigpipe() }
  /// A descriptor that reads every blocked signal.
  package static func descriptor() throws(Errno) -> Descriptor {
    Descriptor(adopting: Int32(try check(clx_signalfd_all())))
  }
  package static func next(_ descriptor: borrowing Descriptor) -> Int32? {
    let number = clx_signalfd_next(descriptor.number)
    return number > 0 ? Int32(number) : nil
  }
}

package enum Clock {
  package static func sleep(milliseconds: Int) { clx_sleep(milliseconds) }
  package static var realtime: Int64 { clx_clock(Int32(CLX_CLOCK_REALTIME)) }
  package static var monotonic: Int64 { clx_clock(Int32(CLX_CLOCK_MONOTONIC)) }
  /// Nanoseconds since boot, including time in suspend.
  package static var boottime: Int64 { clx_clock(Int32(CLX_CLOCK_BOOTTIME)) }
}

// SPDX-License-Identifier: Apache-2.0

/// The system calls that a workspace may make. All others fail with EPERM, so that a kernel's new call is closed until it has
/// been reviewed.
///
/// The list is the default of container engines without the calls that create or join namespaces, change mounts or load code
/// into the kernel. It includes what analysts' tools need: tracing of own children (debuggers, profilers), memory policy (numeric
/// libraries), Landlock and nested seccomp.
enum SyscallProfile {
  static let allowed: [String] = """
    accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown
    clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
    execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod
    fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr
    fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat get_mempolicy
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage
    getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit
    ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown
    lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise map_shadow_stack
    mbind membarrier memfd_create memfd_secret migrate_pages mincore mkdir mkdirat mknod mknodat mlock mlock2
    mlockall mmap move_pages mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
    mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep
    newfstatat open openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc
    pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_madvise process_mrelease
    process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev pwritev2 read readahead readlink
    readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
    sendfile sendmmsg sendmsg sendto set_mempolicy set_mempolicy_home_node set_robust_list set_thread_area
    set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid
    setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat shmctl shmdt shmget shutdown
    sigaltstack signalfd signalfd4 socketpair splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink
    unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev arch_prctl
    """.split(whereSeparator: \.isWhitespace).map(String.init)

  /// Calls that programs probe for and can do without. They fail with ENOSYS, as on a kernel that lacks them.
  static let absent = ["clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"]

  /// Every CLONE_NEW* bit that clone(2) accepts in its flags.
  static let namespaceBits: UInt64 = 0x7E02_0000

  /// AF_UNIX, AF_INET, AF_INET6. AF_ALG, AF_VSOCK and AF_PACKET are refused.
  static let socketFamilies: [UInt64] = [1, 2, 10]

  /// AF_NETLINK, with NETLINK_ROUTE alone, by which programs list interfaces and addresses. No cgroup counts the memory of netlink
  /// messages, and other protocols pass them between processes.
  static let netlink: (family: UInt64, protocol: UInt64) = (16, 0)

  /// PER_LINUX and PER_LINUX32, each also with UNAME26; ADDR_NO_RANDOMIZE, which debuggers set; the query (personality(2)).
  static let personalities: [UInt64] = [0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFF_FFFF]

  /// TIOCSTI and TIOCLINUX, which push input into a terminal. They differ only in their last four bits.
  static let terminalInjection: (common: UInt64, last: Set<UInt64>) = (0x5410, [0x2, 0xC])
}

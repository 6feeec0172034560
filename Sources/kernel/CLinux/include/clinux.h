// SPDX-License-Identifier: Apache-2.0
//
// The only C of the project: system calls as functions. Each returns the
// kernel's convention, a result >= 0 or -errno, so that no caller reads errno.
// Most go through syscall(2): several have no wrapper in Debian 12's glibc, and
// glibc's wrappers of the set*id calls signal other threads, which the shim
// does not have. _GNU_SOURCE is not defined here: Swift's Glibc module is built
// without it, and two views of one type clash in a file that sees both.
#ifndef CARREL_CLINUX_H
#define CARREL_CLINUX_H

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/sched.h>

int clx_argument_count(void);
const char *clx_argument(int index);
extern char **environ;
long syscall(long number, ...);

static inline long clx_result(long r) { return r < 0 ? -(long)errno : r; }
static inline const char *clx_strerror(int code) { return strerror(code); }

// ---------------------------------------------------------------- constants

enum {
  CLX_O_PATH = 010000000, CLX_O_DIRECTORY = 0200000, CLX_O_NOFOLLOW = 0400000,
  CLX_O_CLOEXEC = 02000000, CLX_O_WRONLY = 1, CLX_O_RDWR = 2,
  CLX_O_CREAT = 0100, CLX_O_EXCL = 0200, CLX_O_TRUNC = 01000, CLX_O_APPEND = 02000,
  CLX_O_NONBLOCK = 04000, CLX_O_NOCTTY = 0400, CLX_O_TMPFILE = 020200000,
  CLX_AT_FDCWD = -100, CLX_AT_EMPTY_PATH = 0x1000, CLX_AT_RECURSIVE = 0x8000,
  CLX_AT_SYMLINK_NOFOLLOW = 0x100, CLX_AT_REMOVEDIR = 0x200,
  CLX_RESOLVE_NO_MAGICLINKS = 2, CLX_RESOLVE_NO_SYMLINKS = 4,
  CLX_RESOLVE_BENEATH = 8, CLX_RESOLVE_IN_ROOT = 16,
  CLX_OPEN_TREE_CLONE = 1,
  CLX_MOVE_MOUNT_F_EMPTY_PATH = 0x4, CLX_MOVE_MOUNT_T_EMPTY_PATH = 0x40,
  CLX_ATTR_RDONLY = 0x1, CLX_ATTR_NOSUID = 0x2, CLX_ATTR_NODEV = 0x4, CLX_ATTR_NOEXEC = 0x8,
  CLX_ATTR_NOSYMFOLLOW = 0x200000, CLX_ATTR_IDMAP = 0x100000,
  CLX_FSCONFIG_SET_FLAG = 0, CLX_FSCONFIG_SET_STRING = 1, CLX_FSCONFIG_CMD_CREATE = 6,
  CLX_MNT_DETACH = 2,
  CLX_ATTR_ATIME = 0x70, CLX_ATTR_NOATIME = 0x10, CLX_ATTR_STRICTATIME = 0x20, CLX_ATTR_NODIRATIME = 0x80,
  CLX_PR_SET_DUMPABLE = 4, CLX_PR_SET_KEEPCAPS = 8, CLX_PR_SET_NAME = 15, CLX_PR_CAPBSET_DROP = 24, CLX_PR_SET_SECUREBITS = 28,
  CLX_PR_SET_NO_NEW_PRIVS = 38, CLX_PR_CAP_AMBIENT = 47,
  CLX_SECBIT_NO_SETUID_FIXUP = 4,
  CLX_CLONE_INTO_CGROUP_BIT = 33,
  CLX_SOCK_SEQPACKET = 5, CLX_SOCK_STREAM = 1, CLX_SOCK_CLOEXEC = 02000000, CLX_SOCK_NONBLOCK = 04000,
  CLX_MSG_DONTWAIT = 0x40, CLX_MSG_NOSIGNAL = 0x4000, CLX_MSG_TRUNC = 0x20,
  CLX_POLLIN = 1, CLX_POLLPRI = 2,
  CLX_WNOHANG = 1, CLX_CLOCK_REALTIME = 0, CLX_CLOCK_MONOTONIC = 1, CLX_CLOCK_BOOTTIME = 7,
  CLX_CLOSE_RANGE_CLOEXEC = 4,
};

enum {
  CLX_NEWNS = 0x00020000, CLX_NEWCGROUP = 0x02000000, CLX_NEWUTS = 0x04000000,
  CLX_NEWTIME = 0x80, CLX_NEWIPC = 0x08000000, CLX_NEWUSER = 0x10000000, CLX_NEWPID = 0x20000000, CLX_NEWNET = 0x40000000,
};

#define CLX_SUPER_PROC 0x9fa0
#define CLX_SUPER_DEVPTS 0x1cd1
#define CLX_SUPER_CGROUP2 0x63677270

// -------------------------------------------------------------------- files

static inline long clx_openat(int dir, const char *path, int flags, unsigned mode) {
  return clx_result(syscall(SYS_openat, dir, path, flags | CLX_O_CLOEXEC, mode));
}
struct clx_open_how { uint64_t flags, mode, resolve; };
static inline long clx_openat2(int dir, const char *path, int flags, unsigned mode, uint64_t resolve) {
  struct clx_open_how how = { (uint64_t)(flags | CLX_O_CLOEXEC), mode, resolve };
  return clx_result(syscall(SYS_openat2, dir, path, &how, sizeof how));
}
static inline long clx_close(int fd) { return clx_result(syscall(SYS_close, fd)); }
static inline long clx_read(int fd, void *to, size_t n) { return clx_result(syscall(SYS_read, fd, to, n)); }
static inline long clx_pread(int fd, void *to, size_t n, int64_t at) { return clx_result(syscall(SYS_pread64, fd, to, n, at)); }
static inline long clx_write(int fd, const void *from, size_t n) { return clx_result(syscall(SYS_write, fd, from, n)); }
static inline long clx_dup3(int from, int to) { return clx_result(syscall(SYS_dup3, from, to, 0)); }
static inline long clx_dup_cloexec(int fd, int minimum) { return clx_result(syscall(SYS_fcntl, fd, 1030, minimum)); }
static inline long clx_set_nonblocking(int fd) {
  long flags = clx_result(syscall(SYS_fcntl, fd, F_GETFL, 0));
  return flags < 0 ? flags : clx_result(syscall(SYS_fcntl, fd, F_SETFL, flags | O_NONBLOCK));
}
static inline long clx_pipe2(int fds[2], int flags) { return clx_result(syscall(SYS_pipe2, fds, flags | CLX_O_CLOEXEC)); }
static inline long clx_rewind(int fd) { return clx_result(syscall(SYS_lseek, fd, 0, 0)); }
static inline long clx_memfd_create(const char *name) { return clx_result(syscall(SYS_memfd_create, name, 1)); }  // MFD_CLOEXEC
static inline long clx_fsync(int fd) { return clx_result(syscall(SYS_fsync, fd)); }
static inline long clx_flock(int fd, int operation) { return clx_result(syscall(SYS_flock, fd, operation)); }
static inline long clx_renameat(int a, const char *from, int b, const char *to) { return clx_result(syscall(SYS_renameat2, a, from, b, to, 0)); }
static inline long clx_unlinkat(int dir, const char *path, int flags) { return clx_result(syscall(SYS_unlinkat, dir, path, flags)); }
static inline long clx_mkdirat(int dir, const char *path, unsigned mode) { return clx_result(syscall(SYS_mkdirat, dir, path, mode)); }
static inline long clx_symlinkat(const char *target, int dir, const char *path) { return clx_result(syscall(SYS_symlinkat, target, dir, path)); }
static inline long clx_linkat(int a, const char *from, int b, const char *to) { return clx_result(syscall(SYS_linkat, a, from, b, to, 0)); }
static inline long clx_mknodat(int dir, const char *path, unsigned mode, uint64_t device) { return clx_result(syscall(SYS_mknodat, dir, path, mode, device)); }
static inline long clx_fchmod(int fd, unsigned mode) { return clx_result(syscall(SYS_fchmod, fd, mode)); }
static inline long clx_fchmodat(int dir, const char *path, unsigned mode) { return clx_result(syscall(SYS_fchmodat, dir, path, mode)); }
static inline long clx_fchownat(int dir, const char *path, unsigned uid, unsigned gid) {
  return clx_result(syscall(SYS_fchownat, dir, path, uid, gid, CLX_AT_SYMLINK_NOFOLLOW | (path[0] ? 0 : CLX_AT_EMPTY_PATH)));
}
static inline long clx_readlinkat(int dir, const char *path, char *to, size_t n) { return clx_result(syscall(SYS_readlinkat, dir, path, to, n)); }
static inline long clx_getdents(int fd, void *to, size_t n) { return clx_result(syscall(SYS_getdents64, fd, to, n)); }
static inline long clx_access(int dir, const char *path, int mode) { return clx_result(syscall(SYS_faccessat, dir, path, mode)); }
// stx_mnt_id of struct statx (statx(2)), which C libraries older than kernel 5.8 do not declare.
static inline long clx_mount_id(int fd, uint64_t *id) {
  uint8_t raw[256];
  long r = clx_result(syscall(SYS_statx, fd, "", CLX_AT_EMPTY_PATH, 0x1000, raw));
  if (r >= 0) memcpy(id, raw + 144, 8);
  return r;
}
static inline long clx_fsetxattr(int fd, const char *name, const void *value, size_t n) { return clx_result(syscall(SYS_fsetxattr, fd, name, value, n, 0)); }
static inline long clx_fgetxattr(int fd, const char *name, void *value, size_t n) { return clx_result(syscall(SYS_fgetxattr, fd, name, value, n)); }
static inline long clx_syncfs(int fd) { return clx_result(syscall(SYS_syncfs, fd)); }
static inline long clx_pwrite(int fd, const void *from, size_t n, int64_t at) { return clx_result(syscall(SYS_pwrite64, fd, from, n, at)); }
static inline long clx_utimens(int dir, const char *path, int64_t seconds) {
  struct timespec t[2] = { { seconds, 0 }, { seconds, 0 } };
  return clx_result(syscall(SYS_utimensat, dir, path, t, CLX_AT_SYMLINK_NOFOLLOW));
}

struct clx_file { uint32_t mode, uid, gid; uint32_t major, minor; uint64_t inode, device, size; };
static inline long clx_fstatat(int dir, const char *path, struct clx_file *out) {
  struct stat s;
  long r = clx_result(syscall(SYS_newfstatat, dir, path, &s, CLX_AT_SYMLINK_NOFOLLOW | (path[0] ? 0 : CLX_AT_EMPTY_PATH)));
  if (r == 0) {
    out->mode = s.st_mode; out->uid = s.st_uid; out->gid = s.st_gid; out->size = (uint64_t)s.st_size;
    out->major = gnu_dev_major(s.st_rdev); out->minor = gnu_dev_minor(s.st_rdev);
    out->inode = s.st_ino; out->device = s.st_dev;
  }
  return r;
}
static inline long clx_super_magic(int fd) {
  struct statfs s;
  long r = clx_result(syscall(SYS_fstatfs, fd, &s));
  return r < 0 ? r : (long)s.f_type;
}
static inline long clx_super_readonly(int fd) {
  struct statfs s;
  long r = clx_result(syscall(SYS_fstatfs, fd, &s));
  return r < 0 ? r : (s.f_flags & 1);
}

// ------------------------------------------------------------------- mounts

static inline long clx_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
  return clx_result(syscall(SYS_mount, source, target, type, flags, data));
}
static inline long clx_make_slave(void) { return clx_mount(NULL, "/", NULL, (1UL << 19) | (1UL << 14), NULL); }  // MS_SLAVE | MS_REC
static inline long clx_umount2(const char *target, int flags) { return clx_result(syscall(SYS_umount2, target, flags)); }
static inline long clx_pivot_root(const char *new_root, const char *put_old) { return clx_result(syscall(SYS_pivot_root, new_root, put_old)); }
static inline long clx_open_tree(int dir, const char *path, unsigned flags) { return clx_result(syscall(428, dir, path, flags | CLX_O_CLOEXEC)); }
static inline long clx_move_mount(int from, int to) {
  return clx_result(syscall(429, from, "", to, "", CLX_MOVE_MOUNT_F_EMPTY_PATH | CLX_MOVE_MOUNT_T_EMPTY_PATH));
}
static inline long clx_fsopen(const char *type) { return clx_result(syscall(430, type, 1)); }
static inline long clx_fsconfig(int fd, unsigned command, const char *key, const char *value) {
  return clx_result(syscall(431, fd, command, key, value, 0));
}
static inline long clx_fsmount(int fd, unsigned attributes) { return clx_result(syscall(432, fd, 1, attributes)); }
struct clx_mount_attr { uint64_t set, clear, propagation, userns; };
static inline long clx_mount_setattr(int fd, unsigned flags, uint64_t set, uint64_t clear, uint64_t propagation, int userns) {
  struct clx_mount_attr attr = { set, clear, propagation, (uint64_t)(userns < 0 ? 0 : userns) };
  return clx_result(syscall(442, fd, "", flags | CLX_AT_EMPTY_PATH, &attr, sizeof attr));
}

// ---------------------------------------------------------------- processes

// Clones a child, in new namespaces if flags name any. There is no CLONE_VM: the caller must be single-threaded.
static inline long clx_clone3(uint64_t flags, int *pidfd, int cgroup) {
  struct clone_args args = { 0 };
  args.flags = flags | CLONE_PIDFD;
  args.pidfd = (uint64_t)(uintptr_t)pidfd;
  args.exit_signal = SIGCHLD;
  if (cgroup >= 0) { args.flags |= 1ULL << CLX_CLONE_INTO_CGROUP_BIT; args.cgroup = (uint64_t)cgroup; }
  return clx_result(syscall(435, &args, sizeof args));
}
// Clones a child of this process's parent, with the exit signal that this process has (CLONE_PARENT, clone(2)).
static inline long clx_clone3_sibling(uint64_t flags, int cgroup) {
  struct clone_args args = { 0 };
  args.flags = flags | CLONE_PARENT;
  if (cgroup >= 0) { args.flags |= 1ULL << CLX_CLONE_INTO_CGROUP_BIT; args.cgroup = (uint64_t)cgroup; }
  return clx_result(syscall(435, &args, sizeof args));
}
static inline long clx_mlockall_on_fault(void) { return clx_result(syscall(SYS_mlockall, 1 | 2 | 4)); }  // MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT
static inline long clx_fork(void) { return clx_result(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)); }
static inline long clx_unshare(unsigned long flags) { return clx_result(syscall(SYS_unshare, flags)); }
static inline long clx_setns(int fd, int flags) { return clx_result(syscall(SYS_setns, fd, flags)); }
static inline long clx_pidfd_open(int pid) { return clx_result(syscall(434, pid, 0)); }
static inline long clx_pidfd_send_signal(int pidfd, int signal) { return clx_result(syscall(424, pidfd, signal, NULL, 0)); }
static inline long clx_kill(int pid, int signal) { return clx_result(syscall(SYS_kill, pid, signal)); }
static inline long clx_wait4(int pid, int *status, int options) { return clx_result(syscall(SYS_wait4, pid, status, options, NULL)); }
static inline int clx_exit_code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
static inline int clx_exit_signal(int status) { return WIFSIGNALED(status) ? WTERMSIG(status) : -1; }
static inline long clx_getpid(void) { return syscall(SYS_getpid); }
static inline long clx_geteuid(void) { return syscall(SYS_geteuid); }
static inline long clx_prctl(int option, unsigned long a, unsigned long b) { return clx_result(syscall(SYS_prctl, option, a, b, 0, 0)); }
static inline long clx_set_process_name(const char *name) { return clx_result(syscall(SYS_prctl, CLX_PR_SET_NAME, name, 0, 0, 0)); }
static inline long clx_setresuid(unsigned r, unsigned e, unsigned s) { return clx_result(syscall(SYS_setresuid, r, e, s)); }
static inline long clx_setresgid(unsigned r, unsigned e, unsigned s) { return clx_result(syscall(SYS_setresgid, r, e, s)); }
static inline long clx_setgroups(size_t n, const unsigned *groups) { return clx_result(syscall(SYS_setgroups, n, groups)); }
static inline long clx_capset(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
  struct { uint32_t version; int pid; } header = { 0x20080522, 0 };
  struct { uint32_t effective, permitted, inheritable; } data[2] = {
    { (uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable },
    { (uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32) } };
  return clx_result(syscall(SYS_capset, &header, data));
}
static inline long clx_prctl3(int option, unsigned long a, unsigned long b, unsigned long c) { return clx_result(syscall(SYS_prctl, option, a, b, c, 0)); }
static inline long clx_personality(unsigned long persona) { return clx_result(syscall(SYS_personality, persona)); }
static inline long clx_sched_setattr(uint32_t policy, uint64_t flags, int nice, uint32_t priority, uint64_t runtime, uint64_t deadline, uint64_t period) {
  struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; } attributes = {
    sizeof attributes, policy, flags, nice, priority, runtime, deadline, period };
  return clx_result(syscall(SYS_sched_setattr, 0, &attributes, 0));
}
static inline long clx_ioprio_set(unsigned priority) { return clx_result(syscall(SYS_ioprio_set, 1, 0, priority)); }
static inline long clx_sched_setaffinity(const void *mask, size_t size) { return clx_result(syscall(SYS_sched_setaffinity, 0, size, mask)); }
static inline long clx_seccomp_load(const void *instructions, unsigned short count, unsigned long flags) {
  struct { unsigned short count; const void *instructions; } program = { count, instructions };
  return clx_result(syscall(SYS_seccomp, 1, flags, &program));
}
// bpf(2): BPF_PROG_LOAD of BPF_PROG_TYPE_CGROUP_DEVICE, BPF_PROG_ATTACH at BPF_CGROUP_DEVICE.
static inline long clx_bpf_load_device(const void *instructions, uint32_t count) {
  struct { uint32_t type, count; uint64_t instructions, license; uint32_t rest[24]; } load = {
    15, count, (uint64_t)(uintptr_t)instructions, (uint64_t)(uintptr_t)"Apache-2.0", { 0 } };
  return clx_result(syscall(321, 5, &load, sizeof load));
}
static inline long clx_bpf_attach_device(int program, int cgroup) {
  struct { uint32_t target, program, type, flags; } attach = { (uint32_t)cgroup, (uint32_t)program, 6, 2 };
  return clx_result(syscall(321, 8, &attach, sizeof attach));
}
static inline long clx_setrlimit(int resource, uint64_t soft, uint64_t hard) {
  uint64_t limit[2] = { soft, hard };
  return clx_result(syscall(SYS_prlimit64, 0, resource, limit, NULL));
}
static inline long clx_getrlimit(int resource, uint64_t limit[2]) { return clx_result(syscall(SYS_prlimit64, 0, resource, NULL, limit)); }
static inline long clx_new_session_keyring(void) { return clx_result(syscall(SYS_keyctl, 1, NULL)); }
static inline long clx_sethostname(const char *name, size_t n) { return clx_result(syscall(SYS_sethostname, name, n)); }
static inline long clx_setdomainname(const char *name, size_t n) { return clx_result(syscall(SYS_setdomainname, name, n)); }
static inline long clx_chdir(const char *path) { return clx_result(syscall(SYS_chdir, path)); }
static inline long clx_fchdir(int fd) { return clx_result(syscall(SYS_fchdir, fd)); }
// The raw call: glibc's getcwd hides that a directory is outside the root, "(unreachable)/…".
static inline long clx_getcwd(char *to, size_t n) { return clx_result(syscall(SYS_getcwd, to, n)); }
static inline long clx_umask(unsigned mask) { return syscall(SYS_umask, mask); }
static inline long clx_setsid(void) { return clx_result(syscall(SYS_setsid)); }
static inline long clx_execve(const char *path, char *const *argv, char *const *envp) { return clx_result(syscall(SYS_execve, path, argv, envp)); }
void clx_fault(const char *name);
static inline const char *clx_environment(const char *name) { return getenv(name); }
static inline char **clx_environ(void) { return environ; }
// Executes the file of a descriptor with this process's environment (execveat(2)).
static inline long clx_execute_again(int file, char *const *argv) {
  return clx_result(syscall(SYS_execveat, file, "", argv, environ, CLX_AT_EMPTY_PATH));
}
static inline long clx_close_range(unsigned first, unsigned last, unsigned flags) { return clx_result(syscall(436, first, last, flags)); }
static inline _Noreturn void clx_exit(int code) { for (;;) syscall(SYS_exit_group, code); }

// posix_spawn with three descriptors at 3, 4 and 5, in its own session, with an empty signal mask. glibc's posix_spawn runs no code
// of ours in the child, so it is safe in a threaded process.
static inline long clx_spawn3(const char *path, char *const *argv, char *const *envp, int fd3, int fd4, int fd5, int stderr_fd) {
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  sigset_t none, all;
  pid_t pid = 0;
  int r, kept[3] = { fd3, fd4, fd5 };
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  sigemptyset(&none);
  sigfillset(&all);
  for (int i = 0; i < 3; i++) posix_spawn_file_actions_adddup2(&actions, kept[i], 3 + i);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  if (stderr_fd >= 0) posix_spawn_file_actions_adddup2(&actions, stderr_fd, 2);
  else posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setflags(&attributes, 0x04 | 0x08 | 0x80);  // SETSIGDEF | SETSIGMASK | SETSID
  r = posix_spawn(&pid, path, &actions, &attributes, argv, envp);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  return r ? -(long)r : (long)pid;
}

// ------------------------------------------------------------------ signals

static inline long clx_block_all_signals(void) {
  uint64_t all = ~0ULL;
  return clx_result(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, 8));
}
static inline long clx_unblock_all_signals(void) {
  uint64_t none = 0;
  return clx_result(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8));
}
static inline void clx_keep_memory(void) {
  mallopt(M_TOP_PAD, 1 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_MMAP_THRESHOLD, 1 << 28);
}
static inline void clx_trim_memory(void) { malloc_trim(0); }
static inline void clx_default_signals(void) {
  // execve(2) resets handlers, but a signal that a parent ignores stays ignored in all its children. Those in use are below 32: a
  // shell's nohup and background jobs, an interpreter's SIGPIPE.
  for (int s = 1; s < 32; s++) if (s != SIGKILL && s != SIGSTOP) signal(s, SIG_DFL);
}
static inline long clx_ignore_sigpipe(void) { return signal(SIGPIPE, SIG_IGN) == SIG_ERR ? -(long)errno : 0; }
static inline long clx_signalfd_all(void) {
  uint64_t all = ~0ULL;
  return clx_result(syscall(SYS_signalfd4, -1, &all, 8, CLX_O_CLOEXEC | CLX_O_NONBLOCK));
}
static inline long clx_signalfd_next(int fd) {
  struct { uint32_t number; char rest[124]; } info;
  long r = clx_read(fd, &info, sizeof info);
  return r < 0 ? r : (long)info.number;
}

// ------------------------------------------------------------------ sockets

static inline long clx_socketpair(int type, int fds[2]) { return clx_result(syscall(SYS_socketpair, AF_UNIX, type | CLX_SOCK_CLOEXEC, 0, fds)); }
static inline long clx_socket(int type) { return clx_result(syscall(SYS_socket, AF_UNIX, type | CLX_SOCK_CLOEXEC, 0)); }
static inline long clx_unix_address(struct sockaddr_un *address, const char *path) {
  size_t n = strlen(path);
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  if (n == 0 || n >= sizeof address->sun_path) return -ENAMETOOLONG;
  memcpy(address->sun_path, path, n);
  return 0;
}
static inline long clx_bind(int fd, const char *path) {
  struct sockaddr_un address;
  long r = clx_unix_address(&address, path);
  return r ? r : clx_result(syscall(SYS_bind, fd, &address, sizeof address));
}
static inline long clx_connect(int fd, const char *path) {
  struct sockaddr_un address;
  long r = clx_unix_address(&address, path);
  return r ? r : clx_result(syscall(SYS_connect, fd, &address, sizeof address));
}
static inline long clx_listen(int fd, int backlog) { return clx_result(syscall(SYS_listen, fd, backlog)); }
// Binds a TCP socket to 127.0.0.1, even if that address is not up yet (IP_FREEBIND).
static inline long clx_bind_loopback(unsigned short port) {
  int fd = (int)clx_result(syscall(SYS_socket, AF_INET, CLX_SOCK_STREAM | CLX_SOCK_CLOEXEC | CLX_SOCK_NONBLOCK, 0)), one = 1;
  if (fd < 0) return fd;
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
  long r = clx_result(syscall(SYS_setsockopt, fd, IPPROTO_IP, IP_FREEBIND, &one, sizeof one));
  if (r >= 0) r = clx_result(syscall(SYS_bind, fd, &address, sizeof address));
  if (r < 0) { clx_close(fd); return r; }
  return fd;
}
static inline long clx_connect_loopback(unsigned short port) {
  int fd = (int)clx_result(syscall(SYS_socket, AF_INET, CLX_SOCK_STREAM | CLX_SOCK_CLOEXEC, 0));
  if (fd < 0) return fd;
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
  long r = clx_result(syscall(SYS_connect, fd, &address, sizeof address));
  if (r < 0) { clx_close(fd); return r; }
  return fd;
}
static inline long clx_accept(int fd, int flags) { return clx_result(syscall(SYS_accept4, fd, NULL, NULL, flags | CLX_SOCK_CLOEXEC)); }
struct clx_peer { int32_t pid; uint32_t uid, gid; };
static inline long clx_peer(int fd, struct clx_peer *peer) {
  socklen_t n = sizeof *peer;
  return clx_result(syscall(SYS_getsockopt, fd, SOL_SOCKET, 17, peer, &n));
}

// Sends one datagram with up to four descriptors.
static inline long clx_send(int fd, const void *bytes, size_t n, const int *fds, int count, int flags) {
  struct iovec io = { (void *)bytes, n };
  union { struct cmsghdr header; char bytes[CMSG_SPACE(4 * sizeof(int))]; } control;
  struct msghdr message = { 0 };
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  if (count > 0) {
    if (count > 4) return -EINVAL;
    memset(&control, 0, sizeof control);
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
    memcpy(CMSG_DATA(c), fds, (size_t)count * sizeof(int));
  }
  return clx_result(syscall(SYS_sendmsg, fd, &message, flags | CLX_MSG_NOSIGNAL));
}
static inline long clx_receive(int fd, void *bytes, size_t n, int *fds, int *count, int flags) {
  struct iovec io = { bytes, n };
  union { struct cmsghdr header; char bytes[CMSG_SPACE(4 * sizeof(int))]; } control;
  struct msghdr message = { 0 };
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof control.bytes;
  long r = clx_result(syscall(SYS_recvmsg, fd, &message, flags | 0x40000000));
  *count = 0;
  if (r < 0) return r;
  for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
    if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
      int have = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
      for (int i = 0; i < have && *count < 4; i++) memcpy(&fds[(*count)++], CMSG_DATA(c) + (size_t)i * sizeof(int), sizeof(int));
    }
  if (message.msg_flags & CLX_MSG_TRUNC) {
    for (int i = 0; i < *count; i++) clx_close(fds[i]);
    *count = 0;
    return -EMSGSIZE;
  }
  return r;
}
static inline long clx_eventfd(void) { return clx_result(syscall(SYS_eventfd2, 0, CLX_O_CLOEXEC | CLX_O_NONBLOCK)); }
static inline long clx_shutdown(int fd) { return clx_result(syscall(SYS_shutdown, fd, 2)); }
static inline long clx_poll(struct pollfd *fds, unsigned long count, int milliseconds) {
  return clx_result(syscall(SYS_poll, fds, count, milliseconds));
}

struct clx_ready { uint32_t events; int32_t fd; };
static inline long clx_epoll_create(void) { return clx_result(syscall(SYS_epoll_create1, CLX_O_CLOEXEC)); }
static inline long clx_epoll_add(int epoll, int fd, uint32_t events) {
  struct epoll_event event = { events, { .fd = fd } };
  return clx_result(syscall(SYS_epoll_ctl, epoll, EPOLL_CTL_ADD, fd, &event));
}
static inline long clx_epoll_remove(int epoll, int fd) {
  struct epoll_event event = { 0, { .fd = fd } };
  return clx_result(syscall(SYS_epoll_ctl, epoll, EPOLL_CTL_DEL, fd, &event));
}
static inline long clx_epoll_wait(int epoll, struct clx_ready *ready, int count) {
  struct epoll_event events[64];
  long n = clx_result(syscall(SYS_epoll_wait, epoll, events, count > 64 ? 64 : count, -1));
  for (long i = 0; i < n; i++) { ready[i].events = events[i].events; ready[i].fd = events[i].data.fd; }
  return n;
}

// ---------------------------------------------------------------- terminals

static inline long clx_set_controlling_terminal(int fd) { return clx_result(syscall(SYS_ioctl, fd, TIOCSCTTY, 0)); }
static inline long clx_terminal_resize(int fd, unsigned short rows, unsigned short columns) {
  struct winsize size = { rows, columns, 0, 0 };
  return clx_result(syscall(SYS_ioctl, fd, TIOCSWINSZ, &size));
}
static inline long clx_terminal_size(int fd, unsigned short *rows, unsigned short *columns) {
  struct winsize size = { 0, 0, 0, 0 };
  long r = clx_result(syscall(SYS_ioctl, fd, TIOCGWINSZ, &size));
  *rows = size.ws_row;
  *columns = size.ws_col;
  return r;
}
// struct termios of the kernel, as TCGETS uses it on x86-64 and arm64.
struct clx_terminal_mode { uint32_t input, output, control, local; uint8_t line, keys[19]; };
static inline long clx_terminal_make_raw(int fd, struct clx_terminal_mode *saved) {
  long r = clx_result(syscall(SYS_ioctl, fd, 0x5401, saved));  // TCGETS
  if (r < 0) return r;
  struct clx_terminal_mode raw = *saved;
  // cfmakeraw(3)
  raw.input &= ~(uint32_t)(0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100 | 0x400);
  raw.output &= ~(uint32_t)0x1;
  raw.local &= ~(uint32_t)(0x8 | 0x40 | 0x2 | 0x1 | 0x8000);
  raw.control = (raw.control & ~(uint32_t)(0x30 | 0x100)) | 0x30;
  raw.keys[6] = 1; raw.keys[5] = 0;
  return clx_result(syscall(SYS_ioctl, fd, 0x5402, &raw));  // TCSETS
}
static inline long clx_terminal_restore(int fd, struct clx_terminal_mode *saved) { return clx_result(syscall(SYS_ioctl, fd, 0x5402, saved)); }
static inline long clx_terminal_unlock(int master) {
  int zero = 0;
  return clx_result(syscall(SYS_ioctl, master, 0x40045431, &zero));
}
// TIOCGPTPEER opens the slave of this master; a path could lead to another file (CVE-2025-52565).
static inline long clx_terminal_peer(int master) { return clx_result(syscall(SYS_ioctl, master, 0x5441, O_RDWR | O_NOCTTY | CLX_O_CLOEXEC)); }

// --------------------------------------------------------------------- time

static inline void clx_sleep(long milliseconds) {
  struct timespec t = { milliseconds / 1000, milliseconds % 1000 * 1000000 };
  syscall(SYS_nanosleep, &t, NULL);
}
static inline int64_t clx_clock(int clock) {
  struct timespec t;
  syscall(SYS_clock_gettime, clock, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#endif

// SPDX-License-Identifier: Apache-2.0
//
// The floor of `hack/bench runtime`: one container started, run to its end and cleaned up by the system calls that this
// takes and nothing else. No configuration is read, nothing is checked, no state is kept. Not a runtime: a ruler.
//
// floor ROOTFS FILTER FIRST-ID [steps]    FILTER: a compiled BPF program. With "steps" it prints what each step took.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct step { const char *name; int64_t at; };
static struct step *steps;
static int *count;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void done(const char *name) { steps[*count].name = name; steps[(*count)++].at = now(); }
static long must(long result, const char *what) {
  if (result < 0) { fprintf(stderr, "floor: %s: %s\n", what, strerror(errno)); _exit(1); }
  return result;
}
static void put(const char *path, const char *text) {
  int f = must(open(path, O_WRONLY | O_CLOEXEC), path);
  must(write(f, text, strlen(text)), path);
  close(f);
}

static const char *controllers[] = { "memory", "cpu", "cpuacct", "pids", "devices", "freezer", "unified" };
#define CONTROLLERS (sizeof controllers / sizeof *controllers)

static int new_mount(const char *type, const char *key, const char *value, unsigned attributes) {
  int context = must(syscall(430, type, 1), type);
  if (key) must(syscall(431, context, value ? 1 : 0, key, value, 0), key);
  must(syscall(431, context, 6, NULL, NULL, 0), type);
  int mount = must(syscall(432, context, 1, attributes), type);
  close(context);
  return mount;
}
static void attach(int mount, const char *path) {
  int target = must(open(path, O_PATH | O_CLOEXEC), path);
  must(syscall(429, mount, "", target, "", 0x44), path);
  close(target);
}

int main(int argc, char **argv) {
  if (argc < 4) return 2;
  steps = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  count = (int *)(steps + 256);
  int64_t begin = now();
  char path[256], text[64];
  int tasks[CONTROLLERS];
  for (unsigned i = 0; i < CONTROLLERS; i++) {
    snprintf(path, sizeof path, "/sys/fs/cgroup/%s/carrel-floor-%d", controllers[i], getpid());
    must(mkdir(path, 0755), path);
    if (!strcmp(controllers[i], "unified")) { tasks[i] = must(open(path, O_PATH | O_CLOEXEC), path); break; }
    strcat(path, "/tasks");
    tasks[i] = must(open(path, O_WRONLY | O_CLOEXEC), path);
  }
  done("cgroups made");
#define LIMIT(controller, file, value) snprintf(path, sizeof path, "/sys/fs/cgroup/" controller "/carrel-floor-%d/" file, getpid()); put(path, value)
  LIMIT("memory", "memory.limit_in_bytes", "67108864");
  LIMIT("pids", "pids.max", "64");
  LIMIT("cpu", "cpu.cfs_period_us", "100000");
  LIMIT("cpu", "cpu.cfs_quota_us", "100000");
  LIMIT("devices", "devices.deny", "a");
  static const char *rules[] = { "c *:* m", "b *:* m", "c 136:* rwm", "c 5:1 rwm", "c 5:2 rwm", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm" };
  for (unsigned i = 0; i < sizeof rules / sizeof *rules; i++) { LIMIT("devices", "devices.allow", rules[i]); }
  done("limits");
  static const char *devices[] = { "null", "zero", "full", "random", "urandom", "tty" };
  int nodes[6], null = must(syscall(428, AT_FDCWD, "/dev/null", 1 | O_CLOEXEC), "null");
  for (int i = 0; i < 6; i++) {
    snprintf(path, sizeof path, "/dev/%s", devices[i]);
    nodes[i] = must(syscall(428, AT_FDCWD, path, 1 | O_CLOEXEC), path);
  }
  int root = must(syscall(428, AT_FDCWD, argv[1], 1 | O_CLOEXEC | 0x8000), argv[1]);
  int filter = must(open(argv[2], O_RDONLY | O_CLOEXEC), argv[2]);
  static char program[1 << 19];
  long size = must(read(filter, program, sizeof program), argv[2]);
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), "socketpair");
  done("sources opened");
  int pidfd = -1;
  struct clone_args args = { .flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_PIDFD | CLONE_INTO_CGROUP,
    .pidfd = (uintptr_t)&pidfd, .exit_signal = SIGCHLD, .cgroup = tasks[CONTROLLERS - 1] };
  long pid = must(syscall(435, &args, sizeof args), "clone3");
  if (pid == 0) {
    char byte;
    done("clone3");
    must(read(pair[1], &byte, 1), "read");
    done("ids mapped");
    must(syscall(SYS_setgroups, 0, NULL), "setgroups");
    must(syscall(SYS_setresgid, 0, 0, 0), "setresgid");
    must(syscall(SYS_setresuid, 0, 0, 0), "setresuid");
    must(mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL), "slave");
    umask(0);
    for (unsigned i = 0; i + 1 < CONTROLLERS; i++) must(write(tasks[i], "0", 1), controllers[i]);
    must(syscall(SYS_unshare, CLONE_NEWCGROUP), "cgroup namespace");
    done("cgroups joined");
    attach(root, "/tmp");
    must(chdir("/tmp"), "/tmp");
    attach(new_mount("proc", NULL, NULL, 0), "proc");
    attach(new_mount("tmpfs", "mode", "755", 2), "dev");
    mkdir("dev/pts", 0755); mkdir("dev/shm", 0755); mkdir("dev/mqueue", 0755);
    attach(new_mount("devpts", "ptmxmode", "0666", 2 | 8), "dev/pts");
    attach(new_mount("tmpfs", "mode", "1777", 2 | 4 | 8), "dev/shm");
    attach(new_mount("mqueue", NULL, NULL, 2 | 4 | 8), "dev/mqueue");
    attach(new_mount("sysfs", NULL, NULL, 1 | 2 | 4 | 8), "sys");
    attach(new_mount("tmpfs", "mode", "755", 2 | 4 | 8), "sys/fs/cgroup");
    static const char *shown[] = { "memory", "cpu", "cpuacct", "pids" };
    for (int i = 0; i < 4; i++) {
      snprintf(path, sizeof path, "sys/fs/cgroup/%s", shown[i]);
      mkdir(path, 0755);
      attach(new_mount("cgroup", shown[i], NULL, 0), path);
    }
    done("mounts");
    for (int i = 0; i < 6; i++) {
      snprintf(path, sizeof path, "dev/%s", devices[i]);
      close(must(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0666), path));
      attach(nodes[i], path);
    }
    symlink("/proc/self/fd", "dev/fd"); symlink("/proc/self/fd/0", "dev/stdin"); symlink("/proc/self/fd/1", "dev/stdout");
    symlink("/proc/self/fd/2", "dev/stderr"); symlink("pts/ptmx", "dev/ptmx");
    done("devices");
    static const char *masks[] = { "proc/keys", "proc/timer_list", "proc/kcore" };
    for (int i = 0; i < 3; i++) {
      int target = open(masks[i], O_PATH | O_CLOEXEC);
      if (target >= 0) { syscall(429, null, "", target, "", 0x44); close(target); }
    }
    attach(new_mount("tmpfs", "size", "0", 1 | 2 | 4 | 8), "proc/acpi");
    attach(new_mount("tmpfs", "size", "0", 1 | 2 | 4 | 8), "sys/firmware");
    static const char *fixed[] = { "proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger" };
    for (int i = 0; i < 5; i++) {
      int tree = syscall(428, AT_FDCWD, fixed[i], 1 | O_CLOEXEC);
      if (tree < 0) continue;
      uint64_t attr[4] = { 1 | 2 | 4 | 8, 0, 0, 0 };
      must(syscall(442, tree, "", 0x1000, attr, sizeof attr), fixed[i]);
      attach(tree, fixed[i]);
      close(tree);
    }
    done("masked and read-only paths");
    must(syscall(SYS_pivot_root, ".", "."), "pivot_root");
    must(umount2(".", MNT_DETACH), "umount");
    must(chdir("/"), "/");
    done("pivot");
    must(sethostname("floor", 5), "hostname");
    must(setsid(), "setsid");
    must(syscall(SYS_close_range, 3, ~0U, 4), "close_range");
    for (int capability = 0; capability < 41; capability++) prctl(PR_CAPBSET_DROP, capability, 0, 0, 0);
    struct { uint32_t version; int pid; } header = { 0x20080522, 0 };
    uint32_t sets[6] = { 0 };
    must(syscall(SYS_capset, &header, sets), "capset");
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
    done("identity");
    struct { unsigned short n; void *p; } load = { size / 8, program };
    must(syscall(SYS_seccomp, 1, 0, &load), "seccomp");
    done("seccomp");
    char *arguments[] = { "/bin/true", NULL }, *environment[] = { "PATH=/bin", NULL };
    execve(arguments[0], arguments, environment);
    _exit(127);
  }
  snprintf(text, sizeof text, "0 %s 65536\n", argv[3]);
  snprintf(path, sizeof path, "/proc/%ld/uid_map", pid);
  put(path, text);
  snprintf(path, sizeof path, "/proc/%ld/gid_map", pid);
  put(path, text);
  must(write(pair[0], "x", 1), "write");
  int status;
  must(waitpid(pid, &status, 0), "wait");
  done("execve, run and exit");
  for (unsigned i = 0; i < CONTROLLERS; i++) {
    snprintf(path, sizeof path, "/sys/fs/cgroup/%s/carrel-floor-%d", controllers[i], getpid());
    for (int attempt = 0; rmdir(path) < 0 && attempt < 100; attempt++) usleep(500);
  }
  done("cgroups removed");
  if (argc > 4)
    for (int i = 0; i < *count; i++) printf("%-28s %6ld us\n", steps[i].name, (long)((steps[i].at - (i ? steps[i - 1].at : begin)) / 1000));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

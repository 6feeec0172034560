// SPDX-License-Identifier: Apache-2.0
//
// The floor of `hack/bench runtime`: one container started, run to its end and cleaned up by the system calls that this
// takes and nothing else. No configuration is read, nothing is checked, no state is kept. Not a runtime: a ruler.
//
// floor ROOTFS FILTER FIRST-ID [steps | stamp | workspace FOLDER]
//   FILTER: a compiled BPF program. "steps" prints what each step took. "stamp" runs /bin/stamp, which prints its clock, and
//   prints its own clock at the begin: the in-process floor of a start. "workspace" adds what a workspace has beside a bundle: a
//   supervisor's exec, a transaction on disk, overlayfs, an idmapped home, a file system of secrets, a link with its addresses
//   and routes, an init; FOLDER holds `home` and takes the transaction.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/veth.h>
#include <net/if.h>
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

// ------------------------------------------------------------------ what a workspace has beside a bundle

struct message { struct nlmsghdr head; char body[1000]; };
static void *grow(struct message *m, unsigned size) {
  void *at = (char *)m + m->head.nlmsg_len;
  m->head.nlmsg_len += NLMSG_ALIGN(size);
  return at;
}
static void begin_message(struct message *m, int type, int flags, const void *head, unsigned size) {
  memset(m, 0, sizeof *m);
  m->head = (struct nlmsghdr){ .nlmsg_len = NLMSG_HDRLEN, .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags };
  memcpy(grow(m, size), head, size);
}
static struct rtattr *add(struct message *m, int type, const void *value, unsigned size) {
  struct rtattr *a = grow(m, RTA_LENGTH(size));
  a->rta_type = type;
  a->rta_len = RTA_LENGTH(size);
  if (size) memcpy(RTA_DATA(a), value, size);
  return a;
}
static void end(struct message *m, struct rtattr *a) { a->rta_len = (char *)m + m->head.nlmsg_len - (char *)a; }
static void talk(int s, struct message *m, const char *what) {
  char answer[4096];
  must(send(s, m, m->head.nlmsg_len, 0), what);
  must(recv(s, answer, sizeof answer, 0), what);
  errno = -((struct nlmsgerr *)NLMSG_DATA(answer))->error;
  must(errno ? -1 : 0, what);
}
static void address(int s, int index, const void *own, const void *other) {
  struct message m;
  struct ifaddrmsg head = { .ifa_family = AF_INET, .ifa_prefixlen = 32, .ifa_index = index };
  begin_message(&m, RTM_NEWADDR, NLM_F_CREATE, &head, sizeof head);
  add(&m, IFA_LOCAL, own, 4);
  add(&m, IFA_ADDRESS, other, 4);
  talk(s, &m, "address");
}
static void raise_link(int s, int index) {
  struct message m;
  struct ifinfomsg head = { .ifi_index = index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP };
  begin_message(&m, RTM_NEWLINK, 0, &head, sizeof head);
  talk(s, &m, "up");
}
static void connect_network(long pid, const char *link) {
  static const unsigned char gateway[4] = { 10, 99, 0, 1 }, own[4] = { 10, 99, 0, 2 };
  char path[256];
  snprintf(path, sizeof path, "/proc/%ld/ns/net", pid);
  int there = must(open(path, O_RDONLY | O_CLOEXEC), path), here = must(open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), "net");
  int s = must(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), "netlink");
  struct message m;
  struct ifinfomsg head = { .ifi_flags = IFF_UP, .ifi_change = IFF_UP }, peer = { 0 };
  begin_message(&m, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &head, sizeof head);
  add(&m, IFLA_IFNAME, link, strlen(link) + 1);
  struct rtattr *info = add(&m, IFLA_LINKINFO, NULL, 0);
  add(&m, IFLA_INFO_KIND, "veth", 4);
  struct rtattr *data = add(&m, IFLA_INFO_DATA, NULL, 0), *other = add(&m, VETH_INFO_PEER, &peer, sizeof peer);
  add(&m, IFLA_IFNAME, "eth0", 5);
  add(&m, IFLA_NET_NS_FD, &there, 4);
  end(&m, other); end(&m, data); end(&m, info);
  talk(s, &m, "veth");
  static const char *settings[][2] = { { "ipv6", "disable_ipv6" }, { "ipv4", "rp_filter" }, { "ipv4", "forwarding" } };
  for (int i = 0; i < 3; i++) {
    snprintf(path, sizeof path, "/proc/sys/net/%s/conf/%s/%s", settings[i][0], link, settings[i][1]);
    put(path, "1");
  }
  address(s, if_nametoindex(link), gateway, own);
  must(syscall(SYS_setns, there, CLONE_NEWNET), "setns");
  int inside = must(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), "netlink");
  int far = if_nametoindex("eth0");
  must(syscall(SYS_setns, here, CLONE_NEWNET), "setns");
  raise_link(inside, 1);
  raise_link(inside, far);
  address(inside, far, own, gateway);
  struct rtmsg route = { .rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC, .rtm_type = RTN_UNICAST };
  begin_message(&m, RTM_NEWROUTE, NLM_F_CREATE, &route, sizeof route);
  add(&m, RTA_GATEWAY, gateway, 4);
  add(&m, RTA_OIF, &far, 4);
  talk(inside, &m, "route");
  close(there); close(here); close(s); close(inside);
}
static int idmapped(const char *path, const char *map) {
  int tree = must(syscall(428, AT_FDCWD, path, 1 | O_CLOEXEC), path), wait[2];
  must(pipe2(wait, O_CLOEXEC), "pipe");
  struct clone_args args = { .flags = CLONE_NEWUSER, .exit_signal = SIGCHLD };
  long pid = must(syscall(435, &args, sizeof args), "clone3");
  char name[64], byte;
  if (pid == 0) { close(wait[1]); (void)!read(wait[0], &byte, 1); _exit(0); }
  snprintf(name, sizeof name, "/proc/%ld/uid_map", pid); put(name, map);
  snprintf(name, sizeof name, "/proc/%ld/gid_map", pid); put(name, map);
  snprintf(name, sizeof name, "/proc/%ld/ns/user", pid);
  uint64_t attr[4] = { 0x100000, 0, 0, must(open(name, O_RDONLY | O_CLOEXEC), name) };
  must(syscall(442, tree, "", 0x1000, attr, sizeof attr), "idmap");
  close(attr[3]); close(wait[0]); close(wait[1]);
  must(waitpid(pid, NULL, 0), "wait");
  return tree;
}
static void write_transaction(const char *folder) {
  // As many pages as the journal's log takes for an acceptance.
  static char pages[7 * 4120];
  char path[256];
  snprintf(path, sizeof path, "%s/log", folder);
  int f = must(open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600), path);
  must(write(f, pages, sizeof pages), path);
  must(fdatasync(f), path);
  close(f);
}

int main(int argc, char **argv) {
  if (argc < 4) return 2;
  char *mode = argc > 4 ? argv[4] : "", *folder = argc > 5 ? argv[5] : NULL;
  int printing = !strcmp(mode, "steps"), stamped = !strcmp(mode, "stamp") || folder;
  if (folder && !getenv("BEGUN")) {
    char begun[32];
    snprintf(begun, sizeof begun, "%ld", (long)now());
    setenv("BEGUN", begun, 1);
    write_transaction(folder);
    long pid = must(vfork(), "vfork");
    if (pid == 0) { execv("/proc/self/exe", argv); _exit(127); }
    int status;
    must(waitpid(pid, &status, 0), "wait");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  }
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
  int home = -1;
  char link[16];
  snprintf(link, sizeof link, "crflr%d", getpid() % 1000000);
  if (folder) {
    snprintf(path, sizeof path, "%s/home", folder);
    snprintf(text, sizeof text, "0 %s 1\n", argv[3]);
    home = idmapped(path, text);
  }
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
    if (folder) {
      attach(new_mount("tmpfs", "mode", "755", 4), "/mnt");
      must(chdir("/mnt"), "/mnt");
      mkdir("0", 0755); mkdir("root", 0755); mkdir("scratch", 0755);
      attach(new_mount("tmpfs", "mode", "755", 4), "scratch");
      mkdir("scratch/upper", 0755); mkdir("scratch/work", 0755);
      attach(root, "0");
      must(mount("overlay", "root", "overlay", 0, "lowerdir=0,upperdir=scratch/upper,workdir=scratch/work,userxattr"), "overlay");
      must(chdir("root"), "root");
      mkdir("home", 0755); mkdir("home/analyst", 0755); mkdir("run", 0755); mkdir("run/credentials", 0755);
      attach(home, "home/analyst");
      attach(new_mount("tmpfs", "mode", "755", 2 | 4 | 8), "run/credentials");
    } else {
      attach(root, "/tmp");
      must(chdir("/tmp"), "/tmp");
    }
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
    if (folder) { char byte; must(read(pair[1], &byte, 1), "read"); }
    done("identity");
    struct { unsigned short n; void *p; } load = { size / 8, program };
    must(syscall(SYS_seccomp, 1, 0, &load), "seccomp");
    done("seccomp");
    if (folder) {
      // The init that stays.
      long tool = must(fork(), "fork");
      if (tool) { must(waitpid(tool, NULL, 0), "wait"); _exit(0); }
      must(setsid(), "setsid");
    }
    char *arguments[] = { stamped ? "/bin/stamp" : "/bin/true", NULL }, *environment[] = { "PATH=/bin", NULL };
    execve(arguments[0], arguments, environment);
    _exit(127);
  }
  snprintf(text, sizeof text, "0 %s 65536\n", argv[3]);
  snprintf(path, sizeof path, "/proc/%ld/uid_map", pid);
  put(path, text);
  snprintf(path, sizeof path, "/proc/%ld/gid_map", pid);
  put(path, text);
  must(write(pair[0], "x", 1), "write");
  if (folder) { connect_network(pid, link); must(write(pair[0], "y", 1), "write"); }
  int status;
  must(waitpid(pid, &status, 0), "wait");
  done("execve, run and exit");
  for (unsigned i = 0; i < CONTROLLERS; i++) {
    snprintf(path, sizeof path, "/sys/fs/cgroup/%s/carrel-floor-%d", controllers[i], getpid());
    for (int attempt = 0; rmdir(path) < 0 && attempt < 100; attempt++) usleep(500);
  }
  done("cgroups removed");
  if (stamped) printf("%ld\n", folder ? atol(getenv("BEGUN")) : (long)begin);
  if (printing)
    for (int i = 0; i < *count; i++) printf("%-28s %6ld us\n", steps[i].name, (long)((steps[i].at - (i ? steps[i - 1].at : begin)) / 1000));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

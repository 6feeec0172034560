// SPDX-License-Identifier: Apache-2.0
// What test_attacks.py runs in a workspace: takes what no limit counts, and says how much it got.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SOCKETS = 300 };
static char block[60000];

// Sends to itself until the kernel takes no more.
static void fill_udp(void) {
  for (int i = 0; i < SOCKETS; i++) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int s = socket(AF_INET, SOCK_DGRAM, 0), most = 64 << 20;
    if (s < 0) continue;
    setsockopt(s, SOL_SOCKET, SO_RCVBUF, &most, sizeof most);
    bind(s, (struct sockaddr *)&address, sizeof address);
    getsockname(s, (struct sockaddr *)&address, &length);
    for (int n = 0; n < 200; n++)
      if (sendto(s, block, 50000, MSG_DONTWAIT, (struct sockaddr *)&address, length) < 0) break;
  }
}

static void fill_tcp(void) {
  for (int i = 0; i < SOCKETS / 2; i++) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), s = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || s < 0) continue;
    bind(listener, (struct sockaddr *)&address, sizeof address);
    listen(listener, 1);
    getsockname(listener, (struct sockaddr *)&address, &length);
    fcntl(s, F_SETFL, O_NONBLOCK);
    connect(s, (struct sockaddr *)&address, length);
    // One that is not accepted belongs to no cgroup.
    accept(listener, NULL, NULL);
    for (int n = 0; n < 400; n++)
      if (send(s, block, sizeof block, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) break;
  }
}

static void open_netlink(void) {
  for (int protocol = 0; protocol < 23; protocol++) {
    int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    printf("netlink %d: %s\n", protocol, s < 0 ? strerror(errno) : "open");
    if (s >= 0) close(s);
  }
}

static void open_terminals(void) {
  int count = 0;
  while (count < 1000 && open("/dev/ptmx", O_RDWR | O_NOCTTY) >= 0) count++;
  printf("terminals: %d\n", count);
}

// Exchanges a folder with a link as soon as somebody opens a file in it.
static void swap(const char *folder, const char *link) {
  char event[4096];
  int watch = inotify_init();
  inotify_add_watch(watch, folder, IN_OPEN);
  do {
    if (read(watch, event, sizeof event) <= 0) return;
  } while (!((struct inotify_event *)event)->len);
  renameat2(AT_FDCWD, folder, AT_FDCWD, link, RENAME_EXCHANGE);
  pause();
}

int main(int argc, char **argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "udp")) fill_udp();
  else if (!strcmp(what, "tcp")) fill_tcp();
  else if (!strcmp(what, "netlink")) return open_netlink(), 0;
  else if (!strcmp(what, "terminals")) return open_terminals(), 0;
  else if (!strcmp(what, "swap") && argc == 4) swap(argv[2], argv[3]);
  else return 2;
  printf("%s is full\n", what);
  sleep(1000);
}

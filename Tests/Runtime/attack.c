// SPDX-License-Identifier: Apache-2.0
//
// What the escape suite needs a system call for that no shell has. Static, so that it runs in any root file system.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int say(const char *what, long result) {
  printf("%s %s\n", what, result < 0 ? strerror(errno) : "done");
  return result < 0;
}

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  // A key in a session keyring of its own, then the program.
  if (!strcmp(argv[1], "with-key") && argc > 3) {
    if (syscall(SYS_keyctl, 1, "carrel-attack") < 0 || syscall(SYS_add_key, "user", argv[2], "secret", 6, -3) < 0) return say("with-key", -1);
    execvp(argv[3], argv + 3);
    return say("execute", -1);
  }
  // KEYCTL_SEARCH of the session keyring, KEYCTL_READ of what was found.
  if (!strcmp(argv[1], "find-key") && argc > 2) {
    long key = syscall(SYS_keyctl, 10, -3, "user", argv[2], 0);
    if (key < 0) return say("find-key", -1);
    char text[16] = { 0 };
    return say("find-key", syscall(SYS_keyctl, 11, key, text, sizeof text));
  }
  // Types a character into the terminal that is its standard input.
  if (!strcmp(argv[1], "type")) { char c = '#'; return say("type", ioctl(0, TIOCSTI, &c)); }
  return 2;
}

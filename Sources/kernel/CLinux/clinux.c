// SPDX-License-Identifier: Apache-2.0
#include "clinux.h"

// Embedded Swift has no CommandLine: a constructor stores what the loader passes.
static int argument_count;
static char **arguments;

int clx_argument_count(void) { return argument_count; }
const char *clx_argument(int index) { return arguments[index]; }

__attribute__((constructor)) static void clx_capture(int argc, char **argv) {
  argument_count = argc;
  arguments = argv;
}

// Kills this process when it reaches the point that CARREL_FAULT names, in debug builds only. The log entry is written first.
void clx_fault(const char *name) {
  static int count;
  const char *asked = getenv("CARREL_FAULT");
  size_t length = strlen(name);
  if (!asked || strncmp(asked, name, length) || (asked[length] && asked[length] != ':')) return;
  if (__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) < (asked[length] ? atoi(asked + length + 1) : 1)) return;
  const char *path = getenv("CARREL_FAULT_LOG");
  int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
  if (file >= 0 && write(file, name, length) >= 0 && write(file, "\n", 1) >= 0) close(file);
  kill(getpid(), SIGKILL);
}

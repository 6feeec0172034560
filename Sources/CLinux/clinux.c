// SPDX-License-Identifier: Apache-2.0
#include "clinux.h"

// Embedded Swift has no CommandLine: a constructor keeps what the loader passes.
static int argument_count;
static char **arguments;

int clx_argument_count(void) { return argument_count; }
const char *clx_argument(int index) { return arguments[index]; }

__attribute__((constructor)) static void clx_capture(int argc, char **argv) {
  argument_count = argc;
  arguments = argv;
}

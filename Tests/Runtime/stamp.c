// SPDX-License-Identifier: Apache-2.0
//
// A payload that prints when it began to run: CLOCK_MONOTONIC in nanoseconds.
#include <stdio.h>
#include <time.h>

int main(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  printf("%lld\n", t.tv_sec * 1000000000LL + t.tv_nsec);
  return 0;
}

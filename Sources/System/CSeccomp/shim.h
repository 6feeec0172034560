#pragma once
#include <seccomp.h>
#include <errno.h>
// Macros that Swift cannot import.
static inline uint32_t cseccomp_errno(int code) { return SCMP_ACT_ERRNO(code); }
static inline uint32_t cseccomp_allow(void) { return SCMP_ACT_ALLOW; }
static inline struct scmp_arg_cmp cseccomp_masked(unsigned arg, uint64_t mask, uint64_t value) {
  struct scmp_arg_cmp c = { arg, SCMP_CMP_MASKED_EQ, mask, value };
  return c;
}
static inline struct scmp_arg_cmp cseccomp_equal(unsigned arg, uint64_t value) {
  struct scmp_arg_cmp c = { arg, SCMP_CMP_EQ, value, 0 };
  return c;
}

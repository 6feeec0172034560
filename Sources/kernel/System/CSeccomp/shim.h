#pragma once
#include <seccomp.h>
#include <errno.h>
// Swift cannot import these macros.
static inline uint32_t cseccomp_errno(int code) { return SCMP_ACT_ERRNO(code); }
static inline uint32_t cseccomp_trace(int code) { return SCMP_ACT_TRACE(code); }
static inline uint32_t cseccomp_allow(void) { return SCMP_ACT_ALLOW; }
static inline uint32_t cseccomp_kill_thread(void) { return SCMP_ACT_KILL_THREAD; }
static inline uint32_t cseccomp_kill_process(void) { return SCMP_ACT_KILL_PROCESS; }
static inline uint32_t cseccomp_trap(void) { return SCMP_ACT_TRAP; }
static inline uint32_t cseccomp_log(void) { return SCMP_ACT_LOG; }
static inline uint32_t cseccomp_notify(void) { return SCMP_ACT_NOTIFY; }

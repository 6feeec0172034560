// SPDX-License-Identifier: Apache-2.0
//
// System calls for homes: encryption by the file system, and block devices that are backed by a file. The conventions are those of
// clinux.h.
#ifndef CARREL_CLINUX_STORAGE_H
#define CARREL_CLINUX_STORAGE_H

#include "clinux.h"
#include <linux/fscrypt.h>
#include <linux/loop.h>

// fscrypt of version 2 (linux/fscrypt.h): a key belongs to a file system and has an identifier that the kernel derives from it.
static inline long clx_encryption_add_key(int fd, const void *key, size_t n, uint8_t identifier[FSCRYPT_KEY_IDENTIFIER_SIZE]) {
  union { struct fscrypt_add_key_arg argument; uint8_t room[sizeof(struct fscrypt_add_key_arg) + FSCRYPT_MAX_KEY_SIZE]; } u;
  if (n > FSCRYPT_MAX_KEY_SIZE) return -EINVAL;
  memset(&u, 0, sizeof u);
  u.argument.key_spec.type = FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER;
  u.argument.raw_size = (uint32_t)n;
  memcpy(u.room + sizeof(struct fscrypt_add_key_arg), key, n);
  long r = clx_result(ioctl(fd, FS_IOC_ADD_ENCRYPTION_KEY, &u));
  memcpy(identifier, u.argument.key_spec.u.identifier, FSCRYPT_KEY_IDENTIFIER_SIZE);
  explicit_bzero(&u, sizeof u);
  return r;
}
static inline long clx_encryption_remove_key(int fd, const uint8_t identifier[FSCRYPT_KEY_IDENTIFIER_SIZE]) {
  struct fscrypt_remove_key_arg a;
  memset(&a, 0, sizeof a);
  a.key_spec.type = FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER;
  memcpy(a.key_spec.u.identifier, identifier, FSCRYPT_KEY_IDENTIFIER_SIZE);
  return clx_result(ioctl(fd, FS_IOC_REMOVE_ENCRYPTION_KEY, &a));
}
static inline long clx_encryption_set_policy(int fd, const uint8_t identifier[FSCRYPT_KEY_IDENTIFIER_SIZE]) {
  struct fscrypt_policy_v2 p;
  memset(&p, 0, sizeof p);
  p.version = FSCRYPT_POLICY_V2;
  p.contents_encryption_mode = FSCRYPT_MODE_AES_256_XTS;
  p.filenames_encryption_mode = FSCRYPT_MODE_AES_256_CTS;
  p.flags = FSCRYPT_POLICY_FLAGS_PAD_32;
  memcpy(p.master_key_identifier, identifier, FSCRYPT_KEY_IDENTIFIER_SIZE);
  return clx_result(ioctl(fd, FS_IOC_SET_ENCRYPTION_POLICY, &p));
}
static inline long clx_encryption_policy(int fd, uint8_t identifier[FSCRYPT_KEY_IDENTIFIER_SIZE]) {
  struct fscrypt_get_policy_ex_arg a;
  memset(&a, 0, sizeof a);
  a.policy_size = sizeof a.policy;
  long r = clx_result(ioctl(fd, FS_IOC_GET_ENCRYPTION_POLICY_EX, &a));
  if (r == 0) memcpy(identifier, a.policy.v2.master_key_identifier, FSCRYPT_KEY_IDENTIFIER_SIZE);
  return r;
}

// loop(4).
static inline long clx_loop_free(int control) { return clx_result(ioctl(control, LOOP_CTL_GET_FREE)); }
// The kernel detaches the device with its last user. Direct I/O bypasses the page cache; where the file system cannot do it, the
// kernel uses the cache.
static inline long clx_loop_configure(int device, int file, const char *name) {
  struct loop_config c;
  memset(&c, 0, sizeof c);
  c.fd = (uint32_t)file;
  c.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
  strncpy((char *)c.info.lo_file_name, name, LO_NAME_SIZE - 1);
  return clx_result(ioctl(device, LOOP_CONFIGURE, &c));
}
// Returns the file that backs a device; -ENXIO if there is none.
static inline long clx_loop_file(int device, uint64_t *file_device, uint64_t *inode) {
  struct loop_info64 i;
  long r = clx_result(ioctl(device, LOOP_GET_STATUS64, &i));
  if (r == 0) {
    *file_device = i.lo_device;
    *inode = i.lo_inode;
  }
  return r;
}

#endif

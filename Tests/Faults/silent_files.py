# SPDX-License-Identifier: Apache-2.0
"""A file system (FUSE, without a library) with homes that answer for themselves and never for what is in them: a dead export.

usage: silent_files.py MOUNT_POINT UID       as root; it goes when this process is killed, and what waits for it then fails
"""

import ctypes
import errno
import os
import re
import stat
import struct
import sys

# linux/fuse.h
LOOKUP, FORGET, GETATTR, STATFS, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, BATCH_FORGET, STATX = 1, 2, 3, 17, 26, 27, 28, 29, 34, 36, 42, 52
ROOT = 1
UNANSWERED = (FORGET, BATCH_FORGET, INTERRUPT)


def attributes(node, uid):
    mode, owner = (stat.S_IFDIR | 0o755, 0) if node == ROOT else (stat.S_IFDIR | 0o700, uid)
    return struct.pack("<QQQQQQIIIIIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 2, owner, owner, 0, 4096, 0)


class SilentFiles:
    def __init__(self, point, uid):
        self.uid, self.homes = uid, {}
        self.device = os.open("/dev/fuse", os.O_RDWR)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"silent", os.fsencode(point), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), f"mount {point}")

    def serve(self):
        while True:
            try:
                request = os.read(self.device, 1 << 20)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                continue
            opcode, unique, node = struct.unpack_from("<IQQ", request, 4)
            if opcode in UNANSWERED:
                continue
            # What is in a home is not answered for at all.
            if node > ROOT and opcode not in (GETATTR, STATX):
                continue
            self.reply(unique, *self.answer(opcode, node, request[40:]))

    def reply(self, unique, error, body=b""):
        try:
            os.write(self.device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
        except OSError:
            pass  # whoever asked is gone

    def answer(self, opcode, node, body):
        if opcode == INIT:
            return 0, struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 64, 48, 65536, 1, 0, 0, 0) + bytes(28)
        if opcode == GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + attributes(node, self.uid)
        if opcode == LOOKUP:
            name = body.split(b"\0")[0].decode()
            if not re.fullmatch(r"home-\d+", name):
                return errno.ENOENT,
            child = self.homes.setdefault(name, ROOT + 1 + len(self.homes))
            return 0, struct.pack("<QQQQII", child, 0, 0, 0, 0, 0) + attributes(child, self.uid)
        if opcode == STATFS:
            return 0, struct.pack("<QQQQQIIII", 1000, 500, 500, 1000, 500, 4096, 255, 4096, 0) + bytes(24)
        if opcode == OPENDIR:
            return 0, bytes(16)
        if opcode in (READDIR, RELEASEDIR, ACCESS):
            return 0,
        # STATX for one; the kernel then uses GETATTR.
        return errno.ENOSYS,


if __name__ == "__main__":
    files = SilentFiles(sys.argv[1], int(sys.argv[2]))
    print("mounted", flush=True)
    files.serve()

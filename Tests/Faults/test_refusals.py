# SPDX-License-Identifier: Apache-2.0
"""A kernel that refuses: every system call that the agent and the supervisor make for a workspace is failed in turn (strace), with
the error that it gives when memory or descriptors are short. The start may fail, and says why; nothing may be lost or left."""

import collections
import pathlib
import re
import subprocess

from conftest import Code, judge, until

# What the two programs call while one workspace is launched, runs and is deleted, but for the calls whose failure is not the kernel's
# to choose (exit, gettid …) and those by which a run-time wakes itself (write to an eventfd, futex) or gets memory (mmap: it aborts, which
# is a kill, and those are tested elsewhere). Writes to disks that fail: test_journals.py.
ERRORS = {"EMFILE": ["openat", "openat2", "socket", "socketpair", "pipe2", "eventfd2", "pidfd_open", "accept4", "timerfd_create", "epoll_create1", "inotify_init1"],
          "ENOMEM": ["clone3", "clone", "mount", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "mount_setattr", "mkdirat", "mkdir", "renameat",
                     "rename", "sendmsg", "recvmsg", "sendto", "connect", "bind", "listen", "epoll_ctl", "setsockopt", "fchown", "fchownat",
                     "newfstatat", "fstat", "unlinkat", "fchmod", "fsync", "execve", "execveat", "seccomp", "prctl", "setns", "unshare", "pivot_root",
                     "umount2", "symlinkat", "mknodat", "capset", "setresuid", "setresgid", "setgroups", "sethostname", "prlimit64", "fchdir", "chdir",
                     "getdents64", "readlinkat", "signalfd4", "wait4", "waitid", "keyctl", "setsid", "poll", "ppoll", "dup3", "fcntl", "lseek", "ftruncate"],
          "EAGAIN": ["clone3", "recvmsg", "sendmsg", "setresuid"]}
CASES = [(call, error) for error, calls in ERRORS.items() for call in calls]


def traced(agent, log, *options):
    """A tracer of the running agent and of everything that it starts."""
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", log, *options, "-p", str(agent.process.pid)])
    until(lambda: "TracerPid:\t0" not in pathlib.Path(f"/proc/{agent.process.pid}/status").read_text(), "traced")
    return tracer


def end(tracer):
    tracer.terminate()
    tracer.wait()


def life(agent, name):
    launched = agent.launch(name, "exit 3")
    if launched.returncode == 0:
        ended = agent.wait(name, "STOPPED", "FAILED", seconds=30)
        reason = ended["reason"]
        # By itself, with the code that is its own, or with a reason in words.
        assert reason["exit_code"] == 3 if reason["code"] == Code.Exited else len(reason["message"]) > 10, reason
        removed = agent.do("rm", "--force", name)
        assert removed.returncode == 0, removed
        return reason["code"]
    assert len(launched.stderr) > 10, launched
    return "refused"


def test_each_call_refused_in_turn(node):
    agent, _ = node
    log = agent.directory / "calls"
    tracer = traced(agent, log)
    life(agent, "counted")
    end(tracer)
    made = set(re.findall(r"^\d+ +(\w+)\(", log.read_text(errors="replace"), re.M))
    outcomes = collections.Counter()
    for call, error in CASES:
        for when in (1, 3):
            if call not in made:
                continue
            tracer = traced(agent, log, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}")
            try:
                outcomes[life(agent, f"x-{call.replace('_', '-')}-{error.lower()}-{when}")] += 1
            finally:
                end(tracer)
            if not agent.lives:
                outcomes["the agent ended"] += 1
                agent.process.wait()
                agent.start()
            assert agent.run("node").returncode == 0, f"{call} {error}: the agent does not answer"
            outcomes["injected"] += b"INJECTED" in log.read_bytes()
    print(dict(outcomes))
    assert outcomes["injected"] > 60 and outcomes["Exited"] < outcomes["injected"], outcomes
    judge(agent)


def test_messages_refused_again_and_again(node):
    """Every third message that a thread sends or receives is refused, from the first or a later one on: a request that is lost is made again."""
    agent, _ = node
    log = agent.directory / "calls"
    outcomes = collections.Counter()
    for call, error in (("sendmsg", "ENOMEM"), ("recvmsg", "ENOMEM"), ("poll", "ENOMEM")):
        for first in (1, 2, 3):
            tracer = traced(agent, log, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={first}+3")
            try:
                outcomes[life(agent, f"x-{call}-{first}")] += 1
            finally:
                end(tracer)
            assert agent.lives and b"INJECTED" in log.read_bytes()
    print(dict(outcomes))
    judge(agent)


def test_a_thread_refused_holds_nothing_up(node):
    """Whoever asks for a thread and does not look whether it came waits for ever. The first that each thread asks for is refused."""
    agent, _ = node
    log = agent.directory / "calls"
    life(agent, "counted")
    for number in range(5):
        for error in ("ENOMEM", "EAGAIN"):
            tracer = traced(agent, log, "-e", "trace=clone3", "-e", f"inject=clone3:error={error}:when=1")
            try:
                life(agent, f"x-{error.lower()}-{number}")
            finally:
                end(tracer)
            assert agent.lives and b"INJECTED" in log.read_bytes()
    judge(agent)

# SPDX-License-Identifier: Apache-2.0
"""From the filter to the program, and what engines and their users expect around it: cgroups that others use, hooks, terminals, homes,
descriptors that are handed on, and the words of the command line."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import pytest
from conftest import HYBRID, RUNTIME, busybox_root, in_user_namespace

# What a static busybox needs for `true` and `echo`: nothing that a runtime itself calls between fork and execve(2) but that.
LITTLE = ["execve", "exit_group", "exit", "brk", "arch_prctl", "write", "getuid", "geteuid", "getgid", "getegid", "prctl", "mprotect", "uname", "readlink",
          "set_tid_address", "set_robust_list", "rseq", "prlimit64", "getrandom", "setgid", "setuid", "newfstatat"]


@pytest.fixture
def sleeper(runtime):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "1000"]))
    runtime.run("run", "--detach", "--bundle", bundle, id)
    yield id, bundle
    runtime.run("delete", "--force", id)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_filter_need_allow_nothing_but_what_its_program_calls(runtime, mapped):
    def change(config):
        config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [{"names": LITTLE, "action": "SCMP_ACT_ALLOW"}]}
        config["process"].update(args=["echo", "runs"], user={"uid": 7, "gid": 8, "additionalGids": [9]}, noNewPrivileges=True, cwd="/tmp", env=["PATH=/none:/usr/bin:/bin"])
        if mapped:
            in_user_namespace(config)
    done = runtime.run("run", "--bundle", runtime.bundle(change), runtime.id())
    assert done.stdout == "runs\n"
    # The control: one call fewer than the program needs.
    def without(config):
        change(config)
        config["linux"]["seccomp"]["syscalls"][0]["names"] = [n for n in LITTLE if n != "write"]
    assert runtime.run("run", "--bundle", runtime.bundle(without), runtime.id(), check=False).returncode == 128 + 31


def test_without_no_new_privs_only_the_change_of_user_follows(runtime):
    user = ["setgroups", "setresgid", "setresuid", "capset", "umask", "prctl"]
    def change(config):
        config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [{"names": LITTLE + user, "action": "SCMP_ACT_ALLOW"}]}
        config["process"].update(args=["/bin/echo", "runs"], user={"uid": 7, "gid": 8}, noNewPrivileges=False)
    assert runtime.run("run", "--bundle", runtime.bundle(change), runtime.id()).stdout == "runs\n"


CALL = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) { errno = 0; long r = syscall(atol(argv[i]), -1, -1, -1, -1); printf("%s\n", r < 0 ? strerror(errno) : "done"); }
  return 0;
}
"""


def test_calls_newer_than_a_profile_do_not_exist(runtime, directory):
    root = busybox_root(directory / "call-root")
    subprocess.run(["clang", "-static", "-x", "c", "-", "-o", root / "bin/call"], input=CALL, text=True, check=True)
    # openat2 is 437; 449 came later, 1000 is none yet; mkdir (83) is old and not allowed.
    calls = ["449", "1000", "83"]

    def said(fallback, **more):
        profile = {"defaultAction": fallback, **more, "syscalls": [{"names": LITTLE + ["openat2", "fstat", "ioctl"], "action": "SCMP_ACT_ALLOW"}]}
        def change(config):
            config["linux"]["seccomp"] = profile
            config["process"].update(args=["call", *calls], noNewPrivileges=True)
        return runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), check=False).stdout.splitlines()
    assert said("SCMP_ACT_ERRNO")[:3] == ["Function not implemented", "Function not implemented", "Operation not permitted"]
    assert said("SCMP_ACT_ERRNO", defaultErrnoRet=13)[2:3] == ["Permission denied"]
    allowed = said("SCMP_ACT_ALLOW")
    assert allowed[2] != "Operation not permitted", "the control lets through what it does not know"


@pytest.mark.skipif(not HYBRID and pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists() and not os.access("/sys/fs/cgroup", os.W_OK), reason="no cgroups to make")
def test_a_cgroup_that_is_in_use_is_left_to_who_is_in_it(runtime):
    name = f"/carrel-test-{os.getpid()}/{runtime.id()}"
    place = lambda c: c["linux"].update(cgroupsPath=name)
    first, second = runtime.id(), runtime.id()
    def long(config):
        place(config)
        config["process"]["args"] = ["sleep", "1000"]
    runtime.run("run", "--detach", "--bundle", runtime.bundle(long), first)
    try:
        alive = lambda: json.loads(runtime.run("state", first).stdout)["status"]
        # A create that fails late, one that works, and one that was cut off.
        def fails(config):
            place(config)
            config["process"]["args"] = ["/nonexistent"]
        done = runtime.run("create", "--bundle", runtime.bundle(fails), second, check=False)
        assert done.returncode == 1 and "in use" in done.stderr and alive() == "running", done
        done = runtime.run("run", "--bundle", runtime.bundle(lambda c: (place(c), c["process"].update(args=["true"]))), runtime.id())
        assert "in use" in done.stderr and alive() == "running"
        runtime.run("pause", first)
        done = runtime.run("run", "--bundle", runtime.bundle(lambda c: (place(c), c["process"].update(args=["true"]))), runtime.id(), check=False)
        assert done.returncode == 1 and "frozen" in done.stderr
        runtime.run("resume", first)
    finally:
        runtime.run("delete", "--force", first)
    left = list(pathlib.Path("/sys/fs/cgroup").glob(f"**{name}"))
    assert not left, left
    for folder in pathlib.Path("/sys/fs/cgroup").glob(f"**/carrel-test-{os.getpid()}"):
        folder.rmdir()


def test_the_terminal_is_there_when_a_hook_runs_before_the_start(runtime, tmp_path, directory):
    root = busybox_root(directory / "terminal-root")
    (root / "bin/hook").write_text("#!/bin/sh\ntest -t 0 || echo no >/data/seen\ntest -t 1 && echo terminal >/data/seen\n")
    (root / "bin/hook").chmod(0o755)
    def change(config):
        config["root"]["readonly"] = False
        config["process"].update(terminal=True, args=["true"])
        config["hooks"] = {"startContainer": [{"path": "/bin/hook"}]}
    bundle, id = runtime.bundle(change, root), runtime.id()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bundle}/console")
        listener.listen()
        runtime.run("create", "--bundle", bundle, "--console-socket", f"{bundle}/console", id)
        pid = json.loads(runtime.run("state", id).stdout)["pid"]
        assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in (0, 1, 2)} == {"/dev/pts/0"}
        runtime.run("start", id)
    for _ in range(100):
        if (root / "data/seen").exists():
            break
        time.sleep(0.05)
    assert (root / "data/seen").read_text() == "terminal\n"
    runtime.run("delete", "--force", id)


def test_a_read_only_file_system_is_filled_first(runtime):
    def change(config):
        for mount in config["mounts"]:
            if mount["destination"] == "/dev":
                mount["options"].append("ro")
        config["mounts"] += [{"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
                             {"destination": "/data/inner", "type": "tmpfs", "source": "tmpfs"}]
        config["process"]["cwd"] = "/data/made/for/it"
    done = runtime.once("pwd; : >/data/inner/x && echo inner; : >/dev/null && echo null; ( : >/data/x ) 2>&1; ( : >/dev/x ) 2>&1", change)
    assert done.stdout.split("\n")[:3] == ["/data/made/for/it", "inner", "null"], done
    assert done.stdout.count("Read-only file system") == 2, done


@pytest.mark.skipif(not HYBRID, reason="v1 alone has a folder of hierarchies")
def test_read_only_cgroups_without_a_namespace_of_their_own(runtime):
    def change(config):
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "cgroup"]
        next(m for m in config["mounts"] if m["type"].startswith("cgroup"))["options"] = ["ro", "nosuid"]
    done = runtime.once("ls /sys/fs/cgroup | wc -l; mkdir /sys/fs/cgroup/x 2>&1; mkdir /sys/fs/cgroup/memory/x 2>&1", change)
    assert int(done.stdout.split()[0]) > 3 and done.stdout.count("Read-only file system") == 2, done


def test_hooks_find_the_root_in_its_place_and_the_callers_variables(runtime, directory):
    root = busybox_root(directory / "hook-root")
    script = directory / "place-hook"
    script.write_text(f"#!/bin/sh\nmountpoint -q {root} && echo mounted; ls {root}/proc | grep -c '^1$'; echo $CANARY\n")
    script.chmod(0o755)
    def change(config, **hook):
        config["process"]["args"] = ["true"]
        config["hooks"] = {"createContainer": [{"path": str(script), **hook}]}
    caller = {**os.environ, "CANARY": "seen"}
    done = runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), env=caller)
    assert done.stdout.split() == ["mounted", "1", "seen"], done
    done = runtime.run("run", "--bundle", runtime.bundle(lambda c: change(c, env=["PATH=/usr/bin:/bin"]), root), runtime.id(), env=caller)
    assert done.stdout.split() == ["mounted", "1"], done
    # What runs in the container gets nothing of the caller's.
    def inside(config):
        config["process"]["args"] = ["true"]
        config["hooks"] = {"startContainer": [{"path": "/bin/env"}]}
    assert "CANARY" not in runtime.run("run", "--bundle", runtime.bundle(inside, root), runtime.id(), env=caller).stdout
    # A root that only the host's root reaches, with a user namespace.
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    os.chown(busybox_root(closed / "root"), 400_000, 400_000)
    done = runtime.once("echo here", in_user_namespace, root=closed / "root")
    assert done.stdout == "here\n", done


PASSWD = "root:x:0:0:root:/root:/bin/sh\nada:x:7:7::/tmp:/bin/sh\nbad:x:8:8::relative:/bin/sh\n"


def test_home_comes_from_the_root(runtime, directory):
    root = busybox_root(directory / "home-root")
    def home(uid, text=PASSWD, env=("PATH=/bin",)):
        passwd = root / "etc/passwd"
        passwd.unlink(missing_ok=True)
        if callable(text):
            text(passwd)
        elif text is not None:
            passwd.write_bytes(text.encode() if isinstance(text, str) else text)
        def change(config):
            config["process"].update(user={"uid": uid, "gid": 0}, env=list(env), args=["sh", "-c", "echo $HOME"])
        return runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), timeout=10).stdout.strip()
    assert [home(0), home(7), home(8), home(9)] == ["/root", "/tmp", "/", "/"]
    assert home(7, env=["PATH=/bin", "HOME=/mine"]) == "/mine"
    # What an image can put there.
    assert home(7, None) == "/"
    assert home(7, lambda p: os.mkfifo(p)) == "/"
    assert home(7, lambda p: p.mkdir()) == "/"
    (root / "etc/passwd").rmdir()
    assert home(7, lambda p: p.symlink_to("/dev/zero")) == "/"
    assert home(7, lambda p: p.symlink_to("/proc/kmsg")) == "/"
    assert home(7, lambda p: p.symlink_to("passwd")) == "/"
    assert home(7, "x" * (2 << 20)) == "/"
    assert home(7, b"\xff\xfe:x:7:0::/\xff:\n") != ""
    assert home(7, "a:x:7:0::/" + "y" * 5000 + ":\n") == "/"
    assert home(7, b"a:x:7:0::/x\0y:\n") == "/"
    assert home(7, "a:x:4294967303:0::/wrapped:\n") == "/"


def test_a_working_directory_that_only_the_user_or_only_root_gets_into(runtime, directory):
    root = busybox_root(directory / "cwd-root")
    for name, owner in (("roots", 400_000), ("users", 400_007)):
        (root / name / "deep").mkdir(parents=True)
        for folder in (root / name, root / name / "deep"):
            os.chown(folder, owner, owner)
        (root / name).chmod(0o700)
    def where(path, powers):
        def change(config):
            in_user_namespace(config)
            config["process"].update(cwd=path, user={"uid": 7, "gid": 7}, args=["true"])
            config["process"]["capabilities"] = {s: powers for s in ("bounding", "effective", "permitted")}
        return runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), check=False).returncode
    assert where("/roots/deep", []) == 0 and where("/users/deep", []) == 0
    assert where("/bin/sh", []) != 0


def test_capabilities_of_another_kernel_are_told_and_left_out(runtime):
    powers = {s: ["CAP_KILL", "CAP_OF_TOMORROW"] for s in ("bounding", "effective", "permitted")}
    done = runtime.once("grep CapEff /proc/self/status", lambda c: c["process"].update(capabilities=powers))
    assert done.stdout.split() == ["CapEff:", f"{1 << 5:016x}"] and "CAP_OF_TOMORROW" in done.stderr, done


def test_sockets_of_a_service_manager_are_handed_on(runtime):
    bundle = runtime.bundle(lambda c: c["process"].update(args=["sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; readlink /proc/self/fd/3 | grep -o pipe"]))
    def run(**variables):
        reading, writing = os.pipe()
        done = subprocess.run(["bash", "-c", 'exec 3<&%d; exec "$@"' % reading, "sh", RUNTIME, "--root", runtime.state, "run", "--bundle", bundle, runtime.id()],
                              pass_fds=[reading], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **variables})
        os.close(reading)
        os.close(writing)
        return done.stdout.split()
    assert run(LISTEN_FDS="1") == ["1", "1", "pipe"]
    assert run(LISTEN_FDS="1", LISTEN_PID="1") == []
    assert run() == []


@pytest.mark.parametrize("count", ["1048577", "4294967295", "4294967296", "-1", "x"])
def test_a_number_of_descriptors_that_cannot_be(runtime, sleeper, count):
    bundle = runtime.bundle(lambda c: c["process"].update(args=["true"]))
    for command in (["run", "--preserve-fds", count, "--bundle", bundle, runtime.id()], ["exec", "--preserve-fds", count, sleeper[0], "true"]):
        done = runtime.run(*command, check=False)
        assert done.returncode in (1, 255) and "--preserve-fds" in done.stderr, done


def test_a_configuration_beside_the_bundle(runtime, tmp_path):
    bundle = runtime.bundle(lambda c: c["process"].update(args=["echo", "other"]))
    (bundle / "config.json").rename(tmp_path / "other.json")
    id = runtime.id()
    assert runtime.run("run", "--bundle", bundle, "--config", tmp_path / "other.json", id).stdout == "other\n"
    assert "config.json" in runtime.run("run", "--bundle", bundle, runtime.id(), check=False).stderr


def test_what_exec_ends_with(runtime, sleeper):
    id, _ = sleeper
    assert runtime.run("exec", id, "sh", "-c", "exit 3", check=False).returncode == 3
    assert runtime.run("exec", id, "/nonexistent", check=False).returncode == 255
    assert runtime.run("exec", "nobody", "true", check=False).returncode == 255
    assert runtime.run("exec", "-e", "A=b", "--env", "C=d", id, "sh", "-c", "echo $A$C").stdout == "bd\n"
    runtime.run("pause", id)
    assert "paused" in runtime.run("exec", id, "true", check=False).stderr
    waiting = subprocess.Popen([RUNTIME, "--root", runtime.state, "exec", "--ignore-paused", id, "echo", "later"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    time.sleep(0.3)
    assert waiting.poll() is None
    runtime.run("resume", id)
    assert waiting.communicate(timeout=10)[0] == b"later\n"


def test_exec_into_a_cgroup_below(runtime, sleeper):
    id, _ = sleeper
    state = json.loads((runtime.state / id / "state.json").read_text())["cgroup"]
    base = pathlib.Path("/sys/fs/cgroup") / ("memory" if HYBRID else "") / state["path"]
    (base / "sub").mkdir()
    wanted = "memory:sub" if HYBRID else "sub"
    done = runtime.run("exec", "--cgroup", wanted, id, "sh", "-c", "cat /proc/self/cgroup")
    assert "/sub" in done.stdout, done
    assert runtime.run("exec", "--cgroup", "../x", id, "true", check=False).returncode == 255
    assert runtime.run("exec", "--cgroup", "nothing:x", id, "true", check=False).returncode == 255
    (base / "sub").rmdir()


def test_words_of_the_command_line(runtime, sleeper):
    id, _ = sleeper
    lines = runtime.run("list").stdout.splitlines()
    assert lines[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert next(l for l in lines if l.startswith(id)).split()[-1] == "root"
    runtime.run("kill", id, "0")
    assert runtime.run("kill", id, "65", check=False).returncode == 1
    begun = time.monotonic()
    watcher = subprocess.Popen([RUNTIME, "--root", runtime.state, "events", "--interval", "50ms", id], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert json.loads(watcher.stdout.readline())["type"] == "stats"
    assert time.monotonic() - begun < 2
    watcher.kill()
    watcher.wait()
    for text, size in (("50M", 50 << 20), ("49m", 49 << 20), ("48MiB", 48 << 20), (str(47 << 20), 47 << 20)):
        runtime.run("update", "--memory", text, id)
        assert json.loads(runtime.run("events", "--stats", id).stdout)["data"]["memory"]["usage"]["limit"] == size
    for text in ("50Q", "M", "", "9999999T"):
        assert runtime.run("update", "--memory", text, id, check=False).returncode == 1
    assert "expected a number" in runtime.run("update", "--cpu-rt-runtime", "x", "--cpu-rt-period", "1000000", id, check=False).stderr


@pytest.mark.skipif(not HYBRID, reason="v2 has one hierarchy")
def test_limits_of_a_controller_that_it_was_not_made_with(runtime, sleeper):
    id, _ = sleeper
    pid = json.loads(runtime.run("state", id).stdout)["pid"]
    place = lambda controller: re.search(rf"^\d+:[^:]*\b{controller}\b[^:]*:(.*)$", pathlib.Path(f"/proc/{pid}/cgroup").read_text(), re.M)[1]
    before = place("cpuset")
    runtime.run("update", "--cpuset-cpus", "0", id)
    assert place("cpuset") != before and pathlib.Path(f"/sys/fs/cgroup/cpuset{place('cpuset')}/cpuset.cpus").read_text() == "0\n"
    # A second one, where the folder above is there already.
    def change(config):
        config["linux"]["resources"]["cpu"] = {"cpus": "0"}
    assert runtime.once("grep Cpus_allowed_list /proc/self/status", change, check=True).stdout.split()[-1] == "0"


@pytest.mark.skipif(not HYBRID, reason="on v2 what is frozen can be killed")
def test_delete_ends_a_process_that_is_frozen_elsewhere(runtime, sleeper):
    """On v1 a frozen process does not die; a container that is deleted leaves none behind, wherever somebody has put it."""
    id, _ = sleeper
    pid = json.loads(runtime.run("state", id).stdout)["pid"]
    foreign = pathlib.Path(f"/sys/fs/cgroup/freezer/carrel-foreign-{os.getpid()}")
    foreign.mkdir()
    try:
        (foreign / "cgroup.procs").write_text(str(pid))
        (foreign / "freezer.state").write_text("FROZEN")
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert pathlib.Path(f"/proc/{pid}").exists(), "control: frozen, it outlives SIGKILL"
        assert runtime.run("delete", "--force", id).returncode == 0
        # What is left of it for a moment is for whoever inherits it to reap.
        for _ in range(100):
            if not pathlib.Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.02)
        assert not pathlib.Path(f"/proc/{pid}").exists() and (foreign / "cgroup.procs").read_text() == ""
        assert runtime.run("state", id, check=False).returncode == 1
    finally:
        (foreign / "freezer.state").write_text("THAWED")
        foreign.rmdir()


@pytest.mark.parametrize("mapped", [False, True])
def test_devices_have_the_owner_and_mode_that_they_are_given(runtime, mapped):
    """In a user namespace too, where nobody can make a node, and whatever the host has at that path."""
    def change(config):
        config["linux"]["devices"] = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "uid": 10, "gid": 11, "fileMode": 0o644},
                                      {"path": "/dev/deep/null", "type": "c", "major": 1, "minor": 3}]
        config["linux"]["resources"]["devices"] = [{"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rw"}]
        if mapped:
            in_user_namespace(config)
    script = "stat -c '%u %g %a %t %T' /dev/mine /dev/deep/null; head -c 3 /dev/mine | wc -c; echo x > /dev/deep/null; mknod /tmp/x c 1 5 || echo refused"
    said = runtime.once(script, change).stdout.splitlines()
    assert said[:3] == ["10 11 644 1 5", "0 0 666 1 3", "3"], said
    if mapped:
        assert said[-1] == "refused"
        def unmapped(config):
            change(config)
            config["linux"]["devices"][0]["uid"] = 100_000
        refused = runtime.once("true", unmapped)
        assert refused.returncode == 1 and "/dev/mine: uid 100000" in refused.stderr, refused


def test_what_exec_is_given_takes_the_place_of_what_the_container_has(runtime):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "1000"], env=["PATH=/bin", "A=1", "AB=2"]))
    runtime.run("run", "--detach", "--bundle", bundle, id)
    said = runtime.run("exec", "--env", "A=3", "--env", "C=4", "--env", "A=5", id, "env").stdout.split()
    assert sorted(v for v in said if v[0] in "AC") == ["A=5", "AB=2", "C=4"], said
    # A capability that this kernel has not: told, and left out.
    done = runtime.run("exec", "--cap", "CAP_UNKNOWN", "--cap", "CAP_KILL", id, "grep", "CapBnd", "/proc/self/status")
    assert "CAP_UNKNOWN" in done.stderr and int(done.stdout.split()[1], 16) >> 5 & 1, done
    runtime.run("delete", "--force", id)


def test_capabilities_that_are_only_inherited(runtime):
    def change(config):
        config["process"].update(user={"uid": 1000, "gid": 1000}, capabilities={"inheritable": ["CAP_KILL"], "bounding": ["CAP_KILL"]})
    said = dict(l.split() for l in runtime.once("grep ^Cap /proc/self/status", change, check=True).stdout.splitlines())
    assert int(said["CapInh:"], 16) == 1 << 5 and int(said["CapPrm:"], 16) == int(said["CapEff:"], 16) == 0, said


def test_the_host_name_is_no_sysctl(runtime):
    for key in ("kernel.hostname", "kernel/hostname"):
        done = runtime.once("true", lambda c: c["linux"].update(sysctl={key: "x"}))
        assert done.returncode == 1 and "is what hostname is for" in done.stderr, done
    assert runtime.once("cat /proc/sys/kernel/domainname", lambda c: c["linux"].update(sysctl={"kernel.domainname": "x"}), check=True).stdout == "x\n"

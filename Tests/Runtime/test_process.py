# SPDX-License-Identifier: Apache-2.0
"""What the process object asks of the kernel beside identity: answers to its system calls, scheduling, labels."""

import array
import fcntl
import json
import os
import pathlib
import socket
import struct
import subprocess
import threading

import pytest
from conftest import RUNTIME, in_user_namespace

NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # seccomp_unotify(2): ioctls with 80 and 24 bytes
EXDEV = 18


def answerer(path):
    """Accepts one container, answers its first question with EXDEV; what it was told and asked comes back."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    seen = {}

    def serve():
        connection, _ = listener.accept()
        text, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(4))
        numbers = array.array("i")
        numbers.frombytes(ancillary[0][2][:4])
        seen["state"] = json.loads(text)
        question = bytearray(80)
        fcntl.ioctl(numbers[0], NOTIF_RECV, question)
        number, pid = struct.unpack_from("<QI", question)
        seen["pid"], seen["call"] = pid, struct.unpack_from("<i", question, 16)[0]
        fcntl.ioctl(numbers[0], NOTIF_SEND, bytearray(struct.pack("<QqiI", number, 0, -EXDEV, 0)))
        os.close(numbers[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread, seen


def asking(path, names=("mkdir", "mkdirat")):
    return {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(path), "listenerMetadata": "who asks",
            "syscalls": [{"names": list(names), "action": "SCMP_ACT_NOTIFY"}]}


@pytest.mark.parametrize("forbids", [True, False])
def test_a_listener_answers_for_system_calls(runtime, tmp_path, forbids):
    thread, seen = answerer(tmp_path / "answers")

    def change(config):
        config["linux"]["seccomp"] = asking(tmp_path / "answers")
        config["process"]["noNewPrivileges"] = forbids
    done = runtime.once("mkdir /tmp/new", change)
    thread.join(5)
    assert "cross-device" in done.stderr.lower(), done
    told = seen["state"]
    assert told["fds"] == ["seccompFd"] and told["metadata"] == "who asks" and told["pid"] == told["state"]["pid"]
    assert told["state"]["status"] == "creating" and seen["call"] in (83, 258), seen


def test_a_listener_that_cannot_be(runtime, tmp_path):
    def refused(seccomp):
        return runtime.once("true", lambda c: c["linux"].update(seccomp=seccomp)).stderr
    assert "cannot seccomp listener" in refused(asking(tmp_path / "nobody"))
    assert "listenerPath" in refused({**asking("x"), "listenerPath": "relative"})
    assert "sendmsg" in refused(asking(tmp_path / "x", ["sendmsg"]))
    assert "defaultAction" in refused({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/x"})


def test_scheduling(runtime):
    def change(config):
        config["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
        config["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE", "priority": 3}
        config["process"]["args"] = ["/bin/cat", "/proc/self/stat"]
    fields = runtime.run("run", "--bundle", runtime.bundle(change), runtime.id()).stdout.rsplit(")", 1)[1].split()
    # proc_pid_stat(5): nice is field 19, policy field 41; the first here is field 3.
    assert (fields[16], fields[38]) == ("5", "3")
    assert runtime.once("true", lambda c: c["process"].update(scheduler={"policy": "SCHED_RR", "priority": 100})).returncode != 0


def test_affinity_of_a_further_process(runtime, tmp_path):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "1000"]))
    runtime.run("run", "--detach", "--bundle", bundle, id)
    try:
        process = json.loads((bundle / "config.json").read_text())["process"]
        process.update(args=["grep", "Cpus_allowed_list", "/proc/self/status"], execCPUAffinity={"initial": "0-1", "final": "1"})
        (tmp_path / "process").write_text(json.dumps(process))
        assert runtime.run("exec", "--process", tmp_path / "process", id).stdout.split() == ["Cpus_allowed_list:", "1"]
        process["execCPUAffinity"] = {"final": "3-1"}
        (tmp_path / "process").write_text(json.dumps(process))
        assert "execCPUAffinity.final" in runtime.run("exec", "--process", tmp_path / "process", id, check=False).stderr
    finally:
        runtime.run("delete", "--force", id)


@pytest.mark.parametrize("option,owner", [("ridmap", "0"), ("idmap", "65534")])
def test_what_is_mounted_below_is_mapped_as_well(runtime, tmp_path, option, owner):
    """With `ridmap`; the control, `idmap`, leaves the lower mount's owner unknown inside."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for folder in (upper, lower):
        folder.mkdir()
        os.chown(folder, 1000, 1000)
    (upper / "sub").mkdir()
    subprocess.run(["mount", "--bind", lower, upper / "sub"], check=True)
    try:
        def change(config):
            in_user_namespace(config)
            mapping = [{"containerID": 1000, "hostID": 400_000, "size": 1}]
            config["mounts"].append({"destination": "/data", "type": "none", "source": str(upper), "options": ["rbind", option],
                                     "uidMappings": mapping, "gidMappings": mapping})
        done = runtime.once("stat -c %u /data /data/sub", change)
        assert done.stdout.split() == ["0", owner], done
    finally:
        subprocess.run(["umount", upper / "sub"], check=True)


def test_events_until_the_end(runtime):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "2"]))
    runtime.run("run", "--detach", "--bundle", bundle, id)
    told = [json.loads(line) for line in runtime.run("events", "--interval", "1s", id, timeout=20).stdout.splitlines()]
    assert len(told) >= 2 and {t["type"] for t in told} == {"stats"} and told[0]["data"]["pids"]["current"] >= 1
    assert "--interval" in runtime.run("events", "--interval", "soon", id, check=False).stderr
    runtime.run("delete", "--force", id)


def test_a_relative_root(runtime, tmp_path):
    """State goes below the working directory, and nothing stays."""
    bundle = runtime.bundle(lambda c: c["process"].update(args=["true"]))
    subprocess.run(["timeout", "-s", "KILL", "20", RUNTIME, "--root", "some/state", "run", "--bundle", bundle, runtime.id()], cwd=tmp_path,
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert [p.name for p in (tmp_path / "some/state").iterdir()] == [".filters"]
    assert not pathlib.Path("/some").exists()


def test_what_this_host_lacks_is_refused(runtime):
    if not pathlib.Path("/run/systemd/system").exists():
        for path in ("system.slice:x:y", ""):
            bundle = runtime.bundle(lambda c: c["linux"].update(cgroupsPath=path))
            done = runtime.run("--systemd-cgroup", "run", "--bundle", bundle, runtime.id(), check=False)
            assert "systemd does not run here" in done.stderr
    for path in ("/a/b", "a:b", "x.scope:a:b", "a.slice::", "a b.slice:c:d"):
        bundle = runtime.bundle(lambda c: c["linux"].update(cgroupsPath=path))
        assert "cgroupsPath" in runtime.run("--systemd-cgroup", "run", "--bundle", bundle, runtime.id(), check=False).stderr
    if not pathlib.Path("/sys/module/apparmor").exists():
        done = runtime.once("true", lambda c: c["process"].update(apparmorProfile="x"))
        assert "process.apparmorProfile: x: this host has no AppArmor" in done.stderr
        assert runtime.once("true", lambda c: c["process"].update(apparmorProfile="unconfined")).returncode == 0

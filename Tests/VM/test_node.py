# SPDX-License-Identifier: Apache-2.0
"""A host as production has it: systemd is PID 1 and owns the cgroups, the kernel is Debian's."""

import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import time

import pytest
from conftest import sh, until
from support import Code, Event

UNIFIED = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()
PARENT = "carrel.slice/carrel-workspaces.service"
v2 = pytest.mark.skipif(not UNIFIED, reason="cgroup v2 only")


def cgroup(id, controller="memory"):
    base = pathlib.Path("/sys/fs/cgroup") / ("" if UNIFIED else controller) / PARENT
    with sqlite3.connect("file:/var/lib/carrel/journal.sqlite?mode=ro", uri=True) as journal:
        record = json.loads(journal.execute("SELECT body FROM workspace WHERE id = ?", [id]).fetchone()[0])
    return base / record["sandbox"]["cgroup"]


@pytest.mark.smoke
def test_the_unit_runs_and_is_ready_when_it_says_so(host):
    assert sh("systemctl is-active carreld carrel-workspaces").stdout.split() == ["active", "active"]
    assert sh("systemctl show -p NotifyAccess,Type,StatusText carreld").stdout.count("notify") == 1
    assert "Serving" in sh("systemctl show -p StatusText carreld").stdout
    node = host.json("node")
    assert node["cgroup_layout"] == ("unified" if UNIFIED else "legacy"), node
    degraded = [] if UNIFIED else [d for d in node["degraded"] if "cgroup v2" in d]
    assert node.get("degraded", []) == degraded


@pytest.mark.smoke
def test_limits_are_what_was_asked_for_outside_and_inside(host):
    host.launch("limits", "sleep 600")
    host.running("limits")
    if UNIFIED:
        read = lambda name: (cgroup("limits") / name).read_text().strip()
        assert read("memory.max") == str(64 << 20) and read("memory.swap.max") == "0"
        assert read("cpu.max") == "100000 100000" and read("pids.max") == "64"
        inside = host.carrel("exec limits -- cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max").stdout.split()
        assert inside == [str(64 << 20), "64"]
    else:
        read = lambda name: (cgroup("limits", name.split(".")[0]) / name).read_text().strip()
        assert read("memory.limit_in_bytes") == str(64 << 20) and read("cpu.cfs_quota_us") == "100000" and read("pids.max") == "64"
        shown = host.carrel("exec limits -- cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpuacct/cpuacct.usage").stdout.split()
        assert shown[:2] == [str(64 << 20), "100000"] and int(shown[2]) > 0
    assert host.carrel("exec limits -- sh -c 'echo 1 >/sys/fs/cgroup/cgroup.procs'", check=False).returncode != 0, "read-only inside"
    host.carrel("rm --force limits")


@pytest.mark.smoke
def test_out_of_memory_is_said_with_limit_and_peak_and_swap_does_not_help(host):
    sh("dd if=/dev/zero of=/swap bs=1M count=128 && chmod 600 /swap && mkswap /swap && swapon /swap")
    hog = "dd if=/dev/zero of=/dev/null bs=100M count=1"
    host.launch("hungry", f"exec {hog}")
    reason = host.ended("hungry")
    assert reason["code"] == Code.OutOfMemory and "limit 64Mi" in reason["message"], reason
    assert int(reason["memory_limit_bytes"]) == 64 << 20 and int(reason["memory_peak_bytes"]) > 56 << 20
    # Control: the same below a larger limit ends well.
    host.launch("fed", f"exec {hog}", resources={"memory": "160Mi"})
    assert host.ended("fed")["exit_code"] == 0
    sh("swapoff /swap")
    host.carrel("rm hungry fed")


def test_pids_and_cpu_limits_bite(host):
    host.launch("bomb", "(i=0; while [ $i -lt 200 ]; do sleep 30 & i=$((i+1)); done) 2>/dev/null; exec sleep 30")
    time.sleep(8)
    pids = int((cgroup("bomb", "pids") / "pids.current").read_text())
    assert 50 < pids <= 64
    host.carrel("rm --force bomb")
    host.launch("busy", "while true; do true; done", resources={"memory": "64Mi", "cpu": "300m"})
    host.running("busy")
    used = lambda: int(host.json("top busy")[0]["cpu_nanoseconds"])
    first, begun = used(), time.time()
    time.sleep(5)
    share = (used() - first) / 1e9 / (time.time() - begun)
    assert 0.15 < share < 0.4, share
    host.carrel("rm --force busy")


def test_secrets_are_on_memory_that_is_never_swapped(host):
    path = pathlib.Path("/tmp/secret")
    path.write_text("xyzzy")
    host.launch("secret", "sleep 600", options="--credential key=/tmp/secret")
    host.running("secret")
    assert host.carrel("exec secret -- cat /run/carrel/credentials/key").stdout == "xyzzy"
    mounts = [line.split() for line in host.carrel("exec secret -- cat /proc/self/mountinfo").stdout.splitlines()]
    mount = next(m for m in mounts if m[4] == "/run/carrel/credentials")
    # Kernels before 6.4 have no tmpfs that stays out of swap: ramfs is their way (filesystems/ramfs-rootfs-initramfs).
    kind = mount[mount.index("-") + 1]
    assert kind == "ramfs" or (kind == "tmpfs" and "noswap" in mount[-1]), mount
    path.write_text("plugh")
    host.carrel("credentials secret key=/tmp/secret")
    assert host.carrel("exec secret -- cat /run/carrel/credentials/key").stdout == "plugh"
    host.carrel("rm --force secret")


def holds(path, needle):
    """Whether a file holds it; in pieces, since it may be large, and from the disk, where the kernel writes swap past its cache."""
    before = b""
    reader = subprocess.Popen(["dd", f"if={path}", "iflag=direct", "bs=4M", "status=none"], stdout=subprocess.PIPE)
    found = False
    while block := reader.stdout.read(4 << 20):
        found = found or needle in before + block
        before = block[-len(needle):]
    assert reader.wait() == 0
    return found


@v2
def test_secrets_are_in_no_swap_and_in_no_core_file(host):
    """Files and what the broker holds, in the memory of the agent and of the supervisor; the control is a process that takes no care."""
    control = f"CANARY-{os.urandom(8).hex()}-control"
    # Made by another process, since this one is swapped too; looked up when nothing is swapped any more.
    sh("""python3 -c 'import json, os
secret = f"CANARY-{os.urandom(8).hex()}-secret"
open("/tmp/secret", "w").write(secret * 200)
open("/tmp/given.json", "w").write(json.dumps({"AccessKeyId": "ASIA", "SecretAccessKey": secret * 20, "SessionToken": secret, "Expiration": "2099-01-01T00:00:00Z"}))'""")
    config = pathlib.Path("/etc/carrel/carreld.yaml")
    text = config.read_text()
    assert text.count("\ncredentials:\n") == 1
    config.write_text(text.replace("\ncredentials:\n", "\ncredentials:\n  aws: {file: /tmp/given.json}\n"))
    sh("systemctl restart carreld")
    host.launch("secret", "sleep 600", options="--credential key=/tmp/secret", aws={"roles": ["analyst"]})
    host.running("secret")
    careless = subprocess.Popen(["python3", "-c", "import sys, time; text = sys.stdin.read(); kept = [text + str(n) for n in range(1000)]; time.sleep(600)"], stdin=subprocess.PIPE, text=True)
    careless.stdin.write(control * 20)
    careless.stdin.close()
    shims = [int(p) for p in sh("pgrep -f '^carrel-shim [a-z2-7]+ secret$'").stdout.split()]
    sh("dd if=/dev/zero of=/swap bs=1M count=512 && chmod 600 /swap && mkswap /swap && swapon /swap")
    hog = None
    try:
        free = int(next(l for l in open("/proc/meminfo") if l.startswith("MemAvailable")).split()[1]) // 1024
        hog = subprocess.Popen(["python3", "-c", f"import time; kept = [bytearray(b'x' * (1 << 20)) for _ in range({free + 150})]; print('full', flush=True); time.sleep(600)"], stdout=subprocess.PIPE, text=True)
        assert hog.stdout.readline() == "full\n"
        swapped = lambda pid: int(next(l for l in open(f"/proc/{pid}/status") if l.startswith("VmSwap")).split()[1])
        until(lambda: swapped(careless.pid) > 100, "the host swaps")
        assert [swapped(pid) for pid in (host.agent(), *shims[:1])] == [0, 0]
        hog.kill()
        hog.wait()
        assert swapped(careless.pid) > 100 and holds("/swap", control.encode()), "control"
        secret = pathlib.Path("/tmp/secret").read_text()[:30]
        assert not holds("/swap", secret.encode())
    finally:
        if hog:
            hog.kill()
            hog.wait()
        sh("swapoff /swap; rm /swap")
    # Core files, where everybody may leave them.
    sh("mkdir -p /tmp/cores && echo '/tmp/cores/%p' > /proc/sys/kernel/core_pattern")
    agent = host.agent()
    for pid in (careless.pid, agent, *shims):
        sh(f"prlimit --pid {pid} --core=unlimited:unlimited")
        os.kill(pid, signal.SIGABRT)
    careless.wait()
    until(lambda: host.agent() not in (0, agent), "systemd starts another")
    host.serves()
    host.ended("secret")
    assert (pathlib.Path("/tmp/cores") / str(careless.pid)).exists(), "control"
    assert not any(holds(path, secret.encode()) for path in pathlib.Path("/tmp/cores").iterdir())
    config.write_text(text)
    sh("systemctl restart carreld; rm -r /tmp/cores")
    host.carrel("rm secret")


@pytest.mark.parametrize("make", ["mkfs.ext4 -q -O quota,project", "mkfs.xfs -q"])
def test_a_home_that_is_a_directory_has_a_limit_where_its_file_system_has_project_quotas(host, make):
    sh(f"truncate -s 400M /limited.img && {make} /limited.img && mkdir -p /srv/limited && mount -o loop,prjquota /limited.img /srv/limited")
    sh("truncate -s 64M /plain.img && mkfs.ext4 -q /plain.img && mkdir -p /srv/plain && mount -o loop /plain.img /srv/plain")
    sh("chmod 711 /srv/limited /srv/plain")
    storage = lambda owner, size="32Mi", place="limited": {"home": f"/srv/{place}/{owner}", "driver": "directory", "size": size}
    host.launch("plain", "true", storage=storage("ada", place="plain"))
    assert "has no project quotas" in host.ended("plain")["message"]
    host.launch("grace", "sleep 600", owner={"name": "grace", "uid": 2002, "gid": 2002}, storage=storage("grace"))
    host.running("grace")
    host.launch("first", "mkdir old; echo x > old/file; exit 0", storage={"home": "/srv/limited/ada", "driver": "directory"})
    host.ended("first")
    host.launch("fill", "dd if=/dev/zero of=big bs=1M count=100 2>/dev/null; du -m big; sleep 4; exit 5", storage=storage("ada"))
    assert host.ended("fill")["exit_code"] == 5
    written = int(host.carrel("logs fill").stdout.split()[-2])
    assert 28 <= written <= 32, written
    # What was there before belongs to it as well, and Stats and events know its limit.
    assert sh("lsattr -p /srv/limited/ada/old/file").stdout.split()[0] == sh("lsattr -dp /srv/limited/ada").stdout.split()[0]
    filling = [json.loads(l)["event"] for l in host.carrel("events -o json --workspace fill").stdout.splitlines()]
    assert any(e["type"] == Event.HomeFilling and e["attributes"]["percent"] == "100" for e in filling), filling
    use = host.json("top grace")[0]["home"]
    assert int(use["limit_bytes"]) == 32 << 20 and int(use.get("used_bytes", 0)) < 1 << 20, use
    assert host.carrel("exec grace -- dd if=/dev/zero of=x bs=1M count=20").returncode == 0, "it hurts its owner alone"
    # Full: a little more, once, as with images; and its limit again when there is room.
    host.launch("tight", "head -c 100000 /dev/zero > more && echo wrote; rm big; exit 0", storage=storage("ada"))
    assert host.ended("tight")["exit_code"] == 0 and "wrote" in host.carrel("logs tight").stdout
    assert any(c.startswith("Rescue: the home is full") for c in host.json("get tight")["conditions"])
    host.launch("room", "exit 0", storage=storage("ada"))
    host.ended("room")
    assert "limit" not in str(host.json("get room").get("conditions", []))
    assert sh("df --output=size -B1 /srv/limited/ada").stdout.split()[-1] == str(32 << 20)
    host.carrel("rm --force plain grace first fill tight room")
    sh("umount /srv/limited /srv/plain; rm /limited.img /plain.img")


def test_the_journal_has_fields(host):
    host.launch("noted", "exit 4", wait=True, check=False)
    lines = sh("journalctl -u carreld -o json --no-pager").stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    assert any(e.get("SYSLOG_IDENTIFIER") == "carreld" and e.get("CARREL_SOCKET") for e in entries)
    host.carrel("rm noted")


@pytest.mark.smoke
def test_a_killed_agent_comes_back_and_takes_the_workspaces_over(host):
    host.launch("survivor", "while true; do echo tick; sleep 1; done")
    host.launch("late", "sleep 6; exit 7")
    host.running("survivor")
    first = (cgroup("survivor") / "cgroup.procs").read_text()
    before = host.agent()
    os.kill(before, signal.SIGKILL)
    until(lambda: host.agent() not in (0, before), "systemd starts another")
    host.serves()
    assert host.state("survivor") == "STATE_READY"
    assert (cgroup("survivor") / "cgroup.procs").read_text().split()[0] == first.split()[0]
    assert host.ended("late")["exit_code"] == 7
    events = [e["event"]["type"] for e in map(json.loads, host.carrel("events -o json --workspace survivor").stdout.splitlines())]
    assert Event.Adopted in events
    # The same through a planned restart, and through a pause between stop and start.
    sh("systemctl restart carreld")
    assert host.state("survivor") == "STATE_READY"
    sh("systemctl stop carreld")
    pid = int(first.split()[0])
    os.kill(pid, 0)
    sh("systemctl start carreld")
    assert host.state("survivor") == "STATE_READY"
    host.carrel("stop survivor")
    assert "tick" in host.carrel("logs survivor").stdout
    host.carrel("rm survivor late")


def test_an_agent_that_hangs_is_restarted_by_the_watchdog(host):
    host.launch("watched", "sleep 600")
    host.running("watched")
    drop_in = pathlib.Path("/etc/systemd/system/carreld.service.d/watchdog.conf")
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=4\n")
    sh("systemctl daemon-reload && systemctl restart carreld")
    time.sleep(10)
    hung = host.agent()
    os.kill(hung, 0)  # fed at half the time: it lives beyond two periods
    os.kill(hung, signal.SIGSTOP)
    until(lambda: host.agent() not in (0, hung), "the watchdog acts")
    host.serves()
    assert "Watchdog timeout" in sh("journalctl -u carreld --no-pager").stdout
    assert host.state("watched") == "STATE_READY"
    drop_in.unlink()
    sh("systemctl daemon-reload && systemctl restart carreld")
    host.carrel("rm --force watched")


def test_the_host_reaches_the_port_and_the_workspace_does_not_reach_metadata(host):
    host.launch("web", "echo hello >/tmp/index.html; exec httpd -f -p 8000 -h /tmp", network="open")
    host.running("web")
    address = host.json("get web")["address"]
    until(lambda: "hello" in sh(f"busybox wget -q -O - http://{address}:8000/index.html", check=False).stdout, "the port answers")
    sh("ip address add 169.254.169.254/32 dev lo")
    sh("mkdir -p /tmp/meta && echo keys >/tmp/meta/index.html && busybox httpd -p 169.254.169.254:8080 -h /tmp/meta")
    assert "keys" in sh("busybox wget -q -O - http://169.254.169.254:8080/index.html").stdout, "control: the host reaches it"
    assert host.carrel("exec web -- wget -T 3 -q -O - http://169.254.169.254:8080/index.html", check=False).returncode != 0
    sh("ip address del 169.254.169.254/32 dev lo; busybox pkill -f 169.254.169.254 || true")
    host.carrel("rm --force web")


def test_stopping_the_holding_unit_ends_every_workspace(host):
    host.launch("held", "sleep 600")
    host.running("held")
    sh("systemctl stop carrel-workspaces")
    assert sh("systemctl is-active carreld", check=False).stdout.strip() == "inactive", "it needs the cgroup"
    sh("systemctl start carreld")
    assert host.ended("held")["code"] in (Code.Exited, Code.Signalled, Code.Unknown)
    host.carrel("rm held")
    host.launch("again", "exit 0", wait=True)
    host.carrel("rm again")

# SPDX-License-Identifier: Apache-2.0
"""carrel-runtime on Debian's kernel, with cgroup v2 or with systemd's v1 hierarchies: limits, the device program, the freezer."""

import json
import pathlib
import shutil
import time

import pytest
from conftest import APPLETS, sh

UNIFIED = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()
HOG = "dd if=/dev/zero of=/dev/null bs=100M count=1"


@pytest.fixture(scope="module")
def bundle(host):
    path = pathlib.Path("/tmp/bundle")
    (path / "rootfs").mkdir(parents=True)
    for folder in "bin tmp proc sys dev etc".split():
        (path / "rootfs" / folder).mkdir()
    shutil.copy("/bin/busybox", path / "rootfs/bin/busybox")
    for applet in [*APPLETS, "mknod", "grep"]:
        (path / "rootfs/bin" / applet).symlink_to("busybox")
    sh(f"carrel-runtime spec --bundle {path}")
    return path


def run(bundle, id, script, resources, options="", check=False):
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["sh", "-c", script], env=["PATH=/bin"])
    config["process"]["capabilities"] = {s: ["CAP_MKNOD"] for s in ("bounding", "effective", "permitted")}
    config["linux"]["resources"] = resources
    config["root"]["readonly"] = False
    other = bundle.parent / f"bundle-{id}"
    other.mkdir()
    config["root"]["path"] = str(bundle / "rootfs")
    (other / "config.json").write_text(json.dumps(config))
    # A container that goes on keeps its standard streams: a pipe would be waited for.
    kept = ">/dev/null 2>&1" if options else ""
    return sh(f"carrel-runtime run {options} --bundle {other} {id} </dev/null {kept}", check=check)


@pytest.mark.smoke
def test_limits(bundle):
    resources = {"memory": {"limit": 64 << 20, "swap": 64 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 50000, "period": 100000, "shares": 512}}
    done = run(bundle, "l1", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight memory.swap.max 2>/dev/null || cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us cpu/cpu.shares", resources)
    expected = [str(64 << 20), "20", "50000", "100000", "20", "0"] if UNIFIED else [str(64 << 20), "20", "50000", "512"]
    assert done.stdout.split() == expected, done
    assert run(bundle, "l2", f"exec {HOG}", resources).returncode == 137
    assert run(bundle, "l3", f"exec {HOG}", {"memory": {"limit": 160 << 20}}).returncode == 0, "control"


@pytest.mark.smoke
def test_device_rules(bundle):
    """A node for the host's disk is made and cannot be opened; one that is allowed can."""
    script = "mknod /tmp/disk b 254 0; (: </tmp/disk) && echo disk; mknod /tmp/thing c 10 183; (: </tmp/thing) && echo read; (: >/tmp/thing) && echo written; rm /tmp/disk /tmp/thing; head -c 1 /dev/zero | wc -c; true"
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 9, "access": "rw"}]
    forbidden = run(bundle, "d1", script.replace("rm ", "busybox rm ").replace("wc", "busybox wc"), {"devices": rules})
    assert "disk" not in forbidden.stdout.replace("/tmp/disk", "") and "Operation not permitted" in forbidden.stderr and "read" not in forbidden.stdout, forbidden
    allowed = run(bundle, "d2", script.replace("rm ", "busybox rm ").replace("wc", "busybox wc"), {"devices": [*rules, {"allow": True, "type": "b", "major": 254, "minor": 0, "access": "r"}]})
    assert "disk" in allowed.stdout, allowed


@pytest.mark.smoke
def test_pause_kill_and_nothing_left(bundle):
    run(bundle, "p1", "(sleep 1000 & sleep 1000 & wait) & exec sleep 1000", {"pids": {"limit": 20}}, options="--detach", check=True)
    sh("carrel-runtime pause p1")
    assert json.loads(sh("carrel-runtime state p1").stdout)["status"] == "paused"
    sh("carrel-runtime resume p1")
    time.sleep(0.5)
    assert len(json.loads(sh("carrel-runtime ps --format json p1").stdout)) >= 3
    sh("carrel-runtime update --pids-limit 30 p1")
    assert json.loads(sh("carrel-runtime events --stats p1").stdout)["data"]["pids"]["limit"] == 30
    sh("carrel-runtime delete --force p1")
    assert not list(pathlib.Path("/sys/fs/cgroup").glob("**/carrel-runtime/p1"))


def test_a_scope_of_systemd(bundle):
    """--systemd-cgroup: the unit stands with its slice, limits are below it, a daemon-reload leaves them, the end takes it away."""
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["sleep", "1000"], env=["PATH=/bin"])
    config["linux"].update(cgroupsPath="a-b.slice:carrel:scoped", resources={"memory": {"limit": 64 << 20}, "pids": {"limit": 20}})
    config["root"]["path"] = str(bundle / "rootfs")
    other = bundle.parent / "bundle-scope"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    for attempt in range(2):  # the name is free again after the end
        started = sh(f"carrel-runtime --systemd-cgroup run --detach --bundle {other} scoped </dev/null >/dev/null 2>/tmp/errors", check=False)
        assert started.returncode == 0, pathlib.Path("/tmp/errors").read_text()
        pid = json.loads(sh("carrel-runtime state scoped").stdout)["pid"]
        assert "a.slice/a-b.slice/carrel-scoped.scope/container" in pathlib.Path(f"/proc/{pid}/cgroup").read_text()
        show = sh("systemctl show -p ActiveState -p Slice -p Delegate carrel-scoped.scope").stdout.split()
        assert {"ActiveState=active", "Slice=a-b.slice", "Delegate=yes"} <= set(show), (attempt, show, sh("journalctl -b --no-pager | grep -i -E 'scop|carrel-runtime' | tail -n 12; ls -d /sys/fs/cgroup/a.slice/*/*/*; systemctl list-units --all | grep -i -E 'scope|a-b'", check=False).stdout.splitlines())
        sh("systemctl daemon-reload")
        folder = next(p for p in pathlib.Path("/sys/fs/cgroup").glob("**/carrel-scoped.scope/container") if (p / "pids.max").exists())
        assert (folder / "pids.max").read_text() == "20\n"
        assert sh("carrel-runtime exec scoped sh -c 'cat /proc/self/cgroup'").returncode == 0
        sh("carrel-runtime delete --force scoped")
        assert "carrel-scoped" not in sh("systemctl list-units --all --plain 'carrel-scoped*'").stdout.replace("0 loaded", "")
        assert not list(pathlib.Path("/sys/fs/cgroup").glob("**/carrel-scoped.scope"))


def test_an_apparmor_profile(bundle):
    """A profile that forbids one file: it bites in the first process and in a further one, and only with the profile."""
    profile = pathlib.Path("/tmp/profile")
    profile.write_text("profile carrel-test flags=(attach_disconnected,mediate_deleted) {\n  file,\n  capability,\n  network,\n  mount,\n  umount,\n  signal,\n  ptrace,\n  deny /etc/secret r,\n}\n")
    sh(f"apparmor_parser --replace {profile}")
    (bundle / "rootfs/etc/secret").write_text("secret")

    def go(id, profile, script):
        config = json.loads((bundle / "config.json").read_text())
        config["process"].update(terminal=False, args=["sh", "-c", script], env=["PATH=/bin"])
        if profile:
            config["process"]["apparmorProfile"] = profile
        config["root"]["path"] = str(bundle / "rootfs")
        other = bundle.parent / f"bundle-{id}"
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config))
        return other
    held = sh(f"carrel-runtime run --bundle {go('a1', 'carrel-test', 'cat /proc/self/attr/current; cat /etc/secret')} a1 </dev/null", check=False)
    assert "carrel-test (enforce)" in held.stdout and "secret" not in held.stdout and "denied" in held.stderr, held
    control = sh(f"carrel-runtime run --bundle {go('a2', '', 'cat /etc/secret')} a2 </dev/null", check=False)
    assert control.stdout == "secret", control
    missing = sh(f"carrel-runtime run --bundle {go('a3', 'nonexistent', 'true')} a3 </dev/null", check=False)
    assert "cannot label the program" in missing.stderr, missing
    sh(f"carrel-runtime run --detach --bundle {go('a4', '', 'sleep 1000')} a4 </dev/null >/dev/null 2>&1")
    assert "secret" in sh("carrel-runtime exec a4 cat /etc/secret </dev/null").stdout, "control"
    further = sh("carrel-runtime exec --apparmor carrel-test a4 cat /etc/secret </dev/null", check=False)
    assert "secret" not in further.stdout and "denied" in further.stderr, further
    sh("carrel-runtime delete --force a4")

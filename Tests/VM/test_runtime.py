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


def test_limits(bundle):
    resources = {"memory": {"limit": 64 << 20, "swap": 64 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 50000, "period": 100000, "shares": 512}}
    done = run(bundle, "l1", "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight memory.swap.max 2>/dev/null || cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us cpu/cpu.shares", resources)
    expected = [str(64 << 20), "20", "50000", "100000", "20", "0"] if UNIFIED else [str(64 << 20), "20", "50000", "512"]
    assert done.stdout.split() == expected, done
    assert run(bundle, "l2", f"exec {HOG}", resources).returncode == 137
    assert run(bundle, "l3", f"exec {HOG}", {"memory": {"limit": 160 << 20}}).returncode == 0, "control"


def test_device_rules(bundle):
    """A node for the host's disk is made and cannot be opened; one that is allowed can."""
    script = "mknod /tmp/disk b 254 0; (: </tmp/disk) && echo disk; mknod /tmp/thing c 10 183; (: </tmp/thing) && echo read; (: >/tmp/thing) && echo written; rm /tmp/disk /tmp/thing; head -c 1 /dev/zero | wc -c; true"
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 9, "access": "rw"}]
    forbidden = run(bundle, "d1", script.replace("rm ", "busybox rm ").replace("wc", "busybox wc"), {"devices": rules})
    assert "disk" not in forbidden.stdout.replace("/tmp/disk", "") and "Operation not permitted" in forbidden.stderr and "read" not in forbidden.stdout, forbidden
    allowed = run(bundle, "d2", script.replace("rm ", "busybox rm ").replace("wc", "busybox wc"), {"devices": [*rules, {"allow": True, "type": "b", "major": 254, "minor": 0, "access": "r"}]})
    assert "disk" in allowed.stdout, allowed


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

# SPDX-License-Identifier: Apache-2.0
"""The same list of checks for carrel-runtime and, as the control, for Debian's crun."""

import json
import os
import pty
import subprocess
import time

# Hosts without CAP_SYS_RESOURCE cannot raise limits to podman's defaults, with any runtime.
BASE = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--network", "none"]


def run(podman, *arguments, **options):
    return podman("run", "--rm", *BASE, *arguments, **options)


def test_output_exit_code_and_streams(podman):
    done = run(podman, "box", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert run(podman, "-i", "box", "cat", input="through", stdin=None).stdout == "through"


def test_a_missing_program_is_127(podman):
    assert run(podman, "box", "/nonexistent", check=False).returncode == 127


def test_identity_and_capabilities(podman):
    done = run(podman, "--user", "1000:1001", "--group-add", "5", "--hostname", "inside", "box", "sh", "-c",
               "id -u; id -g; id -G; hostname; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; umask")
    lines = done.stdout.split("\n")
    assert lines[:4] == ["1000", "1001", "1001 5", "inside"]
    assert "0000000000000000" in lines[4] and lines[6].endswith("2") and lines[7] == "0022", lines
    done = run(podman, "--cap-drop", "all", "--cap-add", "CHOWN", "--security-opt", "no-new-privileges", "box", "sh", "-c",
               "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status")
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0000000000000001", "0000000000000001", "1"]


def test_limits(podman):
    done = run(podman, "--memory", "64m", "--pids-limit", "20", "--cpus", "0.5", "--cpu-shares", "512", "box", "sh", "-c",
               "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us cpu/cpu.shares 2>/dev/null || cat memory.max pids.max cpu.max")
    assert done.stdout.split()[:2] == [str(64 << 20), "20"], done.stdout
    done = run(podman, "--memory", "32m", "box", "dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1", check=False)
    assert done.returncode == 137


def test_read_only_root_and_volumes(podman, directory):
    done = run(podman, "--read-only", "box", "sh", "-c", "touch /x; touch /tmp/y && echo tmp; touch /run/z && echo run")
    assert done.stdout == "tmp\nrun\n" and "Read-only" in done.stderr
    volume = directory / "volume"
    volume.mkdir(exist_ok=True)
    (volume / "seen").write_text("host")
    done = run(podman, "-v", f"{volume}:/data:ro", "box", "sh", "-c", "cat /data/seen; touch /data/new", check=False)
    assert done.stdout == "host" and done.returncode != 0
    run(podman, "-v", f"{volume}:/data", "box", "sh", "-c", "echo inside >/data/new")
    assert (volume / "new").read_text() == "inside\n"
    done = run(podman, "--tmpfs", "/scratch:size=1m,mode=700", "box", "sh", "-c", "dd if=/dev/zero of=/scratch/f bs=1M count=3; stat -c %a-%s /scratch /scratch/f", check=False)
    assert "700-" in done.stdout and "-1048576" in done.stdout


def test_user_namespace(podman):
    done = run(podman, "--uidmap", "0:300000:5000", "--gidmap", "0:300000:5000", "box", "sh", "-c", "cat /proc/self/uid_map; id -u; touch /tmp/x; stat -c %u /tmp/x; mknod /tmp/n c 1 3 || echo no nodes")
    assert done.stdout.split() == ["0", "300000", "5000", "0", "0", "no", "nodes"]


def test_a_terminal(podman):
    master, slave = pty.openpty()
    process = subprocess.Popen(podman.command("run", "--rm", *BASE, "-it", "box", "sh", "-c", "test -t 0 && test -t 1 && echo is-a-terminal; stat -c %F /dev/console; read line; echo got $line"),
                               stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    output, sent, deadline = b"", False, time.time() + 30
    while time.time() < deadline:
        try:
            output += os.read(master, 1024)
        except OSError:
            break
        if b"character" in output and not sent:
            os.write(master, b"word\n")
            sent = True
        if b"got word" in output:
            break
    process.wait(30)
    os.close(master)
    assert b"is-a-terminal" in output and b"got word" in output, output


def test_life_of_a_container(podman):
    podman("run", "-d", "--name", "life", *BASE, "box", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while true; do sleep 0.1; done")
    assert podman("exec", "life", "sh", "-c", "id -u; exit 5", check=False).returncode == 5
    assert podman("exec", "-e", "A=b", "-w", "/tmp", "--user", "7", "life", "sh", "-c", "echo $A; pwd; id -u").stdout == "b\n/tmp\n7\n"
    assert "sleep" in podman("top", "life", "args").stdout
    podman("pause", "life")
    assert json.loads(podman("inspect", "life").stdout)[0]["State"]["Status"] == "paused"
    assert podman("exec", "life", "true", check=False).returncode != 0
    podman("unpause", "life")
    podman("stop", "-t", "5", "life")
    state = json.loads(podman("inspect", "life").stdout)[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 3)
    assert podman("logs", "life").stdout == "up\nbye\n"
    podman("start", "life")
    podman("kill", "-s", "KILL", "life")
    podman("wait", "life")
    podman("rm", "life")


def test_a_healthcheck_runs_in_it(podman):
    podman("run", "-d", "--name", "healthy", *BASE, "--health-cmd", "test -e /tmp/ok", "--health-interval", "disable", "box", "sleep", "100")
    assert podman("healthcheck", "run", "healthy", check=False).returncode == 1
    podman("exec", "healthy", "touch", "/tmp/ok")
    assert podman("healthcheck", "run", "healthy").returncode == 0
    podman("rm", "-f", "-t", "0", "healthy")


def test_forced_removal_of_a_running_one_leaves_nothing(podman):
    podman("run", "-d", "--name", "gone", *BASE, "box", "sh", "-c", "sleep 1000 & sleep 1000 & wait")
    pid = json.loads(podman("inspect", "gone").stdout)[0]["State"]["Pid"]
    podman("rm", "-f", "-t", "0", "gone")
    assert not os.path.exists(f"/proc/{pid}/root/bin")


def test_a_second_container_in_the_network_of_the_first(podman):
    podman("run", "-d", "--name", "first", *BASE, "box", "sleep", "100")
    arguments = [a for a in BASE if a not in ("--network", "none")]
    own = podman("exec", "first", "readlink", "/proc/self/ns/net").stdout
    shared = podman("run", "--rm", *arguments, "--network", "container:first", "--pid", "container:first", "box", "sh", "-c", "readlink /proc/self/ns/net; ps").stdout
    assert shared.startswith(own) and "sleep 100" in shared
    podman("rm", "-f", "-t", "0", "first")


def test_privileged_and_devices(podman):
    assert run(podman, "--privileged", "box", "sh", "-c", "head -c 1 /dev/null; ls /dev | wc -l; umount /dev/shm && echo unmounted").stdout.endswith("unmounted\n")
    done = run(podman, "--device", "/dev/fuse:/dev/thing:r", "box", "sh", "-c", "stat -c %t:%T /dev/thing; mknod /tmp/disk b 254 0; head -c 1 /tmp/disk", check=False)
    assert done.stdout == "a:e5\n" and "not permitted" in done.stderr, (done.stdout, done.stderr)


def test_sysctls_and_shm(podman):
    arguments = [a for a in BASE if a not in ("--network", "none")]
    assert podman("run", "--rm", *arguments, "--network", "none", "--sysctl", "kernel.msgmax=4096", "--shm-size", "2m", "box", "sh", "-c", "cat /proc/sys/kernel/msgmax; df -k /dev/shm | tail -n 1").stdout.split()[:3:2] == ["4096", "2048"]

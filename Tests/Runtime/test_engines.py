# SPDX-License-Identifier: Apache-2.0
"""buildah and containerd drive the runtime; crun and runc are the controls."""

import signal
import subprocess
import time

import pytest
from conftest import RUNTIME, peer


@pytest.mark.parametrize("runtime", [str(RUNTIME), "/usr/bin/crun"], ids=["carrel-runtime", "crun"])
def test_buildah_builds_with_run_steps(directory, root, runtime, tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    (context / "Containerfile").write_text(
        "FROM scratch\nADD root.tar /\nENV A=b\nWORKDIR /build\nRUN echo $A >made && id -u >>made\nUSER 1000\nRUN cat made && test \"$(id -u)\" = 1000 && ! touch /build/denied\n")
    subprocess.run(["tar", "-C", str(root), "-cf", str(context / "root.tar"), "."], check=True)
    command = ["buildah", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs", "build",
               "--isolation", "oci", "--runtime", runtime, "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024",
               "-t", "made", str(context)]
    done = subprocess.run(command if runtime == str(RUNTIME) else peer(command), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "b\n0\n" in done.stdout


class Containerd:
    def __init__(self, directory):
        self.directory = directory
        self.address = f"{directory}/c.sock"
        (directory / "config.toml").write_text(
            f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self.address}"\n[ttrpc]\naddress = "{directory}/t.sock"\n')
        self.log = open(directory / "log", "w")
        self.process = subprocess.Popen(["containerd", "-c", str(directory / "config.toml")], stdout=self.log, stderr=self.log)

    def __call__(self, *arguments, check=True):
        done = subprocess.run(["timeout", "-s", "KILL", "60", "ctr", "-a", self.address, *arguments], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"ctr {arguments}: {done.stdout}{done.stderr}"
        return done


@pytest.fixture(scope="module")
def containerd(directory, root):
    path = directory / "containerd"
    path.mkdir()
    containerd = Containerd(path)
    for _ in range(100):
        if containerd("version", check=False).returncode == 0:
            break
        time.sleep(0.1)
    archive = path / "box.tar"
    storage = ["--root", f"{path}/podman", "--runroot", f"{path}/podman-run", "--storage-driver", "vfs"]
    tar = subprocess.run(["tar", "-C", str(root), "-c", "."], capture_output=True, check=True).stdout
    subprocess.run(["podman", *storage, "import", "-", "box"], input=tar, capture_output=True, check=True)
    subprocess.run(["podman", *storage, "save", "--format", "oci-archive", "-o", str(archive), "box"], capture_output=True, check=True)
    containerd("image", "import", "--index-name", "localhost/box:latest", str(archive), check=False)
    yield containerd
    containerd.process.send_signal(signal.SIGTERM)
    containerd.process.wait(20)


# runc is not tried on a hybrid host: containerd's shim reads the cgroups itself and starts it where it sees both.
def test_containerd(containerd):
    run = ["--runc-binary", str(RUNTIME), "--snapshotter", "native"]
    done = containerd("run", "--rm", *run, "--env", "A=b", "localhost/box:latest", "c1", "sh", "-c", "echo $A; id -u; exit 4", check=False)
    assert done.stdout == "b\n0\n" and done.returncode == 4
    containerd("run", "-d", *run, "--memory-limit", str(64 << 20), "localhost/box:latest", "c2", "sleep", "100")
    assert containerd("task", "exec", "--exec-id", "e1", "c2", "sh", "-c", "cat /proc/1/cmdline").stdout.startswith("sleep")
    containerd("task", "pause", "c2")
    assert "PAUSED" in containerd("task", "ls").stdout
    containerd("task", "resume", "c2")
    assert len(containerd("task", "ps", "c2").stdout.splitlines()) == 2
    assert str(64 << 20) in containerd("task", "metrics", "--format", "json", "c2").stdout
    containerd("task", "kill", "-s", "KILL", "c2")
    for _ in range(50):
        if "STOPPED" in containerd("task", "ls").stdout:
            break
        time.sleep(0.1)
    containerd("task", "rm", "c2", check=False)
    containerd("container", "rm", "c2")

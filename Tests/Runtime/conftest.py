# SPDX-License-Identifier: Apache-2.0
"""carrel-runtime under clients that nobody here wrote, with Debian's own runtimes as the control.

A check that fails with a peer too says something about the host; one that fails with ours alone is our fault."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNTIME = pathlib.Path(os.environ.get("CARREL_RUNTIME", pathlib.Path(os.environ.get("CARREL_BUILD", ROOT / ".build")) / os.environ.get("CARREL_CONFIGURATION", "debug") / "carrel-runtime"))
CGROUP_MANAGER = os.environ.get("CARREL_CGROUP_MANAGER", "cgroupfs")
APPLETS = "sh cat id ls sleep ps mount umount hostname true false echo env stat touch kill grep dd head yes mknod ln readlink mkdir pwd test wc tr sync df".split()
HYBRID = pathlib.Path("/sys/fs/cgroup/unified").is_dir()


@pytest.fixture(autouse=True)
def no_test_hangs():
    def late(*_):
        raise TimeoutError("this test takes longer than two minutes")
    signal.signal(signal.SIGALRM, late)
    # An emulated machine takes its time.
    signal.alarm(120 if CGROUP_MANAGER == "cgroupfs" else 600)
    yield
    signal.alarm(0)


def busybox_root(path: pathlib.Path):
    for folder in "bin tmp proc sys dev etc data run".split():
        (path / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/busybox", path / "bin" / "busybox")
    for applet in APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    return path


@pytest.fixture(scope="session")
def directory():
    path = pathlib.Path(f"/tmp/carrel-oci-{os.getpid()}")
    path.mkdir(mode=0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def root(directory):
    return busybox_root(directory / "root")


def peer(command):
    """Debian's crun refuses a host with cgroup v2 beside v1, and its runc stumbles: they run where they do not see it."""
    if not HYBRID:
        return list(command)
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", 'umount /sys/fs/cgroup/unified; exec "$@"', "sh", *command]


class Runtime:
    """The runtime's own command line."""

    def __init__(self, directory: pathlib.Path, root: pathlib.Path, program=RUNTIME):
        self.directory, self.root, self.program = directory, root, program
        self.state = directory / "state"
        self.count = 0

    def run(self, *arguments, check=True, timeout=60, **options):
        # Into files: a container that goes on keeps its standard streams, and a pipe would be waited for.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            done = subprocess.run(["timeout", "-s", "KILL", str(timeout), str(self.program), "--root", str(self.state), *map(str, arguments)],
                                  stdout=output, stderr=errors, stdin=subprocess.DEVNULL, **options)
            for name, file in (("stdout", output), ("stderr", errors)):
                file.seek(0)
                setattr(done, name, file.read().decode(errors="replace"))
        if check:
            assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def bundle(self, change=None, root=None):
        """A bundle of the configuration that `spec` writes, changed; the control program gets the same."""
        self.count += 1
        path = self.directory / f"bundle-{self.count}"
        path.mkdir()
        subprocess.run([RUNTIME, "spec", "--bundle", path], check=True)
        config = json.loads((path / "config.json").read_text())
        config["ociVersion"] = "1.0.2"
        config["process"]["terminal"] = False
        config["process"]["env"] = ["PATH=/bin"]
        config["root"]["path"] = str(root or self.root)
        del config["process"]["rlimits"]
        if change:
            change(config)
        (path / "config.json").write_text(json.dumps(config))
        return path

    def id(self):
        self.count += 1
        return f"t{os.getpid()}-{self.count}"

    def once(self, script, change=None, check=False, root=None, timeout=60):
        """Runs a shell script in a new container to its end."""
        def whole(config):
            config["process"]["args"] = ["/bin/sh", "-c", script]
            if change:
                change(config)
        return self.run("run", "--bundle", self.bundle(whole, root), self.id(), check=check, timeout=timeout)


def in_user_namespace(config, first=400_000):
    config["linux"]["namespaces"].append({"type": "user"})
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": first, "size": 65536}]


@pytest.fixture(scope="session")
def runtime(directory, root):
    (directory / "carrel").mkdir()
    runtime = Runtime(directory / "carrel", root)
    yield runtime
    assert runtime.run("list", "-q").stdout == "", "containers left behind"
    left = [str(p) for p in pathlib.Path("/sys/fs/cgroup").glob(f"**/t{os.getpid()}-*")]
    assert not left, left


class Podman:
    def __init__(self, directory: pathlib.Path, runtime):
        self.directory, self.runtime = directory, runtime

    def command(self, *arguments):
        d = self.directory
        whole = ["podman", "--root", f"{d}/root", "--runroot", f"{d}/run", "--tmpdir", f"{d}/tmp", "--storage-driver", "vfs",
                 "--cgroup-manager", CGROUP_MANAGER, "--events-backend", "file", "--runtime", str(self.runtime), *map(str, arguments)]
        return whole if self.runtime == RUNTIME else peer(whole)

    def __call__(self, *arguments, check=True, timeout=90 if CGROUP_MANAGER == "cgroupfs" else 400, **options):
        done = subprocess.run(["timeout", "-s", "KILL", str(timeout), *self.command(*arguments)], capture_output=True, text=True,
                              **{"stdin": subprocess.DEVNULL, **options})
        if check:
            assert done.returncode == 0, f"podman {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session", params=["carrel-runtime", "crun"])
def podman(request, directory, root):
    path = directory / f"podman-{request.param}"
    path.mkdir()
    podman = Podman(path, RUNTIME if request.param == "carrel-runtime" else "/usr/bin/crun")
    tar = subprocess.run(["tar", "-C", str(root), "-c", "."], capture_output=True, check=True).stdout
    done = subprocess.run(podman.command("import", "-", "box"), input=tar, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    yield podman
    podman("rm", "-f", "-t", "0", "--all", check=False)
    subprocess.run(["umount", f"{path}/root/vfs"], capture_output=True)

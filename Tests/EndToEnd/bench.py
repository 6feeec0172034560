# SPDX-License-Identifier: Apache-2.0
"""The figures of README.md: contenders take turns in every round, and the table gives medians and ratios."""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import grpc

from conftest import ROOT, Agent, generate_stubs
from support import Event

ROUNDS = int(sys.argv[1])


def stubs(folder):
    generate_stubs(folder)
    from carrel.v1 import carrel_pb2, carrel_pb2_grpc
    return carrel_pb2, carrel_pb2_grpc


def rootfs(folder):
    """A root with one static program, as an OCI bundle for crun, a directory for podman and an oci layout for us."""
    root = folder / "bundle" / "rootfs"
    for name in ("bin", "proc", "sys", "dev", "etc", "tmp", "run", "var", "home"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    subprocess.run(["clang", "-O2", "-static", "-o", root / "bin/stamp", ROOT / "Tests/Runtime/stamp.c"], check=True)
    for applet in ("true", "sh"):
        (root / "bin" / applet).symlink_to("busybox")
    subprocess.run(["crun", "spec"], cwd=folder / "bundle", check=True)
    config = json.loads((folder / "bundle/config.json").read_text())
    config["process"]["args"] = ["/bin/true"]
    config["process"]["terminal"] = False
    # The same isolation as a workspace: a user namespace and limits as well.
    config["linux"]["namespaces"] += [{"type": "user"}]
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 3000000, "size": 65536}]
    config["linux"]["resources"] = {"memory": {"limit": 67108864}, "pids": {"limit": 64}, "cpu": {"quota": 100000, "period": 100000}}
    (folder / "bundle/config.json").write_text(json.dumps(config))
    subprocess.run(["chown", "-R", "3000000:3000000", root], check=True)
    import hashlib, io, tarfile
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        def owner(entry):
            entry.uid = entry.gid = 0
            return entry
        tar.add(root, arcname=".", filter=owner)
    layout = folder / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)

    def blob(data):
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}
    diff = blob(layer.getvalue())
    settings = blob(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff["digest"]]}}).encode())
    manifest = blob(json.dumps({"schemaVersion": 2, "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **settings},
                                "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **diff}]}).encode())
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    return root, layout


class Carrel:
    def __init__(self, agent, pb, rpc):
        self.pb, self.channel = pb, grpc.insecure_channel(f"unix:{agent.socket}")
        self.service = rpc.WorkspaceServiceStub(self.channel)

    def spec(self, id, **fields):
        return self.pb.WorkspaceSpec(id=id, owner=self.pb.Owner(name="ada", uid=2001, gid=2001), **fields)

    def until(self, spec, types):
        """Launches and returns the milliseconds to each of these events, as its client sees them."""
        cursor = max((e.event.sequence for e in self.service.Watch(self.pb.WatchRequest(until_head=True))), default=0)
        watch = self.service.Watch(self.pb.WatchRequest(cursor=cursor, workspace=spec.id))
        begun, seen = time.perf_counter(), {}
        self.service.Launch(self.pb.LaunchRequest(spec=spec))
        for message in watch:
            seen[message.event.type] = (time.perf_counter() - begun) * 1000
            if message.event.type in types or message.event.type == Event.Failed:
                assert message.event.type != Event.Failed, message
                break
        watch.cancel()
        return seen

    def remove(self, id):
        self.service.Stop(self.pb.StopRequest(id=id, grace_period_seconds=0))
        self.service.Delete(self.pb.DeleteRequest(id=id))


class Peers:
    """Runs and times the peers' commands in a mount namespace of its own. On a hybrid host, Debian's crun refuses to
    work while it sees the cgroup2 mount beside the v1 ones: there, and only there, that mount is taken away."""

    LOOP = """
import json, subprocess, sys, time
for line in sys.stdin:
    begun = time.perf_counter()
    done = subprocess.run(json.loads(line), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    print(json.dumps([(time.perf_counter() - begun) * 1000, done.returncode, done.stderr]), flush=True)
"""

    def __init__(self):
        prepare = "umount /sys/fs/cgroup/unified 2>/dev/null; exec "
        self.process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", prepare + f"'{sys.executable}' -c \"$0\"", self.LOOP],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def clock(self, command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        taken, code, errors = json.loads(self.process.stdout.readline())
        assert code == 0, f"{command}: {errors}"
        return taken

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def bare_jupyterlab(root):
    """The same image, chrooted, without any isolation. Milliseconds from exec to 200 at /api."""
    home = pathlib.Path(tempfile.mkdtemp(dir=root + "/tmp"))
    port = "18888"
    begun = time.perf_counter()
    process = subprocess.Popen(
        ["/usr/sbin/chroot", "--userspec=1000:1000", root, "/opt/jupyter/bin/jupyter", "lab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
         "--LabApp.news_url=None", "--ServerApp.root_dir=/tmp", "--ServerApp.allow_remote_access=True", "--ContentsManager.allow_hidden=True",
         "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"],
        env={"HOME": "/tmp/" + home.name, "PATH": "/opt/jupyter/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.chown(home, 1000, 1000)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).read()
            break
        except OSError:
            assert process.poll() is None, "JupyterLab ended"
            time.sleep(0.005)
    taken = (time.perf_counter() - begun) * 1000
    process.kill()
    process.wait()
    return taken


def supervisors(carrel, pb, count=20):
    """Proportional set sizes in KB of the supervisors and of the first processes inside, with so many workspaces running."""
    ids = [f"p{index}" for index in range(count)]
    for id in ids:
        carrel.until(carrel.spec(id, tool="command", image="tiny", command=["/bin/busybox", "sleep", "1000"], resources=pb.Resources(memory="16Mi")), {Event.Ready, Event.Stopped})
    sizes = {"supervisor": [], "first process inside": []}
    found = {int(line.split()[0]) for line in subprocess.run(["pgrep", "-a", "-f", r"^carrel-shim [a-z2-7]+ p[0-9]+$"], capture_output=True, text=True).stdout.splitlines()}
    for pid in found:
        rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        size = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        parent = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        sizes["first process inside" if parent in found else "supervisor"].append(size)
    for id in ids:
        carrel.remove(id)
    return sizes


def in_process():
    """The bare system calls of a start up to the payload's first, three times: of a bundle, and of a workspace. Milliseconds."""
    done = subprocess.run([sys.executable, ROOT / "Tests/Runtime/bench.py", "3", "--in-process"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def to_exec(agent, carrel, pb, id):
    """From the call to what the program's own clock says when it begins. Nobody watches: every reader would share these CPUs."""
    begun = time.monotonic_ns()
    carrel.service.Launch(pb.LaunchRequest(spec=carrel.spec(id, tool="command", image="tiny", command=["/bin/stamp"])))
    time.sleep(0.1)
    began = int(agent.run("logs", id).stdout)
    carrel.remove(id)
    return (began - begun) / 1e6


def main():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="carrel-bench-", dir="/tmp"))
    folder.chmod(0o711)
    agent = Agent(folder)
    agent.start()
    chroot = folder / "chroot"
    peers = Peers()
    try:
        pb, rpc = stubs(folder)
        root, layout = rootfs(folder)
        carrel = Carrel(agent, pb, rpc)
        agent.run("image", "import", str(layout), "--name", "tiny:latest")
        agent.run("image", "import", str(ROOT / ".cache/images/jupyterlab.tar"), "--name", "jupyterlab:latest", timeout=300)
        times = {name: [] for name in ("bundle", "workspace", "carrel, to exec", "carrel, to exec known", "carrel, to exit known", "crun", "podman")}
        for index in range(ROUNDS + 2):
            id = f"t{index}"
            seen = carrel.until(carrel.spec(id, tool="command", image="tiny", command=["/bin/true"]), {Event.Stopped})
            carrel.remove(id)
            executed = to_exec(agent, carrel, pb, f"s{index}")
            crun = peers.clock(["crun", "run", "--bundle", str(folder / "bundle"), f"bench-{index}"])
            podman = peers.clock(["podman", "--cgroup-manager=cgroupfs", "run", "--rm", "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--memory=64m", "--pids-limit=64", "--rootfs", str(root), "/bin/true"]) if index % 3 == 0 else None
            floors = in_process() if index % 3 == 0 else {}
            if index < 2:
                continue  # warm-up
            for name, values in floors.items():
                times[name] += values
            times["carrel, to exec"].append(executed)
            times["carrel, to exec known"].append(seen[Event.Starting])
            times["carrel, to exit known"].append(seen[Event.Stopped])
            times["crun"].append(crun)
            if podman:
                times["podman"].append(podman)
        sizes = supervisors(carrel, pb)
        agent_layers = [p for p in (folder / "state/images/layers").iterdir() if p.is_dir() and (p / "opt").exists() or (p / "usr/bin").exists()]
        lowers = ":".join(str(p) for p in sorted(agent_layers, key=lambda p: (p / "usr/lib").exists()))
        for name in ("upper", "work"):
            (folder / name).mkdir()
        chroot.mkdir()
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lowers},upperdir={folder}/upper,workdir={folder}/work", chroot], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", chroot / "proc"], check=True)
        subprocess.run(["mount", "--bind", "/dev", chroot / "dev"], check=True)
        (chroot / "tmp").chmod(0o1777)
        labs = {"bare chroot": [], "carrel": []}
        for index in range(max(3, ROUNDS // 3) + 1):
            bare = bare_jupyterlab(str(chroot))
            id = f"lab{index}"
            seen = carrel.until(carrel.spec(id, tool="jupyterlab", image="jupyterlab", resources=pb.Resources(cpu="2")), {Event.Ready})
            carrel.remove(id)
            if index:
                labs["bare chroot"].append(bare)
                labs["carrel"].append(seen[Event.Ready])
        report(times, labs)
        print("\n| memory (PSS), 20 workspaces running | median KB | range |\n|---|---|---|")
        for name, values in sizes.items():
            print(f"| {name} | {statistics.median(values):.0f} | {min(values)} – {max(values)} |")
    finally:
        for name in ("dev", "proc", "."):
            subprocess.run(["umount", chroot / name], stderr=subprocess.DEVNULL)
        peers.end()
        agent.process.terminate()
        agent.process.wait(30)
        subprocess.run(["nft", "delete", "table", "inet", "carrel_e"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def row(name, values, base):
    median = statistics.median(values)
    print(f"| {name} | {median:.1f} | {min(values):.1f} – {max(values):.1f} | {median / base:.2f} |")
    return median


def report(times, labs):
    kernel = os.uname().release
    version = subprocess.run(["crun", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    podman = subprocess.run(["podman", "--version"], capture_output=True, text=True).stdout.strip()
    print(f"\n{ROUNDS} rounds, kernel {kernel}, {os.cpu_count()} CPUs, {version}, {podman}\n")
    print("| a static program | median ms | range | ratio |\n|---|---|---|---|")
    base = row("floor: the system calls of a bundle (`Tests/Runtime/floor.c`)", times["bundle"], statistics.median(times["bundle"]))
    row("floor: the system calls of a workspace (the same file)", times["workspace"], base)
    row("carrel: API call → program runs", times["carrel, to exec"], base)
    row("carrel: API call → that it runs is known (event received)", times["carrel, to exec known"], base)
    row("carrel: API call → exit known (event received)", times["carrel, to exit known"], base)
    row("crun run", times["crun"], base)
    row("podman run", times["podman"], base)
    print("\n| JupyterLab to 200 at /api | median ms | range | ratio |\n|---|---|---|---|")
    bare = row("bare chroot", labs["bare chroot"], statistics.median(labs["bare chroot"]))
    ours = row("carrel: API call → Ready (event received)", labs["carrel"], bare)
    print(f"\nJupyterLab in a workspace takes {ours - bare:+.0f} ms compared with the bare chroot.")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What storage and credentials cost: the drivers take turns in every round; the same program writes inside and outside."""

import base64
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import grpc
from conftest import ROOT, Agent, generate_stubs
from test_credentials import FETCH

ROUNDS = int(sys.argv[1])
# What fio does: MB/s, and requests a second. What is written is a new file each time; what is read the same, since disks that are not
# real differ much from one place to another.
JOBS = {
    "sequential write and fsync, 256 MB": (["--rw=write", "--bs=1M", "--size=256M", "--end_fsync=1", "--unlink=1"], lambda job: job["write"]["bw"]),
    "sequential read, nothing cached, 256 MB": (["--rw=read", "--bs=1M", "--size=256M", "--invalidate=1", "--filename=read"], lambda job: job["read"]["bw"]),
    "random reads and writes of 4 KB, 3 s": (["--rw=randrw", "--rwmixread=70", "--bs=4k", "--size=64M", "--time_based", "--runtime=3", "--end_fsync=1", "--unlink=1"],
                                             lambda job: job["read"]["iops"] + job["write"]["iops"]),
}


def fio(run, folder, arguments):
    said = run(["--name=x", f"--directory={folder}", "--output-format=json", *arguments])
    return json.loads(said[said.index("{"):])["jobs"][0]


def bundle():
    """fio with what it is linked against, for an image that lacks it: a tar archive as base64."""
    program = shutil.which("fio")
    libraries = [part for line in subprocess.run(["ldd", program], capture_output=True, text=True).stdout.splitlines() for part in line.split() if part.startswith("/")]
    packed = subprocess.run(["tar", "-C", "/", "--create", "--dereference", "--transform=s|.*/||", program, *libraries], capture_output=True, check=True).stdout
    return base64.b64encode(packed).decode()


def stubs(folder):
    generate_stubs(folder)
    from carrel.v1 import storage_pb2, storage_pb2_grpc
    return storage_pb2, storage_pb2_grpc


def attachments(agent, id, count):
    """How long each attachment, and each detachment, takes its caller, in milliseconds."""
    pb, rpc = stubs(agent.directory)
    took = {"attach": [], "detach": []}
    with grpc.insecure_channel(f"unix:{agent.socket}") as channel:
        service = rpc.StorageServiceStub(channel)
        for _ in range(count):
            for what, call in (("attach", lambda: service.AttachDataset(pb.AttachDatasetRequest(id=id, dataset={"dataset": "sales", "target": "/data/sales"}))),
                               ("detach", lambda: service.DetachDataset(pb.DetachDatasetRequest(id=id, target="/data/sales")))):
                begun = time.monotonic()
                call()
                took[what].append((time.monotonic() - begun) * 1000)
    return took


def row(name, values, unit, digits=1):
    print(f"| {name} | {statistics.median(values):.{digits}f} {unit} | {min(values):.{digits}f} – {max(values):.{digits}f} |")


def main():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="carrel-bench-"))
    directory.chmod(0o711)
    agent = Agent(directory)
    agent.start()
    try:
        agent.run("image", "import", str(ROOT / ".cache/images/jupyterlab.tar"), "--name", "jupyterlab:latest", timeout=300)
        (directory / "datasets/sales").mkdir(parents=True)
        (directory / "datasets/sales.yaml").write_text(f"name: sales\npath: {directory}/datasets/sales\nreaders: [\"*\"]\n")
        key = directory / "key"
        key.write_bytes(os.urandom(64))
        storage = {"directory": "driver: directory", "image": "driver: image, size: 2Gi", "image, encrypted": "driver: image, size: 2Gi, encrypted: true",
                   "image, XFS": "driver: image, size: 2Gi, fileSystem: xfs", "image, btrfs": "driver: image, size: 2Gi, fileSystem: btrfs"}
        phase, rates = {}, {}

        def launch(id, owner, driver, *options, command="[sleep, \"1000\"]", **changes):
            options += ("--home-key", str(key)) if "encrypted" in driver else ()
            agent.launch("batch.yaml", id, *options, command=command, image="jupyterlab:latest", owner=f"{{name: {owner}, uid: 2001, gid: 2001}}",
                         storage=f"{{{storage[driver]}}}", resources="{memory: 2Gi, cpu: \"2\"}", check=False, **changes)
            return {p["name"]: p["milliseconds"] for p in agent.json("get", id).get("phases", [])}

        for round in range(ROUNDS):
            for number, driver in enumerate(storage):
                for kind in ("first", "warm"):
                    took = launch("x", f"o{number}-{round}", driver, command="[\"true\"]")
                    phase.setdefault((driver, kind), []).append(took["storage"])
                    agent.remove("x")
        program = bundle()
        for number, driver in enumerate(["directory", "image", "image, encrypted"]):
            launch("io", f"io{number}", driver, "--no-wait", aws="{roles: [analyst]}")
            while agent.json("get", "io")["state"] != "STATE_READY":
                pass
            agent.run("exec", "--interactive", "io", "--", "sh", "-c", "mkdir fio && base64 -d | tar -C fio -x", input=program)
            inside = lambda arguments: agent.exec("io", "sh", "-c", "cd fio && exec ./ld-linux-x86-64.so.2 --library-path . ./fio \"$@\"", "sh", *arguments).stdout
            # A directory is compared with itself.
            outside = directory / "homes" / f"io{number}" if driver == "directory" else directory
            on_host = lambda arguments: subprocess.run(["fio", *arguments], capture_output=True, text=True, check=True).stdout
            for turn in range(max(4, ROUNDS + ROUNDS % 2)):
                for job, (arguments, figure) in JOBS.items():
                    # Each goes first in every other round: the second finds a disk that has just been used.
                    sides = [("inside", inside, "/home/analyst"), ("outside", on_host, outside)]
                    found = {side: figure(fio(run, folder, arguments)) for side, run, folder in (sides if turn % 2 == 0 else sides[::-1])}
                    rates.setdefault((driver, job), []).append(found["inside"] / found["outside"])
            if driver == "directory":
                took = attachments(agent, "io", 50)
                times = json.loads(agent.python("io", FETCH + """
took = []
for _ in range(2000):
    begun = time.monotonic(); fetch(); took.append((time.monotonic() - begun) * 1000); time.sleep(0.005)
print(json.dumps(took))
"""))
            agent.remove("io")
        print(f"\n{ROUNDS} rounds, kernel {os.uname().release}, {os.cpu_count()} CPUs\n\n| storage | median | range |\n|---|---|---|")
        for (driver, kind), values in phase.items():
            row(f"`{driver}`, {kind} start: added to it", values, "ms")
        for (driver, job), values in rates.items():
            row(f"`{driver}`: {job}, inside ÷ outside", values, "×", 2)
        for what, values in took.items():
            row(f"{what} a dataset, the workspace running", values, "ms")
        times.sort()
        print(f"| a credential request, 2000 of them, 200 a second at the most | {times[1000]:.1f} ms | p99 {times[1980]:.1f} |")
    finally:
        for workspace in agent.json("ps"):
            agent.remove(workspace["spec"]["id"])
        agent.process.terminate()
        agent.process.wait(30)
        subprocess.run(["rm", "-rf", directory])


main()

# SPDX-License-Identifier: Apache-2.0
"""What storage and credentials cost: the drivers take turns in every round; the same program writes inside and outside."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from conftest import ROOT, Agent
from test_credentials import FETCH

ROUNDS = int(sys.argv[1])
WRITE = """
import os, sys, time
path, block, begun = sys.argv[1], os.urandom(1 << 20), time.monotonic()
file = os.open(path, os.O_WRONLY | os.O_CREAT)
for _ in range(256): os.write(file, block)
os.fsync(file); took = time.monotonic() - begun
os.close(file); os.unlink(path)
print(256 / took)
"""


def row(name, values, unit, digits=1):
    print(f"| {name} | {statistics.median(values):.{digits}f} {unit} | {min(values):.{digits}f} – {max(values):.{digits}f} |")


def main():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="carrel-bench-"))
    directory.chmod(0o711)
    agent = Agent(directory)
    agent.start()
    try:
        agent.run("image", "import", str(ROOT / ".cache/images/jupyterlab.tar"), "--name", "jupyterlab:latest", timeout=300)
        phase, rates = {}, {}

        def launch(id, owner, driver, command="[sleep, \"1000\"]", options=[], **changes):
            size = ", size: 2Gi" if driver == "image" else ""
            agent.launch("batch.yaml", id, *options, command=command, image="jupyterlab:latest", owner=f"{{name: {owner}, uid: 2001, gid: 2001}}",
                         storage=f"{{driver: {driver}{size}}}", resources="{memory: 1Gi}", check=False, **changes)
            return {p["name"]: p["milliseconds"] for p in agent.json("get", id).get("phases", [])}

        for round in range(ROUNDS):
            for driver in ("directory", "image"):
                for kind in ("first", "warm"):
                    took = launch("x", f"{driver}-{round}", driver, command="[\"true\"]")
                    phase.setdefault((driver, kind), []).append(took["storage"])
                    agent.remove("x")
        for driver in ("directory", "image"):
            launch("io", f"io-{driver}", driver, options=["--no-wait"], aws="{roles: [analyst]}")
            while agent.json("get", "io")["state"] != "STATE_READY":
                pass
            for _ in range(max(3, ROUNDS // 3)):
                inside = float(agent.exec("io", "python3", "-c", WRITE, "/home/analyst/big").stdout)
                outside = float(subprocess.run([sys.executable, "-c", WRITE, str(directory / "homes" / "big")], capture_output=True, text=True, check=True).stdout)
                rates.setdefault(driver, []).append(inside / outside)
            if driver == "image":
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
        for driver, values in rates.items():
            row(f"`{driver}`: sequential write and fsync of 256 MB, inside ÷ outside", values, "×", 2)
        times.sort()
        print(f"| a credential request, 2000 of them, 200 a second at the most | {times[1000]:.1f} ms | p99 {times[1980]:.1f} |")
    finally:
        for workspace in agent.json("ps"):
            agent.remove(workspace["spec"]["id"])
        agent.process.terminate()
        agent.process.wait(30)
        subprocess.run(["rm", "-rf", directory])


main()

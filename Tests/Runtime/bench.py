# SPDX-License-Identifier: Apache-2.0
"""`hack/bench runtime`: one bundle, started by everybody in turns. Ratios are what to read."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time

from conftest import ROOT, RUNTIME, busybox_root, peer

ROUNDS = int(sys.argv[1])
FIRST = 400_000
PEERS = ["crun", "runc"]


def bundle(folder):
    root = busybox_root(folder / "rootfs")
    subprocess.run([RUNTIME, "spec", "--bundle", folder], check=True)
    config = json.loads((folder / "config.json").read_text())
    config["ociVersion"] = "1.0.2"
    config["process"].update(terminal=False, args=["/bin/true"], env=["PATH=/bin"], capabilities={})
    del config["process"]["rlimits"]
    config["root"]["readonly"] = False
    config["linux"]["namespaces"].append({"type": "user"})
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": FIRST, "size": 65536}]
    config["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "pids": {"limit": 64}, "cpu": {"quota": 100000, "period": 100000},
                                    "devices": [{"allow": False, "access": "rwm"}]}
    names = re.search(r'"""(.*?)"""', (ROOT / "Sources/domain/Isolation/SyscallProfile.swift").read_text(), re.S).group(1).split()
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                                  "syscalls": [{"names": [*names, "clone"], "action": "SCMP_ACT_ALLOW"}]}
    (folder / "config.json").write_text(json.dumps(config))
    subprocess.run(["chown", "-R", f"{FIRST}:{FIRST}", root], check=True)


class Bench:
    def __init__(self, folder, states):
        """`states`: in memory, as /run is, where runtimes keep theirs."""
        self.folder, self.states, self.count = folder, states, 0
        bundle(folder)
        subprocess.run([RUNTIME, "--root", states / "carrel", "run", "--bundle", folder, "first"], check=True, stdin=subprocess.DEVNULL)
        kept = next((states / "carrel/.filters").iterdir()).read_bytes()
        profile = struct.unpack_from("<I", kept)[0]
        (folder / "filter").write_bytes(kept[8 + profile:])
        self.floor = folder / "floor"
        for name, place in (("floor", self.floor), ("stamp", folder / "rootfs/bin/stamp")):
            subprocess.run(["clang", "-O2", "-static", "-o", place, ROOT / f"Tests/Runtime/{name}.c"], check=True)

    def id(self):
        self.count += 1
        return f"bench-{os.getpid()}-{self.count}"

    def command(self, who):
        f, states = self.folder, self.states
        return {
            "floor": lambda: [self.floor, f / "rootfs", f / "filter", str(FIRST)],
            "carrel-runtime": lambda: [RUNTIME, "--root", states / "carrel", "run", "--bundle", f, self.id()],
            "runc": lambda: ["runc", "--root", states / "runc", "run", "--bundle", f, self.id()],
            "crun": lambda: ["crun", "--root", states / "crun", "run", "--bundle", f, self.id()],
            "bwrap (no cgroup, no seccomp)": lambda: ["bwrap", "--unshare-all", "--uid", "0", "--gid", "0", "--bind", f / "rootfs", "/", "--proc", "/proc", "--dev", "/dev", "/bin/true"],
        }[who]()

    def once(self, who):
        command = [str(a) for a in self.command(who)]
        begun = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert done.returncode == 0, (who, done.stderr)
        return (time.perf_counter() - begun) * 1000

    def in_process(self, *mode):
        """The floor from its first call to the first of its payload, without the program's own start and end. Milliseconds."""
        said = subprocess.run([*map(str, self.command("floor")), *mode], capture_output=True, text=True, check=True).stdout.split()
        return (int(said[0]) - int(said[1])) / 1e6

    def rate(self, who, workers, total=192):
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            begun = time.perf_counter()
            list(pool.map(lambda _: self.once(who), range(total)))
            return total / (time.perf_counter() - begun)

    def calls(self, who):
        log = self.folder / "calls"
        subprocess.run(["strace", "-f", "-qq", "-o", log, *map(str, self.command(who))], check=True, stdin=subprocess.DEVNULL, capture_output=True)
        lines = [line for line in log.read_text(errors="replace").splitlines() if "resumed>" not in line and "---" not in line and "+++" not in line]
        return len(lines)


def main():
    # Peers refuse or stumble over cgroup v2 beside v1: everything here runs where it is not seen, but the floor and ours.
    with tempfile.TemporaryDirectory(prefix="carrel-bench-", dir="/var/tmp") as name, tempfile.TemporaryDirectory(prefix="carrel-bench-", dir="/dev/shm") as states:
        os.chmod(name, 0o755)
        bench = Bench(pathlib.Path(name), pathlib.Path(states))
        if "--peers" in sys.argv:
            print(json.dumps({w: [bench.once(w) for _ in range(ROUNDS)] for w in PEERS}))
            return
        if "--in-process" in sys.argv:
            folder = bench.folder / "workspace"
            (folder / "home").mkdir(parents=True)
            modes = {"bundle": ["stamp"], "workspace": ["workspace", str(folder)]}
            print(json.dumps({name: [bench.in_process(*mode) for _ in range(ROUNDS)] for name, mode in modes.items()}))
            return
        who = ["floor", "carrel-runtime", "bwrap (no cgroup, no seccomp)"]
        times = {w: [] for w in who} | {w + ", after 100 ms of idleness": [] for w in who[:2]} | {w: [] for w in PEERS}
        for w in who:
            bench.once(w)
        crun = peer([sys.executable, __file__, "3", "--peers"])
        for index in range(ROUNDS):
            for w in who:
                times[w].append(bench.once(w))
            for w in who[:2]:
                time.sleep(0.1)
                times[w + ", after 100 ms of idleness"].append(bench.once(w))
            if index % 3 == 0:
                for w, values in json.loads(subprocess.run(crun, check=True, capture_output=True).stdout).items():
                    times[w] += values[1:]
        version = subprocess.run(["crun", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        print(f"{ROUNDS} rounds, kernel {os.uname().release}, {os.cpu_count()} CPUs, {version}\n")
        floor = statistics.median(times["floor"])
        print("| start to exit, as a process | median ms | range | × floor |\n|---|---|---|---|")
        for w, values in times.items():
            # Of what is measured the same way.
            base = statistics.median(times["floor" + w.removeprefix("carrel-runtime")]) if w.startswith("carrel-runtime") else floor
            print(f"| {w} | {statistics.median(values):.2f} | {min(values):.2f} – {max(values):.2f} | {statistics.median(values) / base:.2f} |")
        print("\n| launches a second | 8 at once | 32 at once |\n|---|---|---|")
        rates = {w: (bench.rate(w, 8), bench.rate(w, 32)) for w in who[:2]}
        for w, (eight, many) in rates.items():
            print(f"| {w} | {eight:.0f} | {many:.0f} |")
        if shutil.which("strace"):
            print("\n| system calls of one start | |\n|---|---|")
            for w in who[:2]:
                print(f"| {w} | {bench.calls(w)} |")
        size = RUNTIME.with_name("carrel-runtime.stripped")
        subprocess.run(["strip", "-o", size, RUNTIME], check=True)
        print(f"\ncarrel-runtime, stripped: {size.stat().st_size / 1e6:.1f} MB. What the floor's time goes to:\n")
        print(subprocess.run([*map(str, bench.command("floor")), "steps"], capture_output=True, text=True).stdout)


main()

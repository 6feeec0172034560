# SPDX-License-Identifier: Apache-2.0
"""`hack/torture`: random life and random harm for so many minutes, judged by the oracle every few steps. The seed is printed;
with --seed the same choices are made again."""

import argparse
import collections
import fcntl
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT, Controller, Witness, destroy, judge, make, pids, until

POINTS = re.findall(r'case \w+ = "(.*)"', (ROOT / "Sources/kernel/Linux/Fault.swift").read_text())
SCRIPTS = ["exit 0", "exit 3", "sleep 1000", "sleep 0.3; exit 7", "trap '' TERM; sleep 1000", "kill -9 $$", "yes | head -c 300000",
           "dd if=/dev/zero of=/dev/null bs=100M count=1", "test -e ~/x || { touch ~/x; exit 1; }"]


class Torture:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.directory = pathlib.Path(f"/tmp/carrel-torture-{os.getpid()}")
        self.panel = Controller(self.directory)
        self.agent = make(self.directory, f"journal: {{keep: 50}}\nmaxLaunching: 6\ncontrollers: [{{name: panel, socket: {self.panel.socket}, owner: true}}]\n", "crt")
        self.panel.start()
        (self.directory / "datasets" / "files").mkdir(parents=True)
        (self.directory / "datasets" / "files.yaml").write_text(f"name: files\npath: {self.directory}/datasets/files\nreaders: [ada]\n")
        self.witness = Witness(self.agent)
        self.counts, self.names, self.number = collections.Counter(), [], 0

    # ------------------------------------------------------------------- life

    def launch(self):
        self.number += 1
        name = f"t{self.number}"
        lifecycle = self.random.choice(["", "", "", "{restartPolicy: onFailure}", "{maxLifetimeSeconds: 1}"])
        script = self.random.choice(SCRIPTS)
        if "kill -9" in script:
            self.agent.killed.add(name)
        if self.agent.launch(name, script, lifecycle).returncode == 0:
            self.names.append(name)

    def stop(self):
        if self.names:
            self.agent.run("stop", self.random.choice(self.names), "--time", self.random.choice("012"))

    def remove(self):
        if self.names:
            name = self.random.choice(self.names)
            if self.agent.run("rm", "--force", name).returncode == 0:
                self.names.remove(name)

    def again(self):
        """The same request again: nothing may come of it."""
        if self.names:
            self.agent.run("launch", "--no-wait", self.directory / f"{self.random.choice(self.names)}.yaml")

    def datasets(self):
        """Attached and detached, by whichever agent there is."""
        if self.names:
            name = self.random.choice(self.names)
            self.agent.run("dataset", "attach", name, "files", "/data/files", *self.random.choice([[], ["--expires", "1s"]]))
            if self.random.random() < 0.5:
                self.agent.run("dataset", "detach", name, "/data/files", "--holders", self.random.choice(["refuse", "lazy", "stop"]))

    def drain(self):
        self.agent.run("drain")
        self.agent.run("uncordon")

    # ------------------------------------------------------------------- harm

    def kill_agent(self):
        self.agent.stop()
        self.agent.start()

    def arm(self):
        """The next agent ends itself at some point."""
        self.agent.stop(self.random.choice([signal.SIGKILL, signal.SIGTERM]))
        self.agent.start(f"{self.random.choice(POINTS)}:{self.random.randint(1, 3)}")

    def kill_supervisor(self):
        processes = [(name, pid) for name in self.names for pid in pids(self.agent, name)]
        if processes:
            name, pid = self.random.choice(processes)
            # PID 1 has the supervisor's name; its end is one by SIGKILL.
            self.agent.killed.add(name)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def freeze_agent(self):
        if self.agent.lives:
            self.agent.process.send_signal(signal.SIGSTOP)
            time.sleep(self.random.random())
            self.agent.process.send_signal(signal.SIGCONT)

    def controller_restarts(self):
        self.panel.stop()
        self.panel.start(*self.random.choice([[], ["--window", 1], ["--slow", 5], ["--crash-after", 5]]))

    def controller_away(self):
        self.panel.stop()

    STEPS = [(launch, 10), (stop, 4), (remove, 5), (again, 2), (datasets, 3), (drain, 1), (kill_agent, 2), (arm, 3), (kill_supervisor, 2), (freeze_agent, 1),
             (controller_restarts, 2), (controller_away, 1)]

    def step(self):
        if not self.agent.lives:
            self.agent.process.wait()
            self.agent.start(self.random.choice(["", self.random.choice(POINTS)]))
        step = self.random.choices([s for s, _ in self.STEPS], [w for _, w in self.STEPS])[0]
        self.counts[step.__name__] += 1
        step(self)
        if len(self.names) > 12:
            self.remove()

    def settle(self):
        """Everything as it should be, for the oracle."""
        if self.agent.lives:
            self.agent.stop()
        self.agent.start()
        if self.panel.process is None or self.panel.process.poll() is not None or "--crash-after" in self.panel.process.args:
            self.panel.stop()
            self.panel.start()
        self.agent.run("uncordon")
        for name in list(self.names):
            done = until(lambda: (d := self.agent.do("rm", "--force", name)).returncode in (0, 3) and d, f"{name} is removed", 30)
            self.names.remove(name)
            del done
        judge(self.agent, self.panel)
        self.witness.check()
        self.counts["judged"] += 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    # Two would sweep each other's cgroups and links.
    lock = open("/tmp/carrel-torture.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("torture: another one runs on this host")
    print(f"torture: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    torture = Torture(options.seed)
    end = time.monotonic() + options.minutes * 60
    failed = None
    try:
        while time.monotonic() < end:
            for _ in range(torture.random.randint(5, 40)):
                torture.step()
            torture.settle()
    except AssertionError as error:
        failed = error
        subprocess.run(["cp", "-r", torture.agent.state / "journal.sqlite", torture.panel.log, ROOT / ".cache/log/"])
    stream = torture.agent.records()[2]
    reached = (torture.directory / "reached").read_text().splitlines() if (torture.directory / "reached").exists() else []
    print("torture: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in torture.counts.most_common()))
    print(f"torture: {stream['head']} events, ended {len(reached)} times at {len(set(reached))} of {len(POINTS)} points, {torture.witness.ticks} ticks over one connection")
    if failed:
        print(f"torture: FAILED: {failed}\nthe directory is left: {torture.directory}")
        sys.exit(1)
    destroy(torture.agent, torture.panel)
    print("torture: nothing lost")


if __name__ == "__main__":
    main()

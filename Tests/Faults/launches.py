# SPDX-License-Identifier: Apache-2.0
"""Launches batch runs whose ends are known, while the agent is killed with SIGKILL at random moments and at named points. What was
accepted has to end as it was to end, reported once for each attempt. The seed is printed; with --seed the same choices are made
again, but when they fall is up to the scheduler."""

import argparse
import collections
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from conftest import ROOT, Agent, Code, Event, Witness, cause, destroy, judge, make
from phases import MEANING, PHASES, Life


def agent_points():
    """The named points of the agent: those of Fault.swift before the supervisor's."""
    return re.findall(r'case \w+ = "(.*)"', (ROOT / "Sources/kernel/Linux/Fault.swift").read_text().split("// The supervisor.")[0])


# What a workspace does not pass that is launched and ends by itself.
ELSEWHERE = re.compile("Stopping|Failed|Deleted|Drain|[dD]ataset|acknowledged|trimmed|folder removed|Restarting")
POINTS = [p for p in agent_points() if not ELSEWHERE.search(p)]

# ---------------------------------------------------------------------- runs

# Statuses above those of the runs themselves: what a script found wrong.
WRONG = {250: "the tool was started twice", 251: "there is no credential file", 252: "the credential file has another content",
         253: "there is no network link", 254: "there is no token"}
OWNERS = [("ada", 2001), ("grace", 2002), ("alan", 2003)]
SERVED = """name: served
arguments: [/bin/sh, -c, {script}]
port: 8080
readiness: {{path: /, status: 200, timeoutSeconds: 60}}
tokenFile: token
home: /home/analyst
"""
LINKED = "test -d /sys/class/net/eth0 || exit 253; "
SERVE = ("mkdir ~/.ran-$RUN || exit 250; test -s /run/carrel/credentials/token || exit 254; " + LINKED
         + "sleep $BEFORE; mkdir -p /tmp/w; echo ok > /tmp/w/index.html; httpd -p 8080 -h /tmp/w; sleep $AFTER; exit $STATUS")


@dataclasses.dataclass
class Run:
    """A workspace and the exit status of each of its attempts."""
    id: str
    kind: str
    ends: list
    spec: str
    secret: str = ""

    def write(self, directory):
        self.path = directory / f"{self.id}.yaml"
        self.path.write_text(self.spec)
        self.options = []
        if self.secret:
            (directory / f"{self.id}.key").write_text(self.secret)
            self.options = ["--credential", f"key={directory / self.id}.key"]
        return self


KINDS = {"plain": 3, "secret": 3, "again": 2, "closed": 1, "served": 2}


def make_run(choices, number, kind=None):
    """A run with a status that its neighbours do not have: `choices` decides everything else."""
    kind = kind or choices.choices(list(KINDS), list(KINDS.values()))[0]
    id, status, seconds = f"k{number}", number * 7 % 201, f"{choices.uniform(0, 2):.2f}"
    (owner, uid), ends, more, secret = choices.choice(OWNERS), [status], "", ""
    # A second start of the same attempt finds the mark of the first.
    once = f"mkdir ~/.ran-{id} || exit 250; " + LINKED
    script = f"{once}sleep {seconds}; exit {status}"
    if kind == "secret":
        # The status is known to the credential file alone.
        word = f"{choices.getrandbits(64):x}"
        secret = f"{word} {status}\n"
        script = (f"{once}read word status < /run/carrel/credentials/key || exit 251; test $word = {word} || exit 252; "
                  f"sleep {seconds}; exit $status")
    elif kind == "again":
        ends, more = [status or 201, 0], "lifecycle: {restartPolicy: onFailure}\n"
        script = (f"mkdir ~/.ran-{id} 2>/dev/null && {{ sleep {seconds}; exit {ends[0]}; }}; mkdir ~/.again-{id} || exit 250; {LINKED}"
                  f"sleep {choices.uniform(0, 1):.2f}; exit 0")
    elif kind == "closed":
        more = "network: none\n"
    tool = f"tool: command\ncommand: {json.dumps(['/bin/sh', '-c', script])}\n"
    if kind == "served":
        before = choices.uniform(0, 0.8)
        tool = (f"tool: served\nenvironment: {{RUN: {id}, BEFORE: \"{before:.2f}\", AFTER: \"{choices.uniform(0.3, 1.2):.2f}\", "
                f"STATUS: \"{status}\"}}\n")
    spec = f"id: {id}\nimage: busybox:latest\nresources: {{memory: 64Mi}}\nowner: {{name: {owner}, uid: {uid}, gid: {uid}}}\n{tool}{more}"
    return Run(id, kind, ends, spec, secret)


def launch(agent, run, ready=lambda: True, seconds=60):
    """What a careful client does. Returns how it knows that the workspace was accepted: "answered" or, where the agent ended under
    the call, "found". `ready` waits for an agent that can be called."""
    end, said = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        ready()
        done = agent.run("launch", "--no-wait", *run.options, run.path)
        if done.returncode == 0:
            return "answered"
        said = done.stderr
        if "another spec" in said:
            break
        ready()
        if agent.run("get", run.id).returncode == 0:
            return "found"
        time.sleep(0.05)
    raise AssertionError(f"{run.id} was not accepted: {said.strip()}")


def complaints(events, runs):
    """What is wrong with the ends of accepted runs, by their ids; pure. `events` as in the journal."""
    mine, wrong = collections.defaultdict(list), {}
    for event in events:
        mine[event["workspace"]].append(event)
    for run in runs:
        found = []
        created = sum(e["type"] == Event.Created for e in mine[run.id])
        if created != 1:
            found.append(f"{created} events that it was created" if created else "the agent knows nothing of it")
        ended = collections.defaultdict(list)
        for event in mine[run.id]:
            if event["type"] in (Event.Stopped, Event.Failed):
                ended[event["generation"]].append((event["type"], cause(json.loads(event["reason"] or "null"))))
        for attempt, status in enumerate(run.ends, 1):
            if len(ended[attempt]) != 1:
                found.append(f"attempt {attempt} has {len(ended[attempt])} ends")
            for kind, reason in ended[attempt]:
                if kind != Event.Stopped or not reason or (reason["code"], reason["exitCode"]) != (Code.Exited, status):
                    said = f"{reason['code']}: {reason['message']}" if reason else "no reason"
                    why = f" ({WRONG[reason['exitCode']]})" if reason and reason["exitCode"] in WRONG else ""
                    found.append(f"attempt {attempt}, for status {status}: {kind}, {said}{why}")
        if more := [a for a in ended if a > len(run.ends)]:
            found.append(f"attempts {more}, of {len(run.ends)}")
        if found:
            wrong[run.id] = found
    return wrong


# -------------------------------------------------------------------- client

def lock():
    """Two on one host would sweep each other's cgroups and links. Held until the file is closed."""
    file = open("/tmp/carrel-launches.lock", "w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def make_agent(directory, prefix="crk"):
    """An agent with the tool `served` beside `command`."""
    agent = make(directory, prefix=prefix)
    tools = directory / "tools"
    tools.mkdir()
    shutil.copy(ROOT / "manifests/tools/command.yaml", tools)
    (tools / "served.yaml").write_text(SERVED.format(script=json.dumps(SERVE)))
    agent.config.write_text(re.sub("^tools: .*$", f"tools: {tools}", agent.config.read_text(), flags=re.M))
    agent.stop(signal.SIGTERM)
    agent.start()
    return agent


class Launches:
    """Workers launch and wait, a keeper removes what has ended, and the thread that calls `run` kills."""

    WORKERS = 6

    def __init__(self, launches, seed, seconds=3600, least=1, directory=None):
        self.wanted, self.seed, self.least = launches, seed, least
        self.seconds, self.begun = seconds, time.monotonic()
        self.specs, self.moments = random.Random(seed), random.Random(seed + 1)
        self.agent: Agent = make_agent(directory or pathlib.Path(f"/tmp/carrel-launches-{os.getpid()}"))
        self.guard = threading.Lock()
        self.runs, self.accepted, self.failures = {}, {}, []
        self.over, self.finished = collections.defaultdict(threading.Event), False
        # By phase: kills that hit at least one workspace in it. By point: how often it was set, and what it hit.
        self.kills, self.hits, self.named = 0, collections.Counter(), 0
        self.tried, self.reached = collections.Counter(), collections.defaultdict(collections.Counter)
        for aim in Life.AIMS:
            self.tried[aim] = self.reached[aim][aim.split()[-1]] = 2
        self.history = collections.defaultdict(list)

    def serves(self):
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(self.agent.socket) == 0

    def ready(self):
        end = time.monotonic() + 30
        while not self.serves() and time.monotonic() < end:
            time.sleep(0.02)

    # ------------------------------------------------------------ launching

    def next(self):
        with self.guard:
            lacks = [p for p in PHASES if self.hits[p] < self.least]
            # More than asked for where a phase was not hit often enough, as on a slow machine, but not for ever.
            more = 4 if lacks else 1
            if time.monotonic() - self.begun > self.seconds * more or len(self.runs) >= self.wanted * more:
                return None
            run = make_run(self.specs, len(self.runs)).write(self.agent.directory)
            self.runs[run.id] = run
            return run, self.specs.random() < 0.1

    def work(self):
        while found := self.next():
            run, twice = found
            try:
                self.accepted[run.id] = launch(self.agent, run, self.ready)
                if twice:
                    # The same request again: it is answered, and nothing comes of it.
                    self.ready()
                    said = self.agent.run("launch", "--no-wait", *run.options, run.path).stderr
                    assert "another spec" not in said, f"{run.id}: {said}"
            except AssertionError as error:
                self.failures.append(str(error))
                continue
            self.over[run.id].wait(30)

    def keep(self):
        """Watches for ends and removes what has ended, so that a new agent has no more to read than on a real host."""
        while not self.finished:
            time.sleep(0.4)
            if self.serves():
                self.sweep()

    def sweep(self):
        listed = self.agent.run("ps", "-o", "json")
        ended = [w["spec"]["id"] for w in (json.loads(listed.stdout or "[]") if listed.returncode == 0 else [])
                 if w["spec"]["id"] in self.runs and self.is_over(w)]
        for id in ended:
            self.over[id].set()
        if len(ended) >= 5:
            self.agent.run("rm", *ended)

    def is_over(self, workspace):
        return workspace["state"] in ("STATE_STOPPED", "STATE_FAILED") and workspace.get("attempt", 1) >= len(self.runs[workspace["spec"]["id"]].ends)

    # -------------------------------------------------------------- killing

    def point(self):
        """Where the next agent ends; the more likely, the oftener it hit the phase that was hit least. "": at a random moment."""
        if self.moments.random() < 0.4:
            return ""
        lacking = min(PHASES, key=lambda p: self.hits[p])
        points = POINTS + Life.AIMS
        return self.moments.choices(points, [(self.reached[p][lacking] + 0.1) / (self.tried[p] + 1) for p in points])[0]

    def live(self, point):
        """One life of an agent, from its start to its death."""
        # 0.2 to 5 kills a second, each rate as likely as any other on its scale. A point needs an agent that has come to serve.
        pause = 0.2 * 25 ** self.moments.random()
        fault = f"{point}:{self.moments.choice([1, 1, 2, 3])}" if point in POINTS else ""
        self.agent.start(fault, wait=False)
        self.count(point, *Life(self.agent, point).end(max(pause, 1.5) if point else pause, self.moments))

    def count(self, point, hit, found):
        code = self.agent.process.returncode
        if code != -signal.SIGKILL or hit and not point:
            self.failures.append(f"the agent ended by itself, with {code}; it was to be killed {point or 'at random'}")
        how = ("at random" if not hit else point if point in Life.AIMS else f"at {point!r}")
        self.kills += 1
        self.named += hit
        self.tried[point] += 1
        for name in set(found.values()):
            self.hits[name] += 1
            self.reached[point if hit else ""][name] += 1
        for id, name in found.items():
            self.history[id].append(f"killed {how}: {name}")

    # ------------------------------------------------------------------ all

    def run(self):
        """Launches, kills, and judges. Returns what is wrong, as sentences."""
        self.witness = Witness(self.agent)
        workers = [threading.Thread(target=self.work) for _ in range(self.WORKERS)]
        keeper = threading.Thread(target=self.keep)
        # The thread that kills must not wait for one that reads JSON, as long as phases are short.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.0005)
        for thread in [*workers, keeper]:
            thread.start()
        try:
            self.count("", *Life(self.agent).end(1, self.moments))
            said = time.monotonic()
            while any(w.is_alive() for w in workers):
                self.live(self.point())
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    print(f"launches: {len(self.accepted)} accepted, {self.kills} kills, " + ", ".join(f"{self.hits[p]} {p}" for p in PHASES), flush=True)
        finally:
            self.finished = True
            for thread in [*workers, keeper]:
                thread.join()
            sys.setswitchinterval(interval)
        self.agent.start()
        open_ends = lambda: [id for id in self.accepted if not self.over[id].is_set()]
        end = time.monotonic() + 60
        while open_ends() and time.monotonic() < end:
            # Removed already, or never there: what happened is in the events.
            known = {w["spec"]["id"]: w for w in json.loads(self.agent.run("ps", "-o", "json").stdout or "[]")}
            for id in open_ends():
                if id not in known or self.is_over(known[id]):
                    self.over[id].set()
            time.sleep(0.3)
        self.lost = complaints(self.agent.records()[0], [self.runs[id] for id in self.accepted])
        wrong = list(self.failures)
        wrong += [f"{id} ({self.runs[id].kind}, {self.accepted[id]}): {'; '.join(found)}\n    " + ", ".join(self.history[id]) for id, found in self.lost.items()]
        wrong += [f"{self.hits[p]} kills while a workspace was {MEANING[p]}, of {self.least}" for p in PHASES if self.hits[p] < self.least]
        try:
            self.witness.check()
            ids = [w["spec"]["id"] for w in json.loads(self.agent.run("ps", "-o", "json").stdout or "[]")]
            for index in range(0, len(ids), 50):
                self.agent.run("rm", "--force", *ids[index:index + 50])
            judge(self.agent)
        except AssertionError as error:
            wrong.append(f"the oracle: {error}")
        return wrong

    def report(self):
        found = sum(how == "found" for how in self.accepted.values())
        print(f"launches: {len(self.accepted)} accepted ({found} found after the call had failed), {self.kills} kills ({self.named} at a point that was aimed at), "
              f"{self.kills} restarts, {self.witness.ticks} ticks over one connection")
        print("launches: kills by phase: " + ", ".join(f"{self.hits[p]} {MEANING[p]}" for p in [*PHASES, "ready", "gone"]))
        kinds = collections.Counter(self.runs[id].kind for id in self.accepted)
        bad = collections.Counter(self.runs[id].kind for id in self.lost)
        print("launches: " + ", ".join(f"{count} {kind}" + (f" ({bad[kind]} lost)" if bad[kind] else "") for kind, count in kinds.items()))


def main():
    parser = argparse.ArgumentParser(description="Launches runs with known ends while the agent is killed again and again; each has to end as it was to end.")
    parser.add_argument("--launches", type=int, default=1000, help="launches to accept (1000); from 1000 on, each phase of a start has to be hit by 30 kills, below by one")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="by default a new one, which is printed")
    parser.add_argument("--seconds", type=float, default=3600, help="launch no more after so long (3600)")
    options = parser.parse_args()
    try:
        held = lock()
    except BlockingIOError:
        sys.exit("launches: another one runs on this host")
    print(f"launches: seed {options.seed}, {options.launches} launches", flush=True)
    client = Launches(options.launches, options.seed, options.seconds, least=30 if options.launches >= 1000 else 1)
    wrong = client.run()
    client.report()
    if wrong:
        for line in wrong:
            print(f"launches: {line}")
        (ROOT / ".cache/log").mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", client.agent.state / "journal.sqlite", client.agent.directory / "carreld.log", ROOT / ".cache/log/"])
        print(f"launches: FAILED: {len(client.lost)} of {len(client.accepted)} lost, {len(wrong)} complaints, seed {options.seed}\nthe directory is left: {client.agent.directory}")
        client.agent.stop(signal.SIGTERM)
        sys.exit(1)
    destroy(client.agent)
    held.close()
    print("launches: nothing lost, 0 failures")


if __name__ == "__main__":
    main()

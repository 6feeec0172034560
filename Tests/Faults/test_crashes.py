# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every named point of agent and supervisor, with a controller that listens and a tool whose connection must live on."""

import os
import re

import pytest
from conftest import ROOT, Event, judge, until

POINTS = re.findall(r'case \w+ = "(.*)"', (ROOT / "Sources/kernel/Linux/Fault.swift").read_text())
ROUNDS = int(os.environ.get("CARREL_FAULT_ROUNDS", "3"))


def scenario(agent, name, point):
    """A piece of every kind of life; each step is said again to the next agent where one ends under it."""
    agent.launch(f"{name}-lives", "sleep 300")
    agent.launch(f"{name}-fails", "", command=["/nonexistent"])
    agent.launch(f"{name}-ends", "exit 3")
    if Event.Restarting in point:
        agent.launch(f"{name}-again", "test -e ~/$0 || { touch ~/$0; exit 1; }".replace("$0", name), "{restartPolicy: onFailure}")
        until(lambda: (found := agent.get(f"{name}-again")) and found["attempt"] == 2 and found["state"] == "STATE_STOPPED", "the second attempt", 30)
    agent.wait(f"{name}-lives", "READY", "STOPPED", "FAILED")
    for id in ("fails", "ends"):
        agent.wait(f"{name}-{id}", "STOPPED", "FAILED")
    if "Drain" in point:
        agent.do("drain")
        assert agent.run("launch", "--no-wait", agent.directory / "witness.yaml").returncode == 0, "what is there is answered"
        refused = agent.launch(f"{name}-late", "true")
        assert refused.returncode != 0 and "drained" in refused.stderr, refused
        agent.do("uncordon")
    if "ataset" in point:
        datasets = agent.directory / "datasets"
        (datasets / "files").mkdir(parents=True, exist_ok=True)
        (datasets / "files.yaml").write_text(f"name: files\npath: {datasets}/files\nreaders: [ada]\n")
        attached = lambda: [d["target"] for d in agent.get(f"{name}-lives").get("datasets", [])]
        assert agent.do("dataset", "attach", f"{name}-lives", "files", "/data/files").returncode == 0
        assert attached() == ["/data/files"] and agent.do("exec", f"{name}-lives", "--", "test", "-d", "/data/files").returncode == 0
        agent.do("dataset", "detach", f"{name}-lives", "/data/files")  # to a new agent, it may be gone already
        until(lambda: not attached(), "it is detached")
        assert agent.do("exec", f"{name}-lives", "--", "grep", "-q", "/data/files", "/proc/self/mountinfo").returncode == 1
    agent.do("stop", f"{name}-lives", "--time", "1")
    agent.wait(f"{name}-lives", "STOPPED", "FAILED")
    for w in ("lives", "fails", "ends", *(["again"] if Event.Restarting in point else [])):
        agent.do("rm", "--force", f"{name}-{w}")


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(place, point):
    agent, controller, witness = place
    reached = agent.directory / "reached"
    for round in range(ROUNDS):
        reached.unlink(missing_ok=True)
        agent.stop()
        agent.start(point if round == 0 else f"{point}:{round + 1}")
        scenario(agent, f"x{round}{re.sub('[^A-Za-z]', '', point)}".lower(), point)
        if round == 0:
            assert reached.exists() and set(reached.read_text().splitlines()) == {point}, f"nothing reached {point!r}"
        if not agent.lives:
            agent.process.wait()
            agent.start()
        judge(agent, controller)
        witness.check()

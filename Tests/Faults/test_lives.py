# SPDX-License-Identifier: Apache-2.0
"""Supervisors that are killed, hosts that were rebooted, requests that come twice, nodes that are drained; and that every stop is explained."""

import concurrent.futures
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import time

import pytest
from conftest import Code, Event, judge, pids, until


def test_killed_supervisors_and_first_processes(node):
    agent, _ = node
    for victim in ("supervisor", "init", "both"):
        agent.launch(victim, "sleep 1000")
        agent.wait(victim, "READY")
        family = pids(agent, victim)  # the supervisor, and PID 1 of the workspace, which has its name
        shim = next(p for p in family if int(pathlib.Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1]) not in family)
        init = [int(p) for p in subprocess.run(["pgrep", "-P", str(shim)], capture_output=True, text=True).stdout.split()]
        for pid in {"supervisor": [shim], "init": init, "both": [shim, *init]}[victim]:
            os.kill(pid, signal.SIGKILL)
        ended = agent.wait(victim, "STOPPED")
        assert ended["reason"]["code"] == ("Signalled" if victim == "init" else "Unknown"), (victim, ended["reason"])
        assert "advice" in ended["reason"]
        agent.do("rm", victim)
    judge(agent, killed=["supervisor", "init", "both"])


def test_a_supervisor_keeps_nothing_of_its_agent(node):
    """Whoever reads a pipe of which a supervisor holds the other end waits until the workspace has ended."""
    agent, _ = node
    agent.stop(signal.SIGTERM)
    agent.start(under=("bash", "-c", "exec 9</etc/hostname; exec \"$@\"", "bash"))
    agent.launch("clean", "sleep 1000")
    agent.wait("clean", "READY")
    held = lambda pid: {os.readlink(p) for p in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    assert "/etc/hostname" in held(agent.process.pid), "control: the agent has it, and hands it on"
    for pid in pids(agent, "clean"):
        assert "/etc/hostname" not in held(pid)
    agent.do("rm", "--force", "clean")
    judge(agent)


def test_a_link_has_its_policy_whoever_made_it(node):
    """What runs keeps its network, also from an agent that said by other means who reaches the outside."""
    agent, _ = node
    agent.launch("linked", "sleep 1000")
    slot = int(agent.wait("linked", "READY")["address"].rsplit(".", 1)[1]) - 2
    link = f"{agent.prefix}{slot}"
    group = lambda: int(pathlib.Path(f"/sys/class/net/{link}/netdev_group").read_text())
    made = group()
    assert made != 0, "open is the default"
    subprocess.run(["ip", "link", "set", link, "group", "0"], check=True)
    agent.stop()
    agent.start()
    assert group() == made
    agent.do("rm", "--force", "linked")
    judge(agent)


def test_a_hundred_ends_at_once(node):
    agent, _ = node
    flag = agent.directory / "homes" / "ada"
    for index in range(30):
        agent.launch(f"w-{index}", "while [ ! -e ~/go ]; do sleep 0.05; done; exit 5")
    for index in range(30):
        agent.wait(f"w-{index}", "READY", seconds=60)
    (flag / "go").touch()
    for index in range(30):
        ended = agent.wait(f"w-{index}", "STOPPED", seconds=60)
        assert ended["reason"]["exit_code"] == 5
    agent.do("rm", *[f"w-{i}" for i in range(30)])
    (flag / "go").unlink()
    judge(agent)


def test_the_same_request_many_times(node):
    agent, _ = node
    agent.launch("same", "sleep 100")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: agent.run("launch", "--no-wait", agent.directory / "same.yaml"), range(24)))
    assert all(a.returncode == 0 or "being accepted or deleted" in a.stderr for a in answers)
    agent.stop()
    agent.start()
    assert agent.run("launch", "--no-wait", agent.directory / "same.yaml").returncode == 0
    other = agent.directory / "other.yaml"
    other.write_text((agent.directory / "same.yaml").read_text().replace("sleep 100", "sleep 200"))
    assert "another spec" in agent.run("launch", "--no-wait", other).stderr
    assert [e["type"] for e in agent.records()[0] if e["workspace"] == "same"].count(Event.Created) == 1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        stops = list(pool.map(lambda _: agent.run("stop", "same", "--time", "1"), range(8)))
    assert all(s.returncode == 0 for s in stops)
    judge(agent)


def test_a_reboot(node):
    """A stand-in: the journal is made to say another boot, and what ran is killed while no agent looks."""
    agent, _ = node
    agent.launch("ran", "sleep 1000")
    agent.wait("ran", "READY")
    agent.stop()
    for pid in pids(agent, "ran"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        body = json.loads(database.execute("SELECT body FROM workspace WHERE id = 'ran'").fetchone()[0])
        for holder in (body, body.get("sandbox") or {}):
            if "bootID" in holder:
                holder["bootID"] = "an-earlier-boot"
        assert "an-earlier-boot" in json.dumps(body), body
        database.execute("UPDATE workspace SET body = ? WHERE id = 'ran'", (json.dumps(body),))
    database.close()
    for _ in range(2):
        agent.start()
        ended = agent.wait("ran", "STOPPED")
        assert ended["reason"]["code"] == Code.Lost
        agent.stop()
    agent.start()
    assert [e["type"] for e in agent.records()[0] if e["workspace"] == "ran"].count(Event.Stopped) == 1, "told once"
    judge(agent, killed=["ran"])


@pytest.mark.parametrize("node", [pytest.param({"more": "maxLaunching: 2\n"}, id="narrow")], indirect=True)
def test_launches_are_bounded(node):
    agent, _ = node
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: agent.launch(f"w-{i}", "true"), range(16)))
    refused = [a for a in answers if a.returncode != 0]
    assert all("launches: 2 in progress (limit 2)" in a.stderr for a in refused), [a.stderr for a in refused]
    for index, answer in enumerate(answers):
        if answer.returncode == 0:
            agent.wait(f"w-{index}", "STOPPED")
    judge(agent)


def test_draining_stops_by_its_deadline_and_outlives_the_agent(node):
    agent, _ = node
    agent.launch("stubborn", "trap '' TERM; while true; do sleep 0.1; done")
    agent.launch("obedient", "trap 'exit 0' TERM; while true; do sleep 0.1; done", "{restartPolicy: always}")
    for id in ("stubborn", "obedient"):
        agent.wait(id, "READY")
    begun = time.monotonic()
    assert agent.run("drain", "--deadline", "2").returncode == 0
    agent.wait("obedient", "STOPPED", seconds=2)
    agent.stop()  # in the middle of it
    agent.start()
    ended = agent.wait("stubborn", "STOPPED", seconds=10)
    assert ended["reason"]["code"] == Code.Drained and time.monotonic() - begun > 1.9, ended["reason"]
    time.sleep(1.5)
    assert agent.get("obedient")["state"] == "STATE_STOPPED", "a drained node starts nothing again"
    assert "draining" in agent.run("node").stdout
    agent.stop()
    agent.start()
    assert "drained" in agent.launch("late", "true").stderr
    assert agent.run("uncordon").returncode == 0
    assert agent.launch("late", "true").returncode == 0
    agent.wait("late", "STOPPED")
    judge(agent)


def test_every_stop_is_explained(node):
    agent, _ = node
    agent.launch("fails", "echo first; echo last words; exit 9")
    agent.wait("fails", "STOPPED")
    text = agent.run("explain", "fails").stdout
    for part in ("Exited: the tool ended with status 9", "| first", "| last words", "what to do", "ran ", "start "):
        assert part in text, (part, text)
    agent.launch("missing", "", command=["/nonexistent"])
    agent.wait("missing", "FAILED")
    text = agent.run("explain", "missing").stdout
    assert "CannotExecute" in text and "errno 2" in text and "Choose an image" in text
    agent.launch("hungry", "dd if=/dev/zero of=/dev/null bs=100M count=1")
    agent.wait("hungry", "STOPPED")
    reason = agent.get("hungry")["reason"]
    assert reason["code"] == Code.OutOfMemory and reason["killed_process"]["name"] == "dd", reason
    assert int(reason["killed_process"]["resident_bytes"]) > 1 << 20 and int(reason["memory_limit_bytes"]) == 64 << 20
    assert "killed     dd (pid" in agent.run("explain", "hungry").stdout
    agent.do("rm", "fails", "missing", "hungry")
    assert "the tool ended with status 9" in agent.run("explain", "fails").stdout, "also of what was deleted"
    assert agent.run("explain", "nobody").returncode == 3
    judge(agent)


def test_out_of_memory_of_a_part_is_told_at_once_and_once(node):
    """The kernel tells the supervisor, which tells the agent, also one that was away; nobody looks at counters meanwhile."""
    agent, _ = node
    agent.launch("parts", "while true; do if [ -e ~/go ]; then rm -f ~/go; dd if=/dev/zero of=/dev/null bs=100M count=1; fi; sleep 0.05; done", "{restartPolicy: always}")
    agent.wait("parts", "READY")
    told = lambda: [json.loads(e["attributes"]) for e in agent.records()[0] if e["type"] == Event.OutOfMemory]
    go = agent.directory / "homes" / "ada" / "go"

    def eat():
        go.touch()
        os.chown(go, 2001, 2001)
    eat()
    begun = time.monotonic()
    until(told, "the event")
    assert time.monotonic() - begun < 10
    assert told()[0]["process"] == "dd" and told()[0]["limitBytes"] == str(64 << 20), told()
    agent.stop()
    eat()
    until(lambda: not go.exists(), "the second")
    time.sleep(0.5)
    for _ in range(2):
        agent.start()
        until(lambda: len(told()) == 2, "what happened while no agent was there")
        time.sleep(0.7)
        assert [t["kills"] for t in told()] == ["1", "2"]
        agent.stop()
    agent.start()
    # The next attempt counts anew: its end by a signal is no want of memory, and its want of memory is told again.
    for pid in pids(agent, "parts"):
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
        if children:
            os.kill(int(children[0]), signal.SIGKILL)
    until(lambda: agent.get("parts")["attempt"] == 2 and agent.get("parts")["state"] == "STATE_READY", "another attempt")
    ended = next(json.loads(e["reason"]) for e in agent.records()[0] if e["type"] == Event.Stopped)
    assert ended["code"] == Code.Signalled, ended
    eat()
    until(lambda: len(told()) == 3, "the event of the second attempt")
    assert told()[2]["kills"] == "1"
    agent.do("rm", "--force", "parts")
    judge(agent, killed=["parts"])


@pytest.mark.alone
def test_commits_share_what_the_disk_costs(node):
    """As many ends as there are at once need fewer syncs than there are events; each of them is there."""
    agent, _ = node
    for index in range(24):
        agent.launch(f"w-{index}", "while [ ! -e ~/go ]; do sleep 0.05; done")
    for index in range(24):
        agent.wait(f"w-{index}", "READY", seconds=60)
    before = agent.records()[2]["head"]
    log = agent.directory / "syncs"
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", log, "-e", "trace=fsync,fdatasync", "-e", "inject=fdatasync:delay_exit=20000",
                               "-p", str(agent.process.pid)])
    until(lambda: "TracerPid:\t0" not in pathlib.Path(f"/proc/{agent.process.pid}/status").read_text(), "traced")
    (agent.directory / "homes" / "ada" / "go").touch()
    for index in range(24):
        agent.wait(f"w-{index}", "STOPPED", seconds=60)
    tracer.terminate()
    tracer.wait()
    events = agent.records()[2]["head"] - before
    syncs = log.read_text().count("sync(")
    assert events == 24 and 0 < syncs < events, (events, syncs)
    agent.do("rm", *[f"w-{i}" for i in range(24)])
    judge(agent)

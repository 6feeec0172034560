# SPDX-License-Identifier: Apache-2.0
"""More than anyone should ask for: connections by the thousand, readers that do not read, a controller that was away for long."""

import json
import os
import pathlib
import resource
import signal
import socket
import sqlite3
import subprocess
import time

import pytest
from conftest import BIN, batch, judge, memory, node_info, one, until


def test_ten_thousand_connections(node):
    """Half-open, none of which says anything: who is connected is still served, nothing grows without end, and all is well when they have gone."""
    agent, _ = node
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    agent.launch("runs", "sleep 1000")
    agent.wait("runs", "READY")
    before, crowd = memory(agent), []
    for _ in range(10_000):
        # Waits while the agent has not yet taken those before it.
        crowd.append(socket.socket(socket.AF_UNIX))
        crowd[-1].connect(str(agent.socket))
    grown = memory(agent) - before
    print(f"{len(crowd)} connections held, {grown >> 20} MiB more")
    begun = time.monotonic()
    assert agent.run("node").returncode == 0
    assert time.monotonic() - begun < 2 and grown < 512 << 20
    for s in crowd:
        s.close()
    until(lambda: agent.run("ps").returncode == 0, "served again")
    until(lambda: len(os.listdir(f"/proc/{agent.process.pid}/fd")) < 100, "descriptors are given back")
    assert agent.get("runs")["state"] == "STATE_READY"
    agent.do("rm", "--force", "runs")
    judge(agent)


def test_a_reader_that_does_not_read(node):
    agent, _ = node
    reader = subprocess.Popen([BIN / "carrel", "events", "--follow", "-o", "json"], stdout=subprocess.PIPE, env={**os.environ, "CARREL_SOCKET": str(agent.socket)})
    batch(agent, "a", 1)
    reader.send_signal(signal.SIGSTOP)
    agent.stop(signal.SIGTERM)
    # More than fits into any window: 50,000 events, by hand.
    fill(agent, 50_000)
    agent.start()
    before = memory(agent)
    slow = subprocess.Popen([BIN / "carrel", "events", "--follow", "-o", "json"], stdout=subprocess.PIPE, env={**os.environ, "CARREL_SOCKET": str(agent.socket)})
    # Until its window is full.
    spent, quiet = None, lambda: pathlib.Path(f"/proc/{agent.process.pid}/stat").read_text().split()[13]
    while spent != quiet():
        spent = quiet()
        time.sleep(0.5)
    begun = time.monotonic()
    batch(agent, "b", 3)
    assert time.monotonic() - begun < 5, "others are not slowed"
    assert memory(agent) - before < 64 << 20, "it is the disk that is the queue"
    head = int(node_info(agent)["head"])
    assert any(int(json.loads(line)["event"]["sequence"]) == head for line in slow.stdout), "and it gets all of it in the end"
    for process in (reader, slow):
        process.kill()
        process.wait()


def fill(agent, count):
    """Events of a workspace that never was, for the size alone."""
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        head = database.execute("SELECT head FROM stream").fetchone()[0]
        columns = "type, workspace, state, previous, generation, reason, attributes, wallTime, bootNanoseconds, bootID, phases"
        database.execute(f"""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
            INSERT INTO event (sequence, {columns}) SELECT {head} + i, {columns} FROM n, (SELECT {columns} FROM event WHERE sequence = {head})""")
        database.execute("UPDATE stream SET head = ?", (head + count,))
    database.close()


@pytest.mark.parametrize("node", [one(more="journal: {keep: 0, limit: 1Gi}\n")], indirect=True)
def test_a_controller_that_was_away_for_long(node):
    agent, (panel,) = node
    batch(agent, "a", 1)
    agent.stop(signal.SIGTERM)
    fill(agent, 36_000)
    begun = time.monotonic()
    agent.start()
    assert time.monotonic() - begun < 5
    before = memory(agent)
    begun = time.monotonic()
    panel.start("--window", 256, "--silent")
    batch(agent, "b", 1)
    assert memory(agent) - before < 64 << 20, "it is the disk that is the queue"
    panel.stop()
    panel.start("--window", 256)
    head = agent.records()[2]["head"]
    until(lambda: panel.cursor() >= head, "all is told", 300)
    took = time.monotonic() - begun
    print(f"{head} events in {took:.0f} s: {head / took:.0f}/s; {(memory(agent) - before) >> 20} MiB more")
    assert memory(agent) - before < 64 << 20
    until(lambda: int(node_info(agent)["oldest"]) > head, "and trimmed", 30)

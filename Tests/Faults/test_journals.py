# SPDX-License-Identifier: Apache-2.0
"""Journals that are damaged, set back, full, of another version or on a disk that fails."""

import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import time

import pytest
from conftest import BIN, OWN, Agent, Event, batch, full, judge, node_info, on_small_disk, one, pids, sandbox_of, until


def test_a_second_agent_is_refused_and_told_of_the_first(node):
    agent, _ = node
    other = Agent(agent.directory, prefix=OWN)  # the same state
    text = other.config.read_text().replace("/run/carrel.sock", "/run2/carrel.sock")
    (agent.directory / "other.yaml").write_text(text)
    done = subprocess.run(["timeout", "-s", "KILL", "20", BIN / "carreld", "--config", agent.directory / "other.yaml"], capture_output=True, text=True)
    assert done.returncode == 1 and f"another agent, pid {agent.process.pid}, owns {agent.state}" in done.stderr, done.stderr
    assert agent.run("node").returncode == 0


VERSION_1 = """
CREATE TABLE stream (id TEXT NOT NULL); INSERT INTO stream VALUES ('stream-of-1');
CREATE TABLE workspace (id TEXT PRIMARY KEY, state TEXT NOT NULL, slot INTEGER NOT NULL UNIQUE, body TEXT NOT NULL);
CREATE TABLE event (sequence INTEGER PRIMARY KEY, type TEXT NOT NULL, workspace TEXT NOT NULL, state TEXT NOT NULL, reason TEXT,
  attributes TEXT NOT NULL, wallTime TEXT NOT NULL, bootNanoseconds INTEGER NOT NULL, bootID TEXT NOT NULL);
CREATE INDEX event_by_workspace ON event (workspace, sequence);
PRAGMA user_version = 1; PRAGMA journal_mode = WAL;
"""


def test_a_journal_of_version_1_is_brought_up_and_a_newer_one_refused(node):
    agent, _ = node
    agent.launch("old", "exit 4")
    agent.wait("old", "STOPPED")
    events, workspaces, _, _ = agent.records()
    agent.stop(signal.SIGTERM)
    for suffix in ("", "-wal", "-shm"):
        (agent.state / f"journal.sqlite{suffix}").unlink(missing_ok=True)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.executescript(VERSION_1)
        row = workspaces["old"]
        database.execute("INSERT INTO workspace VALUES (?,?,?,?)", (row["id"], row["state"], row["slot"], row["body"]))
        for e in events:
            database.execute("INSERT INTO event VALUES (?,?,?,?,?,?,?,?,?)", [e[k] for k in ("sequence", "type", "workspace", "state", "reason", "attributes", "wallTime", "bootNanoseconds", "bootID")])
    database.close()
    agent.start()
    info = node_info(agent)
    assert info["stream_id"] == "stream-of-1" and int(info["head"]) == len(events) and int(info["oldest"]) == 1
    assert agent.get("old")["reason"]["exit_code"] == 4
    agent.do("rm", "old")
    assert agent.records()[2]["head"] == len(events) + 1
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    agent.start()
    assert not agent.lives and "version 99, of a newer agent" in (agent.directory / "carreld.log").read_text()
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("PRAGMA user_version = 2")
    database.close()


@pytest.mark.parametrize("node", [one()], indirect=True)
@pytest.mark.parametrize("damage", ["garbage", "flipped page", "deleted"])
def test_a_damaged_journal_is_announced_and_what_runs_goes_on(node, damage):
    agent, (panel,) = node
    panel.start()
    agent.launch("runs", "while true; do sleep 0.1; done")
    agent.wait("runs", "READY")
    for index in range(20):
        agent.launch(f"fill-{index}", "true")
    for index in range(20):
        agent.wait(f"fill-{index}", "STOPPED")
    judge(agent, panel)
    before = agent.records()
    supervisor = pids(agent, "runs")[0]
    agent.stop()
    database = agent.state / "journal.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    bytes = bytearray(database.read_bytes())
    if damage == "garbage":
        bytes = os.urandom(8192)
    elif damage == "flipped page":
        bytes[4096:8192] = b"\xaa" * 4096
    if damage == "deleted":
        database.unlink()
    else:
        database.write_bytes(bytes)
    agent.start()
    assert agent.lives
    events, workspaces, stream, _ = agent.records()
    assert stream["id"] != before[2]["id"]
    assert stream["loss"] and (damage == "deleted" or list(agent.state.glob("journal.sqlite-damaged-*")))
    assert agent.get("runs")["state"] == "STATE_READY" and pathlib.Path(f"/proc/{supervisor}").exists()
    assert [e["type"] for e in events if e["workspace"] == "runs"][:2] == [Event.Recovered, Event.Adopted]
    gap = until(lambda: [m["gap"] for m in panel.messages() if "gap" in m], "the controller is told", 40)[0]
    assert ("missing" if damage == "deleted" else "damaged") in gap["reason"]
    snapshot = until(lambda: [m["snapshot"] for m in panel.messages() if "snapshot" in m], "and how things stand")[-1]
    assert snapshot["streamId"] == stream["id"]


def test_what_nobody_knows_is_set_aside_untouched(node):
    """A folder without a record, with a tool that runs: moved to quarantine, told, and left alone. Of one where nothing runs, the rest goes."""
    agent, _ = node
    for name in ("unknown", "rest"):
        agent.launch(name, "sleep 1000")
        agent.wait(name, "READY")
    agent.do("stop", "rest", "--time", "0")
    supervisor, sandbox = pids(agent, "unknown"), sandbox_of(agent, "unknown")
    assert supervisor, "control: it is found"
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("DELETE FROM workspace")
    database.close()
    (sandbox.folder / "record.json").unlink()
    agent.start()
    events = [(e["type"], json.loads(e["attributes"]).get("folder")) for e in agent.records()[0] if e["workspace"] == ""]
    assert (Event.Quarantined, sandbox.name) in events and (Event.Swept, "rest") in events, events
    assert list((agent.state / "quarantine").glob(f"{sandbox.name}-*")) and not (agent.state / "workspaces" / "rest").exists()
    agent.stop()
    agent.start()
    assert all(pathlib.Path(f"/proc/{p}").exists() for p in supervisor), "also by the agent after that"
    for pid in supervisor:
        os.kill(pid, signal.SIGKILL)


def test_a_journal_checked_on_demand(node):
    agent, _ = node
    batch(agent, "a", 2)
    events = len(agent.records()[0])
    assert agent.run("node", "--check-journal").stdout == f"the journal is sound: {events} events\n"
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("DELETE FROM event WHERE sequence = 3")
    database.close()
    done = agent.run("node", "--check-journal")
    assert done.returncode == 1 and f"has {events - 1} events where its sequences say {events}" in done.stderr, done


def test_clocks_that_jump(node):
    """The wall clock decides nothing: days and years to and fro between three agents (libfaketime; the monotonic clocks stay)."""
    agent, _ = node
    library = next(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    times = []
    for offset in ("+10y", "-1d", "-20y", "+0"):
        agent.stop(signal.SIGTERM)
        # By env(1), so that the library has set its own variables before: Swift finds its arguments behind the environment.
        agent.start(under=["env"], LD_PRELOAD=str(library), FAKETIME=offset, DONT_FAKE_MONOTONIC="1")
        name = "w" + offset.strip("+-")
        agent.launch(name, "sleep 0.2; exit 2", "{maxLifetimeSeconds: 60}")
        assert agent.wait(name, "STOPPED")["reason"]["exit_code"] == 2
        times.append(agent.records()[0][-1]["wallTime"])
    assert times[0] > times[3] > times[1] > times[2], times
    events = agent.records()[0]
    assert [e["bootNanoseconds"] for e in events] == sorted(e["bootNanoseconds"] for e in events)
    judge(agent)


def test_a_full_disk_delays_what_happened_and_refuses_what_is_asked(node):
    """ENOSPC at the journal: a launch is refused; an end is told when there is room again, and nothing is lost."""
    agent, _ = node
    with on_small_disk(agent) as small:
        agent.launch("ends", "sleep 2; exit 7")
        agent.wait("ends", "READY")
        with full(small):
            refused = agent.launch("refused", "true")
            assert refused.returncode == 1 and ("journal" in refused.stderr or "No space" in refused.stderr), refused
            time.sleep(3)
        ended = agent.wait("ends", "STOPPED", seconds=30)
        assert ended["reason"]["exit_code"] == 7
        assert agent.launch("refused", "true").returncode == 0
        agent.wait("refused", "STOPPED")
        agent.do("rm", "ends", "refused")
    judge(agent)


@pytest.mark.parametrize("node", [pytest.param({"more": "journal: {limit: 1Mi, keep: 10}\n", "controllers": ["panel"]}, id="capped")], indirect=True)
def test_a_journal_at_its_cap_refuses_launches_and_keeps_room_for_ends(node):
    agent, (panel,) = node  # the owner never comes
    for id in ("runs", "other"):
        agent.launch(id, "sleep 1000")
        agent.wait(id, "READY")
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("CREATE TABLE ballast (x)")
        database.execute("INSERT INTO ballast VALUES (zeroblob(1000000))")
    database.close()
    # The agent, which alone writes there in earnest, looks when it has written.
    assert agent.do("stop", "other", "--time", "1").returncode == 0
    refused = agent.launch("more", "true")
    assert refused.returncode == 1 and "journal:" in refused.stderr and "has to acknowledge" in refused.stderr, refused
    assert agent.do("stop", "runs", "--time", "1").returncode == 0 and agent.do("rm", "runs").returncode == 0
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("DROP TABLE ballast")
    database.close()
    assert agent.launch("more", "true").returncode == 0
    agent.wait("more", "STOPPED")
    panel.start()
    judge(agent, panel)


@pytest.mark.parametrize("call", ["fsync,fdatasync", "write,pwrite64"])
@pytest.mark.parametrize("number", [2, 5, 9])
def test_a_failed_write_or_fsync_ends_the_agent_and_loses_nothing(node, call, number):
    """EIO at the so-maniest write or fsync of the journal, injected by strace: nothing is acknowledged on it; the next agent reads what is there."""
    agent, _ = node
    agent.stop(signal.SIGTERM)
    # The journal's file descriptors alone: -P follows the paths.
    journal = agent.state / "journal.sqlite"
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(journal), "-P", f"{journal}-wal", "-e", f"trace={call}",
              "-e", f"inject={call}:error=EIO:when={number}"]
    agent.start(under=tracer)
    # strace counts for each thread by itself: which of them commits is the system's choice.
    for index in range(60):
        agent.launch(f"w-{index}", "exit 6")
        agent.wait(f"w-{index}", "STOPPED", "FAILED")
        # At work, or where it was the first of all, at its start.
        if any(said in (agent.directory / "carreld.log").read_text() for said in ("the journal's disk failed", "disk I/O error")):
            break
    else:
        raise AssertionError("nothing failed")
    agent.do("node")  # by an agent that runs: the one that failed may have left something to do
    judge(agent)


def test_a_torn_end_is_no_event(node):
    """Power cut in the middle of the last commit: the log's end is cut off at some byte, or is a page of zeros. What was committed before it is there."""
    agent, _ = node
    batch(agent, "a", 2)
    # Until the commit is on disk, the sandbox's folder is there as well.
    agent.stop()
    agent.start("after Stopped")
    agent.launch("last", "exit 3")
    until(lambda: not agent.lives, "the commit")
    log = agent.state / "journal.sqlite-wal"
    whole = log.read_bytes()
    frame = 24 + 4096
    kept = agent.directory / "kept"
    kept.mkdir()
    for file in agent.state.glob("journal.sqlite*"):
        shutil.copy(file, kept)
    sandboxes = agent.state / "sandboxes"
    if sandboxes.is_dir():
        shutil.copytree(sandboxes, kept / "sandboxes", ignore=shutil.ignore_patterns("shim.sock"))
    assert len(whole) > 32 + 3 * frame
    heads = []
    for torn in (whole[:-1], whole[:-4096], whole[:-frame], whole[:-frame - 7], whole[:-4096] + bytes(4096), whole[:-frame] + bytes(frame)):
        # The mark is from before the cut, as it would be: it is made at the start and at a trim.
        shutil.copy(kept / "journal.sqlite", agent.state / "journal.sqlite")
        if sandboxes.is_dir():
            shutil.copytree(kept / "sandboxes", sandboxes, dirs_exist_ok=True)
        log.write_bytes(torn)
        (agent.state / "journal.sqlite-shm").unlink(missing_ok=True)
        (agent.state / "journal.sqlite.mark").write_bytes((kept / "journal.sqlite.mark").read_bytes())
        agent.start()
        assert agent.wait("last", "STOPPED")["reason"]["exit_code"] == 3, "what the torn commit told is told again"
        events, _, stream, _ = agent.records()
        assert stream["loss"] is None and [e["sequence"] for e in events] == list(range(1, stream["head"] + 1))
        # A run this short may have ended before it is told as ready.
        told = [e["type"] for e in events if e["workspace"] == "last"]
        assert [type for type in told if type != Event.Ready] == [Event.Created, Event.Preparing, Event.Starting, Event.Stopped], told
        heads.append(stream["head"])
        agent.stop()
    assert len(heads) == 6
    shutil.rmtree(kept)
    agent.start()
    judge(agent)


@pytest.mark.parametrize("node", [one()], indirect=True)
def test_an_older_copy_put_in_the_journals_place_is_a_loss(node):
    agent, (panel,) = node
    panel.start()
    batch(agent, "a", 1)
    judge(agent, panel)
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    copy = (agent.state / "journal.sqlite").read_bytes()
    agent.start()
    agent.launch("runs", "sleep 1000")
    agent.wait("runs", "READY")
    judge(agent, panel)
    before = agent.records()[2]
    agent.stop(signal.SIGTERM)
    agent.start()
    agent.stop()
    for suffix in ("-wal", "-shm"):
        (agent.state / f"journal.sqlite{suffix}").unlink(missing_ok=True)
    (agent.state / "journal.sqlite").write_bytes(copy)
    agent.start()
    events, _, stream, _ = agent.records()
    assert stream["id"] != before["id"] and "an older copy was put in its place" in stream["loss"], stream
    assert agent.get("runs")["state"] == "STATE_READY" and events[0]["type"] == Event.Recovered
    gap = until(lambda: [m["gap"] for m in panel.messages() if "gap" in m], "the controller is told", 40)[0]
    assert "older copy" in gap["reason"]


@pytest.mark.alone
def test_five_hundred_records_are_read_in_two_seconds(node):
    agent, _ = node
    agent.launch("w", "sleep 1")
    agent.wait("w", "READY")
    ready = json.loads(agent.records()[1]["w"]["body"])
    agent.wait("w", "STOPPED")
    stopped = json.loads(agent.records()[1]["w"]["body"])
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        for slot in range(1, 500):
            body = json.loads(json.dumps(ready if slot % 2 else stopped))
            body["slot"] = slot
            body["spec"]["id"] = f"w{slot}"
            if body.get("sandbox"):
                # One each, that is not there any more: twelve letters, of which these are ten.
                name = "".join("abcdefghij"[int(digit)] for digit in f"{slot:012}")
                body["sandbox"].update(id=name, folder=f"sandboxes/{name}", cgroup=name)
            database.execute("INSERT INTO workspace VALUES (?,?,?,?)", (f"w{slot}", body["state"], slot, json.dumps(body)))
    database.close()
    begun = time.monotonic()
    agent.start()
    took = time.monotonic() - begun
    assert len(json.loads(agent.run("ps", "-o", "json").stdout)) == 500
    print(f"recovery of 500 records: {took:.2f} s")
    assert took < 2, took
    until(lambda: all(w["state"] == "STATE_STOPPED" for w in json.loads(agent.run("ps", "-o", "json").stdout)), "all have ended", 60)

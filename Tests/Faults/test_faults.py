# SPDX-License-Identifier: Apache-2.0
"""What else goes wrong: controllers that stall, forget and ask for the impossible, disks that are full, journals that are damaged,
supervisors that are killed, hosts that were rebooted, requests that come twice."""

import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import time

import pytest
from conftest import Agent, Controller, destroy, judge, make, until


NUMBERS = itertools.count()


@pytest.fixture
def node(request):
    """An agent of its own, with as many controllers as asked for; the first owns the acknowledgement."""
    options = getattr(request, "param", {})
    directory = pathlib.Path(f"/tmp/carrel-fault-{os.getpid()}-{next(NUMBERS)}")
    controllers = [Controller(directory, name) for name in options.get("controllers", [])]
    lines = "".join(f"  - {{name: {c.socket.stem}, socket: {c.socket}, owner: {str(i == 0 and options.get('owner', True)).lower()}}}\n" for i, c in enumerate(controllers))
    agent = make(directory, options.get("more", "") + (f"controllers:\n{lines}" if lines else ""), prefix="crg")
    yield agent, controllers
    destroy(agent, *controllers)


def one(name="panel", more=""):
    return pytest.param({"controllers": [name], "more": more}, id=name)


def batch(agent, name, count, script="exit 0"):
    for index in range(count):
        agent.launch(f"{name}-{index}", script)
    for index in range(count):
        agent.wait(f"{name}-{index}", "STOPPED", "FAILED")
    agent.do("rm", "--force", *[f"{name}-{i}" for i in range(count)])


def node_info(agent):
    return json.loads(agent.run("node", "-o", "json").stdout)


# ------------------------------------------------------------------ controllers


@pytest.mark.parametrize("node", [one(more="journal: {keep: 0}\n")], indirect=True)
def test_a_controller_that_crashes_stalls_and_returns(node):
    """At least once and in order over every kind of interruption; only what it acknowledged is trimmed."""
    agent, (panel,) = node
    panel.start("--crash-after", 7, "--window", 3)
    batch(agent, "a", 2)
    until(lambda: panel.process.poll() is not None, "it crashed")
    assert panel.process.returncode == -signal.SIGKILL
    batch(agent, "b", 2)  # nobody listens
    held = agent.records()[2]
    assert held["trimmed"] <= panel.cursor(), "trimmed what nobody has"
    panel.stop()
    panel.start("--slow", 30)
    batch(agent, "c", 2)
    judge(agent, panel)
    seen = [int(m["event"]["sequence"]) for m in panel.messages() if "event" in m]
    assert len(seen) > len(set(seen)), "control: some came twice, since the crash was before the memory"
    until(lambda: (i := node_info(agent)) and int(i["oldest"]) == int(i["head"]) + 1 == int(i["acknowledged"]) + 1, "all is trimmed")
    assert node_info(agent)["controllers"][0]["connected"]


@pytest.mark.parametrize("node", [one()], indirect=True)
def test_a_controller_that_never_acknowledges_gets_its_window_and_no_more(node):
    agent, (panel,) = node
    panel.start("--silent", "--window", 4)
    before = memory(agent)
    batch(agent, "a", 6)
    time.sleep(0.5)
    assert len([m for m in panel.messages() if "event" in m]) == 4
    assert memory(agent) - before < 32 << 20
    panel.order("acknowledge 3")
    until(lambda: len([m for m in panel.messages() if "event" in m]) == 7, "three more")
    panel.order("acknowledge 99")
    refusal = until(lambda: [m["refusal"] for m in panel.messages() if "refusal" in m], "an acknowledgement from the future is refused")[0]
    assert refusal["code"] == 11 and "99 was not sent yet" in refusal["message"]


def memory(agent):
    return int(next(l for l in pathlib.Path(f"/proc/{agent.process.pid}/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1]) << 10


@pytest.mark.parametrize("node", [one(more="journal: {keep: 0}\n")], indirect=True)
def test_cursors_old_forgotten_foreign_and_impossible(node):
    agent, (panel,) = node
    panel.start()
    batch(agent, "a", 3)
    agent.launch("stays", "sleep 100")
    agent.wait("stays", "READY")
    judge(agent, panel)
    head = agent.records()[2]["head"]
    until(lambda: agent.records()[2]["trimmed"] == head, "all is trimmed")

    def again(*options):
        panel.stop()
        panel.log.unlink()
        panel.start(*options)
        return until(lambda: [m for m in panel.messages() if "hello" not in m], "an answer", 40)
    # Forgotten: what was trimmed is a gap, and a snapshot stands for it.
    answer = again("--forget")
    assert answer[0]["gap"] == {"from": "1", "to": str(head), "reason": "trimmed"}, answer
    until(lambda: any("snapshot" in m for m in panel.messages()), "a snapshot")
    snapshot = next(m["snapshot"] for m in panel.messages() if "snapshot" in m)
    assert int(snapshot["sequence"]) >= head and [w["spec"]["id"] for w in snapshot["workspaces"]] == ["stays"]
    # From the future.
    answer = again("--cursor", 10_000)
    assert answer[0]["refusal"]["code"] == 11 and f"above the head, {head}" in answer[0]["refusal"]["message"]
    # Of another stream.
    state = json.loads(panel.state.read_text())
    panel.stop()
    panel.state.write_text(json.dumps({"torture": {"stream": "another", "cursor": 5}}))
    answer = again()
    assert answer[0]["gap"]["from"] == "6" and "another stream" in answer[0]["gap"]["reason"], answer
    # A snapshot on request, and the events behind it, are the state.
    panel.stop()
    panel.state.write_text(json.dumps(state))
    answer = None
    panel.log.unlink()
    panel.start()
    until(lambda: any("hello" in m for m in panel.messages()), "connected", 40)
    until(lambda: node_info(agent)["controllers"][0].get("connected"), "welcomed")
    panel.order("snapshot")
    until(lambda: any("snapshot" in m for m in panel.messages()), "a snapshot")


@pytest.mark.parametrize("node", [pytest.param({"controllers": ["owner", "observer"], "more": "journal: {keep: 0}\n"}, id="two")], indirect=True)
def test_one_owner_and_one_who_observes(node):
    agent, (owner, observer) = node
    owner.start()
    batch(agent, "a", 2)
    judge(agent, owner)
    # The observer comes late, and is told that it is late; its own acknowledgements trim nothing.
    observer.start()
    until(lambda: any("gap" in m for m in observer.messages()), "a gap", 40)
    owner.stop()
    batch(agent, "b", 2)
    until(lambda: observer.cursor() == agent.records()[2]["head"], "the observer has all")
    assert agent.records()[2]["trimmed"] < agent.records()[2]["head"], "trimmed without its owner"
    owner.start()
    until(lambda: agent.records()[2]["trimmed"] == agent.records()[2]["head"], "trimmed by its owner", 40)
    judge(agent, owner)


@pytest.mark.parametrize("node", [one()], indirect=True)
def test_a_control_plane_may_live_without_dialling(node):
    """Launch, stop, delete and drain as commands of the controller, their results and refusals."""
    agent, (panel,) = node
    panel.start()
    until(lambda: node_info(agent)["controllers"][0].get("connected"), "connected", 40)
    path = agent.directory / "ordered.yaml"
    path.write_text("id: ordered\ntool: command\nimage: busybox:latest\nowner: {name: ada, uid: 2001, gid: 2001}\ncommand: [\"/bin/sleep\", \"100\"]\n")

    def result(order):
        count = len([m for m in panel.messages() if "result" in m])
        panel.order(order)
        return until(lambda: [m["result"] for m in panel.messages() if "result" in m][count:], order)[0]
    assert result(f"launch {path}")["workspace"]["spec"]["id"] == "ordered"
    agent.wait("ordered", "READY")
    refused = result("delete ordered")
    assert refused["code"] == 9 and "stop it first" in refused["message"]
    assert result("drain").get("code", 0) == 0
    path.write_text(path.read_text().replace("ordered", "late"))
    refused = result(f"launch {path}")
    assert refused["code"] == 9 and "drained" in refused["message"]
    assert result("resume").get("code", 0) == 0
    stopped = result("stop ordered")
    assert stopped["workspace"]["reason"]["code"] == "Requested" and stopped["workspace"]["reason"]["stoppedBy"] == "a controller"
    assert result("delete ordered").get("code", 0) == 0
    assert result("stop nobody")["code"] == 5
    judge(agent, panel)


def test_pulling_with_acknowledgement_and_gaps(node):
    agent, _ = node
    batch(agent, "a", 2)
    lines = [json.loads(l) for l in agent.run("events", "-o", "json").stdout.splitlines()]
    assert [int(l["event"]["sequence"]) for l in lines] == list(range(1, len(lines) + 1))
    clouds = [json.loads(l) for l in agent.run("events", "-o", "cloudevents").stdout.splitlines()]
    assert {c["specversion"] for c in clouds} == {"1.0"} and len({(c["source"], c["id"]) for c in clouds}) == len(clouds) == len(lines)
    assert clouds[0]["type"] == "carrel.v1.workspace.created" and clouds[0]["subject"] == "a-0" and clouds[0]["data"]["sequence"] == "1"
    assert [c["sequence"] for c in clouds] == sorted(c["sequence"] for c in clouds)
    assert agent.run("ps", "-o", "cloudevents").returncode == 2
    impossible = agent.run("events", "--cursor", "9999")
    assert impossible.returncode == 1 and f"above the head, {len(lines)}" in impossible.stderr


# -------------------------------------------------------------------- journals


def test_a_second_agent_is_refused_and_told_of_the_first(node):
    agent, _ = node
    other = Agent(agent.directory, prefix="crg")  # the same state
    text = other.config.read_text().replace("/run/carrel.sock", "/run2/carrel.sock")
    (agent.directory / "other.yaml").write_text(text)
    done = subprocess.run(["timeout", "-s", "KILL", "20", str(pathlib.Path(__file__).parents[2] / ".build/debug/carreld"), "--config", agent.directory / "other.yaml"], capture_output=True, text=True)
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
    supervisor = int(subprocess.run(["pgrep", "-f", "^carrel-shim runs$"], capture_output=True, text=True).stdout.split()[0])
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
    assert [e["type"] for e in events if e["workspace"] == "runs"][:2] == ["Recovered", "Adopted"]
    gap = until(lambda: [m["gap"] for m in panel.messages() if "gap" in m], "the controller is told", 40)[0]
    assert ("gone" if damage == "deleted" else "damaged") in gap["reason"]
    snapshot = until(lambda: [m["snapshot"] for m in panel.messages() if "snapshot" in m], "and how things stand")[-1]
    assert snapshot["streamId"] == stream["id"]


def test_what_nobody_knows_is_set_aside_untouched(node):
    """A folder without a record, with a tool that runs: moved to quarantine, told, and left alone. Of one where nothing runs, the rest goes."""
    agent, _ = node
    for name in ("unknown", "rest"):
        agent.launch(name, "sleep 1000")
        agent.wait(name, "READY")
    agent.do("stop", "rest", "--time", "0")
    supervisor = pids(agent, "unknown")
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("DELETE FROM workspace")
    database.close()
    (agent.state / "workspaces" / "unknown" / "record.json").unlink()
    agent.start()
    events = [(e["type"], json.loads(e["attributes"]).get("folder")) for e in agent.records()[0] if e["workspace"] == ""]
    assert ("Quarantined", "unknown") in events and ("Swept", "rest") in events, events
    assert list((agent.state / "quarantine").glob("unknown-*")) and not (agent.state / "workspaces" / "rest").exists()
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
    agent.stop(signal.SIGTERM)
    small = agent.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=True)
    try:
        shutil.copytree(agent.state, small / "state", symlinks=True)
        shutil.rmtree(agent.state)
        agent.state.symlink_to(small / "state")
        agent.start()
        agent.launch("ends", "sleep 2; exit 7")
        agent.wait("ends", "READY")
        ballast = os.open(small / "ballast", os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(ballast, b"x" * 4096)
        except OSError:
            os.close(ballast)
        refused = agent.launch("refused", "true")
        assert refused.returncode == 1 and ("journal" in refused.stderr or "No space" in refused.stderr), refused
        time.sleep(3)
        (small / "ballast").unlink()
        ended = agent.wait("ends", "STOPPED", seconds=30)
        assert ended["reason"]["exit_code"] == 7
        assert agent.launch("refused", "true").returncode == 0
        agent.wait("refused", "STOPPED")
        agent.do("rm", "ends", "refused")
        agent.stop(signal.SIGTERM)
        agent.state.unlink()
        shutil.copytree(small / "state", agent.state, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    agent.start()
    judge(agent)


@pytest.mark.parametrize("node", [pytest.param({"more": "journal: {limit: 1Mi, keep: 10}\n", "controllers": ["panel"]}, id="capped")], indirect=True)
def test_a_journal_at_its_cap_refuses_launches_and_keeps_room_for_ends(node):
    agent, (panel,) = node  # the owner never comes
    agent.launch("runs", "sleep 1000")
    agent.wait("runs", "READY")
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        database.execute("CREATE TABLE ballast (x)")
        database.execute("INSERT INTO ballast VALUES (zeroblob(1000000))")
    database.close()
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


@pytest.mark.parametrize("number", [2, 5, 9])
def test_a_failed_fsync_ends_the_agent_and_loses_nothing(node, number):
    """EIO at the so-maniest fsync of the journal, injected by strace: nothing is acknowledged on it; the next agent reads what is there."""
    agent, _ = node
    agent.stop(signal.SIGTERM)
    # The journal's file descriptors alone: -P follows the paths.
    journal = agent.state / "journal.sqlite"
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(journal), "-P", f"{journal}-wal", "-e", "trace=fsync,fdatasync",
              "-e", f"inject=fsync,fdatasync:error=EIO:when={number}"]
    agent.start(under=tracer)
    # strace counts for each thread by itself: which of them commits is the system's choice.
    for index in range(60):
        agent.launch(f"w-{index}", "exit 6")
        agent.wait(f"w-{index}", "STOPPED", "FAILED")
        if "the journal's disk failed" in (agent.directory / "carreld.log").read_text():
            break
    else:
        raise AssertionError("no fsync failed")
    judge(agent)


def test_five_hundred_records_are_read_in_two_seconds(node):
    agent, _ = node
    agent.launch("w", "exit 0")
    agent.wait("w", "STOPPED")
    agent.stop(signal.SIGTERM)
    with sqlite3.connect(agent.state / "journal.sqlite") as database:
        row = database.execute("SELECT body FROM workspace").fetchone()[0]
        for slot in range(1, 500):
            body = json.loads(row)
            body.update(slot=slot, state="ready" if slot % 2 else "stopped")
            body["spec"]["id"] = f"w{slot}"
            if slot % 2:
                del body["reason"]
            database.execute("INSERT INTO workspace VALUES (?,?,?,?)", (f"w{slot}", body["state"], slot, json.dumps(body)))
    database.close()
    begun = time.monotonic()
    agent.start()
    took = time.monotonic() - begun
    assert len(json.loads(agent.run("ps", "-o", "json").stdout)) == 500
    print(f"recovery of 500 records: {took:.2f} s")
    assert took < 2, took
    until(lambda: all(w["state"] == "STATE_STOPPED" for w in json.loads(agent.run("ps", "-o", "json").stdout)), "all have ended", 60)


# ------------------------------------------------------------------ lives, ends


def pids(agent, id):
    shim = subprocess.run(["pgrep", "-f", f"^carrel-shim {id}$"], capture_output=True, text=True).stdout.split()
    return [int(p) for p in shim]


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
    assert all(a.returncode == 0 or "being accepted" in a.stderr for a in answers)
    agent.stop()
    agent.start()
    assert agent.run("launch", "--no-wait", agent.directory / "same.yaml").returncode == 0
    other = agent.directory / "other.yaml"
    other.write_text((agent.directory / "same.yaml").read_text().replace("sleep 100", "sleep 200"))
    assert "another spec" in agent.run("launch", "--no-wait", other).stderr
    assert [e["type"] for e in agent.records()[0] if e["workspace"] == "same"].count("Created") == 1
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
        body["bootID"] = "an-earlier-boot"
        database.execute("UPDATE workspace SET body = ? WHERE id = 'ran'", (json.dumps(body),))
    database.close()
    for _ in range(2):
        agent.start()
        ended = agent.wait("ran", "STOPPED")
        assert ended["reason"]["code"] == "Lost"
        agent.stop()
    agent.start()
    assert [e["type"] for e in agent.records()[0] if e["workspace"] == "ran"].count("Stopped") == 1, "told once"
    judge(agent)


@pytest.mark.parametrize("node", [pytest.param({"more": "maxLaunching: 2\n"}, id="narrow")], indirect=True)
def test_launches_are_bounded(node):
    agent, _ = node
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: agent.launch(f"w-{i}", "true"), range(16)))
    refused = [a for a in answers if a.returncode != 0]
    assert all("launches: 2 are on their way" in a.stderr for a in refused), [a.stderr for a in refused]
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
    assert ended["reason"]["code"] == "Drained" and time.monotonic() - begun > 1.9, ended["reason"]
    time.sleep(1.5)
    assert agent.get("obedient")["state"] == "STATE_STOPPED", "a drained node starts nothing again"
    assert "draining" in agent.run("node").stdout
    agent.stop()
    agent.start()
    assert "drained" in agent.launch("late", "true").stderr
    assert agent.run("resume").returncode == 0
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
    assert reason["code"] == "OutOfMemory" and reason["killed_process"]["name"] == "dd", reason
    assert int(reason["killed_process"]["resident_bytes"]) > 1 << 20 and int(reason["memory_limit_bytes"]) == 64 << 20
    assert "killed     dd (pid" in agent.run("explain", "hungry").stdout
    agent.do("rm", "fails", "missing", "hungry")
    assert "the tool ended with status 9" in agent.run("explain", "fails").stdout, "also of what was deleted"
    assert agent.run("explain", "nobody").returncode == 3
    judge(agent)

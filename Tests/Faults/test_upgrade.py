# SPDX-License-Identifier: Apache-2.0
"""Workspaces that the release before supervisors spoke a version (commit 7ede341) has started go on under today's agent."""

import itertools
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import socket
import subprocess

import conftest
import pytest
from conftest import Agent, Code, Event, destroy, judge, leftovers, until
from legacy import JOURNAL, STATES, WORKSPACES, Connection, Legacy, children, decode_plan, encode_plan, read

NUMBERS = itertools.count()


@pytest.fixture
def old():
    """An old agent that is gone in a moment, and today's, which has not begun."""
    directory = pathlib.Path(f"/tmp/carrel-upgrade-{os.getpid()}-{next(NUMBERS)}")
    directory.mkdir(mode=0o711)
    agent = Agent(directory, f"credentials: {{aws: {{exec: [{directory}/provider, \"{{owner}}\", \"{{role}}\"]}}}}\n", prefix="crv")
    old = None
    try:
        old = Legacy(directory, "crv")
        yield old, agent
    finally:
        try:
            destroy(agent)
        finally:
            if old:
                old.clear()


@pytest.fixture
def upgraded(old):
    """All workspaces up, the old agent dead, today's serving."""
    old, agent = old
    for id in old.ids:
        old.start(id)
    tools = {id: old.tool(id) for id in old.ids}
    old.die()
    agent.start()
    adopted(agent, old.ids)
    yield old, agent, tools


def events(agent, id, *types):
    return [event for event in agent.records()[0] if event["workspace"] == id and (not types or event["type"] in types)]


def adopted(agent, ids, times=1):
    """The event is told once for each agent, and nothing of the workspace has changed."""
    for id in ids:
        until(lambda: len(events(agent, id, Event.Adopted)) == times, lambda: f"{id} is adopted: {[e['type'] for e in events(agent, id)]}")
        found = agent.get(id)
        assert found["state"] == "STATE_READY" and found.get("attempt", 1) == 1, found


def inside(agent, id, script, *options):
    return agent.run("exec", *options, id, "--", "/bin/sh", "-c", script)


def said(agent, id, script):
    done = inside(agent, id, script)
    assert done.returncode == 0, done
    return done.stdout


def reason(agent, id):
    """Of the end, which is told once; as the event has it and as the workspace shows it."""
    found = agent.wait(id, "STOPPED", "FAILED")["reason"]
    ends = events(agent, id, Event.Stopped, Event.Failed)
    assert len(ends) == 1 and json.loads(ends[0]["reason"])["code"] == found["code"], (found, ends)
    return found


def dial(address):
    """A connection to the tool, which ticks."""
    try:
        connection = socket.create_connection((address, 9000), timeout=2)
        connection.settimeout(5)
        return connection
    except OSError:
        return None


def goes_on(connection):
    # What is in its buffer came before.
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        pass
    connection.settimeout(5)
    return b"tick" in connection.recv(64) + connection.recv(64)


def nothing_is_left(old, agent, killed=(), judged=True):
    """`killed`: workspaces of which the test killed something."""
    ids = [found["spec"]["id"] for found in json.loads(agent.run("ps", "-o", "json").stdout)]
    done = agent.run("rm", "--force", *ids)
    assert done.returncode == 0, done
    if judged:
        judge(agent, killed=killed)
    until(lambda: not leftovers(agent, {}), lambda: leftovers(agent, {}))
    assert not list((agent.state / "workspaces").iterdir())
    assert all(old.gone(id) for id in old.ids if old.running[id].shim)
    for base in old.cgroups.bases:
        assert not list((base / old.cgroups.parent).glob("*/")), base
    assert not re.search(rf"\b{agent.prefix}\d", subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout)


# ------------------------------------------------------------- the stand-in

def test_the_recording_is_understood(old):
    """The control of all that follows: these are the bytes of that agent, and its supervisors speak as they did."""
    old, agent = old
    assert old.ids == ["desk", "late", "loop", "roles", "sales"] and sorted(old.ended) == ["asked", "batch", "boxed", "missing"]
    assert JOURNAL.stat().st_size < 1 << 18
    for folder in WORKSPACES.iterdir():
        plan = (folder / "plan").read_bytes()
        assert encode_plan(decode_plan(plan)) == plan
        read((folder / "record.json").read_text())
    for id, step in zip(old.ids, old.STEPS):
        old.start(id, to=step)
    for id in old.ids[2:]:
        connection = Connection.to(old.folder(id))
        code, _ = connection.receive()
        assert code in STATES, "no hello: a version begins with 0x48"
        connection.close()
    assert os.readlink(f"/proc/{old.running['sales'].shim}/exe") == os.path.realpath(old.program)
    assert oct((old.folder("sales") / "shim.sock").stat().st_mode & 0o777) == "0o600"
    held = lambda pid: {os.readlink(p) for p in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    assert str(old.folder("sales")) in held(old.running["sales"].shim)
    old.die()
    until(lambda: old.gone("desk"), "one that has no plan ends with its agent")


# ------------------------------------------------------------------ adopted

def test_all_are_adopted_and_none_is_touched(old):
    old, agent = old
    for id in old.ids:
        old.start(id)
    tools = {id: old.tool(id) for id in old.ids}
    connections = {id: until(lambda: dial(old.running[id].record["address"]), "a connection") for id in old.ids}
    old.die()
    agent.start()
    adopted(agent, old.ids)
    for id, record in old.ended.items():
        found = agent.get(id)
        assert found["state"] == f"STATE_{record['state'].upper()}" and found["reason"]["code"] == record["reason"]["code"], found
        assert not events(agent, id, Event.Adopted)
    assert agent.run("logs", "batch").stdout == "rows: 45\n"
    for times in (1, 2, 3):
        adopted(agent, old.ids, times)
        for id in old.ids:
            assert old.tool(id) == tools[id] and goes_on(connections[id])
            assert agent.run("logs", id).stdout.startswith(f"hello from {id}\n")
            found = agent.get(id)
            assert found["address"] == old.running[id].record["address"] and found["image_digest"] == old.image, found
        assert agent.run("node").returncode == 0
        # Killed, ended in order, and once more.
        agent.stop(signal.SIGKILL if times == 1 else signal.SIGTERM)
        assert all(goes_on(connection) for connection in connections.values())
        agent.start()
    used = agent.run("top", "-o", "json", *old.ids)
    assert used.returncode == 0 and used.stdout.count(str(64 << 20)) == len(old.ids), "of each its own cgroup is read"
    nothing_is_left(old, agent)


def test_programs_run_in_them(upgraded):
    old, agent, tools = upgraded
    done = inside(agent, "desk", "echo $CARREL_WORKSPACE; id -u; echo wrong >&2; exit 41")
    assert (done.returncode, done.stdout, done.stderr) == (41, "desk\n1000\n", "wrong\n"), done
    assert inside(agent, "desk", "kill -9 $$").returncode == 137
    assert inside(agent, "loop", "echo $MODE").stdout == "loop\n"
    assert agent.run("exec", "desk", "--", "/nonexistent").returncode != 0
    fed = subprocess.run(["timeout", "20", conftest.BIN / "carrel", "exec", "-i", "desk", "--", "/bin/cat"], input="through\n", text=True, capture_output=True,
                         env={**os.environ, "CARREL_SOCKET": agent.socket})
    assert (fed.returncode, fed.stdout) == (0, "through\n"), fed
    # With a terminal.
    master, slave = pty.openpty()
    typed = subprocess.Popen(["timeout", "20", conftest.BIN / "carrel", "exec", "-it", "desk", "--", "/bin/sh", "-c",
                              "test -t 0 && echo a terminal; read x; exit $x"],
                             stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "CARREL_SOCKET": agent.socket})
    os.close(slave)
    shown = b""
    while b"a terminal" not in shown:
        shown += os.read(master, 4096)
    os.write(master, b"17\r")
    assert typed.wait(20) == 17
    os.close(master)
    # It ends with whoever asked for it.
    begun = subprocess.Popen([conftest.BIN / "carrel", "exec", "desk", "--", "/bin/sleep", "987"], env={**os.environ, "CARREL_SOCKET": agent.socket})
    sleeps = lambda: subprocess.run(["pgrep", "-fx", "/bin/sleep 987"], capture_output=True, text=True).stdout
    until(sleeps, "the program runs")
    begun.kill()
    begun.wait()
    agent.stop()
    until(lambda: not sleeps(), "the program is ended when the agent goes at the latest")
    agent.start()
    adopted(agent, old.ids, 2)
    assert inside(agent, "desk", "exit 42").returncode == 42 and old.tool("desk") == tools["desk"]
    nothing_is_left(old, agent)


def test_credentials(upgraded):
    old, agent, tools = upgraded
    folder = "/run/carrel/credentials"
    secret = agent.directory / "secret"

    def put(content, *arguments):
        secret.write_text(content)
        done = agent.run("credentials", "put", *arguments)
        assert done.returncode == 0, done
    assert said(agent, "desk", f"cat {folder}/password {folder}/day") == "of the request\n" * 2, "what the old agent gave"
    put("new\n", "desk", f"password={secret}")
    put("new\n", "--expires", "1h", "desk", f"more={secret}")
    put("short\n", "--expires", "2s", "desk", f"short={secret}")
    put("first\n", "loop", f"key={secret}")
    assert said(agent, "desk", f"cat {folder}/password {folder}/more") == "new\nnew\n"
    assert said(agent, "loop", f"cat {folder}/key; stat -c '%a %u' {folder}/key") == "first\n400 1000\n"
    until(lambda: not said(agent, "desk", f"ls {folder} | grep short || true"), "a credential goes when its time is over")
    assert agent.run("credentials", "rm", "desk", "more").returncode == 0
    assert inside(agent, "desk", f"cat {folder}/more").returncode == 1
    agent.stop()
    agent.start()
    adopted(agent, old.ids, 2)
    assert said(agent, "desk", f"ls {folder}").split() == ["day", "password"]
    put("after\n", "desk", f"password={secret}")
    assert said(agent, "desk", f"cat {folder}/password") == "after\n" and old.tool("desk") == tools["desk"]
    assert [json.loads(e["attributes"])["names"] for e in events(agent, "desk", Event.CredentialsUpdated)] == ["day", "password", "more", "short", "password"]
    nothing_is_left(old, agent)


def test_the_broker_gets_new_credentials(upgraded):
    old, agent, _ = upgraded
    ask = 'wget -q -O - --header "Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)" http://127.0.0.1:15170/aws/'
    until(lambda: '"new"' in inside(agent, "roles", ask + "reader").stdout, "today's provider is asked, and its answer handed over")
    assert inside(agent, "roles", ask + "writer").returncode != 0, "what was revoked stays revoked"
    until(lambda: [json.loads(e["attributes"])["role"] for e in events(agent, "roles", Event.CredentialsIssued)][:1] == ["reader"], "that it was given is told")
    agent.stop()
    agent.start()
    adopted(agent, old.ids, 2)
    assert agent.run("credentials", "revoke", "roles").returncode == 0
    assert inside(agent, "roles", ask + "reader").returncode != 0
    nothing_is_left(old, agent)


def test_datasets(upgraded):
    old, agent, tools = upgraded
    assert said(agent, "sales", "cat /data/sales/rows /data/extra/rows") == "sales 1\nextra 1\n", "of its spec, and attached by the old agent"
    assert inside(agent, "sales", "touch /data/sales/new").returncode != 0
    assert agent.run("dataset", "attach", "desk", "sales", "/data/sales").returncode == 0
    assert said(agent, "desk", "cat /data/sales/rows") == "sales 1\n" and inside(agent, "desk", "touch /data/sales/new").returncode != 0
    os.chown(agent.directory / "datasets" / "sales-1", 2001, 2001)
    assert agent.run("dataset", "attach", "--write", "desk", "sales", "/data/sales").returncode == 0, "its mode is changed where it is"
    assert inside(agent, "desk", "touch /data/sales/new").returncode == 0
    agent.stop()
    agent.start()
    adopted(agent, old.ids, 2)
    assert said(agent, "desk", "ls /data/sales") == "new\nrows\n"
    for id, target in (("desk", "/data/sales"), ("sales", "/data/extra"), ("sales", "/data/sales")):
        done = agent.run("dataset", "detach", id, target)
        assert done.returncode == 0, done
        assert inside(agent, id, f"cat {target}/rows").returncode != 0
    busy = agent.run("dataset", "attach", "--expires", "2s", "late", "extra", "/data/extra")
    assert busy.returncode == 0, busy
    until(lambda: inside(agent, "late", "cat /data/extra/rows").returncode != 0, "detached when its time is over")
    assert all(old.tool(id) == tools[id] for id in ("desk", "sales", "late"))
    nothing_is_left(old, agent)


def test_want_of_memory_is_told(upgraded):
    old, agent, tools = upgraded
    assert inside(agent, "late", "dd if=/dev/zero of=/dev/null bs=200M count=1").returncode == 137
    told = until(lambda: events(agent, "late", Event.OutOfMemory), "the event")
    assert json.loads(told[0]["attributes"])["kills"] == "1"
    agent.stop()
    agent.start()
    adopted(agent, old.ids, 2)
    assert len(events(agent, "late", Event.OutOfMemory)) == 1 and old.tool("late") == tools["late"]
    nothing_is_left(old, agent)


# --------------------------------------------------------------------- ended

def test_every_end_is_reported_as_it_was(old):
    old, agent = old
    for id in old.ids:
        old.start(id)
    old.die()
    # While no agent runs: by itself, and with its supervisor.
    old.end("sales", 9)
    os.kill(old.running["roles"].shim, signal.SIGKILL)
    until(lambda: old.gone("sales") and old.gone("roles"), "both are gone")
    agent.start()
    adopted(agent, ["desk", "late", "loop"])
    found = reason(agent, "sales")
    assert (found["code"], found["exit_code"]) == ("Exited", 9), found
    assert "bye from sales" in agent.run("logs", "sales").stdout
    assert reason(agent, "roles")["code"] == Code.Unknown
    # While one does: by itself, asked to, and killed.
    old.end("late", 7)
    found = reason(agent, "late")
    assert (found["code"], found["exit_code"], found["message"]) == ("Exited", 7, "the tool ended with status 7"), found
    done = agent.run("stop", "desk")
    assert done.returncode == 0, done
    found = reason(agent, "desk")
    assert found["code"] == Code.Requested and found["stopped_by"].endswith("(carrel stop)") and "(carrel stop)" in found["message"], found
    assert found["signal"] == 15, found
    os.kill(old.tool("loop")[0], signal.SIGKILL)
    until(lambda: (found := agent.get("loop"))["attempt"] == 2 and found["state"] == "STATE_READY", "its policy starts it again")
    ended = json.loads(events(agent, "loop", Event.Stopped)[0]["reason"])
    assert (ended["code"], ended["signal"]) == ("Signalled", 9), ended
    agent.stop()
    agent.start()
    assert all(len(events(agent, id, Event.Stopped)) == 1 for id in ("sales", "roles", "late", "desk"))
    nothing_is_left(old, agent, killed=["roles", "loop"])


def test_one_that_does_not_end_is_ended(upgraded):
    """SIGTERM first, SIGKILL after the time that was given; also where the agent is killed in between."""
    old, agent, _ = upgraded
    deaf = children(children(old.running["late"].shim)[0])
    for pid in deaf:
        os.kill(pid, signal.SIGSTOP)  # hears nothing but SIGKILL
    stopping = subprocess.Popen(["timeout", "60", conftest.BIN / "carrel", "stop", "late"], env={**os.environ, "CARREL_SOCKET": agent.socket},
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: events(agent, "late", Event.Stopping), "the stop is on its way")
    agent.stop()
    stopping.wait()
    agent.start()
    found = reason(agent, "late")
    assert found["code"] == Code.Requested and found["stopped_by"].endswith("(carrel stop)") and found["signal"] == 9, found
    nothing_is_left(old, agent)


def test_a_restart_is_todays(upgraded):
    """The next attempt has today's supervisor, and all that there is to have."""
    old, agent, _ = upgraded
    connection = dial(old.running["desk"].record["address"])
    old.end("loop", 4)
    until(lambda: (found := agent.get("loop"))["attempt"] == 2 and found["state"] == "STATE_READY", "the second attempt")
    ended = json.loads(events(agent, "loop", Event.Stopped)[0]["reason"])
    assert (ended["code"], ended["exitCode"]) == ("Exited", 4), ended
    assert old.gone("loop") and said(agent, "loop", "echo $MODE") == "loop\n"
    agent.stop()
    agent.start()
    adopted(agent, ["desk", "late", "roles", "sales"], 2)
    until(lambda: events(agent, "loop", Event.Adopted)[1:], "it is adopted beside those of the old agent")
    assert goes_on(connection)
    old.end("loop", 0)
    until(lambda: agent.get("loop")["state"] == "STATE_STOPPED", "an end without failure is the end")
    found = agent.get("loop")
    assert found["reason"]["code"] == Code.Exited and found["attempt"] == 2
    nothing_is_left(old, agent)


# ---------------------------------------------------------------- the rest

def test_a_start_that_was_cut_off_is_settled(old):
    """At every step: it comes up, or it is told why not, and nothing is left of it. One whose secrets the supervisor never got is not started."""
    old, agent = old
    for id, step in zip(("desk", "late", "loop", "roles", "sales"), ("created", "standing", "launched", "waiting", "started")):
        old.start(id, to=step)
    tool = old.tool("sales")
    old.die()
    agent.start()
    adopted(agent, ["sales"])
    for id in ("desk", "late", "loop", "roles"):
        agent.wait(id, "READY", "FAILED", "STOPPED")
        assert "reason" in agent.get(id) or said(agent, id, "echo $CARREL_WORKSPACE") == f"{id}\n"
    assert agent.get("desk")["state"] == "STATE_FAILED" and old.tool("sales") == tool
    # The control is an old agent, which ends what it finds half-way, says that it was restarted, and sweeps away what it starts anew.
    is_control = not (agent.state / "sandboxes").is_dir()
    assert is_control or agent.get("late")["state"] == "STATE_READY", agent.get("late")
    nothing_is_left(old, agent, judged=not is_control)


def test_a_lost_journal_is_made_up_for_by_the_old_copies(old):
    old, agent = old
    for id in old.ids:
        old.start(id)
    tools = {id: old.tool(id) for id in old.ids}
    old.die()
    for file in agent.state.glob("journal.sqlite*"):
        file.unlink()
    for id in old.ended:
        shutil.rmtree(old.folder(id))
    agent.start()
    for id in old.ids:
        until(lambda: events(agent, id, Event.Recovered), f"{id} is brought back")
        agent.wait(id, "READY")
        assert events(agent, id, Event.Adopted) and old.tool(id) == tools[id]
        assert inside(agent, id, "exit 5").returncode == 5
    old.end("late", 6)
    agent.wait("late", "STOPPED")
    assert agent.get("late")["reason"]["exit_code"] == 6
    nothing_is_left(old, agent)

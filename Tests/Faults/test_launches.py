# SPDX-License-Identifier: Apache-2.0
"""No launch is lost: what was accepted ends as it was to end, wherever the agent is killed on the way. The long version is launches.py."""

import json
import os
import pathlib
import random
import signal
import socket
import struct
import threading
import types

import pytest
from conftest import Code, Event, Exit, Sandbox, destroy, exit_record, judge, leftovers, misreported, sandbox, until
from launches import POINTS, Launches, complaints, launch, lock, make_agent, make_run
from phases import Sight, hello_state, look, phase

# ------------------------------------------------------- what judges, judged


def event(sequence, workspace, type, generation=1, nanoseconds=None, **reason):
    reason = {"code": Code.Exited, "message": "said", **reason} if reason else None
    return {"sequence": sequence, "workspace": workspace, "type": type, "generation": generation, "bootNanoseconds": nanoseconds or sequence * 10,
            "reason": json.dumps(reason), "cause": reason and {"exitCode": None, "signal": None, "errno": None, "stoppedBy": "", **reason}}


@pytest.mark.parametrize("type, reason, wrong", [
    (Event.Stopped, {"exitCode": 3}, None),
    (Event.Failed, {"code": Code.Internal, "message": "the agent was restarted during the start; launch it again"}, "is not the end of a workspace"),
    (Event.Failed, {"code": Code.Internal, "message": "there is no tool x any more"}, None),
    (Event.Stopped, {"code": Code.Signalled, "signal": 9}, "nobody is named"),
    (Event.Stopped, {"code": Code.Signalled, "signal": 15}, None),
    (Event.Stopped, {"code": Code.OutOfMemory, "signal": 9}, None),
    (Event.Stopped, {"code": Code.Requested, "signal": 9, "stoppedBy": "uid 0"}, None),
    (Event.Stopped, {"code": Code.Requested, "signal": 9}, "asked for by nobody"),
    (Event.Failed, {"code": Code.NotReadyInTime}, None),
    (Event.Stopped, {"exitCode": 3, "message": ""}, "says nothing"),
])
def test_the_oracle_knows_an_end_that_explains_nothing(type, reason, wrong):
    found = misreported({5: event(5, "w", type, **reason)})
    assert len(found) == bool(wrong) and (not wrong or wrong in found[0]), found
    if reason.get("signal") == signal.SIGKILL:
        assert not [f for f in misreported({5: event(5, "w", type, **reason)}, killed={"w"}) if "nobody is named" in f]


@pytest.mark.parametrize("kind, value, reason, right", [
    ("exited", 48, {"exitCode": 48}, True),
    ("exited", 48, {"exitCode": 48, "code": Code.Requested, "stoppedBy": "uid 0"}, True),
    ("exited", 48, {"exitCode": 0}, False),
    ("exited", 0, {"code": Code.Unknown}, False),
    ("exited", 48, {"code": Code.CredentialsLost}, False),
    ("signalled", 9, {"code": Code.NotReadyInTime}, True),
    ("signalled", 9, {"code": Code.NetworkFailed}, True),
    ("signalled", 9, {"code": Code.Internal, "message": "anything"}, False),
    ("signalled", 11, {"code": Code.Signalled, "signal": 11}, True),
    ("failed", 2, {"code": Code.CannotExecute, "errno": 2}, True),
    ("failed", 2, {"code": Code.Unknown}, False),
])
def test_the_oracle_holds_an_end_against_its_exit_record(kind, value, reason, right):
    history = {5: event(5, "w", Event.Stopped, generation=2, **reason)}
    found = misreported(history, {Exit("w", 2, 45, kind, value)})
    assert (not found) == right, found
    assert not misreported(history, {Exit("w", 1, 45, kind, value), Exit("v", 2, 45, kind, value), Exit("w", 2, 55, kind, value)}), "of other ends"


def test_what_counts_as_lost():
    run = make_run(random.Random(1), 1, "again")
    right = [event(1, run.id, Event.Created, exitCode=None), event(2, run.id, Event.Stopped, 1, exitCode=run.ends[0]), event(3, run.id, Event.Stopped, 2, exitCode=0)]
    assert not complaints(right, [run])
    for events, said in (([], "knows nothing"), (right[:2], "attempt 2 has 0 ends"), (right + right[1:2], "attempt 1 has 2 ends"),
                         (right[:2] + [event(3, run.id, Event.Stopped, 2, exitCode=250)], "started twice"),
                         (right[:2] + [event(3, run.id, Event.Failed, 2, code=Code.Internal)], "Failed, Internal"),
                         (right[:1] + right, "2 events that it was created"), (right + [event(4, run.id, Event.Stopped, 3, exitCode=0)], "attempts [3]")):
        assert said in "; ".join(complaints(events, [run])[run.id]), (events, said)


@pytest.mark.parametrize("state, sight, expected", [
    ("pending", None, "accepted"), ("preparing", None, "accepted"), ("preparing", Sight(lives=True, state=0), "accepted"),
    ("preparing", Sight(plan=True, lives=True, state=0), "preparing"), ("preparing", Sight(plan=True, lives=True, childless=True, state=2), "preparing"),
    ("preparing", Sight(plan=True, lives=True), "preparing"), ("preparing", Sight(plan=True, lives=True, state=2), "created"),
    ("preparing", Sight(plan=True, lives=True, state=3), "waiting"), ("preparing", Sight(plan=True, lives=True, state=4), "started"),
    ("ready", Sight(plan=True, lives=True, childless=True, state=4), "ready"),
    ("starting", Sight(plan=True, lives=True, state=4), "started"), ("ready", Sight(plan=True, lives=True, state=4), "ready"),
    ("starting", Sight(plan=True, lives=True, state=6), "ended"), ("ready", Sight(plan=True, ended=True), "ended"), ("starting", Sight(plan=True), "gone"),
])
def test_the_phase_of_a_start(state, sight, expected):
    assert phase(state, sight) == expected


def test_the_points_of_a_start_are_those_of_the_agent():
    assert {"after Created", "supervisor spawned", "before Ready", "exit seen"} <= set(POINTS) and not {"supervisor cloned", "before Deleted"} & set(POINTS)


def hello(state):
    text = lambda value: struct.pack("<I", len(value)) + value
    return b"H" + struct.pack("<QQ", 1, 2) + text(b"hold") + text(b"exec-hangup") + bytes([state])


def test_a_hello_is_read():
    for state in range(7):
        assert hello_state(hello(state) + b"more") == state
    head = hello(0)[:-1]
    assert [hello_state(d) for d in (b"", b"H", head, head[:20], b"H" + b"\xff" * 40, bytes([22]), b"Q")] == [None, None, None, None, None, 3, None]


@pytest.fixture
def host(tmp_path):
    """What the oracle needs to know of an agent, without one."""
    for name in ("sandboxes", "workspaces"):
        (tmp_path / "state" / name).mkdir(parents=True)
    return types.SimpleNamespace(directory=tmp_path, state=tmp_path / "state", parent="carrel-nobody", prefix="nobody")


def test_sandboxes_are_looked_at(host):
    """One that answers, one that is busy, one whose supervisor is gone, one without a plan."""
    listeners = []
    for name in ("answers", "busy", "gone", "early"):
        folder = host.state / "sandboxes" / name
        folder.mkdir()
        if name != "early":
            (folder / "plan").touch()
        number, listener = os.open(folder, os.O_PATH | os.O_DIRECTORY), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"/proc/self/fd/{number}/shim.sock")
        os.close(number)
        listener.listen()
        listeners.append(listener)
    listeners[2].close()
    threading.Thread(target=lambda: listeners[0].accept()[0].send(hello(3))).start()
    sights = {folder.name: sight for folder, sight in look(host).items()}
    assert sights == {"answers": Sight(True, False, True, None, 3), "busy": Sight(True, False, True), "gone": Sight(True), "early": Sight(lives=True)}
    assert {name: phase("preparing", sight) for name, sight in sights.items()} == {"answers": "waiting", "busy": "preparing", "gone": "gone", "early": "accepted"}


def test_what_is_left_is_found(host):
    record = lambda state, **body: {"state": state, "body": json.dumps(body)}
    for path in ("sandboxes/s1", "sandboxes/s2", "sandboxes/s4", "sandboxes/s3", "workspaces/runs/log", "workspaces/ended/log", "workspaces/early/log", "workspaces/nobody/log",
                 "workspaces/legacy/log"):
        (host.state / path).mkdir(parents=True)
    for path in ("sandboxes/s2/exit", "workspaces/ended/plan", "workspaces/legacy/plan"):
        (host.state / path).touch()
    workspaces = {"runs": record("ready", sandbox={"id": "s1"}), "ends": record("ready", sandbox={"id": "s2"}), "ended": record("stopped", sandbox={"id": "s3"}),
                  "early": record("pending", sandbox={"id": "s4"}), "legacy": record("ready", cgroup="legacy-7")}
    assert set(leftovers(host, workspaces)) == {"an end of ends that is not reported", "folder nobody", "folder of sandbox s3",
                                                str(host.state / "workspaces/ended/plan")}
    assert sandbox(host, "runs", {"sandbox": {"id": "s1"}, "cgroup": ""}) == Sandbox("s1", "s1", host.state / "sandboxes/s1")
    assert sandbox(host, "legacy", {"cgroup": "legacy-7"}) == Sandbox("legacy", "legacy-7", host.state / "workspaces/legacy")
    adopted = {"sandbox": {"id": "legacy", "folder": "workspaces/legacy", "cgroup": "legacy-7"}}
    assert sandbox(host, "legacy", adopted) == Sandbox("legacy", "legacy-7", host.state / "workspaces/legacy")
    assert sandbox(host, "early", {}) is None


def test_an_exit_record_is_read(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"spec": {"id": "w"}, "attempt": 2}))
    for text, expected in (("version=1\nexited=48\nrealtime=1\nboottime=77\n\n\n", Exit("w", 2, 77, "exited", 48)),
                           ("version=1\nsignalled=9\nboottime=77\n", Exit("w", 2, 77, "signalled", 9)),
                           ("version=1\nfailed=2\nstep=execute /x=y\nboottime=77\n", Exit("w", 2, 77, "failed", 2)),
                           ("version=1\nexited=48\n", None), ("", None)):
        (tmp_path / "exit").write_text(text)
        assert exit_record(tmp_path) == expected


# ------------------------------------------------------------------- launches

def test_no_launch_is_lost():
    seed = int(os.environ.get("CARREL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}, again with CARREL_SEED={seed}")
    with lock():
        client = Launches(60, seed, seconds=40)
        try:
            wrong = client.run()
            client.report()
            assert not wrong, "\n".join(wrong)
        finally:
            destroy(client.agent)


@pytest.fixture(scope="module")
def agent():
    agent = make_agent(pathlib.Path(f"/tmp/carrel-points-{os.getpid()}"), "crl")
    yield agent
    destroy(agent)


PASSED = [*POINTS, "before Restarting", "after Restarting"]


@pytest.mark.parametrize("point", PASSED)
def test_a_start_goes_on_where_its_agent_was_killed(agent, point):
    """With a credential file, which no later agent was given; only for a restart, which such a workspace has none of, without."""
    run = make_run(random.Random(point), PASSED.index(point), "again" if Event.Restarting in point else "secret").write(agent.directory)
    reached = agent.directory / "reached"
    reached.unlink(missing_ok=True)
    agent.stop()
    agent.start(point)
    armed = agent.process

    def ready():
        if not agent.lives:
            agent.process.wait()
            agent.start()
    launch(agent, run, ready)
    armed.wait(20)
    assert reached.read_text().split("\n")[0] == point
    ready()
    ended = lambda: (found := agent.get(run.id)) and found["state"] in ("STATE_STOPPED", "STATE_FAILED") and found.get("attempt", 1) >= len(run.ends)
    until(ended, f"the end of {run.id}", 20)
    wrong = complaints(agent.records()[0], [run])
    assert not wrong, wrong
    agent.do("rm", run.id)
    # Not the oracle, which would hold what an earlier point did against this one; it judges all of them at last.
    until(lambda: not leftovers(agent, agent.records()[1]), lambda: leftovers(agent, agent.records()[1]), 8)


def test_what_the_points_left_is_judged(agent):
    judge(agent)

# SPDX-License-Identifier: Apache-2.0
"""Controllers that crash, stall, forget and ask for the impossible: nothing is lost, and what had to go is announced."""

import json
import signal
import subprocess
import time

import pytest
from conftest import BIN, Code, Event, batch, judge, memory, node_info, one, until
from test_storage import inside


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
    until(lambda: agent.records()[2]["trimmed"] == agent.records()[2]["head"], "trimmed by its owner", 40)
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
    assert result("uncordon").get("code", 0) == 0
    # Its former name is an alias for one release.
    assert result("resume").get("code", 0) == 0
    stopped = result("stop ordered")
    assert stopped["workspace"]["reason"]["code"] == Code.Requested and stopped["workspace"]["reason"]["stoppedBy"] == "a controller"
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


@pytest.mark.parametrize("node", [one(more="credentials: {aws: {controller: panel, timeout: 2}}\n")], indirect=True)
def test_a_controller_gives_credentials(node):
    """Asked ahead of their end, over its restarts and silences; the workspace has what it had meanwhile."""
    agent, (panel,) = node
    given = agent.directory / "given.json"

    def give(number, seconds):
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        given.write_text(json.dumps({"AccessKeyId": f"ASIA{number}", "SecretAccessKey": f"CANARY-{number}", "SessionToken": "CANARY", "Expiration": end}))
    give(1, 12)
    panel.start("--credentials", given)
    until(lambda: node_info(agent)["controllers"][0].get("connected"), "connected")
    agent.launch("w", more="aws: {roles: [analyst]}\n")
    agent.wait("w", "READY")
    key = lambda: inside(agent, "w", "wget -qO- --header \"Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)\" $AWS_CONTAINER_CREDENTIALS_FULL_URI")
    assert json.loads(key().stdout)["AccessKeyId"] == "ASIA1"
    give(2, 20)
    until(lambda: '"ASIA2"' in key().stdout, "renewed at half their time")
    failed = lambda: [json.loads(e["attributes"])["error"] for e in agent.records()[0] if e["type"] == Event.CredentialsFailed]
    panel.process.send_signal(signal.SIGSTOP)
    until(lambda: failed(), "a silence is told", 30)
    assert "panel: did not answer within 2 s" in failed()[0] and '"ASIA2"' in key().stdout
    panel.stop()
    give(3, 3600)
    panel.start("--credentials", given)
    until(lambda: '"ASIA3"' in key().stdout, "the next one that answers", 40)
    asked = [m["wanted"] for m in panel.messages() if "wanted" in m]
    assert {(a["workspace"], a["owner"], a["awsRole"]) for a in asked} == {("w", "ada", "analyst")} and len({a["id"] for a in asked}) == len(asked) >= 3, asked
    # One that has none says so; one that nobody asked is not heard.
    given.unlink()
    agent.launch("none", more="aws: {roles: [analyst]}\n")
    agent.wait("none", "READY")
    until(lambda: any("panel: there are none for ada" in f for f in failed()), failed)
    for path in [agent.directory / "carreld.log", panel.log, *agent.state.glob("journal*")]:
        assert b"CANARY" not in path.read_bytes(), path
    bad = agent.directory / "bad.yaml"
    bad.write_text(agent.config.read_text().replace("controller: panel", "controller: nobody"))
    refused = subprocess.run([BIN / "carreld", "--check-config", "--config", bad], capture_output=True, text=True)
    assert refused.returncode != 0 and "nobody is none of the controllers" in refused.stdout + refused.stderr, refused

# SPDX-License-Identifier: Apache-2.0
"""Limits, ends, restarts of the agent, and what the stream of events says about them."""

import os
import pathlib
import signal
import subprocess
import time

import pexpect
import requests

from conftest import BIN
from jupyter import Jupyter
from support import Code, Event


def test_a_batch_run_returns_its_output_and_exit_code(agent):
    done = agent.launch("batch.yaml", "batch", check=False)
    assert done.returncode == 3
    assert agent.run("logs", "batch").stdout == "rows: 45\n"
    assert [e["type"] for e in agent.events("batch")] == [Event.Created, Event.Preparing, Event.Starting, Event.Ready, Event.Stopped]
    assert agent.json("get", "batch")["reason"]["exit_code"] == 3
    agent.remove("batch")


def test_out_of_memory_is_said_as_such(agent):
    done = agent.launch("batch.yaml", "hungry", command='["python3", "-c", "x = bytearray(1 << 30)"]', resources="\n  memory: 128Mi", check=False)
    assert done.returncode == 137
    reason = agent.json("get", "hungry")["reason"]
    assert reason["code"] == Code.OutOfMemory and "limit 128Mi" in reason["message"]
    assert int(reason["memory_limit_bytes"]) == 128 << 20 and int(reason["memory_peak_bytes"]) > 100 << 20
    agent.remove("hungry")


def test_a_kernel_out_of_memory_is_an_event_and_jupyterlab_lives(agent):
    agent.launch("jupyterlab.yaml", "greedy", resources="\n  memory: 400Mi\n  cpu: \"1\"")
    jupyter = Jupyter(agent.json("get", "greedy"))
    assert int(agent.exec("greedy", "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes").stdout) == 400 << 20, "seen from inside"
    agent.exec("greedy", "python3", "-c", "x = bytearray(1 << 30)", check=False)
    time.sleep(2.5)
    event = next(e for e in agent.events("greedy") if e["type"] == Event.OutOfMemory)
    assert event["attributes"]["limitBytes"] == str(400 << 20)
    assert jupyter.request("GET", "/api/status")["kernels"] == 0
    agent.remove("greedy")


def test_pids_and_cpu_limits_bite(agent, lab):
    bomb = "import subprocess\nn=0\ntry:\n  while n<2000: subprocess.Popen(['sleep','5']); n+=1\nexcept OSError: pass\nprint(n)"
    assert int(agent.python("lab", bomb)) < 512
    time.sleep(5.5)
    agent.launch("batch.yaml", "busy", command='["python3", "-c", "import time; e=time.time()+3\\nwhile time.time()<e: pass"]', resources="\n  cpu: 500m", check=False)
    # Half a CPU for three seconds, and Python's own start.
    assert any(e["type"] == Event.Ready for e in agent.events("busy"))
    agent.remove("busy")
    agent.launch("batch.yaml", "busy2", "--no-wait", command='["python3", "-c", "while True: pass"]', resources="\n  cpu: 500m")
    time.sleep(1)
    first, begun = int(agent.json("top", "busy2")[0]["cpu_nanoseconds"]), time.time()
    time.sleep(3)
    share = (int(agent.json("top", "busy2")[0]["cpu_nanoseconds"]) - first) / 1e9 / (time.time() - begun)
    assert 0.3 < share < 0.6, share
    agent.remove("busy2")


def test_a_killed_agent_leaves_the_tool_and_its_connections_alone(agent):
    agent.launch("jupyterlab.yaml", "survivor")
    agent.launch("batch.yaml", "ends-meanwhile", "--no-wait", command='["sh", "-c", "sleep 2; echo late; exit 7"]')
    workspace = agent.json("get", "survivor")
    jupyter = Jupyter(workspace)
    kernel = jupyter.start_kernel()
    channel = jupyter.socket(f"/api/kernels/{kernel}/channels")
    agent.kill()
    assert requests.get(jupyter.base + "/api", timeout=5).status_code == 200
    time.sleep(2.5)
    agent.start()
    channel.ping()
    assert jupyter.execute(kernel, "1+1") == "2"
    channel.close()
    again = agent.json("get", "survivor")
    assert again["state"] == "STATE_READY" and again["token"] == workspace["token"]
    assert any(e["type"] == Event.Adopted for e in agent.events("survivor"))
    for _ in range(50):
        ended = agent.json("get", "ends-meanwhile")
        if ended["state"] == "STATE_STOPPED":
            break
        time.sleep(0.1)
    assert ended["reason"]["exit_code"] == 7, "the status of a tool that ended while no agent ran"
    assert agent.run("logs", "ends-meanwhile").stdout == "late\n"
    agent.remove("survivor", "ends-meanwhile")


def test_a_killed_supervisor_is_told_as_unknown_and_leaves_nothing(agent):
    agent.launch("batch.yaml", "orphan", "--no-wait", command='["sleep", "60"]')
    time.sleep(0.5)
    pids = subprocess.run(["pgrep", "-f", "^carrel-shim [a-z2-7]+ orphan$"], capture_output=True, text=True).stdout.split()
    os.kill(int(pids[0]), signal.SIGKILL)
    for _ in range(50):
        workspace = agent.json("get", "orphan")
        if workspace["state"] == "STATE_STOPPED":
            break
        time.sleep(0.1)
    assert workspace["reason"]["code"] == Code.Unknown
    time.sleep(0.3)
    assert not subprocess.run(["pgrep", "-f", "^carrel-shim [a-z2-7]+ orphan$"], capture_output=True).stdout
    agent.remove("orphan")


def test_stop_grants_its_grace_and_then_kills(agent):
    agent.launch("batch.yaml", "polite", "--no-wait", command='["sh", "-c", "trap \\"echo bye; exit 0\\" TERM; while true; do sleep 0.1; done"]')
    agent.launch("batch.yaml", "stubborn", "--no-wait", command='["sh", "-c", "trap \\"\\" TERM; while true; do sleep 0.1; done"]')
    time.sleep(0.7)
    agent.run("stop", "polite")
    assert agent.run("logs", "polite").stdout == "bye\n"
    begun = time.time()
    agent.run("stop", "-t", "1", "stubborn")
    assert 0.9 < time.time() - begun < 3
    assert agent.json("get", "stubborn")["reason"]["code"] == Code.Requested
    agent.remove("polite", "stubborn")


def test_lifetime_and_restart_policy(agent):
    agent.launch("batch.yaml", "short", "--no-wait", command='["sleep", "60"]', lifecycle="\n  maxLifetimeSeconds: 1\n  gracePeriodSeconds: 1")
    agent.launch("batch.yaml", "again", "--no-wait", command='["sh", "-c", "exit 1"]', lifecycle="\n  restartPolicy: onFailure")
    time.sleep(4)
    assert agent.json("get", "short")["reason"]["code"] == Code.Lifetime
    types = [e["type"] for e in agent.events("again")]
    assert types.count(Event.Restarting) >= 1 and types.count(Event.Stopped) >= 2
    agent.run("stop", "again")
    agent.remove("short", "again")


def test_restarts_and_lifetimes_go_on_under_the_next_agent(agent):
    agent.launch("batch.yaml", "phoenix", "--no-wait", command='["sh", "-c", "sleep 0.5; exit 1"]', lifecycle="\n  restartPolicy: always")
    agent.launch("batch.yaml", "mortal", "--no-wait", command='["sleep", "60"]', lifecycle="\n  maxLifetimeSeconds: 4\n  gracePeriodSeconds: 1")
    time.sleep(1.5)
    agent.kill()
    agent.start()
    before = [e["type"] for e in agent.events("phoenix")].count(Event.Restarting)
    time.sleep(5)
    assert [e["type"] for e in agent.events("phoenix")].count(Event.Restarting) > before
    assert agent.json("get", "mortal")["reason"]["code"] == Code.Lifetime
    agent.remove("phoenix", "mortal")


def test_exec_with_a_terminal_resizes_and_passes_the_exit_code(agent, lab):
    shell = pexpect.spawn(str(BIN / "carrel"), ["exec", "-i", "-t", "lab", "--", "bash", "--norc"], timeout=20, dimensions=(30, 100),
                          env={**os.environ, "CARREL_SOCKET": agent.socket})
    shell.sendline("stty size; tty")
    shell.expect("30 100")
    shell.expect("/dev/pts/")
    shell.setwinsize(40, 120)
    time.sleep(0.5)
    shell.sendline("stty size")
    shell.expect("40 120")
    shell.sendline("exit 7")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 7


def test_exec_without_a_terminal_keeps_streams_apart(agent, lab):
    done = agent.run("exec", "-i", "lab", "--", "sh", "-c", "cat; echo err >&2; exit 5", input="in\n", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "err\n", 5)
    big = agent.run("exec", "lab", "--", "head", "-c", "5000000", "/dev/zero").stdout
    assert len(big) == 5_000_000
    missing = agent.run("exec", "lab", "--", "nosuch", check=False)
    assert missing.returncode == 1 and "no such program" in missing.stderr


def test_logs_follow_and_survive_a_flood(agent):
    agent.launch("batch.yaml", "flood", "--no-wait", command='["sh", "-c", "yes x | head -c 6000000; echo end"]')
    seen = agent.run("logs", "-f", "flood").stdout
    assert seen.endswith("end\n")
    size = sum(f.stat().st_size for f in pathlib.Path(agent.directory / "state/workspaces/flood/log").iterdir())
    assert size < 4 * (224 << 10), size
    agent.remove("flood")


def test_credentials_are_replaced_while_the_tool_runs_and_appear_nowhere(agent):
    secret = agent.directory / "secret"
    secret.write_text("canary-1d4f")
    agent.launch("jupyterlab.yaml", "creds", "--credential", f"aws={secret}")
    assert agent.exec("creds", "cat", "/run/carrel/credentials/aws").stdout == "canary-1d4f"
    assert agent.exec("creds", "stat", "-c", "%a %u", "/run/carrel/credentials/aws").stdout.strip() == "400 1000"
    secret.write_text("canary-9b2c")
    agent.run("credentials", "creds", f"aws={secret}")
    assert agent.exec("creds", "cat", "/run/carrel/credentials/aws").stdout == "canary-9b2c"
    secret.unlink()
    for path in agent.directory.rglob("*"):
        if path.is_file() and "/images/" not in str(path):
            content = path.read_bytes()
            assert b"canary-1d4f" not in content and b"canary-9b2c" not in content, path
    agent.remove("creds")


def test_events_are_dense_and_resume_from_a_cursor(agent):
    import json
    lines = [json.loads(line)["event"] for line in agent.run("events", "-o", "json").stdout.splitlines()]
    assert [int(e["sequence"]) for e in lines] == list(range(1, len(lines) + 1))
    rest = agent.run("events", "-o", "json", "--cursor", str(len(lines) - 3)).stdout.splitlines()
    assert len(rest) == 3
    above = agent.run("events", "--cursor", "999999", check=False)
    assert above.returncode == 1 and "above the head" in above.stderr


def test_a_second_agent_does_not_take_the_socket(agent):
    second = subprocess.run([BIN / "carreld", "--config", agent.config], capture_output=True, text=True, timeout=20)
    assert second.returncode == 1 and "another agent, pid" in second.stderr
    assert agent.run("node").returncode == 0


def test_nothing_is_left_of_what_was_removed(agent):
    agent.launch("batch.yaml", "trace", check=False)
    slot = int(agent.json("get", "trace")["address"].rsplit(".", 1)[1]) - 2
    sandbox = agent.sandbox("trace")
    agent.remove("trace")
    assert not (agent.directory / "state/workspaces/trace").exists()
    assert not (agent.directory / "state/sandboxes" / sandbox).exists()
    assert not list(pathlib.Path("/sys/fs/cgroup").glob(f"**/carrel-e2e/{sandbox}"))
    # The kernel takes a link away with its namespace, a little later.
    deadline = time.monotonic() + 5
    while pathlib.Path(f"/sys/class/net/cre{slot}").exists():
        assert time.monotonic() < deadline, "its link is left"
        time.sleep(0.05)
    assert not subprocess.run(["pgrep", "-f", "^carrel-shim [a-z2-7]+ trace$"], capture_output=True).stdout

# SPDX-License-Identifier: Apache-2.0
"""An agent that is made to fail, a controller that hears of it, and the oracle that judges what is left."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import typing

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from busybox import busybox_image  # noqa: E402
from support import BIN, ROOT, Code, Event, generate_stubs, run_client, spec, until  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: measures a time that other tests beside it would change (hack/test runs these one by one)")


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """The folder with the Python stubs of the API, which is in sys.path."""
    return generate_stubs(tmp_path_factory.mktemp("stubs"))


class Controller:
    """The reference controller, as a process."""

    def __init__(self, directory, name="panel"):
        self.socket = directory / f"{name}.sock"
        self.state, self.log = directory / f"{name}.json", directory / f"{name}.log"
        self.process = None

    def start(self, *options):
        self.process = subprocess.Popen([BIN / "carrel-controller", "--socket", self.socket, "--state", self.state, *map(str, options)],
                                        stdin=subprocess.PIPE, stdout=open(self.log, "ab"), stderr=subprocess.STDOUT, text=True)
        until(self.socket.exists, "the controller's socket")

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def order(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def messages(self):
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def cursor(self, node="torture"):
        try:
            return json.loads(self.state.read_text())[node]["cursor"]
        except (FileNotFoundError, KeyError, ValueError):
            return 0


# Agents that run at the same time, as a torture beside the tests does, have links, tables and cgroups with different prefixes, and
# different subnets: 10.N.0.0/16.
SUBNETS = {"crh": 85, "cri": 86, "crf": 89, "crg": 90, "crt": 91, "crk": 92, "crv": 93, "crl": 94, "crx": 95, "cry": 96}
# The prefixes of the agent that the tests of a module share, and of an agent that one test has to itself. Each of the workers of
# pytest-xdist, of which there are at most two, has its own.
SHARED, OWN = {"gw0": ("crf", "crg"), "gw1": ("crh", "cri")}[os.environ.get("PYTEST_XDIST_WORKER", "gw0")]


class Sandbox(typing.NamedTuple):
    """Where an attempt runs, by the names that the host knows it by."""
    name: str
    cgroup: str
    folder: pathlib.Path


def sandbox(agent, id, body):
    """The sandbox that a record says its workspace occupies; None where it says none."""
    place = body.get("sandbox") or {}
    if name := place.get("id"):
        return Sandbox(name, place.get("cgroup", name), agent.state / place.get("folder", f"sandboxes/{name}"))
    # A record as commit 7ede341 wrote it, which named folder and supervisor after the workspace.
    if body.get("cgroup") or not (agent.state / "sandboxes").is_dir():
        return Sandbox(id, body.get("cgroup", ""), agent.state / "workspaces" / id)
    return None


class Exit(typing.NamedTuple):
    """An exit record that was on disk: `kind` and `value` as the supervisor wrote them (exited, signalled, failed)."""
    workspace: str
    attempt: int
    nanoseconds: int
    kind: str
    value: int


def exit_record(folder):
    """The exit record of a sandbox's folder; None while there is none. The copy of the record beside it says whose it is."""
    try:
        lines = dict(line.split("=", 1) for line in (folder / "exit").read_text().splitlines() if line)
        record = json.loads((folder / "record.json").read_text())
        kind = next(k for k in ("exited", "signalled", "failed") if k in lines)
        return Exit(record["spec"]["id"], record["attempt"], int(lines["boottime"]), kind, int(lines[kind]))
    except (OSError, ValueError, KeyError, StopIteration):
        return None


class Agent:
    def __init__(self, directory, more="", prefix=SHARED):
        self.directory, self.prefix = directory, prefix
        self.state = directory / "state"
        self.socket = str(directory / "run" / "carrel.sock")
        self.config = directory / "carreld.yaml"
        self.parent = f"carrel-faults-{prefix}"
        self.config.write_text(
            f"socket: {self.socket}\nstate: {self.state}\nhomes: {directory}/homes\nnodeName: torture\n"
            f"tools: {ROOT}/manifests/tools\ndatasets: {directory}/datasets\nhelper: {BIN}/carrel-shim\nfirstID: 1600000000\ncgroupParent: {self.parent}\n"
            f"network: {{subnet: 10.{SUBNETS[prefix]}.0.0/16, table: carrel_{prefix}, linkPrefix: {prefix}}}\n"
            "defaults: {memory: 64Mi, cpu: 200m, pids: \"64\"}\nreservedMemory: 0\n" + more)
        self.process = None
        # What the oracle has to know: exit records that were seen, and workspaces of which something was killed on purpose.
        self.exits, self.killed = set(), set()
        # What was held against it already: an agent that many tests share fails the one in which it happened.
        self.blamed = set()

    def remember_exits(self):
        """An agent removes the folder of a sandbox whose end it has reported. So this is done while none runs."""
        folders = [*self.state.glob("sandboxes/*"), *self.state.glob("workspaces/*")]
        self.exits |= {found for folder in folders if (found := exit_record(folder))}

    def start(self, fault="", wait=True, under=(), **environment):
        self.remember_exits()
        log = open(self.directory / "carreld.log", "ab")
        env = {**os.environ, **environment, "SWIFT_BACKTRACE": "enable=no"}
        if fault:
            env.update(CARREL_FAULT=fault, CARREL_FAULT_LOG=str(self.directory / "reached"))
        self.process = subprocess.Popen([*under, BIN / "carreld", "--config", self.config], stdout=log, stderr=log, env=env)
        self.is_traced = "strace" in under
        if self.is_traced:
            until(self.traced, "the tracer has its child")
        if wait:
            until(lambda: self.run("node").returncode == 0 or not self.lives, "the agent serves")

    @property
    def lives(self):
        if self.process is None or self.process.poll() is not None:
            return False
        # A tracer follows the supervisors as well, which go on without their agent: it is over when its own child is.
        if self.is_traced and not self.traced():
            self.process.kill()
            self.process.wait()
            return False
        return True

    def traced(self):
        """The processes that the tracer itself started, as text."""
        return pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()

    def stop(self, how=signal.SIGKILL):
        if self.lives:
            self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def run(self, *arguments):
        return run_client(self.socket, *arguments)

    def do(self, *arguments):
        """A command; where the agent ended under it, a new one is started and it is said again."""
        for _ in range(4):
            done = self.run(*arguments)
            if done.returncode == 0:
                return done
            time.sleep(0.05)
            if self.lives:
                return done
            self.process.wait()
            self.start()
        return done

    def launch(self, id, script="sleep 100000", lifecycle="", options=(), **fields):
        """Does not wait. `fields`: as for `spec`."""
        path = self.directory / f"{id}.yaml"
        path.write_text(spec(id, script, lifecycle=lifecycle, **fields))
        return self.do("launch", "--no-wait", *options, path)

    def get(self, id):
        done = self.do("get", id, "-o", "json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def wait(self, id, *states, seconds=20):
        return until(lambda: (found := self.get(id)) and found["state"] in {f"STATE_{s}" for s in states} and found, f"{id} {states}", seconds)

    def records(self):
        with sqlite3.connect(f"file:{self.state}/journal.sqlite?mode=ro", uri=True) as database:
            database.row_factory = sqlite3.Row
            database.execute("BEGIN")  # one moment
            events = [dict(r) for r in database.execute("SELECT * FROM event ORDER BY sequence")]
            workspaces = {r["id"]: dict(r) for r in database.execute("SELECT * FROM workspace")}
            stream = dict(database.execute("SELECT * FROM stream").fetchone())
            acknowledged = dict(database.execute("SELECT controller, sequence FROM acknowledgement").fetchall())
        return events, workspaces, stream, acknowledged


# Written anew from the documentation of the states, not from the agent's code: (type, before) -> after.
LEGAL = {("Created", None): "pending", ("Preparing", "pending"): "preparing", ("Starting", "preparing"): "starting", ("Ready", "starting"): "ready",
         ("Restarting", "stopped"): "pending", ("Restarting", "failed"): "pending"}
LEGAL |= {("Stopping", s): "stopping" for s in ("preparing", "starting", "ready")}
LEGAL |= {("Stopped", s): "stopped" for s in ("pending", "preparing", "starting", "ready", "stopping")}
LEGAL |= {("Failed", s): "failed" for s in ("pending", "preparing", "starting")}
LEGAL[("Restarting", "preparing")] = "pending"  # a supervisor that was lost before it started anything: the launch is tried again
ASIDE = {"RestartsEnded", "ExecStarted", "ExecEnded", "OutOfMemory", "CredentialsUpdated", "HomeFilling", "CredentialsIssued", "CredentialsFailed", "CredentialsRevoked", "Adopted", "Recovered",
         "CredentialsExpiring", "CredentialsRemoved", "StaleCredentials", "DatasetAttached", "DatasetChanged", "DatasetDetached", "Rescue", "ImageChanged",
         "ExecStarted", "ExecEnded"}
NODE = {"Swept", "DrainBegan", "DrainEnded", "Quarantined"}
# An event type that the oracle does not know how to judge fails the collection of these tests.
assert {kind for kind, _ in LEGAL} | ASIDE | NODE | {Event.Deleted} == set(vars(Event)), "conftest.py: LEGAL, ASIDE, NODE"


def plain(event):
    """An event as a controller got it, in the journal's words."""
    state = event.get("state", "").removeprefix("STATE_").lower()
    return {"sequence": int(event["sequence"]), "type": event["type"], "workspace": event.get("workspace", ""), "state": state,
            "previous": event.get("previousState", "STATE_").removeprefix("STATE_").lower() or None, "wallTime": event["time"],
            "bootNanoseconds": int(event["monotonicNanoseconds"]), "generation": event.get("generation", 0), "cause": cause(event.get("reason"))}


def cause(reason):
    """What the oracle looks at in a reason, whether it comes from the journal or from a controller; None without one."""
    if not reason:
        return None
    return {key: reason.get(key) for key in ("code", "message", "exitCode", "signal", "errno")} | {"stoppedBy": reason.get("stoppedBy") or ""}


# Ends for which the agent or the kernel killed, and whose code says why. Those of ASKED name in `stoppedBy` who asked for them, too.
ASKED = {Code.Requested, Code.Lifetime, Code.Drained}
VERDICTS = ASKED | {Code.NotReadyInTime, Code.OutOfMemory, Code.CredentialsLost}
GUESSES = {Code.Exited, Code.Unknown, Code.Lost, Code.Internal}


def misreported(history, exits=(), killed=()):
    """The ends that were reported as something else than what happened, each as a sentence.

    `history`: events by sequence, with their `cause`. `exits`: exit records that were on disk. `killed`: workspaces of which a
    process was killed by the test or by themselves, so that SIGKILL is how they ended."""
    wrong = []
    ends = [e for _, e in sorted(history.items()) if e["type"] in (Event.Stopped, Event.Failed) and e["cause"]]
    for end in ends:
        reason, whose = end["cause"], f"{end['workspace']}, attempt {end['generation']}: {end['type']}, {end['cause']}"
        if reason["code"] == Code.Internal and "restart" in reason["message"]:
            wrong.append(f"{whose}: an agent's restart is not the end of a workspace")
        if reason["signal"] == signal.SIGKILL and not reason["stoppedBy"] and reason["code"] not in VERDICTS and end["workspace"] not in killed:
            wrong.append(f"{whose}: killed, and nobody is named")
        if reason["code"] in ASKED and not reason["stoppedBy"]:
            wrong.append(f"{whose}: asked for by nobody")
        if not reason["message"]:
            wrong.append(f"{whose}: says nothing")
    for record in sorted(exits):
        # Ids are used again after a deletion, so that the time decides; where no end follows, none has been reported yet.
        end = next((e for e in ends if (e["workspace"], e["generation"]) == record[:2] and e["bootNanoseconds"] >= record.nanoseconds), None)
        if end is None:
            continue
        reason = end["cause"]
        # A verdict on a tool that did not come up hides that it was killed for it, as does the failure of another step of the start.
        right = {"exited": reason["exitCode"] == record.value or reason["code"] == Code.NotReadyInTime,
                 "signalled": reason["signal"] == record.value or reason["code"] not in GUESSES,
                 "failed": reason["errno"] == record.value}[record.kind]
        if not right:
            wrong.append(f"{record.workspace}, attempt {record.attempt}: its exit record says {record.kind} {record.value}, what was reported is {reason}")
    return wrong


def judge(agent, controller=None, settled=True, killed=()):
    """The oracle. `settled`: nobody asks for anything any more, so that what has ended may have left nothing. `killed`: workspaces of
    which a process was killed from outside, or kills itself; it stays known for later judgements."""
    agent.killed |= set(killed)
    agent.remember_exits()
    if controller:
        head = agent.records()[2]["head"]
        until(lambda: controller.cursor() >= head, f"the controller has all {head} events")
    events, workspaces, stream, acknowledged = agent.records()
    journal = {e["sequence"]: e | {"cause": cause(json.loads(e["reason"] or "null"))} for e in events}
    assert sorted(journal) == list(range(stream["trimmed"] + 1, stream["head"] + 1)), "the journal has holes"
    history = dict(journal)
    if controller:
        told = {}
        for message in controller.messages():
            if "event" in message and message["event"]["streamId"] == stream["id"]:
                event = plain(message["event"])
                assert told.setdefault(event["sequence"], event) == event, "an event changed between two deliveries"
        for sequence, event in told.items():
            for key, value in event.items():
                if sequence in journal:
                    assert journal[sequence][key] == value, (sequence, key)
        assert set(range(1, stream["trimmed"] + 1)) <= set(told), "trimmed before the controller had it"
        assert max(acknowledged.values(), default=0) <= max(told, default=0)
        history = {**told, **journal}
        assert sorted(history) == list(range(1, stream["head"] + 1)), "what was told has holes"
    states = {}
    for sequence in sorted(history):
        event = history[sequence]
        id, kind = event["workspace"], event["type"]
        if kind in NODE:
            assert not id
            continue
        if 1 in history:
            before = states.get(id)
            if kind == Event.Deleted:
                assert before in ("stopped", "failed"), (id, before)
            elif kind in ASIDE:
                assert event["state"] == before or kind == Event.Recovered, (id, kind, before)
            else:
                assert LEGAL.get((kind, before)) == event["state"], f"{id}: {kind} after {before} led to {event['state']}"
            assert event["previous"] == before or kind == Event.Recovered, (id, kind, event["previous"], before)
        states[id] = event["state"]
        if kind == Event.Deleted:
            del states[id]
    if 1 in history:
        assert {id: w["state"] for id, w in workspaces.items()} == states, "the snapshot is not the fold of the events"
    wrong = [said for said in misreported(history, agent.exits, agent.killed) if said not in agent.blamed]
    agent.blamed |= set(wrong)
    assert not wrong, "\n".join(wrong)
    if settled:
        # Of the records as they are then: an attempt that follows by itself has a sandbox of its own.
        left = lambda: leftovers(agent, agent.records()[1])
        until(lambda: not left(), left, 8)


def leftovers(agent, workspaces):
    """What is on the host and belongs to no workspace that runs."""
    running = {id: json.loads(w["body"]) for id, w in workspaces.items() if w["state"] in ("pending", "preparing", "starting", "ready", "stopping")}
    occupied = {id: found for id, body in running.items() if (found := sandbox(agent, id, body))}
    names = {s.name for s in occupied.values()}
    left = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
            if line[0] != b"carrel-shim" or line[1].decode() in names:
                continue
            # Of this agent, and a supervisor: PID 1 of a sandbox has the same name, and nothing of the host open.
            if any(os.readlink(file).startswith(f"{agent.state.resolve()}/") for file in (process / "fd").iterdir()):
                left.append(f"supervisor of {line[1].decode()}")
        except OSError:
            continue
    left += [f"an end of {id} that is not reported" for id, s in occupied.items() if (s.folder / "exit").exists()]
    known = {s.cgroup for s in occupied.values()}
    for base in pathlib.Path("/sys/fs/cgroup").glob(f"*/{agent.parent}/*/"):
        if base.name not in known:
            left.append(str(base))
    links = [line.split(": ")[1].split("@")[0] for line in subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout.splitlines()]
    links = [name for name in links if name.startswith(agent.prefix)]
    if len(links) > len(running):
        left.append(f"links {links} for {sorted(running)}")
    left += [line for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if str(agent.directory) in line]
    left += [f"folder {p.name}" for p in (agent.state / "workspaces").iterdir() if p.name not in workspaces]
    if (agent.state / "sandboxes").is_dir():
        left += [f"folder of sandbox {p.name}" for p in (agent.state / "sandboxes").iterdir() if p.name not in names]
        # The output alone outlives the sandbox that wrote it.
        legacy = {s.name for id, s in occupied.items() if s.folder.parent.name == "workspaces"}
        left += [str(p) for p in (agent.state / "workspaces").glob("*/*") if p.name not in ("log", "record.json") and p.parent.name not in legacy]
    return left


class Witness:
    """A connection to a tool that must never break: it reads a tick every tenth of a second."""

    def __init__(self, agent):
        agent.launch("witness", "while true; do while true; do echo tick; sleep 0.1; done | nc -l -p 9000; done")
        self.address = agent.wait("witness", "READY")["address"]
        self.connection = until(self.connect, "the witness answers")
        self.connection.settimeout(5)
        self.ticks, self.broken = 0, ""
        threading.Thread(target=self.listen, daemon=True).start()

    def connect(self):
        try:
            return socket.create_connection((self.address, 9000), timeout=1)
        except OSError:
            return None

    def listen(self):
        try:
            while data := self.connection.recv(4096):
                self.ticks += data.count(b"tick")
            self.broken = "closed"
        except OSError as error:
            self.broken = str(error)

    def check(self):
        before = self.ticks
        until(lambda: self.ticks > before or self.broken, "a tick")
        assert not self.broken, f"the witness's connection broke: {self.broken}"


@contextlib.contextmanager
def on_small_disk(agent):
    """Has the agent keep its state on a file system of 24 MB, which is yielded, and have it back afterwards."""
    agent.stop(signal.SIGTERM)
    small = agent.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=True)
    try:
        shutil.copytree(agent.state, small / "state", symlinks=True)
        shutil.rmtree(agent.state)
        agent.state.symlink_to(small / "state")
        agent.start()
        yield small
        agent.stop(signal.SIGTERM)
        agent.state.unlink()
        shutil.copytree(small / "state", agent.state, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
        small.rmdir()
    agent.start()


@contextlib.contextmanager
def full(folder):
    """Leaves no room on a file system."""
    ballast = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(ballast, b"x" * 4096)
    except OSError:
        os.close(ballast)
    try:
        yield
    finally:
        (folder / "ballast").unlink()


def make(directory, more="", prefix=SHARED, image=True):
    directory.mkdir(mode=0o711)
    agent = Agent(directory, more, prefix)
    agent.start()
    if image:
        busybox_image(directory / "busybox.tar")
        done = agent.run("image", "import", directory / "busybox.tar", "--name", "busybox:latest")
        assert done.returncode == 0, done
    return agent


def destroy(agent, *controllers):
    if not agent.lives:
        agent.start()
    ids = [w["spec"]["id"] for w in json.loads(agent.run("ps", "-o", "json").stdout or "[]")]
    if ids:
        agent.run("rm", "--force", *ids)
    agent.stop(signal.SIGTERM)
    # One whose tracer went before it.
    for line in subprocess.run(["pgrep", "-f", f"carreld --config {agent.config}"], capture_output=True, text=True).stdout.split():
        os.kill(int(line), signal.SIGKILL)
    for controller in controllers:
        controller.stop()
    (ROOT / ".cache" / "log").mkdir(parents=True, exist_ok=True)
    shutil.copy(agent.directory / "carreld.log", ROOT / ".cache" / "log" / f"carreld-faults-{agent.prefix}.log")
    shutil.rmtree(agent.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An agent with a controller that owns its acknowledgement, and a witness."""
    directory = pathlib.Path(f"/tmp/carrel-faults-{os.getpid()}")
    controller = Controller(directory)
    agent = make(directory, f"journal: {{keep: 20}}\ncontrollers: [{{name: panel, socket: {controller.socket}, owner: true}}]\n")
    controller.start()
    witness = Witness(agent)
    yield agent, controller, witness
    destroy(agent, controller)


NUMBERS = itertools.count()


@pytest.fixture
def node(request):
    """An agent of its own, with as many controllers as asked for; the first owns the acknowledgement."""
    options = getattr(request, "param", {})
    directory = pathlib.Path(f"/tmp/carrel-fault-{os.getpid()}-{next(NUMBERS)}")
    controllers = [Controller(directory, name) for name in options.get("controllers", [])]
    lines = "".join(f"  - {{name: {c.socket.stem}, socket: {c.socket}, owner: {str(i == 0 and options.get('owner', True)).lower()}}}\n" for i, c in enumerate(controllers))
    agent = make(directory, options.get("more", "") + (f"controllers:\n{lines}" if lines else ""), prefix=OWN)
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


def memory(agent):
    return int(next(l for l in pathlib.Path(f"/proc/{agent.process.pid}/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1]) << 10


def sandbox_of(agent, id):
    """The sandbox that a workspace occupies by its record; None where it has none."""
    workspaces = agent.records()[1]
    return sandbox(agent, id, json.loads(workspaces[id]["body"])) if id in workspaces else None


def namespace_depth(pid):
    """The number of nested PID namespaces that a process is in; 0 if it has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^NSpid:(.*)$", status, re.M)
    return len(found[1].split()) if found else 0


def pids(agent, id):
    """The supervisor of a workspace, and PID 1 inside, which has its name."""
    found = sandbox_of(agent, id)
    if found is None:
        return []
    shim = subprocess.run(["pgrep", "-f", f"^carrel-shim {re.escape(found.name)}( |$)"], capture_output=True, text=True).stdout.split()
    return sorted((int(p) for p in shim), key=namespace_depth)

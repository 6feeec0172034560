# SPDX-License-Identifier: Apache-2.0
"""Programs of `exec`: they end with their client, return when they end, and hold up neither each other nor the agent."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from conftest import BIN, Code, Event, destroy, judge, make, pids, until

PREFIX = "crx"
# Programs that run in one sandbox at once (ShimProtocol.execLimit).
LIMIT = 64


@pytest.fixture(scope="module")
def agent():
    agent = make(pathlib.Path(f"/tmp/carrel-exec-{os.getpid()}"), prefix=PREFIX)
    (agent.directory / "datasets" / "files").mkdir(parents=True)
    (agent.directory / "datasets" / "files.yaml").write_text(f"name: files\npath: {agent.directory}/datasets/files\nreaders: [ada]\n")
    yield agent
    destroy(agent)


class Room:
    """A workspace whose tool does nothing, and what runs in it besides."""

    def __init__(self, agent, id):
        self.agent, self.id = agent, id
        done = agent.launch(id, command=["sleep", "100000"], resources={"memory": "512Mi", "pids": "512"})
        assert done.returncode == 0, done
        agent.wait(id, "READY")
        self.home = agent.directory / "homes" / "ada"
        self.supervisor, self.init = pids(agent, id)
        # Held, so that its number does not come to mean another one's.
        self.held = os.open(f"/proc/{self.init}/ns/pid", os.O_RDONLY)
        self.namespace = os.readlink(f"/proc/self/fd/{self.held}")
        self.tool = set(self.inside())

    def inside(self):
        """The command lines of the processes in it, by pid."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") == self.namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def left(self):
        """What runs in it beside its tool."""
        return {pid: line for pid, line in self.inside().items() if pid not in self.tool}

    def remove(self):
        if self.held is not None:
            os.close(self.held)
        self.held = None
        if self.agent.get(self.id):
            assert self.agent.do("rm", "--force", self.id).returncode == 0


@pytest.fixture
def room(agent, request):
    """A workspace of the test's own."""
    if not agent.lives:
        agent.start()
    room = Room(agent, re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:50].strip("-"))
    yield room
    room.remove()


def cli(agent, *arguments, **options):
    """A client with SIGINT as a shell in the foreground leaves it: tests in the background of a script inherit it ignored."""
    return subprocess.Popen([BIN / "carrel", "exec", *map(str, arguments)], env={**os.environ, "CARREL_SOCKET": agent.socket},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def run(agent, *arguments, limit=10, **options):
    """The finished command, and its seconds."""
    options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
    begun = time.monotonic()
    done = subprocess.run([BIN / "carrel", *map(str, arguments)], capture_output=True, timeout=limit,
                          env={**os.environ, "CARREL_SOCKET": agent.socket}, **options)
    return done, time.monotonic() - begun


class Call:
    """An `Exec` call of a client of ours."""

    def __init__(self, channel, id, *command, terminal=False):
        from carrel.v1 import carrel_pb2, carrel_pb2_grpc
        self.messages, self.pb = queue.SimpleQueue(), carrel_pb2
        self.send(start=carrel_pb2.ExecRequest.Start(id=id, command=command, terminal=terminal))
        self.call = carrel_pb2_grpc.WorkspaceServiceStub(channel).Exec(iter(self.messages.get, None))

    def send(self, **message):
        self.messages.put(self.pb.ExecRequest(**message))

    def started(self):
        assert next(self.call).started
        return self

    def end(self):
        """Ends the thread that sends."""
        self.messages.put(None)

    def rest(self):
        """What it printed, and how it ended."""
        output, code = b"", None
        for message in self.call:
            output += message.stdout
            if message.HasField("exit"):
                code = message.exit.code
        self.end()
        return output, code


def connect(path, *options):
    """A channel with a connection of its own."""
    return grpc.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1), *options])


class Relay:
    """Passes one connection on, until it is cut."""

    def __init__(self, agent):
        self.path = agent.directory / "relay.sock"
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(1)
        self.ends = []

        def serve():
            near = listener.accept()[0]
            far = socket.socket(socket.AF_UNIX)
            far.connect(agent.socket)
            self.ends = [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(source, target), daemon=True).start()
        threading.Thread(target=serve, daemon=True).start()

    @staticmethod
    def copy(source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass

    def cut(self):
        for end in self.ends:
            end.shutdown(socket.SHUT_RDWR)
            end.close()


# --------------------------------------------------------- its client is gone

def stubborn(name):
    """A program that records SIGHUP and goes on, with a child in its group that ignores it. `name` is among its arguments. It writes nothing:
    a shell that reports a child's end by SIGHUP to a pipe that nobody reads is ended by SIGPIPE."""
    return ("sh", "-c", f"exec 2> /dev/null; trap 'echo > {name}.hup' HUP; (trap '' HUP; while true; do sleep 0.1; done) & echo > {name}.up; while true; do sleep 0.1; done", name)


def check_hang_up(room, ways):
    """Harms the clients of stubborn programs: SIGHUP at once, SIGKILL about two seconds later, for the whole group."""
    for name in ways:
        until((room.home / f"{name}.up").exists, f"{name} runs")
    # By name: a leader and its child.
    running = lambda: {name: [pid for pid, line in room.left().items() if line.rstrip().endswith(" " + name)] for name in ways}
    # A shell that is about to execute `sleep` has the same name for a moment.
    until(lambda: all(len(found) == 2 for found in running().values()), running)
    begun, killed = {}, {}
    for name, harm in ways.items():
        begun[name] = time.time()
        harm()
    until(lambda: all((room.home / f"{name}.hup").exists() for name in ways),
          lambda: f"no SIGHUP: {[name for name in ways if not (room.home / f'{name}.hup').exists()]}", 3)
    while len(killed) < len(ways) and time.time() < max(begun.values()) + 6:
        for name, found in running().items():
            if not found:
                killed.setdefault(name, round(time.time() - begun[name], 2))
        time.sleep(0.05)
    heard = {name: round((room.home / f"{name}.hup").stat().st_mtime - begun[name], 2) for name in ways}
    print(f"SIGHUP after {heard} s, SIGKILL after {killed} s")
    assert set(killed) == set(ways), f"not killed: { {name: found for name, found in running().items() if found} }"
    assert all(seconds < 1 for seconds in heard.values()), heard
    assert all(1.5 < seconds < 3.5 for seconds in killed.values()), killed
    until(lambda: not room.left(), room.left, 2)


def test_a_program_ends_with_its_client(agent, stubs, room):
    cli_of = {name: cli(agent, *options, room.id, "--", *stubborn(name), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
              for name, options in (("killed", []), ("terminated", []), ("interrupted", []), ("terminal", ["-i", "-t"]))}
    relay = Relay(agent)
    direct, cut = connect(agent.socket), connect(relay.path)
    calls = {"cancelled": Call(direct, room.id, *stubborn("cancelled")).started(), "closed": Call(cut, room.id, *stubborn("closed")).started()}
    check_hang_up(room, {
        "killed": cli_of["killed"].kill, "terminated": cli_of["terminated"].terminate,
        "interrupted": lambda: cli_of["interrupted"].send_signal(signal.SIGINT), "terminal": cli_of["terminal"].kill,
        "cancelled": calls["cancelled"].call.cancel, "closed": relay.cut})
    for process in cli_of.values():
        process.wait(5)
    for call in calls.values():
        call.end()
    direct.close()
    cut.close()
    judge(agent)


def test_a_script_runs_its_trap_when_its_client_goes(agent, room):
    """Without a terminal either: a shell writes of the end of its foreground command to stderr first, which must not be the end of it."""
    client = cli(agent, room.id, "--", "sh", "-c", "trap 'echo > trapped; exit' HUP; echo > up; while true; do sleep 0.1; done", stderr=subprocess.DEVNULL)
    until((room.home / "up").exists, "it runs")
    client.kill()
    client.wait()
    until(lambda: not room.left(), room.left, 4)
    assert (room.home / "trapped").exists()


def test_a_program_whose_output_nobody_reads_ends_with_its_client(agent, stubs, room):
    """Its client has been suspended for a while, so that the agent waits for it as the program for the agent."""
    channel = connect(agent.socket)
    slow, call = cli(agent, room.id, "--", "yes", stdout=subprocess.PIPE), Call(channel, room.id, "yes").started()
    slow.stdout.read(1)
    slow.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    assert len(room.left()) == 2, room.left()
    slow.kill()
    call.call.cancel()
    until(lambda: not room.left(), room.left, 4)
    slow.wait()
    call.end()
    channel.close()
    judge(agent)


def test_a_program_ends_with_its_agent(agent, stubs, room):
    client = cli(agent, room.id, "--", *stubborn("agent"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    check_hang_up(room, {"agent": agent.stop})
    # Its client was told.
    assert client.wait(5) == 4, client.stderr.read()
    agent.start()
    assert agent.wait(room.id, "READY")["attempt"] == 1
    assert agent.run("exec", room.id, "--", "sh", "-c", "exit 7").returncode == 7
    judge(agent)


# ------------------------------------------------------- the program has ended

LINES = b"carrel\n" * 1_000_000


@pytest.mark.parametrize("options", [[], ["-t"]], ids=["pipes", "terminal"])
def test_the_call_returns_when_the_program_ends(agent, room, options):
    """A child in the background holds its output open meanwhile. All that was written before is there."""
    done, seconds = run(agent, "exec", *options, room.id, "--", "sh", "-c", "sleep 30 & echo hi; exit 5")
    assert (done.returncode, done.stdout.split(), seconds < 1) == (5, [b"hi"], True), (done, seconds)
    done, seconds = run(agent, "exec", *options, room.id, "--", "sh", "-c", "sleep 31 & yes carrel | head -c 5000000; exit 6")
    expected = LINES[:5_000_000].replace(b"\n", b"\r\n" if options else b"\n")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(expected).digest(), (len(done.stdout), len(expected))
    assert done.returncode == 6, done.stderr
    print(f"5 MB in {seconds:.2f} s")


def test_a_program_that_writes_a_line_at_a_time_delays_nobody(agent, stubs, room):
    """Each line was a message, and an event loop that is given messages faster than it sends them accepted no connection any more."""
    with connect(agent.socket) as channel:
        call = Call(channel, room.id, "sh", "-c", "while :; do echo x; done").started()

        def read():
            try:
                for _ in call.call:
                    pass
            except grpc.RpcError:
                pass
        reader = threading.Thread(target=read)
        reader.start()
        waits = []
        for _ in range(8):
            begun = time.monotonic()
            assert agent.run("node").returncode == 0
            waits.append(round(time.monotonic() - begun, 1))
        call.call.cancel()
        call.end()
        reader.join(10)
    print(f"seconds: {waits}")
    assert max(waits) < 5 and not reader.is_alive(), waits


def seconds_of_slow_reading(channel, room, script):
    """Until the exit code of a program comes to a client that reads about 1.6 MB a second; and the code, and how many bytes came first."""
    call = Call(channel, room.id, "sh", "-c", script).started()
    begun, code, size = time.monotonic(), None, 0
    for message in call.call:
        size += len(message.stdout)
        if message.HasField("exit"):
            code = message.exit.code
        if code is not None or time.monotonic() > begun + 8:
            break
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    call.call.cancel()
    call.end()
    return round(seconds, 1), code, size


def test_the_call_returns_although_children_go_on_writing(agent, stubs, room):
    """They write faster than the client reads, so that there is always more. What is passed on after the end is bounded."""
    # A window that does not grow.
    with connect(agent.socket, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)) as channel:
        found = [seconds_of_slow_reading(channel, room, "for i in 1 2 3 4 5 6 7 8; do cat /dev/zero & done; sleep 0.5; exit 5") for _ in range(3)]
    print(f"seconds, exit code, bytes: {found}")
    assert all(code == 5 for _, code, _ in found), found
    assert max(seconds for seconds, _, _ in found) < 2, found


def test_input_is_passed_on(agent, stubs, room):
    data = os.urandom(1 << 20)
    done, _ = run(agent, "exec", "-i", room.id, "--", "cat", input=data)
    assert done.returncode == 0 and hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest(), (done.returncode, len(done.stdout), done.stderr)
    # More than it reads: the end is the program's all the same.
    done, seconds = run(agent, "exec", "-i", room.id, "--", "sh", "-c", "head -c 3; exit 3", input=data * 8)
    assert (done.returncode, done.stdout, seconds < 3) == (3, data[:3], True), (done, seconds)
    with connect(agent.socket) as channel:
        typing = Call(channel, room.id, "cat", terminal=True).started()
        typing.send(stdin=b"hello\n")
        typing.send(stdin=b"\x04")
        assert typing.rest() == (b"hello\r\nhello\r\n", 0)


# ---------------------------------------------------------- as many as there are

def answered_at_once(agent, *commands, seconds=2):
    for command in commands:
        done, elapsed = run(agent, *command)
        assert done.returncode == 0 and elapsed < seconds, (command, elapsed, done)


def put(agent, id, content="x"):
    (agent.directory / "content").write_text(content)
    return "credentials", "put", id, f"key={agent.directory}/content"


def test_there_is_a_limit_and_the_next_is_refused_at_once(agent, stubs, room):
    channel = grpc.insecure_channel(f"unix:{agent.socket}")
    calls = [Call(channel, room.id, "sleep", "1000") for _ in range(LIMIT)]
    for call in calls:
        call.started()
    assert len(room.left()) == LIMIT
    for _ in range(3):
        begun, more = time.monotonic(), Call(channel, room.id, "true")
        with pytest.raises(grpc.RpcError) as refused:
            next(more.call)
        more.end()
        assert time.monotonic() - begun < 1
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and str(LIMIT) in refused.value.details(), refused.value
    answered_at_once(agent, put(agent, room.id), ("get", room.id), ("node",), ("image", "ls"))
    # One that ends makes room for another.
    calls.pop().call.cancel()
    until(lambda: agent.run("exec", room.id, "--", "true").returncode == 0, "room for one more", 5)
    # The workspace ends, and all that ran in it: the clients are told.
    answered_at_once(agent, ("stop", room.id, "--time", "2"), seconds=5)
    assert not room.inside()
    for call in calls:
        with pytest.raises(grpc.RpcError) as ended:
            call.rest()
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE and "ended before the program" in ended.value.details(), ended.value
    channel.close()
    room.remove()
    judge(agent)


# Opens so many connections, each with a program that runs, says so, and waits to be killed.
CROWD = """
import sys, time
folder, path, id, count = sys.argv[1:]
sys.path.insert(0, folder)
import grpc
from carrel.v1 import carrel_pb2 as pb, carrel_pb2_grpc as rpc
kept = []
for _ in range(int(count)):
    channel = grpc.insecure_channel("unix:" + path, options=[("grpc.use_local_subchannel_pool", 1)])
    while True:
        call = rpc.WorkspaceServiceStub(channel).Exec(iter([pb.ExecRequest(start=dict(id=id, command=["sleep", "1000"]))]))
        try:
            assert next(call).started
            break
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED: raise
            time.sleep(0.05)
    kept.append((channel, call))
print("all run", flush=True)
time.sleep(100)
"""


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_the_programs_of_two_hundred_killed_clients_block_nothing(agent, stubs, room):
    before = descriptors(agent.process.pid), descriptors(room.supervisor)
    for _ in range(4):
        crowd = subprocess.Popen([sys.executable, "-c", CROWD, stubs, agent.socket, room.id, "50"], stdout=subprocess.PIPE)
        assert crowd.stdout.readline() == b"all run\n"
        crowd.kill()
        crowd.wait()
        answered_at_once(agent, put(agent, room.id), ("get", room.id))
    until(lambda: agent.run("exec", room.id, "--", "true").returncode == 0, "a program runs", 3)
    until(lambda: not room.left(), room.left, 4)
    until(lambda: descriptors(agent.process.pid) < before[0] + 10 and descriptors(room.supervisor) < before[1] + 5,
          lambda: f"descriptors: {before}, now {descriptors(agent.process.pid), descriptors(room.supervisor)}", 5)
    ended = [e for e in agent.records()[0] if e["workspace"] == room.id and e["type"] == Event.ExecEnded]
    assert len(ended) >= 200, len(ended)
    judge(agent)


def test_stops_whose_clients_left_block_nothing(agent, stubs, room):
    """Each waits for the end of a long grace period. As long as their clients wait they count against the calls of the node."""
    from carrel.v1 import carrel_pb2, carrel_pb2_grpc

    agent.launch("stays", "trap '' TERM; while true; do sleep 1; done")
    agent.wait("stays", "READY")
    channels = [connect(agent.socket, ("grpc.dummy", n)) for n in range(22)]
    stops = [carrel_pb2_grpc.WorkspaceServiceStub(channel).Stop.future(carrel_pb2.StopRequest(id="stays", grace_period_seconds=3000))
             for channel in channels for _ in range(50)]
    until(lambda: any(stop.done() for stop in stops), "the limit of calls is reached")
    refused = run(agent, "node")[0]
    assert refused.returncode == 1 and b"calls" in refused.stderr, refused
    for stop in stops:
        stop.cancel()
    for channel in channels:
        channel.close()
    until(lambda: run(agent, "node")[0].returncode == 0, lambda: run(agent, "node")[0].stderr, 5)
    stopping = agent.get("stays")
    assert stopping["state"] == "STATE_STOPPING", stopping
    assert agent.do("stop", "--time", "0", "stays").returncode == 0
    agent.do("rm", "stays")
    judge(agent)


# ---------------------------------------------------- neither end nor drain waits

def open_programs(agent, room):
    """One that waits for input, one on a terminal, one whose output its client does not read, and one that ignores SIGHUP."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    clients = [cli(agent, *options, room.id, "--", *command, **pipes) for options, command in (
        (["-i"], ["cat"]), (["-i", "-t"], ["sh"]), ([], ["yes"]), ([], ["sh", "-c", "trap '' HUP; while true; do sleep 1; done"]))]
    until(lambda: len(room.left()) >= 4, room.left)
    # An event follows its program by a moment, in which an end of the agent would come before both.
    until(lambda: [type for type, _ in exec_events(agent, room)].count(Event.ExecStarted) >= 4, lambda: exec_events(agent, room))
    clients[2].stdout.read(1)
    return clients


def close(clients):
    for client in clients:
        client.kill()
        client.wait()


def seconds_to_end(agent):
    """From SIGTERM on; one that does not end is killed."""
    begun = time.monotonic()
    agent.process.terminate()
    try:
        agent.process.wait(12)
    except subprocess.TimeoutExpired:
        agent.stop()
        return float("inf")
    return time.monotonic() - begun


def test_programs_of_an_agent_that_is_killed_have_an_end_on_record(agent, room):
    clients = open_programs(agent, room)
    until(lambda: len(exec_events(agent, room)) == 4, lambda: exec_events(agent, room))
    agent.stop(signal.SIGKILL)
    until(lambda: not room.left(), room.left, 5)
    close(clients)
    agent.start()
    until(lambda: len(exec_events(agent, room)) == 8, lambda: exec_events(agent, room), 5)
    assert {a["outcome"] for type, a in exec_events(agent, room) if type == Event.ExecEnded} == {"the agent ended first; the program was hung up on"}
    judge(agent)


def test_programs_of_a_workspace_that_is_deleted_have_an_end_on_record(agent, room):
    """Also if a client neither reads nor leaves."""
    clients = open_programs(agent, room)
    for client in clients:
        client.send_signal(signal.SIGSTOP)
    room.remove()
    close(clients)
    events = [e["type"] for e in agent.records()[0] if e["workspace"] == room.id]
    assert events.count(Event.ExecStarted) == events.count(Event.ExecEnded) == 4, events
    assert events[-1] == Event.Deleted and events.index(Event.Stopped) > max(n for n, type in enumerate(events) if type == Event.ExecEnded), events
    judge(agent)


@pytest.mark.parametrize("suspended", [False, True], ids=["clients", "suspended-clients"])
def test_the_agent_ends_soon_although_programs_run(agent, room, suspended):
    """Clients that are told of the end, and clients that neither read nor say anything any more."""
    clients = open_programs(agent, room)
    for client in clients if suspended else []:
        client.send_signal(signal.SIGSTOP)
    seconds = seconds_to_end(agent)
    print(f"ended {seconds:.1f} s after SIGTERM")
    try:
        assert seconds < 8, seconds
        if not suspended:
            assert all(client.wait(5) in (1, 4) for client in clients if client is not clients[2])
        until(lambda: not room.left(), room.left, 5)
    finally:
        close(clients)
        agent.start()
    assert agent.wait(room.id, "READY")["attempt"] == 1
    # What the old agent could not record, the new one records when it has adopted the workspace.
    count = lambda kind: len([type for type, _ in exec_events(agent, room) if type == kind])
    until(lambda: count(Event.ExecEnded) >= 4, lambda: exec_events(agent, room), 5)
    assert count(Event.ExecStarted) == count(Event.ExecEnded) == 4, exec_events(agent, room)
    judge(agent)


def test_a_drain_does_not_wait_for_programs(agent, room):
    clients = open_programs(agent, room)
    done, seconds = run(agent, "drain", "--deadline", "1", "--wait", limit=40)
    print(f"drained in {seconds:.1f} s")
    ended = agent.get(room.id)
    close(clients)
    assert agent.run("uncordon").returncode == 0
    assert done.returncode == 0 and seconds < 8, (done, seconds)
    assert ended["state"] == "STATE_STOPPED" and ended["reason"]["code"] == Code.Drained, ended
    assert not room.inside()
    room.remove()
    judge(agent)


# ------------------------------------------------------ a supervisor that is stopped

def test_a_supervisor_that_does_nothing_holds_up_only_its_own(agent, room):
    other = Room(agent, "other")
    calls = {"exec": ("exec", room.id, "--", "sleep", "12345"), "put": put(agent, room.id, "late"), "attach": ("dataset", "attach", room.id, "files", "/data/files")}
    os.kill(room.supervisor, signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            pending = {name: pool.submit(run, agent, *command, limit=60) for name, command in calls.items()}
            slowest = 0
            while not all(p.done() for p in pending.values()):
                for command in (("exec", other.id, "--", "true"), put(agent, other.id, "late"), ("get", room.id), ("node",)):
                    done, seconds = run(agent, *command, limit=60)
                    assert done.returncode == 0, (command, done)
                    slowest = max(slowest, seconds)
                assert agent.get(room.id)["state"] == "STATE_READY"
                time.sleep(0.5)
            answers = {name: p.result() for name, p in pending.items()}
    finally:
        os.kill(room.supervisor, signal.SIGCONT)
    print({name: f"{done.returncode} after {seconds:.1f} s: {done.stderr.decode().strip()}" for name, (done, seconds) in answers.items()}, f"others: {slowest:.2f} s")
    # Exit code 4: UNAVAILABLE or DEADLINE_EXCEEDED.
    for name, limit in (("exec", 15), ("put", 30)):
        done, seconds = answers[name]
        assert done.returncode == 4 and seconds < limit + 1, (name, done, seconds)
    # Mounts are changed without the supervisor.
    done, seconds = answers["attach"]
    assert done.returncode in (0, 4) and seconds < 31, (done, seconds)
    assert slowest < 2, slowest
    # All works again, and what was not waited for does not go on.
    until(lambda: agent.run("exec", room.id, "--", "true").returncode == 0, "a program runs", 5)
    until(lambda: not room.left(), room.left, 5)
    answered_at_once(agent, put(agent, room.id, "after"), ("exec", room.id, "--", "test", "-e", "/run/carrel/credentials/key"))
    assert run(agent, "exec", room.id, "--", "cat", "/run/carrel/credentials/key")[0].stdout == b"after"
    if answers["attach"][0].returncode == 0:
        answered_at_once(agent, ("dataset", "detach", room.id, "/data/files"))
    assert agent.get(room.id)["attempt"] == 1 and room.tool <= set(room.inside())
    assert not [e for e in agent.records()[0] if e["workspace"] == room.id and e["type"] in (Event.Stopping, Event.Stopped, Event.Failed)]
    other.remove()
    judge(agent)


# ------------------------------------------------------------------ what is on record

def exec_events(agent, room):
    return [(e["type"], json.loads(e["attributes"])) for e in agent.records()[0] if e["workspace"] == room.id and e["type"].startswith("Exec")]


def test_each_program_is_an_event_without_its_arguments(agent, stubs, room):
    word = f"argument-{os.urandom(8).hex()}"
    assert run(agent, "exec", "-i", "-e", f"NAME={word}", room.id, "--", "sh", "-c", "cat; exit 7", word, input=word.encode())[0].returncode == 7
    assert run(agent, "exec", room.id, "--", "sh", "-c", "kill -TERM $$")[0].returncode == 143
    refused = run(agent, "exec", room.id, "--", "no-such-program", word)[0]
    assert refused.returncode != 0 and b"no-such-program" in refused.stderr, refused
    left = cli(agent, "-t", room.id, "--", "sleep", "1000")
    until(room.left, "it runs")
    left.kill()
    left.wait()
    until(lambda: len([e for e in exec_events(agent, room) if e[0] == Event.ExecEnded]) == 4, lambda: exec_events(agent, room), 5)
    events = [{"type": type, **{k: v for k, v in attributes.items() if k not in ("by", "milliseconds")}} for type, attributes in exec_events(agent, room)]
    for event in events:
        event.pop("attempt", None)
    shell, sleep = {"program": "sh"}, {"program": "sleep", "arguments": "1", "terminal": "true"}
    failed = events.pop(4)
    assert events == [
        {"type": Event.ExecStarted, **shell, "arguments": "3"}, {"type": Event.ExecEnded, **shell, "arguments": "3", "exitCode": "7"},
        {"type": Event.ExecStarted, **shell, "arguments": "2"}, {"type": Event.ExecEnded, **shell, "arguments": "2", "signal": "15"},
        {"type": Event.ExecStarted, **sleep}, {"type": Event.ExecEnded, **sleep, "client": "left; the program was hung up on", "signal": "1"}], events
    assert failed["type"] == Event.ExecEnded and failed["program"] == "no-such-program" and "it was not started" in failed["outcome"], failed
    # Nowhere in journal, records and log.
    files = [agent.directory / "carreld.log", *(path for path in agent.state.rglob("*") if path.is_file() and "images" not in path.parts)]
    assert len(files) > 3
    assert not [path for path in files if word.encode() in path.read_bytes()]
    judge(agent)


def test_a_program_that_was_started_has_an_end_on_record(agent, stubs, room):
    """Clients that leave at any moment of the start."""
    with connect(agent.socket) as channel:
        for number in range(200):
            call = Call(channel, room.id, "sleep", "1000", terminal=number % 2 == 0)
            time.sleep(random.random() * 0.02)
            call.call.cancel()
            call.end()
    until(lambda: not room.left(), room.left, 4)
    time.sleep(0.5)
    events = exec_events(agent, room)
    started = [a for type, a in events if type == Event.ExecStarted]
    ended = [a for type, a in events if type == Event.ExecEnded and "it was not started" not in a.get("outcome", "")]
    assert len(started) == len(ended), (len(started), len(ended))
    judge(agent)


def test_the_event_of_a_program_says_who_asked_for_it(agent, stubs, room):
    client = cli(agent, room.id, "--", "true")
    client.wait(10)
    until(lambda: len(exec_events(agent, room)) == 2, "both events", 5)
    assert {attributes["by"] for _, attributes in exec_events(agent, room)} == {f"uid {os.getuid()}, pid {client.pid}"}

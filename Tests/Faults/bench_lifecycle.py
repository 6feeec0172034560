# SPDX-License-Identifier: Apache-2.0
"""What durability and recovery cost: from what happens to a controller that has it, how many events a second, and how long an agent
that was killed needs to have everything back. The floor of a commit is an append and fdatasync(2) on the same disk, in the same run."""

import concurrent.futures
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import grpc
from conftest import Event, destroy, generate_stubs, make, until

ROUNDS = int(sys.argv[1])


def stubs(folder):
    generate_stubs(folder)
    from carrel.controller.v1 import controller_pb2, controller_pb2_grpc
    from carrel.v1 import carrel_pb2, carrel_pb2_grpc
    return controller_pb2, controller_pb2_grpc, carrel_pb2, carrel_pb2_grpc


def controller(socket, messages, service):
    """A controller in Python that notes when it got each event; in nanoseconds after what it tells of."""
    delays = []

    class Controller(service.ControllerServicer):
        def Connect(self, requests, context):
            for message in requests:
                if message.HasField("hello"):
                    yield messages.ControllerMessage(welcome=messages.Welcome(stream_id=message.hello.stream_id, cursor=message.hello.head, window=4096))
                elif message.HasField("event"):
                    delays.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME) - message.event.monotonic_nanoseconds)
                    yield messages.ControllerMessage(acknowledge=messages.Acknowledge(sequence=message.event.sequence))
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    service.add_ControllerServicer_to_server(Controller(), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    return server, delays


def synced_appends(folder, count):
    """Milliseconds for each."""
    path, times = folder / "floor", []
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(count):
        begun = time.monotonic_ns()
        os.write(file, b"x" * 4096)
        os.fdatasync(file)
        times.append((time.monotonic_ns() - begun) / 1e6)
    os.close(file)
    path.unlink()
    return times


def percentiles(values):
    values = sorted(values)
    return statistics.median(values), values[int(len(values) * 0.99)]


def many(agent, stub, messages, callers=16, seconds=5):
    """Events a second: each caller drains and resumes the node, and every call is an event that is on disk when it returns."""
    end, counts = time.monotonic() + seconds, itertools.count()

    def call(_):
        while time.monotonic() < end:
            stub.Drain(messages.DrainRequest(by="bench"))
            next(counts)
    before = agent.records()[2]["head"]
    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        list(pool.map(call, range(callers)))
    stub.Uncordon(messages.UncordonRequest(by="bench"))
    return (agent.records()[2]["head"] - before) / seconds


def pss(pid):
    return next(int(line.split()[1]) for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")) / 1024


def ticks(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def launch(agent, id):
    """Small, so that hundreds find room on any machine."""
    done = agent.launch(id, command=["sleep", "100000"], memory="16Mi")
    assert done.returncode == 0, done


def comeback(agent, count, rounds=5):
    """From exec of a new agent to its first answer, and to the last adoption, in milliseconds; then what it uses while nothing happens."""
    answers, adoptions = [], []
    for _ in range(rounds):
        agent.stop()
        head = agent.records()[2]["head"]
        begun = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        agent.start(wait=False)
        channel = grpc.insecure_channel(f"unix:{agent.socket}", options=[("grpc.initial_reconnect_backoff_ms", 5), ("grpc.max_reconnect_backoff_ms", 5), ("grpc.min_reconnect_backoff_ms", 5)])
        grpc.channel_ready_future(channel).result(30)
        answers.append((time.clock_gettime_ns(time.CLOCK_BOOTTIME) - begun) / 1e6)
        channel.close()
        adopted = lambda: [e["bootNanoseconds"] for e in agent.records()[0] if e["sequence"] > head and e["type"] == Event.Adopted]
        until(lambda: len(adopted()) >= count, lambda: f"{len(adopted())} of {count} adopted", 60)
        adoptions.append((max(adopted(), default=begun + answers[-1] * 1e6) - begun) / 1e6)
    time.sleep(2)
    before = ticks(agent.process.pid)
    time.sleep(10)
    busy = (ticks(agent.process.pid) - before) / os.sysconf("SC_CLK_TCK") / 10 * 100
    return statistics.median(answers), statistics.median(adoptions), pss(agent.process.pid), busy


def main():
    directory = pathlib.Path(f"/tmp/carrel-bench-lifecycle-{os.getpid()}")
    panel = directory / "panel.sock"
    agent = make(directory, f"maxLaunching: 600\nmaxWorkspaces: 600\ncontrollers: [{{name: panel, socket: {panel}, owner: true}}]\n")
    with tempfile.TemporaryDirectory() as generated:
        control, control_service, messages, service = stubs(pathlib.Path(generated))
        server, delays = controller(panel, control, control_service)
        try:
            until(lambda: any(c.get("connected") for c in json.loads(agent.run("node", "-o", "json").stdout).get("controllers", [])), "the controller is there", 60)
            channel = grpc.insecure_channel(f"unix:{agent.socket}")
            stub = service.NodeServiceStub(channel)
            for _ in range(ROUNDS * 10):
                stub.Drain(messages.DrainRequest(by="bench"))
                stub.Uncordon(messages.UncordonRequest(by="bench"))
                time.sleep(0.01)
            floor = synced_appends(directory, ROUNDS * 20)
            until(lambda: len(delays) >= ROUNDS * 20, "all events")
            alone = percentiles([d / 1e6 for d in delays])
            rate = many(agent, stub, messages)
            floor_rate = 1000 / statistics.mean(synced_appends(directory, ROUNDS * 20))
            channel.close()
            table = [("an event, from when it happened to its controller", f"{alone[0]:.2f} ms", f"p99 {alone[1]:.2f} ms; {alone[0] / statistics.median(floor):.1f} × the floor"),
                     ("floor: append and fdatasync(2)", f"{statistics.median(floor):.2f} ms", f"p99 {percentiles(floor)[1]:.2f} ms"),
                     ("events a second, 16 callers", f"{rate:.0f}", f"{rate / floor_rate:.2f} × of one file's fdatasyncs a second")]
            for count in (0, 100, 500):
                have = len(json.loads(agent.run("ps", "-o", "json").stdout or "[]"))
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda i: launch(agent, f"b-{i}"), range(have, count)))
                until(lambda: agent.run("ps").stdout.count("ready") + agent.run("ps").stdout.count("Ready") >= count, f"{count} run", 300)
                answer, adopted, memory, busy = comeback(agent, count)
                table.append((f"killed with {count} workspaces: it answers, has adopted all", f"{answer:.0f}, {adopted:.0f} ms", f"then {memory:.0f} MB PSS, {busy:.2f} % of a CPU"))
            print(f"\n{ROUNDS} rounds, kernel {os.uname().release}, {os.cpu_count()} CPUs\n\n| lifecycle | median | |\n|---|---|---|")
            for row in table:
                print("| " + " | ".join(row) + " |")
        finally:
            server.stop(0)
            destroy(agent)


main()

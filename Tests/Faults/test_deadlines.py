# SPDX-License-Identifier: Apache-2.0
"""Calls answer at their limit whatever is below them, and what is slow or stuck holds up only itself: a journal that is locked or whose
disk is full, imports of images, homes that hang."""

import gzip
import hashlib
import os
import pathlib
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import time

import pytest
from busybox import archive
from conftest import BIN, ROOT, Agent, Code, Event, busybox_image, destroy, full, judge, node_info, on_small_disk, until

PREFIX = "cry"

# Looks into the home before each start, as the tools for people do.
TOOL = """name: looks
home: /home/analyst
packages: {PACKAGES: packages}
rescue: {suspects: [.config], sessions: [.session], sessionLimit: 1Mi}
"""


@pytest.fixture(scope="module")
def agent():
    directory = pathlib.Path(f"/tmp/carrel-deadlines-{os.getpid()}")
    directory.mkdir(mode=0o711)
    agent = Agent(directory, prefix=PREFIX)
    tools = directory / "tools"
    shutil.copytree(ROOT / "manifests" / "tools", tools)
    (tools / "looks.yaml").write_text(TOOL)
    agent.config.write_text(agent.config.read_text().replace(f"tools: {ROOT}/manifests/tools", f"tools: {tools}"))
    agent.start()
    busybox_image(directory / "busybox.tar")
    done = agent.run("image", "import", directory / "busybox.tar", "--name", "busybox:latest")
    assert done.returncode == 0, done
    yield agent
    destroy(agent)


def command(agent, *arguments):
    return subprocess.Popen([BIN / "carrel", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "CARREL_SOCKET": agent.socket})


def timed(agent, *arguments):
    begun = time.monotonic()
    done = agent.run(*arguments)
    return done, time.monotonic() - begun


def check_answers(agent, *commands, seconds=2):
    for arguments in commands:
        done, elapsed = timed(agent, *arguments)
        assert done.returncode == 0 and elapsed < seconds, (arguments, elapsed, done)


def remove(agent, *ids):
    assert agent.do("rm", "--force", *ids).returncode == 0


def degraded(agent):
    return node_info(agent).get("degraded", [])


# ------------------------------------------------------------- stopping first

# Records SIGTERM in its home, and ends by it.
TRAP = "trap 'echo > {0}.signalled; exit 3' TERM; echo > {0}.up; while true; do sleep 0.1; done"


def launch_trap(agent, id):
    home = agent.directory / "homes" / "ada"
    agent.launch(id, TRAP.format(id))
    agent.wait(id, "READY")
    until((home / f"{id}.up").exists, f"{id} runs")
    return home / f"{id}.signalled"


def check_stop_signals(agent, id, signalled):
    """Asks for a stop; its process."""
    begun = time.monotonic()
    stop = command(agent, "stop", id, "--time", "20")
    until(signalled.exists, "SIGTERM for its tool", 20)
    seconds = time.monotonic() - begun
    print(f"SIGTERM {seconds:.2f} s after `stop`")
    assert seconds < 1, seconds
    return stop


def check_stopped(agent, id, stop):
    assert stop.wait(30) == 0, stop.stderr.read()
    reason = agent.wait(id, "STOPPED")["reason"]
    assert reason["exit_code"] == 3 and reason["code"] == Code.Requested and reason["stopped_by"], reason


def test_a_stop_signals_first_when_the_disk_is_full(agent):
    with on_small_disk(agent) as small:
        signalled = launch_trap(agent, "full")
        with full(small):
            stop = check_stop_signals(agent, "full", signalled)
        check_stopped(agent, "full", stop)
        remove(agent, "full")
    judge(agent)


# ------------------------------------------------------------ a locked journal

def test_a_locked_journal_delays_only_what_is_to_be_durable(agent):
    signalled = launch_trap(agent, "locked")
    agent.launch("kept", "sleep 100000")
    agent.wait("kept", "READY")
    (agent.directory / "content").write_text("given while locked")
    lock = sqlite3.connect(agent.state / "journal.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        begun = time.monotonic()
        put = command(agent, "credentials", "put", "kept", f"key={agent.directory}/content")
        stop = check_stop_signals(agent, "locked", signalled)
        while put.poll() is None and time.monotonic() < begun + 40:
            check_answers(agent, ("node",), ("get", "kept"), ("exec", "kept", "--", "true"), ("image", "ls"))
            time.sleep(0.5)
        seconds = time.monotonic() - begun
        print(f"`credentials put` answered after {seconds:.1f} s")
        assert put.poll() == 4 and 28 < seconds < 32, (put.poll(), seconds)
        assert "no result within 30 s" in put.stderr.read()
        named = degraded(agent)
        assert stop.poll() is None, "a stop is answered when it is durable"
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    check_stopped(agent, "locked", stop)
    check_answers(agent, ("credentials", "put", "kept", f"key={agent.directory}/content"), ("exec", "kept", "--", "test", "-s", "/run/carrel/credentials/key"))
    updates = [e for e in agent.records()[0] if e["workspace"] == "kept" and e["type"] == Event.CredentialsUpdated]
    assert len(updates) == 2, updates
    assert agent.launch("after", "exit 4").returncode == 0
    assert agent.wait("after", "STOPPED")["reason"]["exit_code"] == 4
    remove(agent, "locked", "kept", "after")
    judge(agent)
    # What went on after its time: the call, or what it waits for.
    says = lambda sentences: [s for s in sentences if "UpdateCredentials" in s or "journal" in s]
    assert says(named), named
    until(lambda: not says(degraded(agent)), lambda: degraded(agent))


# --------------------------------------------------------------------- imports

def layers(count, size=200 << 20, part=1 << 20):
    """Compressed layers of about that size that are all different, each with its tar's digest. They differ in their first file; the rest
    is compressed once (RFC 1952: members of a gzip file follow each other)."""
    def members(name, content):
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        return entry.tobuf(tarfile.USTAR_FORMAT), content + bytes(-len(content) % 512)
    content = os.urandom(part // 2).hex().encode()
    packed = gzip.compress(content, 1)
    rest = [(members(f"data/{n:03}", content)[0]) for n in range(size // part)]
    rest_packed = [gzip.compress(header, 1) for header in rest]
    end, end_packed = bytes(1024), gzip.compress(bytes(1024), 1)
    for number in range(count):
        first = b"".join(members("number", str(number).encode()))
        digest = hashlib.sha256(first)
        for header in rest:
            digest.update(header)
            digest.update(content)
        digest.update(end)
        yield b"".join([gzip.compress(first, 1), *(part for header in rest_packed for part in (header, packed)), end_packed]), digest.hexdigest()


def milliseconds_to_ready(agent, id):
    """From the command to what the event says, by the clock that both go by."""
    begun = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert agent.launch(id, "sleep 100000").returncode == 0
    agent.wait(id, "READY")
    ready = next(e for e in agent.records()[0] if e["workspace"] == id and e["type"] == Event.Ready)
    return (ready["bootNanoseconds"] - begun) / 1e6


@pytest.mark.alone
def test_launches_go_on_while_images_are_imported(agent):
    for number, (layer, digest) in enumerate(layers(4)):
        archive(agent.directory / f"large-{number}.tar", layer, digest)
    os.sync()
    quiet = [milliseconds_to_ready(agent, f"quiet-{n}") for n in range(10)]
    imports = [command(agent, "image", "import", agent.directory / f"large-{n}.tar", "--name", f"large-{n}:latest") for n in range(4)]
    time.sleep(0.5)
    meanwhile = []
    while len(meanwhile) < 10 and any(i.poll() is None for i in imports):
        meanwhile.append(milliseconds_to_ready(agent, f"meanwhile-{len(meanwhile)}"))
        check_answers(agent, ("node",), ("image", "ls"))
    medians = statistics.median(quiet), statistics.median(meanwhile)
    print(f"launch to ready, median of {len(quiet)}: {medians[0]:.0f} ms; during four imports, of {len(meanwhile)}: {medians[1]:.0f} ms (x {medians[1] / medians[0]:.1f})")
    for process in imports:
        assert process.wait(60) == 0, process.stderr.read()
    remove(agent, *(f"quiet-{n}" for n in range(10)), *(f"meanwhile-{n}" for n in range(len(meanwhile))))
    assert len(meanwhile) == 10, "the imports were over before ten launches"
    # The aim is twice; a machine that does other things as well may take three times.
    assert medians[1] <= 3 * medians[0], (quiet, meanwhile)
    judge(agent)


# ------------------------------------------------------------- homes that hang

def test_homes_that_hang_hold_up_nobody_else(agent):
    agent.launch("runs", "sleep 100000")
    agent.wait("runs", "READY")
    point = pathlib.Path(f"/tmp/carrel-deadlines-silent-{os.getpid()}")
    point.mkdir()
    files = subprocess.Popen([sys.executable, pathlib.Path(__file__).parent / "silent_files.py", point, "2001"], stdout=subprocess.PIPE)
    assert files.stdout.readline() == b"mounted\n"
    names = [f"hangs-{n}" for n in range(5)]
    times = []
    try:
        for number, name in enumerate(names):
            done = agent.launch(name, tool="looks", command=["sleep", "100000"], storage={"home": f"{point}/home-{number}"})
            assert done.returncode == 0, done
        until(lambda: any(f"storage {point}" in sentence for sentence in degraded(agent)), lambda: f"its threads are all taken: {degraded(agent)}")
        for number in range(4):
            times.append(milliseconds_to_ready(agent, f"elsewhere-{number}"))
            check_answers(agent, ("exec", "runs", "--", "true"), ("image", "ls"), ("ps",), ("top",))
            time.sleep(0.5)
        assert [agent.get(name)["state"] for name in names] == ["STATE_PREPARING"] * 5
        # One that hangs can be stopped.
        check_answers(agent, ("stop", names[0], "--time", "0"), seconds=5)
    finally:
        # What waits for it fails.
        files.kill()
        files.wait()
        subprocess.run(["umount", "-l", point])
        point.rmdir()
    print(f"launch to ready elsewhere: {[round(t) for t in times]} ms")
    assert max(times) < 2000, times
    for name in names:
        agent.wait(name, "STOPPED", "FAILED", "READY")
    remove(agent, "runs", *names, *(f"elsewhere-{n}" for n in range(4)))
    judge(agent)

# SPDX-License-Identifier: Apache-2.0
"""How far the start of each workspace has come, read from disk and from the supervisors right after a kill; and lives of an agent that
end where they are to end."""

import ctypes
import dataclasses
import json
import os
import pathlib
import select
import signal
import socket
import sqlite3
import struct
import time

from conftest import sandbox

# In the order in which a workspace passes them; each has to be hit.
PHASES = ["accepted", "preparing", "created", "waiting", "started", "ended"]
MEANING = {"accepted": "accepted, its supervisor without a plan", "preparing": "plan sent, preparing", "created": "PID 1 created", "waiting": "waiting for the start",
           "started": "started, not ready", "ended": "ended, not reported", "ready": "ready", "gone": "without a supervisor"}
# The status that the supervisors of commit 7ede341 send in place of a hello.
STATUS = {20: 1, 21: 2, 22: 3, 23: 4, 24: 5, 25: 6}


def hello_state(datagram):
    """How far a sandbox has come, by the first datagram of its supervisor: 0 awaiting its plan, 1 preparing, 2 created, 3 waiting,
    4 started, 5 failed, 6 ended; None where that is not to be read from it."""
    if datagram[:1] != b"H":
        return STATUS.get(datagram[0]) if datagram else None
    # The version, so many capabilities, each with its length before it.
    number = lambda at, width: int.from_bytes(datagram[at:at + width], "little")
    at = 17
    for _ in range(min(number(9, 8), len(datagram))):
        at += 4 + number(at, 4)
    return datagram[at] if at < len(datagram) else None


@dataclasses.dataclass
class Sight:
    """A sandbox's folder right after a kill."""
    plan: bool = False
    ended: bool = False
    # A supervisor accepts connections there.
    lives: bool = False
    # It has no child yet; None where that cannot be seen.
    childless: bool = None
    state: int = None


def phase(record_state, sight):
    """Where in its start a workspace is, by its record and its sandbox; pure."""
    if record_state == "pending" or sight is None or not (sight.plan or sight.ended):
        return "accepted"
    if sight.ended or sight.state in (5, 6):
        return "ended"
    if not sight.lives:
        return "gone"
    # A supervisor that prepares does not answer until it is done, and then says that it has created PID 1.
    if sight.state in (None, 0, 1) or sight.childless and sight.state < 4:
        return "preparing"
    if sight.state < 4:
        return {2: "created", 3: "waiting"}[sight.state]
    return "ready" if record_state in ("ready", "stopping") else "started"


def supervisor(folder):
    """A connection to the supervisor of a sandbox, and its pid; None until it listens itself, and not the agent that made the socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    number = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        # A path that is short enough for a socket's address, wherever the folder is.
        connection.connect(f"/proc/self/fd/{number}/shim.sock")
    finally:
        os.close(number)
    pid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        return connection, pid if pathlib.Path(f"/proc/{pid}/comm").read_text() == "carrel-shim\n" else None
    except OSError:
        return connection, None


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(p) for p in file.read().split()]


def look(agent, patience=0.05):
    """Every sandbox's folder as it is now. Each supervisor is stopped for the moment in which it is looked at: what takes less than a
    millisecond, such as the preparation, would be over before it could be seen. When it goes on, it first accepts the connection
    that waits, and says where it stood."""
    sights, stopped, asked = {}, [], {}
    folders = [entry for name in ("sandboxes", "workspaces") if (agent.state / name).is_dir() for entry in os.scandir(agent.state / name)]
    # The youngest first: it goes on fastest.
    for folder in sorted(folders, key=born, reverse=True):
        sights[pathlib.Path(folder.path)] = sight = Sight()
        try:
            connection, pid = supervisor(folder.path)
            sight.lives = True
            asked[connection.fileno()] = (connection, sight)
            if pid:
                os.kill(pid, signal.SIGSTOP)
                stopped.append((pid, sight))
        except OSError:
            continue
    for folder, sight in sights.items():
        sight.plan, sight.ended = (folder / "plan").exists(), (folder / "exit").exists()
    for pid, sight in stopped:
        try:
            sight.childless = not children(pid)
        except OSError:
            pass
        os.kill(pid, signal.SIGCONT)
    poller, end = select.poll(), time.monotonic() + patience
    for number in asked:
        poller.register(number, select.POLLIN)
    while asked and (left := end - time.monotonic()) > 0:
        for number, _ in poller.poll(left * 1000):
            poller.unregister(number)
            connection, sight = asked.pop(number)
            try:
                sight.state = hello_state(connection.recv(65536))
            except OSError:
                pass
    return sights


def born(folder):
    try:
        return folder.stat().st_ctime_ns
    except OSError:
        return 0


def phases(agent, sights):
    """The phase of each workspace that has not ended by the journal, as its agent left it."""
    database = sqlite3.connect(f"file:{agent.state}/journal.sqlite?mode=ro", uri=True, timeout=5)
    rows = database.execute("SELECT id, state, body FROM workspace WHERE state NOT IN ('stopped', 'failed')").fetchall()
    database.close()
    found = {}
    for id, state, body in rows:
        occupied = sandbox(agent, id, json.loads(body))
        found[id] = phase(state, occupied and sights.get(occupied.folder))
    return found


# ---------------------------------------------------------------------- lives

class Changes:
    """inotify(7), of which Python's library has nothing: what comes into folders and what is written to files."""

    MODIFIED, MOVED_HERE, CREATED = 0x2, 0x80, 0x100

    def __init__(self):
        self.library = ctypes.CDLL(None, use_errno=True)
        self.file = self.library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watched = {}

    def watch(self, path, mask):
        self.watched[self.library.inotify_add_watch(self.file, bytes(path), mask)] = path

    def read(self):
        """The paths that changed since the last call."""
        try:
            data = os.read(self.file, 65536)
        except BlockingIOError:
            return
        while data:
            number, _, _, length = struct.unpack_from("iIII", data)
            name = data[16:16 + length].rstrip(b"\0").decode()
            data = data[16 + length:]
            if number in self.watched:
                yield self.watched[number] / name if name else self.watched[number]


class Life:
    """One life of an agent, which ends by SIGKILL: at a random moment, at a named point, or where a sandbox is held in a phase that is
    over within a millisecond."""

    AIMS = ["while preparing", "while created"]

    def __init__(self, agent, aim=""):
        self.agent, self.aim, self.root = agent, aim, None
        # The process that is held, and whether the end comes as it was aimed at.
        self.held, self.hit = None, False
        self.changes = Changes()
        self.pidfd = os.pidfd_open(agent.process.pid)
        # At a named point an agent writes that it is there. The kernel takes longer than some phases to take it apart.
        self.reached = agent.directory / "reached"
        self.reached.touch()
        self.changes.watch(self.reached, Changes.MODIFIED)
        if aim in self.AIMS:
            self.root = agent.state / ("sandboxes" if (agent.state / "sandboxes").is_dir() else "workspaces")
            self.changes.watch(self.root, Changes.CREATED)
            for folder in self.root.iterdir():
                self.follow(folder)

    def follow(self, folder):
        if not (folder / "plan").exists():
            self.changes.watch(folder, Changes.CREATED | Changes.MOVED_HERE)
            # Come between the two.
            if (folder / "plan").exists():
                self.hold(folder)

    def hold(self, folder):
        """Stops a supervisor that has just got its plan, or the PID 1 that it makes by it."""
        try:
            connection, pid = supervisor(folder)
            connection.close()
            if pid is None:
                return
            if self.aim == "while created":
                end = time.monotonic() + 0.05
                while not (born := children(pid)) and time.monotonic() < end:
                    pass
                pid = born[0]
            os.kill(pid, signal.SIGSTOP)
            self.held, self.hit = pid, True
        except (OSError, IndexError):
            pass

    def end(self, seconds, moments):
        """Waits for the end, or makes it. True where it came as it was aimed at."""
        until = time.monotonic() + seconds
        while not self.hit and (left := until - time.monotonic()) > 0:
            ready = select.select([self.changes.file, self.pidfd], [], [], left)[0]
            for path in self.changes.read():
                if path == self.reached:
                    self.hit = True
                elif path.parent == self.root:
                    self.follow(path)
                elif path.name == "plan" and not self.hit:
                    self.hold(path.parent)
            self.hit = self.hit or self.pidfd in ready
        if self.held:
            # The agent goes on with what it has to do for it, as far as it gets.
            time.sleep(moments.uniform(0, 0.005))
        if self.held or not self.hit:
            os.kill(self.agent.process.pid, signal.SIGKILL)
        sights = look(self.agent)
        if self.held:
            try:
                os.kill(self.held, signal.SIGCONT)
            except OSError:
                pass
        self.agent.process.wait()
        os.close(self.changes.file)
        os.close(self.pidfd)
        return self.hit, phases(self.agent, sights)

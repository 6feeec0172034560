# SPDX-License-Identifier: Apache-2.0
"""Plays an agent of commit 7ede341, whose supervisors speak without a version, up to the moment in which it is killed.

The supervisors are real ones of that commit (hack/legacy-shim); journal, records and launch plans are what such an agent wrote
(Tests/Fixtures), with the places, the boot and the image of here put in. What it said to its supervisors is said anew, here.

    old = Legacy(directory, "crv")
    for id in old.ids:
        old.start(id)
    old.die()
"""

import calendar
import ctypes
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import tarfile
import threading
import time

from conftest import ROOT, SUBNETS, busybox_image, until

FIXTURES = ROOT / "Tests" / "Fixtures"
JOURNAL, WORKSPACES = FIXTURES / "journal-7ede341.sqlite", FIXTURES / "workspaces-7ede341"
# Where the recorded agent had its state, homes and datasets, and how its addresses began.
RECORDED, RECORDED_SUBNET = "/tmp/carrel-7ede341", "10.92"
SECRET = b"of the request\n"
PROVIDER = """#!/bin/sh
echo '{"Version": 1, "AccessKeyId": "ASIA'$2'", "SecretAccessKey": "new", "SessionToken": "session", "Expiration": "2100-01-01T00:00:00Z"}'
"""
OPEN_GROUP = 0xCA88E1
BROKER_PORT = 15170


def shim():
    """The supervisor's program."""
    made = subprocess.run([ROOT / "hack" / "legacy-shim"], stdout=subprocess.PIPE, text=True)
    assert made.returncode == 0, "hack/legacy-shim: see above"
    return made.stdout.strip()


# ------------------------------------------------------------- launch plans

NUMBER, TEXT, BYTES, LIST = 1, 2, 3, 4
CGROUP, LAYER, BIND, CGROUP_FILE_SYSTEM, FILE = 1, 4, 7, 11, 17


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        assert self.at + count <= len(self.data), "truncated"
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, width=8):
        return int.from_bytes(self.take(width), "little")

    def counted(self):
        return self.take(self.number(4))

    def text(self):
        return self.counted().decode()


def decode_plan(data):
    """[(operation, [(kind, value)])], by the flat encoding of version 3."""
    reader = Reader(data)
    assert reader.take(5) == b"CRLP\x03"
    operations = []
    for _ in range(reader.number(4)):
        code, count = reader.take(2)
        fields = []
        for _ in range(count):
            kind = reader.take(1)[0]
            if kind == NUMBER:
                value = reader.number()
            elif kind == LIST:
                value = [reader.text() for _ in range(reader.number(4))]
            else:
                value = reader.counted() if kind == BYTES else reader.text()
            fields.append((kind, value))
        operations.append((code, fields))
    assert reader.at == len(data)
    return operations


def counted(data):
    data = data.encode() if isinstance(data, str) else data
    return struct.pack("<I", len(data)) + data


def encode_plan(operations):
    data = b"CRLP\x03" + struct.pack("<I", len(operations))
    for code, fields in operations:
        data += bytes([code, len(fields)])
        for kind, value in fields:
            data += bytes([kind])
            if kind == NUMBER:
                data += struct.pack("<Q", value)
            elif kind == LIST:
                data += struct.pack("<I", len(value)) + b"".join(map(counted, value))
            else:
                data += counted(value)
    return data


# ----------------------------------------------------------------- messages

START, PUT_SECRET, SERVE_CREDENTIALS, PUT_ROLE, ATTACH, LAUNCH = 2, 5, 9, 10, 13, 18
CREATED, WAITING, STARTED, FAILED, EXITED, DONE, REFUSED, MOUNT = 21, 22, 23, 24, 25, 27, 28, 35
# What a supervisor says first to whoever connects: where its workspace is.
STATES = range(20, 26)


class Connection:
    """One datagram, one message: its code, then numbers of 8 bytes and counted texts."""

    def __init__(self, connected):
        self.socket = connected
        self.socket.settimeout(20)

    @classmethod
    def to(cls, folder):
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # By descriptor: a path may be too long for an address.
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            connected.connect(f"/proc/self/fd/{at}/shim.sock")
        finally:
            os.close(at)
        return cls(connected)

    def send(self, code, *fields, passing=()):
        data = bytes([code]) + b"".join(struct.pack("<q", field) if isinstance(field, int) else counted(field) for field in fields)
        if passing:
            socket.send_fds(self.socket, [data], list(passing))
        else:
            self.socket.send(data)

    def receive(self):
        """(code, reader); None when the other side has closed."""
        data = self.socket.recv(131_072)
        return (data[0], Reader(data[1:])) if data else None

    def close(self):
        self.socket.close()


def ask(folder, code, *fields, passing=()):
    """One question over a connection of its own."""
    connection = Connection.to(folder)
    try:
        connection.send(code, *fields, passing=passing)
        while received := connection.receive():
            assert received[0] != REFUSED, f"refused: {os.strerror(received[1].number())}"
            if received[0] not in (*STATES, 33, 34):
                return received
        raise AssertionError("the supervisor has closed")
    finally:
        connection.close()


# ------------------------------------------------------------------ cgroups

class Cgroups:
    """As `Limits` of that commit makes them."""
    root = pathlib.Path("/sys/fs/cgroup")

    def __init__(self, parent):
        kind = lambda path: subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout.strip()
        self.is_unified = kind(self.root) == "cgroup2fs"
        bases = ["memory", "cpu", "cpuacct", "pids"]
        if kind(self.root / "unified") == "cgroup2fs":
            bases.append("unified")
        elif (self.root / "systemd" / "cgroup.procs").exists():
            bases.append("systemd")
        self.bases = [self.root] if self.is_unified else [self.root / base for base in bases]
        self.parent = parent
        for base in self.bases:
            folder = base
            for part in pathlib.PurePath(parent).parts:
                self.enable(folder)
                folder /= part
                folder.mkdir(exist_ok=True)
            self.enable(folder)

    def enable(self, folder):
        if self.is_unified:
            for controller in ("memory", "cpu", "pids"):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")

    def make(self, name, amounts):
        paths = [base / self.parent / name for base in self.bases]
        for path in paths:
            path.mkdir()
        memory, pids = amounts["memoryBytes"], amounts["pids"]
        quota = max(amounts["milliCPUs"] * 100, 1000)
        if self.is_unified:
            values = [("memory.max", memory), ("memory.oom.group", 0), ("memory.swap.max", 0), ("cpu.max", f"{quota} 100000"), ("pids.max", pids)]
            values = [(paths[0] / file, value) for file, value in values]
        else:
            values = [("memory/memory.limit_in_bytes", memory), ("memory/memory.memsw.limit_in_bytes", memory), ("cpu/cpu.cfs_period_us", 100_000),
                      ("cpu/cpu.cfs_quota_us", quota), ("pids/pids.max", pids)]
            values = [(self.root / file.split("/")[0] / self.parent / name / file.split("/")[1], value) for file, value in values]
        for file, value in values:
            if file.name in ("memory.oom.group", "memory.swap.max", "memory.memsw.limit_in_bytes") and not file.exists():
                continue
            file.write_text(str(value))
        return [str(path) for path in paths]

    @property
    def shown(self):
        """The v1 hierarchies that a workspace sees."""
        if self.is_unified:
            return []
        found = [line.split(":")[1] for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines()]
        return [names for names in found if {"memory", "cpu", "cpuacct", "pids"} & set(names.split(","))]


# ------------------------------------------------------------------ network

def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def sysctl(path, value):
    pathlib.Path("/proc/sys/net", path).write_text(value)


def connect_network(link, address, gateway, is_open, pid):
    run("ip", "link", "add", link, "up", "group", OPEN_GROUP if is_open else 0, "type", "veth", "peer", "name", "eth0", "netns", pid)
    try:
        sysctl(f"ipv6/conf/{link}/disable_ipv6", "1")
    except OSError:
        pass
    sysctl(f"ipv4/conf/{link}/rp_filter", "1")
    sysctl(f"ipv4/conf/{link}/forwarding", "1")
    run("ip", "address", "add", f"{gateway}/32", "peer", f"{address}/32", "dev", link)
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "address", "add", f"{address}/32", "peer", f"{gateway}/32", "dev", "eth0")
    run(*inside, "route", "add", "default", "via", gateway, "dev", "eth0", "proto", "static")


def put_firewall(table, prefix, subnet, addresses):
    links = f'"{prefix}*"'
    sources = ", ".join(f'"{prefix}{slot}" . {address}' for slot, address in enumerate(addresses))
    rules = f"""
        add table inet {table}
        delete table inet {table}
        table inet {table} {{
          set sources {{ type ifname . ipv4_addr; elements = {{ {sources} }} }}
          chain forward {{
            type filter hook forward priority filter; policy accept;
            iifname {links} jump outbound
            oifname {links} jump inbound
          }}
          chain outbound {{
            meta nfproto ipv6 counter drop
            iifname . ip saddr != @sources counter drop
            ip daddr 169.254.0.0/16 counter drop
            oifname {links} counter drop
            iifgroup {OPEN_GROUP} accept
            ct state established,related accept
            counter drop
          }}
          chain inbound {{
            ct state established,related accept
            counter drop
          }}
          chain input {{
            type filter hook input priority filter; policy accept;
            iifname {links} jump host
          }}
          chain host {{
            iifname . ip saddr @sources ct state established,related accept
            ip6 daddr fd00:ec2::254 counter drop
            counter drop
          }}
          chain postrouting {{
            type nat hook postrouting priority srcnat; policy accept;
            ip saddr {subnet} oifname != {links} masquerade
          }}
        }}"""
    done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def listen_inside(pid, port):
    """A socket that listens at 127.0.0.1 of a workspace. Made by a thread of its own, which ends where it went."""
    made = []

    def make():
        with open(f"/proc/{pid}/ns/net") as namespace:
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: its lo may be down yet
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        made.append(listener)
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


# ------------------------------------------------------------------- images

def store_image(root, archive):
    """As that commit's image store keeps what `carrel image import --name busybox:latest` unpacked. Returns digest and layers."""
    with tarfile.open(archive) as tar:
        read = lambda name: tar.extractfile(name).read()
        manifest_digest = json.loads(read("index.json"))["manifests"][0]["digest"]
        blob = lambda digest: read("blobs/sha256/" + digest.split(":")[1])
        manifest = json.loads(blob(manifest_digest))
        config = blob(manifest["config"]["digest"])
        layers = [gzip.decompress(blob(layer["digest"])) for layer in manifest["layers"]]
    for folder in ("", "layers", "images", "ingest"):
        (root / folder).mkdir(mode=0o755 if folder else 0o700, parents=True)
    size, found = 0, []
    for layer in layers:
        digest = hashlib.sha256(layer).hexdigest()
        folder = root / "layers" / digest
        folder.mkdir()
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            bytes_of = sum(member.size for member in tar if member.isreg())
            tar.extractall(folder, numeric_owner=True)
        replace(root / "layers" / f"{digest}.size", str(bytes_of).encode())
        size += bytes_of
        found.append(f"sha256:{digest}")
    image = {"name": "busybox:latest", "digest": manifest_digest, "layers": found, "sizeBytes": size, "created": "", "environment": [],
             "configJSON": config.decode()}
    replace(root / "images" / f"{manifest_digest[7:]}.json", json.dumps(image).encode())
    replace(root / "names.json", json.dumps({"busybox:latest": manifest_digest}).encode())
    return manifest_digest, found


def replace(path, content):
    """As everything is written that the agent and its supervisors keep."""
    new = path.with_name("new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    new.rename(path)


# ---------------------------------------------------------------- the agent

def written(value):
    """JSON as that agent writes it: sorted keys, no spaces, `/` escaped. Its readers take anything; a harness that is to be faithful does not."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).replace("/", "\\/")


def read(text):
    value = json.loads(text)
    assert written(value) == text, "this is not how that agent writes"
    return value


def boottime():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Running:
    """A workspace that the recorded journal says is ready, and its supervisor here."""

    def __init__(self, record, folder):
        self.record, self.folder = record, folder
        self.id = record["spec"]["id"]
        self.reached = None
        self.connection = self.shim = self.child = None


class Legacy:
    """The state of an old agent below `directory`, configured as `conftest.Agent` does for this prefix."""
    STEPS = ("standing", "launched", "created", "waiting", "started")

    def __init__(self, directory, prefix):
        self.directory, self.prefix, self.subnet = pathlib.Path(directory), prefix, f"10.{SUBNETS[prefix]}"
        self.program = shim()
        self.state = self.directory / "state"
        self.stderr = open(self.directory / "carreld.log", "ab")
        self.boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.cgroups = Cgroups(f"carrel-faults-{prefix}")
        for folder in ("", "workspaces", "homes", "datasets"):
            (self.state / folder).mkdir(mode=0o700)
        replace(self.state / "lock", b"4194304\n")
        busybox_image(self.directory / "busybox.tar")
        self.image, self.layers = store_image(self.state / "images", self.directory / "busybox.tar")
        self.provide()
        addresses = [f"{self.subnet}.{(slot + 2) >> 8}.{(slot + 2) & 255}" for slot in range(500)]
        put_firewall(f"carrel_{prefix}", prefix, f"{self.subnet}.0.0/16", addresses)
        shutil.copyfile(JOURNAL, self.state / "journal.sqlite")
        with sqlite3.connect(self.state / "journal.sqlite") as database:
            bodies = dict(database.execute("SELECT id, body FROM workspace"))
            # The recording's last moment, by both clocks.
            last, self.recorded_boottime = database.execute("SELECT wallTime, bootNanoseconds FROM event ORDER BY sequence DESC LIMIT 1").fetchone()
        database.close()
        self.recorded_at = calendar.timegm(time.strptime(last[:19], "%Y-%m-%dT%H:%M:%S"))
        self.begun, self.begun_boottime = time.time(), boottime()
        records = {id: self.moved(read(body)) for id, body in bodies.items()}
        self.ended = {id: record for id, record in records.items() if record["state"] in ("stopped", "failed")}
        self.running = {id: Running(record, self.folder(id)) for id, record in records.items() if record["state"] == "ready"}
        for id in self.ended:
            self.keep_ended(id)

    @property
    def ids(self):
        return sorted(self.running)

    def folder(self, id):
        return self.state / "workspaces" / id

    def provide(self):
        """What its configuration speaks of, and what the recorded workspaces were given."""
        for folder in (self.directory / "homes", self.directory / "homes" / "ada"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o711)
        (self.directory / "homes" / "ada").chmod(0o700)
        os.chown(self.directory / "homes" / "ada", 2001, 2001)
        for name in ("sales", "extra"):
            folder = self.directory / "datasets" / f"{name}-1"
            folder.mkdir(parents=True)
            (folder / "rows").write_text(f"{name} 1\n")
            (folder.parent / f"{name}-1.yaml").write_text(f"name: {name}\nversion: \"1\"\npath: {folder}\nreaders: [ada]\nwriters: [ada]\n")
        provider = self.directory / "provider"
        provider.write_text(PROVIDER)
        provider.chmod(0o755)

    # -------------------------------------------------------- of the recording

    def place(self, value):
        if isinstance(value, dict):
            return {key: self.place(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.place(part) for part in value]
        return value.replace(RECORDED, str(self.directory)) if isinstance(value, str) else value

    def moved(self, record):
        """A record of this place, this boot, this image and this time."""
        record = self.place(record)
        shift = self.begun - self.recorded_at
        record["bootID"] = self.boot
        record["imageDigest"] = self.image
        record["address"] = record["address"].replace(RECORDED_SUBNET, self.subnet, 1)
        if "startedNanoseconds" in record:
            record["startedNanoseconds"] += self.begun_boottime - self.recorded_boottime
        for end in record.get("credentialEnds", {}).values():
            end["given"] += shift
            end["end"] += shift
        for dataset in record.get("datasets", []):
            if "expires" in dataset:
                dataset["expires"] += shift
        return record

    def plan(self, running, cgroups):
        """As it was recorded, with what is another's here."""
        recorded = (WORKSPACES / running.id / "plan").read_bytes()
        operations = decode_plan(recorded)
        assert encode_plan(operations) == recorded
        plan, layers = [(CGROUP, [(TEXT, path)]) for path in cgroups], list(reversed(self.layers))
        for code, fields in operations:
            if code == CGROUP:
                continue
            if code == LAYER:
                fields = [(TEXT, f"{self.state}/images/layers/{layers.pop(0)[7:]}")]
            elif code == CGROUP_FILE_SYSTEM:
                fields = [(LIST, self.cgroups.shown), *fields[1:]]
            elif code == FILE:
                fields = [*fields[:2], (BYTES, fields[2][1].replace(RECORDED_SUBNET.encode(), self.subnet.encode()))]  # /etc/hosts
            else:
                fields = [(kind, self.place(value)) for kind, value in fields]
            plan.append((code, fields))
        assert not layers
        return plan

    def keep_ended(self, id):
        folder = self.folder(id)
        self.make_folder(folder)
        replace(folder / "plan", (WORKSPACES / id / "plan").read_bytes())
        replace(folder / "record.json", written(self.moved(read((WORKSPACES / id / "record.json").read_text()))).encode())
        shifts = {"realtime": int((self.begun - self.recorded_at) * 1e9), "boottime": self.begun_boottime - self.recorded_boottime}
        lines = [line.split("=", 1) for line in (WORKSPACES / id / "exit").read_text().splitlines() if line]
        text = "".join(f"{key}={int(value) + shifts[key] if key in shifts else value}\n" for key, value in lines)
        replace(folder / "exit", text.encode().ljust(4096, b"\n"))
        # Nobody takes the socket away.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.listen(opened).close()
        os.close(opened)
        if output := (WORKSPACES / id / "output").read_bytes():
            replace(folder / "log" / ("0" * 20 + ".log"), output)

    @staticmethod
    def make_folder(folder):
        folder.mkdir(mode=0o700)
        (folder / "log").mkdir(mode=0o700)

    # ------------------------------------------------------------ step by step

    def start(self, id, to="started"):
        """Brings a workspace up, to one of STEPS: a supervisor that stands; that has its plan; whose child is there; that waits for `start`;
        whose tool runs."""
        running = self.running[id]
        self.spawn(running)
        running.reached = "standing"
        if to == "standing":
            return
        record = running.record
        record["cgroup"] = f"{id}-{random.getrandbits(32)}"
        operations = self.plan(running, self.cgroups.make(record["cgroup"], record["amounts"]))
        # As it was when the supervisor was launched, and never again after that.
        copy = {**self.moved(read((WORKSPACES / id / "record.json").read_text())), "cgroup": record["cgroup"]}
        replace(running.folder / "record.json", written(copy).encode())
        replace(running.folder / "plan", encode_plan(operations))
        running.connection.send(LAUNCH)
        running.reached = "launched"
        if to != "launched":
            self.follow(running, to)
        if running.reached == "started":
            self.give(running, operations)

    def spawn(self, running):
        """With its folder, its listening socket and its first connection at 3, 4 and 5, in a session of its own, and nobody's child."""
        self.make_folder(running.folder)
        folder = os.open(running.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        listener = self.listen(folder)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Away from the numbers where they are to be placed.
        given = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20) for number in (self.stderr.fileno(), folder, listener.fileno(), far.fileno())]
        actions = [(os.POSIX_SPAWN_DUP2, number, 2 + index) for index, number in enumerate(given)]
        actions += [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
        pid, told = self.orphan(lambda: os.posix_spawn(
            self.program, ["carrel-shim", running.id], {}, file_actions=actions, setsid=True, setsigmask=[], setsigdef=signal.valid_signals()))
        assert told == 0, os.strerror(told)
        for number in (folder, *given):
            os.close(number)
        listener.close()
        far.close()
        running.connection, running.shim = Connection(near), pid

    @staticmethod
    def listen(folder):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(f"/proc/self/fd/{folder}/shim.sock")
        listener.listen(128)
        return listener

    @staticmethod
    def orphan(spawn):
        """What `spawn` starts is a child of a process that has ended, as it is when an agent has died. Returns its pid and an error number."""
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            answer = (0, errno.EIO)
            try:
                answer = (spawn(), 0)
            except OSError as error:
                answer = (0, error.errno)
            finally:
                os.write(writing, struct.pack("<ii", *answer))
                os._exit(0)
        os.close(writing)
        answer = struct.unpack("<ii", os.read(reading, 8))
        os.close(reading)
        os.waitpid(between, 0)
        return answer

    def follow(self, running, to):
        """Hears the supervisor and does what is the agent's to do, until it has come that far."""
        spec, outstanding, connected, waiting = running.record["spec"], 0, False, False
        while running.reached != to:
            received = running.connection.receive()
            assert received, f"{running.id}: the supervisor has closed"
            code, body = received
            assert code not in (FAILED, EXITED, REFUSED), (running.id, code, body.data)
            if code in (CREATED, WAITING):
                running.child = body.number()
                waiting = waiting or code == WAITING
                if not (connected or to == "created"):
                    outstanding = len(spec["credentials"])
                    for name in spec["credentials"]:
                        running.connection.send(PUT_SECRET, name, SECRET)
                    self.connect(running)
                    connected = True
                running.reached = "waiting" if code == WAITING else "created"
            elif code == DONE:
                outstanding -= 1
            elif code == STARTED:
                running.record["startedNanoseconds"] = boottime()
                running.reached = "started"
            if waiting and connected and outstanding == 0 and to == "started":
                waiting = False
                running.connection.send(START)

    def connect(self, running):
        record = running.record
        link = f"{self.prefix}{record['slot']}"
        if pathlib.Path(f"/sys/class/net/{link}").exists():
            subprocess.run(["ip", "link", "delete", link], capture_output=True)
        connect_network(link, record["address"], f"{self.subnet}.0.1", record["spec"].get("network") != "none", running.child)
        roles = record["spec"].get("aws", {}).get("roles", [])
        if not roles:
            return
        token = random.randbytes(24).hex()
        listener = listen_inside(running.child, BROKER_PORT)
        ask(running.folder, PUT_SECRET, "broker-token", token)
        ask(running.folder, SERVE_CREDENTIALS, token, passing=[listener.fileno()])
        listener.close()
        for role in roles:
            body = {"AccessKeyId": f"ASIA{role}", "SecretAccessKey": "old", "Token": "session", "Expiration": "2100-01-01T00:00:00Z"}
            ask(running.folder, PUT_ROLE, role, json.dumps(body), 4102444800)

    def give(self, running, operations):
        """What came while it ran, by its record."""
        record = running.record
        for name in record.get("credentialEnds", {}):
            ask(running.folder, PUT_SECRET, name, SECRET)
        for role in record.get("revoked", []):
            ask(running.folder, PUT_ROLE, role, b"", 0)
        for dataset in record.get("datasets", []):
            if not dataset["isAttached"]:
                continue
            # As the plan has the one that the spec asked for; writable: without the first bit, MOUNT_ATTR_RDONLY.
            bind = next(fields for code, fields in operations if code == BIND and fields[1][1].startswith("/data/"))
            attributes = bind[2][1] & ~1 if dataset["writable"] else bind[2][1]
            fields = [(TEXT, dataset["source"]), (TEXT, dataset["target"]), (NUMBER, attributes), *bind[3:]]
            assert ask(running.folder, ATTACH, encode_plan([(BIND, fields)]))[0] == MOUNT

    # ------------------------------------------------------------------ the end

    def die(self):
        """As by SIGKILL: the journal as it stood, and the connections gone. What runs goes on."""
        with sqlite3.connect(self.state / "journal.sqlite") as database:
            for id, record in self.ended.items():
                self.note(database, id, record)
            for running in self.running.values():
                if running.reached != "started":
                    self.cut(database, running)
                self.note(database, running.id, running.record)
            events = database.execute("SELECT sequence, reason, attributes, bootNanoseconds FROM event").fetchall()
            for sequence, reason, attributes, moment in events:
                moment += self.begun_boottime - self.recorded_boottime
                texts = [self.place(text.replace("\\/", "/")).replace("/", "\\/") if text else text for text in (reason, attributes)]
                database.execute("UPDATE event SET reason = ?, attributes = ?, bootNanoseconds = ?, bootID = ? WHERE sequence = ?",
                                 (*texts, moment, self.boot, sequence))
            stream, head = database.execute("SELECT id, head FROM stream").fetchone()
        database.close()
        (self.state / "journal.sqlite.mark").write_text(f"{stream}\n{head}\n")
        for running in self.running.values():
            if running.connection:
                running.connection.close()
        self.stderr.close()

    @staticmethod
    def note(database, id, record):
        database.execute("UPDATE workspace SET state = ?, body = ? WHERE id = ?", (record["state"], written(record), id))

    @staticmethod
    def cut(database, running):
        """A start that had not come to its end: the journal knows that its preparation began, and nothing after that."""
        running.record |= {"state": "preparing", "bootID": "", "cgroup": "", "imageDigest": "", "phases": []}
        for later in ("startedNanoseconds", "datasets", "credentialEnds", "revoked"):
            running.record.pop(later, None)
        database.execute("DELETE FROM event WHERE workspace = ? AND type NOT IN ('Created', 'Preparing')", (running.id,))
        # Without holes.
        kept = [sequence for (sequence,) in database.execute("SELECT sequence FROM event ORDER BY sequence")]
        for new, old in enumerate(kept, 1):
            database.execute("UPDATE event SET sequence = ? WHERE sequence = ?", (new, old))
        database.execute("UPDATE stream SET head = ?", (len(kept),))
        database.execute("UPDATE acknowledgement SET sequence = min(sequence, ?)", (len(kept),))

    # ------------------------------------------------------------- looking at it

    def tool(self, id):
        """Pid and time of start of a workspace's tool: the child of the child of its supervisor, which has its arguments."""
        shell = self.running[id].record["spec"]["command"]

        def find():
            for first in children(self.running[id].shim):
                for pid in children(first):
                    try:
                        if pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:2] == shell[:2]:
                            return pid, pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
                    except OSError:
                        pass
        return until(find, f"the tool of {id}")

    def end(self, id, status):
        """Lets a tool end by itself with this status."""
        home = self.directory / "homes" / "ada"
        (home / "new").write_text(str(status))
        os.chown(home / "new", 2001, 2001)
        (home / "new").rename(home / f"{id}.end")

    def gone(self, id):
        """Whether its supervisor has ended."""
        return not pathlib.Path(f"/proc/{self.running[id].shim}/fd/3").is_symlink()

    def clear(self):
        """For a test that failed half-way: ends what was started here."""
        for running in self.running.values():
            if running.shim and not self.gone(running.id):
                os.kill(running.shim, signal.SIGKILL)
        for base in self.cgroups.bases:
            for folder in (base / self.cgroups.parent).glob("*/"):
                for pid in (folder / "cgroup.procs").read_text().split():
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except ProcessLookupError:
                        pass


def children(pid):
    return [int(line) for line in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]

# SPDX-License-Identifier: Apache-2.0
"""From inside a real workspace, with real Python: what it cannot do, and that the same probe works outside."""

import pathlib
import subprocess
import sys
import time

import pytest

CALLS = """
import ctypes, os, socket, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*a)
    return errno.errorcode.get(ctypes.get_errno(), 'ok') if r < 0 else 'ok'
def family(f):
    try: socket.socket(f, socket.SOCK_STREAM if f != 38 else socket.SOCK_SEQPACKET).close(); return 'ok'
    except OSError as e: return errno.errorcode[e.errno]
print('clone3', call(435, 0, 0))
print('io_uring', call(425, 1, 0))
print('bpf', call(321, 0, 0, 0))
print('keyctl', call(250, 0, 0))
print('mount', call(165, 0, 0, 0, 0, 0))
print('unshare', call(272, 0x10000000))
print('setns', call(308, 0, 0))
print('open_by_handle', call(304, 0, 0, 0))
print('perf', call(298, 0, 0, 0, 0, 0))
print('x32', call(0x40000000 + 39))
print('tiocsti', call(16, 0, ctypes.c_ulong(0x5412), b'x'))
print('tiocsti_high', call(16, 0, ctypes.c_ulong(0x5412 | 1 << 32), b'x'))
print('tioclinux', call(16, 0, ctypes.c_ulong(0x541C), b'x'))
print('tcgets', call(16, 99, ctypes.c_ulong(0x5401), 0))
print('alg', family(38)); print('vsock', family(40)); print('packet', family(17)); print('inet', family(2)); print('unix', family(1))
print('alg_high', call(41, ctypes.c_ulong(38 | 1 << 32), 5, 0))
"""


def answers(text):
    return dict(line.split() for line in text.splitlines())


def test_system_calls_are_refused_and_the_same_probe_passes_outside(agent, lab):
    inside = answers(agent.python("lab", CALLS))
    outside = answers(subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True).stdout)
    for name in ("bpf", "keyctl", "mount", "unshare", "setns", "open_by_handle", "perf", "x32", "tiocsti", "tiocsti_high", "tioclinux", "alg", "vsock",
                 "packet", "alg_high"):
        assert inside[name] == "EPERM", (name, inside[name])
    assert inside["clone3"] == "ENOSYS" and inside["io_uring"] == "ENOSYS"
    assert inside["inet"] == inside["unix"] == "ok" and inside["tcgets"] == "EBADF"
    # The control: outside, these get past the door and fail or pass for another reason.
    for name in ("keyctl", "mount", "unshare", "setns", "tiocsti", "clone3", "tiocsti_high"):
        assert outside[name] not in ("EPERM", "ENOSYS"), (name, outside[name])


def test_debuggers_work(agent, lab):
    # ptrace of an own child: PTRACE_TRACEME is request 0.
    assert agent.python("lab", "import ctypes,os\npid=os.fork()\nif pid==0: os._exit(0 if ctypes.CDLL(None).ptrace(0,0,0,0)==0 else 1)\nprint(os.waitpid(pid,0)[1])") == "0"


@pytest.fixture(scope="module")
def neighbours(agent, lab):
    agent.launch("jupyterlab.yaml", "eve", owner="\n  name: eve\n  uid: 2002\n  gid: 2002")
    yield lab, agent.json("get", "eve")
    agent.remove("eve")


def connect(address, port):
    return f"import socket\ntry: socket.create_connection(('{address}',{port}),2).close(); print('reached')\nexcept OSError as e: print('refused')"


def test_a_neighbour_cannot_be_reached(agent, neighbours):
    lab, eve = neighbours
    assert agent.python("eve", connect(lab["address"], 8888)) == "refused"
    assert agent.python("eve", connect(eve["address"], 8888)) == "reached", "control: its own port answers"
    outside = subprocess.run([sys.executable, "-c", connect(lab["address"], 8888)], capture_output=True, text=True).stdout.strip()
    assert outside == "reached", "control: the host reaches the same port"


def test_a_neighbours_home_processes_and_secrets_are_not_there(agent, neighbours):
    agent.exec("lab", "sh", "-c", "echo mine > only-adas")
    assert agent.exec("eve", "ls", "-A", "/home").stdout.split() == ["analyst"]
    assert "only-adas" not in agent.exec("eve", "ls", "-A", "/home/analyst").stdout
    assert "only-adas" in agent.exec("lab", "ls", "-A", "/home/analyst").stdout, "control"
    commands = agent.exec("eve", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert commands.count("jupyter-lab") == 1
    assert agent.exec("eve", "cat", "/run/carrel/credentials/token").stdout != agent.exec("lab", "cat", "/run/carrel/credentials/token").stdout


def test_the_host_and_the_metadata_service_cannot_be_reached(agent, neighbours):
    def drops():
        text = subprocess.run(["nft", "list", "table", "inet", "carrel_e"], capture_output=True, text=True).stdout
        return sum(int(line.split("packets")[1].split()[0]) for line in text.splitlines() if "packets" in line)
    before = drops()
    server = subprocess.Popen([sys.executable, "-m", "http.server", "18999", "--bind", "0.0.0.0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        assert subprocess.run([sys.executable, "-c", connect("10.88.0.1", 18999)], capture_output=True, text=True).stdout.strip() == "reached", "control"
        assert agent.python("eve", connect("10.88.0.1", 18999)) == "refused"
    finally:
        server.terminate()
        server.wait()
    assert agent.python("eve", connect("169.254.169.254", 80)) == "refused"
    assert drops() > before, "the firewall's counters rise"


def test_outbound_traffic_follows_the_policy(agent, lab):
    """A network of our own plays the world outside: a namespace behind a veth, with an address routed to it."""
    def ip(*command):
        subprocess.run(["ip", *command], check=True)
    ip("netns", "add", "carrel-world")
    try:
        ip("link", "add", "crwrld0", "type", "veth", "peer", "name", "crwrld1", "netns", "carrel-world")
        ip("addr", "add", "198.51.100.1/30", "dev", "crwrld0")
        ip("link", "set", "crwrld0", "up")
        ip("-n", "carrel-world", "addr", "add", "198.51.100.2/30", "dev", "crwrld1")
        ip("-n", "carrel-world", "link", "set", "crwrld1", "up")
        pathlib.Path("/proc/sys/net/ipv4/conf/crwrld0/forwarding").write_text("1")
        server = subprocess.Popen(["ip", "netns", "exec", "carrel-world", sys.executable, "-m", "http.server", "8000"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        time.sleep(1)
        try:
            agent.launch("jupyterlab.yaml", "closed", network="none")
            # No route back to 10.88/16 is in that namespace: what is reached is reached through NAT.
            assert agent.python("lab", connect("198.51.100.2", 8000)) == "reached"
            assert agent.python("closed", connect("198.51.100.2", 8000)) == "refused"
            assert "name service" in agent.exec("closed", "cat", "/etc/resolv.conf").stdout
        finally:
            server.terminate()
            server.wait()
            agent.remove("closed")
    finally:
        subprocess.run(["ip", "netns", "del", "carrel-world"], check=False)


def test_generated_files(agent, lab):
    assert agent.exec("lab", "hostname").stdout.strip() == "lab"
    assert f"{lab['address']} lab" in agent.exec("lab", "cat", "/etc/hosts").stdout
    assert agent.exec("lab", "sh", "-c", "echo x >> /etc/hosts", check=False).returncode != 0


def test_datasets_are_read_only_unless_said_otherwise(agent):
    for name in ("public", "shared"):
        folder = agent.directory / name
        folder.mkdir(mode=0o755)
        (folder / "rows.csv").write_text("1,2")
    import os
    os.chown(agent.directory / "shared", 2001, 2001)
    storage = f"\n  datasets:\n    - {{source: {agent.directory}/public, target: /data/public}}\n    - {{source: {agent.directory}/shared, target: /data/shared, writable: true}}"
    agent.launch("jupyterlab.yaml", "data", storage=storage)
    assert agent.exec("data", "cat", "/data/public/rows.csv").stdout == "1,2"
    assert "Read-only" in agent.exec("data", "touch", "/data/public/new", check=False).stderr
    agent.exec("data", "touch", "/data/shared/new")
    assert (agent.directory / "shared/new").stat().st_uid == 2001
    agent.remove("data")


def test_a_symlink_or_a_strangers_folder_in_place_of_a_home_is_refused(agent):
    (agent.directory / "homes/mallory").symlink_to("/etc")
    (agent.directory / "homes/stranger").mkdir()
    for name, why in (("mallory", "symlink"), ("stranger", "belongs to uid 0")):
        done = agent.launch("jupyterlab.yaml", f"home-{name}", owner=f"\n  name: {name}\n  uid: 2003\n  gid: 2003", check=False)
        assert done.returncode == 1 and "StorageFailed" in done.stderr and why in done.stderr, done.stderr
        agent.remove(f"home-{name}")

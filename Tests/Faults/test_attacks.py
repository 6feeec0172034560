# SPDX-License-Identifier: Apache-2.0
"""What analysts, images and clients did to an agent of 0.1 (commit 7ede341). `CARREL_BUILD` and `CARREL_CONFIGURATION` run the same tests
against other programs, such as those of that commit, where each of them fails."""

import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import tarfile
import time

import grpc
import pytest
from busybox import archive_of
from conftest import ROOT, Event, destroy, make, run_client, until

TOOL = "name: packages\nhome: /home/user\npackages: {PACKAGES: packages}\n"
PROGRAMS = pathlib.Path(__file__).parent / "attacks.c"


@pytest.fixture(scope="module")
def agent():
    directory = pathlib.Path(f"/tmp/carrel-attacks-{os.getpid()}")
    agent = make(directory, "log: {rate: 1Mi}\n")
    tools = directory / "tools"
    tools.mkdir()
    (tools / "command.yaml").write_text((ROOT / "manifests/tools/command.yaml").read_text())
    (tools / "packages.yaml").write_text(TOOL)
    agent.config.write_text(re.sub(r"(?m)^tools: .*$", f"tools: {tools}", agent.config.read_text()))
    agent.stop()
    agent.start()
    yield agent
    destroy(agent)


@pytest.fixture
def home(agent, request):
    """A home, of an owner of this test alone, with the programs of attacks.c in it."""
    path = agent.directory / "homes" / request.node.name.replace("_", "-")[:40].strip("-").split("[")[0]
    path.mkdir(parents=True)
    subprocess.run(["gcc", "-static", "-O1", "-o", path / "attack", PROGRAMS], check=True)
    for each in (path, path / "attack"):
        os.chown(each, 2001, 2001)
    path.chmod(0o700)
    return path


@pytest.fixture
def calls(agent, stubs):
    from carrel.v1 import carrel_pb2, carrel_pb2_grpc
    with grpc.insecure_channel(f"unix:{agent.socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield carrel_pb2, carrel_pb2_grpc, channel


def inside(agent, home, id, script, **fields):
    """Runs a script to its end, and returns the workspace's last event and output."""
    agent.launch(id, script, owner=home.name, **fields)
    agent.wait(id, "STOPPED", "FAILED", seconds=60)
    output = agent.run("logs", id).stdout
    end = [e for e in agent.records()[0] if e["workspace"] == id and e["type"] in (Event.Stopped, Event.Failed)][-1]
    agent.do("rm", id)
    return end, output


def test_names_that_an_owner_makes_are_in_no_event(agent, home):
    """C1: each name in the folder for packages was an attribute of ImageChanged and part of a condition, from then on in every record."""
    folder = home / ".local/share/carrel/packages"
    folder.mkdir(parents=True)
    for index in range(3000):
        (folder / f"\x1b[31m{index}-{'x' * 200}").touch()
    for index in range(100):
        (folder / f"{index:016x}").mkdir()
    for path in (folder, *folder.parents[:3]):
        os.chown(path, 2001, 2001)
    agent.launch("names", tool="packages", command=["sleep", "1000"], owner=home.name)
    agent.wait("names", "READY")
    event = next(e for e in agent.records()[0] if e["type"] == Event.ImageChanged)
    found = json.loads(event["attributes"])["packagesFor"].split()
    assert 0 < len(found) <= 16 and all(re.fullmatch("[0-9a-f]{16}", name) for name in found), event
    for command in (["ps"], ["get", "names"], ["explain", "names"], ["events"]):
        said = agent.run(*command)
        assert said.returncode == 0 and "\x1b" not in said.stdout, (command, said)
    agent.do("rm", "--force", "names")


def test_the_memory_limit_counts_sockets(agent, home):
    """C3: UDP and TCP are no memory for cgroup v1, and netlink for none."""
    for kind in ("udp", "tcp"):
        before = socket_pages()
        agent.launch(kind, f"~/attack {kind}", owner=home.name, memory="64Mi", network="none")
        until(lambda: f"{kind} is full" in agent.run("logs", kind).stdout, f"{kind} is full", 30)
        held = (socket_pages() - before) * 4096
        assert 1 << 20 < held < 100 << 20, f"{kind}: {held >> 20} MB"
        agent.do("rm", "--force", kind)
    _, output = inside(agent, home, "netlink", "~/attack netlink")
    refused = re.findall(r"netlink (\d+): Operation not permitted", output)
    assert len(refused) == 22 and "netlink 0: open" in output, output


def socket_pages():
    text = pathlib.Path("/proc/net/sockstat").read_text()
    return sum(int(number) for number in re.findall(r"mem (\d+)", text))


def test_a_copy_writes_nothing_outside_the_home(agent, home):
    """H1: snapshots went where a link in the home led, with programs that are set-uid."""
    outside = agent.directory / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o1777)
    folder = home / ".local/share/carrel/packages"
    agent.launch("links", tool="packages", command=["sleep", "1000"], owner=home.name)
    agent.wait("links", "READY")
    agent.do("rm", "--force", "links")
    key = next(p for p in folder.iterdir() if p.is_dir())
    (key / "program").write_text("x")
    (folder / "snapshots").symlink_to(outside)
    said = agent.run("env", "snapshot", home.name)
    assert not any(outside.iterdir()), (said, list(outside.iterdir()))
    (folder / "snapshots").unlink()
    assert agent.run("env", "snapshot", home.name).returncode == 0, "the control: without the link"
    (folder / "snapshots").rename(folder / "own")
    (folder / "snapshots").symlink_to(outside)
    agent.run("env", "reset", home.name)
    assert not any(outside.iterdir())


def test_a_copy_reads_nothing_outside_the_home(agent, home):
    """H1: cp(1) followed a folder that became a link when it had opened the first of its files."""
    outside = agent.directory / "others"
    outside.mkdir(mode=0o755)
    (home / "x").mkdir()
    for folder, text in ((outside, "SECRET"), (home / "x", "mine")):
        for index in range(50):
            (folder / f"f{index}").write_text(text.ljust(200_000))
    (home / "link").symlink_to(outside)
    for path in (home / "x", *(home / "x").iterdir()):
        os.chown(path, 2001, 2001)
    os.chown(home / "link", 2001, 2001, follow_symlinks=False)
    agent.launch("swaps", "~/attack swap ~/x ~/link", owner=home.name)
    agent.wait("swaps", "READY")
    time.sleep(0.3)
    said = agent.run("home", "snapshot", home.name)
    assert (home / "x").is_symlink(), "the attack was made"
    copied = [p.read_text().strip() for p in (agent.directory / "homes/.snapshots" / home.name).glob("*/x/f*")]
    assert "SECRET" not in copied, (said, copied.count("SECRET"))
    said = agent.run("home", "snapshot", home.name)
    assert said.returncode == 0, ("the control: nothing changes during this one", said)
    agent.do("rm", "--force", "swaps")


@pytest.mark.parametrize("offset", [1 << 31, 1 << 63, (1 << 64) - 1])
def test_an_offset_ends_no_agent(agent, calls, offset):
    """C4: an offset of 2^63 trapped."""
    pb, rpc, channel = calls
    agent.launch("offset", "echo x; sleep 1000")
    agent.wait("offset", "READY")
    pid = agent.process.pid
    try:
        list(rpc.WorkspaceServiceStub(channel).Logs(pb.LogsRequest(id="offset", offset=offset), timeout=10))
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT), error
    assert agent.lives and agent.process.pid == pid and agent.run("node").returncode == 0
    agent.do("rm", "--force", "offset")


def test_aliases_do_not_multiply(agent):
    """H6: a key of nested aliases, which the check for duplicates expands."""
    for breaks in ("", "\u2028"):
        check_bomb(agent, breaks)
    assert run_client(agent.socket, "node", timeout=5).returncode == 0


def check_bomb(agent, breaks):
    levels = ["x0: &x0 [1,1,1,1,1,1,1,1,1]"] + [f"x{n}: &x{n} [{','.join([f'{breaks}*x{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = agent.directory / "bomb.yaml"
    path.write_text("\n".join([*levels, "? *x8", ": 1", ""]))
    begun = time.monotonic()
    said = run_client(agent.socket, "launch", "--no-wait", path, timeout=20)
    assert said.returncode not in (0, -9, 137) and "aliases" in said.stderr and time.monotonic() - begun < 5, said


def test_many_calls_at_once_are_queued(agent, calls):
    """H7: the connection was reset at the 101st."""
    pb, rpc, channel = calls
    stub = rpc.NodeServiceStub(channel)
    pending = [stub.Info.future(pb.InfoRequest(), timeout=30) for _ in range(1500)]
    assert all(call.result() for call in pending)


def test_the_output_log_writes_what_is_stored_at_its_rate(agent, home):
    """H8: an empty line is fifty bytes in the log, and the rate counted one."""
    agent.launch("flood", "yes ''", owner=home.name)
    agent.wait("flood", "READY")
    folder = agent.state / "workspaces/flood/log"

    def written():
        """The offset that the log has reached: segments are named by theirs."""
        last = max((f for f in folder.glob("*") if re.match(r"\d{20}", f.name)), key=lambda f: f.name)
        return int(last.name[:20]) + last.stat().st_size

    begun = time.monotonic()
    until(lambda: any(re.match(r"\d{20}", f.name) for f in folder.glob("*")), "a segment")
    time.sleep(8)
    # The allowance of the first second, and one read of 64 KiB, which is fifty times as much in the log, may come on top.
    bytes, most = written(), (time.monotonic() - begun + 1) * (1 << 20) + 50 * (64 << 10)
    assert 1 << 20 < bytes < 1.2 * most, f"{bytes / 1e6:.1f} MB of {most / 1e6:.1f}"
    agent.do("rm", "--force", "flood")


def test_a_digest_is_only_a_digest(agent, home):
    """H9: an image that calls itself by another's digest ran in its place."""
    known = next(i for i in json.loads(agent.run("image", "ls", "-o", "json").stdout) if i["name"] == "busybox:latest")["digest"]
    other = agent.directory / "other.tar"
    layer = make_layer({"etc/other": b"x"})
    named_archive(other, [layer], known)
    said = agent.run("image", "import", other)
    if said.returncode == 0:
        end, output = inside(agent, home, "digest", "test -e /etc/other && echo the other image", image=known)
        assert "the other image" not in output
    assert said.returncode != 0 and "sha256:" in said.stderr, said
    named_archive(other, [layer], "x\x1b[2J")
    said = agent.run("image", "import", other)
    assert said.returncode != 0 and "\x1b" not in said.stdout + said.stderr, said


def test_a_layer_that_an_image_has_twice(agent, home):
    """M10: overlayfs refuses the same directory twice."""
    with open("/bin/busybox", "rb") as file:
        program = make_layer({"bin/busybox": file.read(), "bin/sh": "busybox", "home/user/": None})
    empty = make_layer({"etc/": None})
    twice = agent.directory / "twice.tar"
    named_archive(twice, [program, empty, make_layer({"etc/x": b"x"}), empty], "twice:latest")
    assert agent.run("image", "import", twice).returncode == 0
    end, _ = inside(agent, home, "twice", "test -e /etc/x || exit 3; exit 7", image="twice:latest")
    assert json.loads(end["reason"])["exitCode"] == 7, end


def test_the_standard_streams_can_be_opened_again(agent, home):
    """M11: the pipes were root's."""
    script = "echo a > /dev/stdout; echo b > /dev/stderr; echo c > /proc/self/fd/1"
    _, output = inside(agent, home, "streams", script + "; sleep 0.1")
    assert "a\n" in output and "c\n" in output and "denied" not in output, output
    agent.launch("streams", owner=home.name)
    agent.wait("streams", "READY")
    said = agent.run("exec", "streams", "--", "sh", "-c", script)
    assert said.stdout == "a\nc\n" and said.stderr == "b\n", said
    agent.do("rm", "--force", "streams")


def test_terminals_are_shared_out(agent, home):
    """M3: all workspaces of a host share the kernel's 3072."""
    _, output = inside(agent, home, "terminals", "~/attack terminals")
    opened = int(re.search(r"terminals: (\d+)", output).group(1))
    assert 50 <= opened <= 64, output


def test_nothing_names_the_homes_of_others(agent, home):
    """M4: loop devices name their files, and with them the owners who are at work."""
    agent.launch("other", owner="grace", uid=2002, storage={"driver": "image", "size": "32Mi"})
    agent.wait("other", "READY")
    _, output = inside(agent, home, "looks", "busybox find /sys /proc -maxdepth 6 -name backing_file -exec cat {} +; cat /sys/block/*/loop/backing_file; ls /sys/fs/ext4 /sys/devices/virtual/block; cat /proc/diskstats /proc/partitions; echo looked")
    assert "looked" in output and "grace" not in output and not re.search(r"(?m)^\s*[\d\s]*(loop|vd|sd|nvme)\w*\d", output), output
    agent.do("rm", "--force", "other")


def test_no_owner_is_called_as_the_volume_of_another(agent):
    """M13: the home of `x.img` is the volume of `x`."""
    for owner in ("x.img", "x.img.lock", "x.img.lock.node"):
        said = agent.launch("volume", "true", owner=owner)
        assert said.returncode != 0 and "owner.name" in said.stderr, said
        said = agent.run("home", "rm", owner, "--again", owner)
        assert said.returncode != 0 and "owner" in said.stderr and ".img" in said.stderr, said


def test_what_is_printed_moves_no_cursor(agent, home):
    """Low: C1 controls and what changes the direction of a text passed."""
    agent.launch("prints", "printf 'a\\302\\233b\\342\\200\\256c\\033[2Jd\\n'; exit 1", owner=home.name)
    agent.wait("prints", "STOPPED")
    said = agent.run("explain", "prints").stdout
    assert "a\\u{9b}b\\u{202e}c" in said and not re.search("[\x80-\x9f\u202a-\u202e\x1b]", said), said
    agent.do("rm", "prints")


def make_layer(files):
    """A layer; a text is a symlink, and no content a folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.mode = 0o755
            if content is None:
                entry.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
            else:
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return packed.getvalue()


def named_archive(path, layers, name):
    """An image of these layers, with the name that its archive gives it."""
    archive_of(path, [(layer, "layer.v1.tar", hashlib.sha256(layer).hexdigest()) for layer in layers], name)

# SPDX-License-Identifier: Apache-2.0
"""Homes in images of other file systems, and encrypted ones."""

import os
import pathlib
import subprocess

import pytest
from conftest import Code, judge, until
from test_homes import image, left, run

IMAGES = pytest.param({"more": "storage: {driver: image, size: 32Mi}\n"}, id="images")
pytestmark = pytest.mark.parametrize("node", [IMAGES], indirect=True)

# Whether this host may make an ext4 larger while it is mounted.
MAY_RESIZE = int(next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("CapEff")).split()[1], 16) >> 24 & 1


@pytest.mark.parametrize("format, size", [("ext4", 32), ("xfs", 320), ("btrfs", 256)])
def test_every_file_system_holds_its_limit_grows_and_is_copied(node, format, size):
    agent, _ = node
    storage = f"{{fileSystem: {format}, size: {size}Mi}}"
    reason, text = run(agent, "first", "grep ' /home/analyst ' /proc/mounts; echo kept > file; yes | dd of=big bs=1M 2>&1 | grep -o 'No space left'; exit 5", storage=storage)
    assert reason["exit_code"] == 5 and f" {format} rw,nosuid,nodev" in text and "No space left" in text, text
    assert image(agent).stat().st_blocks * 512 <= (size << 20) + (1 << 20)
    # Asked for nothing, it stays what it is; asked for something else, it is refused.
    assert "kept" in run(agent, "silent", "rm big; cat file")[1]
    other = "xfs" if format != "xfs" else "ext4"
    reason, _ = run(agent, "other", "true", storage=f"{{fileSystem: {other}, size: 1Gi}}")
    assert f"is {format}; the file system of an existing home cannot be changed to {other}" in reason["message"], reason
    agent.launch("uses", "sleep 1000", storage=storage)
    agent.wait("uses", "READY")
    room = lambda: int(agent.run("exec", "uses", "--", "/bin/sh", "-c", "df -m . | tail -1").stdout.split()[-5])
    before = room()
    grown = agent.run("home", "grow", "ada", f"{size + 64}Mi")
    if format == "ext4" and not MAY_RESIZE:
        assert grown.returncode == 1 and "cannot grow while it is in use" in grown.stderr and image(agent).stat().st_size == size << 20, grown
        agent.do("rm", "--force", "uses")
        until(lambda: not left(agent), lambda: left(agent))
        assert agent.run("home", "grow", "ada", f"{size + 64}Mi").returncode == 0
        agent.launch("uses", "sleep 1000")
        agent.wait("uses", "READY")
    else:
        assert grown.returncode == 0, grown
    assert room() >= before + 50 and image(agent).stat().st_size == size + 64 << 20
    for arguments, message in ((["ada", f"{size}Mi"], "a home can only grow"), (["ada", "x"], "size"), (["nobody", "1Gi"], "there is no home"), (["../x", "1Gi"], "owner")):
        refused = agent.run("home", "grow", *arguments)
        assert refused.returncode == 1 and message in refused.stderr, refused
    # A copy beside its original, both in use at once.
    copy = agent.run("home", "snapshot", "ada")
    assert copy.returncode == 0, copy
    cloned = agent.run("home", "clone", "ada", copy.stdout.strip(), "grace", "--uid", "2002")
    assert cloned.returncode == 0, cloned
    reason, text = run(agent, "clone", "cat file; echo more > more && exit 4", owner="grace", uid=2002)
    assert reason["exit_code"] == 4 and "kept" in text, (reason, text)
    assert agent.run("exec", "uses", "--", "/bin/sh", "-c", "cat file; test ! -e more").stdout == "kept\n"
    agent.do("rm", "--force", "uses")
    until(lambda: not left(agent), lambda: left(agent))
    judge(agent)


def test_file_systems_need_their_room(node):
    agent, _ = node
    for storage, message in (("{fileSystem: xfs, size: 32Mi}", "between 300Mi"), ("{fileSystem: btrfs, size: 64Mi}", "between 256Mi"), ("{fileSystem: ntfs}", "fileSystem"),
                             ("{fileSystem: xfs, encrypted: true, size: 1Gi}", "storage.encrypted: is for ext4")):
        refused = agent.launch("bad", "true", storage=storage)
        assert refused.returncode == 1 and message in refused.stderr, refused


def test_a_power_cut_is_mended_when_it_is_mounted(node):
    """As test_homes has it for ext4: the image as it was at some moment while it was written to."""
    agent, _ = node
    for format, size, owner in (("xfs", 320, "ada"), ("btrfs", 256, "grace")):
        storage = f"{{fileSystem: {format}, size: {size}Mi}}"
        agent.launch(f"w-{format}", "echo kept > kept; sync; i=0; while true; do echo $i > f$i; i=$((i+1)); [ $((i % 50)) = 0 ] && rm -f f*; done", owner=owner, storage=storage)
        agent.wait(f"w-{format}", "READY")
        until(lambda: (agent.state / "homes").exists() and subprocess.run(f"ls {agent.state}/homes/*{owner}/home/kept", shell=True, capture_output=True).returncode == 0, "it writes")
        subprocess.run(["sync"], check=True)
        subprocess.run(["cp", "--sparse=always", image(agent, owner), image(agent, f"{owner}-cut")], check=True)
        agent.do("rm", "--force", f"w-{format}")
        if format == "btrfs":  # or both are one file system to the kernel, which has seen the other
            subprocess.run(["btrfstune", "-f", "-m", image(agent, f"{owner}-cut")], capture_output=True)
        reason, text = run(agent, f"cut-{format}", "cat kept; echo more > more && exit 4", owner=f"{owner}-cut")
        assert reason.get("exit_code") == 4 and text.startswith("kept"), (reason, text)
    until(lambda: not left(agent), lambda: left(agent))


def holds(path, *needles):
    data = path.read_bytes()
    return any(n in data for n in needles)


def test_encrypted_homes(node):
    agent, _ = node
    right, wrong, short = (agent.directory / name for name in ("right", "wrong", "short"))
    for path, size in ((right, 64), (wrong, 64), (short, 31)):
        path.write_bytes(os.urandom(size))
    key = lambda path: ["--home-key", path]
    storage = "{encrypted: true, size: 32Mi}"
    canary = os.urandom(16).hex()
    script = f"i=0; while [ $i -lt 200 ]; do echo {canary} >> canary-{canary[:8]}; i=$((i+1)); done; sync"
    for options, message in (((), "home_key: is missing"), (key(short), "home_key: 31 bytes"), (key(agent.directory / "none"), "cannot be read")):
        refused = agent.launch("bad", "true", storage=storage, options=options)
        assert refused.returncode in (1, 2) and message in refused.stderr, refused
    assert "home_key: is for homes that are encrypted" in agent.launch("bad", "true", options=key(right)).stderr
    assert run(agent, "first", script, storage=storage, options=key(right))[0]["exit_code"] == 0
    assert run(agent, "control", script, owner="grace", uid=2002)[0]["exit_code"] == 0
    until(lambda: not left(agent), lambda: left(agent))
    words = (canary.encode(), f"canary-{canary[:8]}".encode())
    assert holds(image(agent, "grace"), *words), "control: what is not encrypted is there to be read"
    assert not holds(image(agent), *words)
    # With its key it is as it was, beside others of its owner that bring it too, and for nobody who does not.
    agent.launch("uses", "sleep 1000", storage=storage, options=key(right))
    agent.wait("uses", "READY")
    count = lambda id: agent.run("exec", id, "--", "/bin/sh", "-c", f"grep -c {canary} canary-*").stdout.strip()
    assert count("uses") == "200"
    for n, (options, wish, message) in enumerate(((key(wrong), storage, "with another key"), ((), "{size: 32Mi}", "is encrypted; it needs storage.encrypted"))):
        reason, _ = run(agent, f"refused-{n}", "true", storage=wish, options=options)
        assert reason["code"] == Code.StorageFailed and message in reason["message"], reason
    reason, text = run(agent, "beside", f"grep -c {canary} canary-*", storage=storage, options=key(right))
    assert text.strip() == "200"
    assert count("uses") == "200", "neither a wrong key nor the end of another takes it away"
    agent.stop()
    agent.start()
    assert count("uses") == "200"
    # The host's own root reads it while it is open: that is what the key in the kernel is for. Not afterwards.
    seen = lambda: subprocess.run(f"cat {agent.state}/homes/*/home/canary-*", shell=True, capture_output=True, text=True).stdout.count(canary)
    assert seen() == 200
    agent.do("rm", "--force", "uses")
    until(lambda: not left(agent), lambda: left(agent))
    raw = agent.directory / "raw"
    raw.mkdir()
    subprocess.run(["mount", "-o", "loop,ro,noload", image(agent), raw], check=True)
    try:
        names = os.listdir(raw / "home")
        assert names and not any("canary" in n for n in names), names
        with pytest.raises(OSError):
            (raw / "home" / names[0]).read_bytes()
    finally:
        subprocess.run(["umount", raw], check=True)
    reason, _ = run(agent, "wrong", "true", storage=storage, options=key(wrong))
    assert reason["code"] == Code.StorageFailed and "with another key" in reason["message"], reason
    looked = agent.run("env", "ls", "ada")
    assert looked.returncode == 1 and "is encrypted" in looked.stderr, looked
    # What was not made for it does not become it.
    reason, _ = run(agent, "late", "true", owner="grace", uid=2002, storage=storage, options=key(right))
    assert reason["code"] == Code.StorageFailed and "was not made for encryption" in reason["message"], reason
    until(lambda: not left(agent), lambda: left(agent))
    # The key is nowhere on the disk.
    secret = right.read_bytes()
    for path in [p for p in agent.directory.rglob("*") if p.is_file() and p != right and not p.name.endswith(".img")]:
        assert not holds(path, secret, secret.hex().encode()), path
    judge(agent)

# SPDX-License-Identifier: Apache-2.0
"""Homes kept as images: a hard limit that hurts its owner alone, on any host; mended after a power cut; never mounted twice; nothing left."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest
from conftest import Code, Event, judge, until

IMAGES = pytest.param({"more": "storage: {driver: image, size: 32Mi}\n"}, id="images")
images = pytest.mark.parametrize("node", [IMAGES], indirect=True)


def run(agent, id, script, **options):
    """To its end; what it printed."""
    done = agent.launch(id, script, **options)
    assert done.returncode == 0, done
    ended = agent.wait(id, "STOPPED", "FAILED")
    text = agent.run("logs", id).stdout
    agent.do("rm", id)
    return ended["reason"], text


def image(agent, owner="ada"):
    return agent.directory / "homes" / f"{owner}.img"


def left(agent):
    loops = subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True).stdout
    return [line for line in loops.splitlines() if str(agent.directory) in line] + \
           [line for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if str(agent.directory) in line] + \
           [str(p) for p in (agent.directory / "homes").glob("*.lock*")]


@images
def test_a_full_home_hurts_its_owner_alone_and_still_starts(node):
    agent, _ = node
    agent.launch("grace", "sleep 1000", owner="grace", uid=2002)
    reason, text = run(agent, "fill", "id -u; yes | dd of=big bs=1M 2>&1 | tail -1; df -m . | tail -1; sleep 2; exit 5")
    assert reason["exit_code"] == 5 and "1000" in text, text
    filling = [json.loads(e["attributes"]) for e in agent.records()[0] if e["type"] == Event.HomeFilling]
    assert int(filling[-1]["percent"]) == 100 and int(filling[-1]["limitBytes"]) <= 32 << 20, filling
    assert image(agent).stat().st_size == 32 << 20
    use = next(s for s in json.loads(agent.run("top", "-o", "json").stdout) if s["id"] == "grace")["home"]
    assert 0 < int(use["used_bytes"]) < 4 << 20 < int(use["limit_bytes"]) <= 32 << 20 and int(use["used_inodes"]) < 100 < int(use["limit_inodes"]), use
    other = agent.run("exec", "grace", "--", "/bin/sh", "-c", "dd if=/dev/zero of=x bs=1M count=5 && rm x")
    assert other.returncode == 0, other
    # Full of blocks: the next start finds the headroom, once; and the one after that none, and starts all the same.
    reason, text = run(agent, "tight", "head -c 100000 /dev/zero > more && echo wrote; yes | dd of=rest bs=64k 2>/dev/null; exit 0")
    assert reason["exit_code"] == 0 and "wrote" in text, text
    rescued = [json.loads(e["attributes"]) for e in agent.records()[0] if e["type"] == Event.Rescue]
    assert len(rescued) == 1 and "the home is full" in rescued[0]["why"], rescued
    taken = image(agent).stat().st_blocks
    reason, text = run(agent, "clean", "head -c 100000 /dev/zero > less && echo wrote; ls; rm big rest && echo x > more && cat more")
    assert reason["exit_code"] == 0 and "big" in text and "wrote" not in text and text.rstrip().endswith("x"), text
    assert len([e for e in agent.records()[0] if e["type"] == Event.Rescue]) == 1
    until(lambda: not [l for l in left(agent) if "ada" in l], lambda: left(agent))
    assert image(agent).stat().st_blocks < taken / 4, (taken, image(agent).stat().st_blocks)
    # Full of inodes.
    reason, text = run(agent, "inodes", "i=0; while touch f$i 2>/dev/null; do i=$((i+1)); done; echo made $i")
    assert int(text.split()[-1]) < 4096
    assert run(agent, "again", "rm -f f*; : > one && exit 0")[0]["exit_code"] == 0
    agent.do("rm", "--force", "grace")
    until(lambda: not left(agent), lambda: left(agent))
    judge(agent)


@images
def test_it_grows_and_never_shrinks(node):
    agent, _ = node
    run(agent, "first", "echo kept > file")
    reason, text = run(agent, "larger", "cat file; df -m . | tail -1", storage="{size: 64Mi}")
    assert "kept" in text and image(agent).stat().st_size == 64 << 20 and int(text.split()[-5]) > 50, text
    reason, _ = run(agent, "smaller", "true", storage="{size: 32Mi}")
    assert reason["code"] == Code.StorageFailed and "a home can only grow" in reason["message"], reason
    # What the node gives where nobody asks is no wish for less.
    assert "kept" in run(agent, "silent", "cat file")[1] and image(agent).stat().st_size == 64 << 20
    for size, message in (("1Ki", "is not a quantity between 16Mi"), ("x", "is not a quantity"), ("-1", "is not a quantity")):
        refused = agent.launch("bad", "true", storage=f"{{size: {size}}}")
        assert refused.returncode == 1 and message in refused.stderr, refused
    for field, value in (("fileSystem", "xfs"), ("encrypted", "true")):
        refused = agent.launch("bad", "true", storage=f"{{driver: directory, {field}: {value}}}")
        assert refused.returncode == 1 and f"storage.{field}: is for homes kept as images" in refused.stderr, refused
    # A directory has a limit where its file system has project quotas (Tests/VM); here it says that it has none.
    reason, _ = run(agent, "limited", "true", owner="grace", uid=2002, storage="{driver: directory, size: 64Mi}")
    assert reason["code"] == Code.StorageFailed and "project quotas" in reason["message"], reason
    assert not left(agent)
    judge(agent)


@images
@pytest.mark.parametrize("thing, message", [
    ("garbage", "does not hold a file system"), ("symlink", "cannot be opened"), ("directory", "homes as images"), ("locked", "in use on node elsewhere")])
def test_what_is_in_the_way_is_refused_by_name_and_untouched(node, thing, message):
    agent, _ = node
    path = image(agent)
    content = os.urandom(65536)
    if thing == "garbage":
        path.write_bytes(content)
    elif thing == "symlink":
        (agent.directory / "target").write_bytes(content)
        path.symlink_to(agent.directory / "target")
    elif thing == "directory":
        (agent.directory / "homes/ada").mkdir()
    else:
        pathlib.Path(f"{path}.lock").write_text("elsewhere\n")
    reason, _ = run(agent, "refused", "true")
    assert reason["code"] == Code.StorageFailed and message in reason["message"], reason
    if thing in ("garbage", "symlink"):
        assert path.read_bytes() == content
    pathlib.Path(f"{path}.lock").unlink(missing_ok=True)
    assert not left(agent)


@images
def test_a_directory_does_not_hide_an_image(node):
    agent, _ = node
    run(agent, "first", "echo kept > file")
    reason, _ = run(agent, "second", "true", storage="{driver: directory}")
    assert reason["code"] == Code.StorageFailed and "is an image" in reason["message"]
    assert "kept" in run(agent, "third", "cat file")[1]


@images
def test_a_power_cut_is_mended_before_it_is_mounted(node):
    """The image as it was at some moment while it was written to, as a cut would leave it."""
    agent, _ = node
    agent.launch("writes", "echo kept > kept; sync; i=0; while true; do echo $i > f$i; i=$((i+1)); [ $((i % 50)) = 0 ] && rm -f f*; done")
    agent.wait("writes", "READY")
    time.sleep(1.5)
    cut = agent.directory / "homes" / "grace.img"
    shutil.copy(image(agent), cut)
    assert cut.read_bytes()[1024 + 96] & 4, "control: its journal has something to replay"
    agent.do("rm", "--force", "writes")
    reason, text = run(agent, "mended", "cat kept; ls | wc -l; echo more > more && exit 4")
    assert reason["exit_code"] == 4 and text.startswith("kept"), (reason, text)
    reason, text = run(agent, "cut", "cat kept; echo more > more && exit 4", owner="grace")
    assert reason["exit_code"] == 4 and text.startswith("kept"), (reason, text)
    until(lambda: not left(agent), lambda: left(agent))
    assert subprocess.run(["e2fsck", "-f", "-n", cut], capture_output=True).returncode == 0
    judge(agent)


@images
def test_agents_come_and_go_and_it_stays_mounted_while_it_is_used(node):
    agent, _ = node
    agent.launch("one", "while true; do date > now; sleep 0.1; done")
    agent.launch("two", "sleep 1000")
    for id in ("one", "two"):
        agent.wait(id, "READY")
    agent.stop()
    agent.start()
    agent.do("rm", "--force", "two")
    assert agent.run("exec", "one", "--", "cat", "now").returncode == 0
    agent.launch("three", "cat now && exit 6")
    assert agent.wait("three", "STOPPED")["reason"]["exit_code"] == 6
    agent.do("rm", "--force", "one", "three")
    until(lambda: not left(agent), lambda: left(agent))
    # Killed between the mount and the start: the next one takes it down. So it does with what nobody knows, and says so.
    agent.stop()
    unknown = agent.state / "homes" / "unknown"
    unknown.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", unknown], check=True)
    agent.start("limits set")
    agent.launch("half", "true")
    until(lambda: not agent.lives, "killed")
    assert left(agent), "control: it was mounted"
    agent.start()
    agent.wait("half", "FAILED", "STOPPED")
    until(lambda: not left(agent), lambda: left(agent))
    agent.do("rm", "half")
    assert [e["attributes"] for e in agent.records()[0] if e["type"] == Event.Swept and "mount" in e["attributes"]] == ['{"mount":"unknown"}']
    judge(agent)


@images
def test_twenty_owners_again_and_again_leave_nothing(node):
    agent, _ = node
    rounds = int(os.environ.get("CARREL_ROUNDS", "50"))

    def owner(number):
        for round in range(rounds):
            reason, text = run(agent, f"w-{number}-{round}", "echo x >> rows; wc -l < rows", owner=f"o{number}", uid=3000 + number)
            assert reason["exit_code"] == 0 and text.strip() == str(round + 1), (reason, text)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(owner, range(20)))
    until(lambda: not left(agent), lambda: left(agent))
    judge(agent)


DIRECTORIES = pytest.param({"more": "storage: {size: 64Mi}\n"}, id="directories")


@images
def test_homes_on_storage_that_hangs_do_not_delay_the_start_of_an_agent(node):
    """A home that is left mounted, and one in use, below a frozen file system: unmounting and thawing them blocks."""
    agent, _ = node
    agent.stop()
    disk, homes = agent.directory / "disk", agent.directory / "homes"
    subprocess.run(["truncate", "--size", "200M", disk], check=True)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, homes], check=True)
    try:
        agent.start()
        for owner, uid in (("ada", 2001), ("grace", 2002)):
            agent.launch(owner, "while true; do date > now; sleep 0.1; done", owner=owner, uid=uid)
            agent.wait(owner, "READY")
        agent.do("rm", "--force", "ada")
        agent.stop()
        # As an agent leaves it that is killed between the last event and the release.
        left_mounted = agent.state / "homes" / f"{homes}/ada".replace("/", "%2F")
        left_mounted.mkdir()
        subprocess.run(["mount", "-o", "loop", image(agent), left_mounted], check=True)
        (left_mounted / "unwritten").write_bytes(os.urandom(1 << 20))
        subprocess.run(["fsfreeze", "--freeze", homes], check=True)
        begun = time.monotonic()
        agent.start()
        assert time.monotonic() - begun < 5
        reason, _ = run(agent, "other", "exit 3", owner="eve", uid=2003, storage=f"{{home: {agent.directory}/eve}}")
        assert reason["exit_code"] == 3 and time.monotonic() - begun < 15, reason
        # The control: the storage does hang.
        agent.launch("waits", "exit 4", owner="kay", uid=2004)
        time.sleep(1)
        assert agent.get("waits")["state"] == "STATE_PREPARING"
        subprocess.run(["fsfreeze", "--unfreeze", homes], check=True)
        assert agent.wait("waits", "STOPPED", seconds=40)["reason"]["exit_code"] == 4
        assert agent.wait("grace", "READY")["attempt"] == 1
        agent.do("rm", "--force", "grace", "waits")
        until(lambda: not [line for line in left(agent) if str(disk) not in line and f" {homes} " not in line], lambda: left(agent))
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", homes], stderr=subprocess.DEVNULL)
        agent.run("rm", "--force", "grace", "waits")
        agent.stop()
        time.sleep(0.5)
        subprocess.run(["umount", homes], check=True)
        agent.start()


@pytest.mark.parametrize("node", [DIRECTORIES], indirect=True)
def test_places_that_are_no_good_for_a_home(node):
    """Read-only, without id-mapped mounts, and one that does not answer, which holds up nobody but who asked for it."""
    agent, _ = node
    places = {name: agent.directory / name for name in ("ro", "ramfs", "stale")}
    for path in places.values():
        path.mkdir()
    disk = agent.directory / "disk"
    subprocess.run(["truncate", "--size", "16M", disk], check=True)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    for name, options in (("ro", ["-t", "tmpfs", "-o", "ro", "tmpfs"]), ("ramfs", ["-t", "ramfs", "ramfs"]), ("stale", ["-o", "loop", disk])):
        subprocess.run(["mount", *options, places[name]], check=True)
    try:
        (places["ramfs"] / "ada").mkdir(mode=0o700)
        os.chown(places["ramfs"] / "ada", 2001, 2001)
        for name, message in (("ro", "Read-only file system (on tmpfs)"), ("ramfs", "id-mapped mounts, which its file system (ramfs) has not")):
            reason, _ = run(agent, name, "true", storage=f"{{home: {places[name]}/ada}}")
            assert message in reason["message"], reason
        subprocess.run(["fsfreeze", "--freeze", places["stale"]], check=True)
        begun = time.monotonic()
        for number in range(8):
            agent.launch(f"stale-{number}", "true", storage=f"{{home: {places['stale']}/h{number}}}")
        # The node gives directories a limit where it can; this one cannot, and starts all the same.
        reason, _ = run(agent, "good", "exit 3", owner="grace", uid=2002)
        assert reason["exit_code"] == 3 and time.monotonic() - begun < 20, reason
        for number in range(8):
            ended = agent.wait(f"stale-{number}", "FAILED", "STOPPED", seconds=60)
            assert "does not respond within 30 s" in ended["reason"]["message"], ended
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", places["stale"]])
        time.sleep(0.5)
        for path in places.values():
            subprocess.run(["umount", path], check=True)
    assert run(agent, "after", "exit 4")[0]["exit_code"] == 4


@images
def test_an_image_that_somebody_of_the_host_still_holds_has_one_device(node):
    """Two devices of one file would be two file systems that write over each other."""
    agent, _ = node
    agent.launch("first", "echo first > file; sleep 1000")
    agent.wait("first", "READY")
    point = next(line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if str(agent.directory) in line and "ada" in line.split()[4])
    until((pathlib.Path(point) / "home/file").exists, "the file")
    with open(pathlib.Path(point) / "home/held", "w") as held:
        agent.do("rm", "--force", "first")
        until(lambda: point not in pathlib.Path("/proc/self/mountinfo").read_text(), "it is taken away, though held")
        agent.launch("second", "echo second >> file; sleep 1000")
        agent.wait("second", "READY")
        devices = [line for line in left(agent) if line.endswith("ada.img")]
        assert len(devices) == 1, devices
        held.write("written late")
    agent.do("rm", "--force", "second")
    until(lambda: not left(agent), lambda: left(agent))
    assert run(agent, "third", "cat file held")[1] == "first\nsecond\nwritten late"
    judge(agent)

# SPDX-License-Identifier: Apache-2.0
"""The escape suite: each known class of escape tried against the runtime, and again where it should bite: with the defence
switched off in a build that can do that (`.build/open`, made with -DWITHOUT_DEFENCES), or without the isolation in question.
The table at the end says which were tried how often, and whether both came out as they must."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest
from conftest import ROOT, Runtime, busybox_root, in_user_namespace, peer

OPEN = pathlib.Path(os.environ.get("CARREL_BUILD", ROOT / ".build")) / "open" / "debug" / "carrel-runtime"
RESULTS = []


def record(what, cve, times, held, bit):
    RESULTS.append((what, cve, times, held, bit))
    assert held, f"{what}: not held"
    assert bit in (True, None), f"{what}: the control did not bite, so this proves nothing"


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    lines = [f"{'class':58} {'known as':30} {'tried':>5}  held  control"]
    for what, cve, times, held, bit in RESULTS:
        lines.append(f"{what:58} {cve:30} {times:5}  {'yes' if held else 'NO':4}  {'bit' if bit else 'none' if bit is None else 'DID NOT BITE'}")
    text = "\n".join(lines) + "\n"
    (ROOT / ".cache" / "log").mkdir(parents=True, exist_ok=True)
    (ROOT / ".cache" / "log" / "escapes.txt").write_text(text)
    print("\n" + text)


@pytest.fixture(scope="module")
def open_runtime(directory, root):
    """The runtime with defences that CARREL_WITHOUT names switched off."""
    assert OPEN.exists(), "hack/test builds it"
    (directory / "open").mkdir()
    return Runtime(directory / "open", root, OPEN)


@pytest.fixture(scope="module")
def host():
    """A place of the host that a start does not cover by its own workbench, as it does /tmp."""
    path = pathlib.Path(f"/var/tmp/carrel-oci-{os.getpid()}")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def without(name):
    return {"env": {**os.environ, "CARREL_WITHOUT": name}}


def rewrite_attack(runtime, directory, rounds, **options):
    """CVE-2019-5736: a program that is the runtime itself (`#!/proc/self/exe`), and a process inside that keeps its file open
    until it can be written to."""
    program = directory / f"victim-{runtime.program.parent.parent.name}-{rounds}"
    shutil.copy(runtime.program, program)
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    root = busybox_root(directory / f"root-{program.name}")
    (root / "evil").write_text("#!/proc/self/exe update\n")  # which then reads its standard input for a while
    (root / "evil").chmod(0o755)
    (root / "loop").write_text(
        "#!/bin/sh\nwhile true; do for p in /proc/[0-9]*; do [ $p/exe -ef /bin/busybox ] || [ ! -e $p/exe ] || ( exec 5<$p/exe; i=0; "
        "while [ $i -lt 20000 ]; do { echo owned >/proc/self/fd/5; } 2>/dev/null && break; i=$((i+1)); done ) 2>/dev/null; done; done\n")
    (root / "loop").chmod(0o755)
    victim = Runtime(directory / f"state-{program.name}", root, program)
    victim.directory.mkdir()

    def change(config):
        config["root"]["readonly"] = False
        config["process"]["args"] = ["/loop"]
    id = victim.id()
    victim.run("run", "--detach", "--bundle", victim.bundle(change), id, **options)
    for _ in range(rounds):
        process = subprocess.Popen([program, "--root", victim.state, "exec", id, "/evil", "--resources", "-"], stdin=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        time.sleep(0.04)
        process.stdin.close()
        process.wait(20)
        if hashlib.sha256(program.read_bytes()).hexdigest() != digest:
            break
    time.sleep(0.3)
    changed = hashlib.sha256(program.read_bytes()).hexdigest() != digest
    runtime.run("--root", victim.state, "delete", "--force", id, check=False)
    return changed


def test_the_runtime_cannot_be_rewritten(runtime, open_runtime, directory):
    held = not rewrite_attack(runtime, directory, 100)
    bit = rewrite_attack(open_runtime, directory, 300, **without("read-only-executable"))
    record("host binary rewritten through /proc/PID/exe", "CVE-2019-5736", 100, held, bit)


def crafted_roots(directory, canary):
    """Root file systems whose standard places lead to a directory of the host."""
    for name, link in [("proc", "proc"), ("dev", "dev"), ("sys", "sys"), ("etc", "etc"), ("run", "run"), ("dev-shm", "dev/shm"), ("deep", "data/a/b")]:
        for target in (str(canary), f"../../../../../../../..{canary}"):
            root = busybox_root(directory / f"crafted-{name}-{len(target)}")
            path = root / link
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
            yield root, "/" + link


def tree(path):
    return sorted((str(p), p.lstat().st_mode, p.lstat().st_mtime_ns) for p in [path, *path.rglob("*")])


def attack_with_links(runtime, directory, host, prefix, **options):
    canary = host / f"{prefix}-canary"
    canary.mkdir()
    (canary / "x").write_text("host")
    before = tree(canary)
    count = 0
    (directory / prefix).mkdir()
    for root, link in crafted_roots(directory / prefix, canary):
        def change(config):
            config["root"]["readonly"] = False
            config["process"]["args"] = ["true"]
            config["mounts"] = [m for m in config["mounts"] if not link.startswith("/dev") or not m["destination"].startswith("/dev")]
            config["mounts"].append({"destination": link + "/made/here", "type": "tmpfs", "source": "tmpfs"})
        runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), check=False, **options)
        count += 1
    return count, tree(canary) != before


def test_links_of_the_image_lead_nowhere_outside(runtime, open_runtime, directory, host):
    count, escaped = attack_with_links(runtime, directory, host, "links")
    _, bit = attack_with_links(open_runtime, directory, host, "links-open", **without("resolve-in-root"))
    record("mount targets, devices and folders through an image's links", "CVE-2019-19921, 2026-47766", count, not escaped, bit)


def attack_with_exchange(runtime, directory, host, prefix, starts, **options):
    """CVE-2021-30465: a target that is exchanged with a link to the host while containers start."""
    canary = host / f"{prefix}-canary"
    (canary / "here").mkdir(parents=True)
    root = busybox_root(directory / f"{prefix}-root")
    (root / "swap" / "here").mkdir(parents=True)
    (root / "link").symlink_to(canary)
    stop = threading.Event()

    def exchange():
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        a, b = str(root / "swap").encode(), str(root / "link").encode()
        while not stop.is_set():
            libc.renameat2(-100, a, -100, b, 2)  # RENAME_EXCHANGE
    thread = threading.Thread(target=exchange)
    thread.start()
    hits = 0
    try:
        def change(config):
            config["root"]["readonly"] = False
            config["process"]["args"] = ["true"]
            config["mounts"].append({"destination": "/swap/made", "type": "tmpfs", "source": "tmpfs"})
        bundle = runtime.bundle(change, root)
        for _ in range(starts):
            runtime.run("run", "--bundle", bundle, runtime.id(), check=False, **options)
            if (canary / "made").exists():
                hits += 1
                break
    finally:
        stop.set()
        thread.join()
    return hits > 0


def test_a_target_that_is_exchanged_while_it_is_mounted(runtime, open_runtime, directory, host):
    held = not attack_with_exchange(runtime, directory, host, "exchange", 200)
    bit = attack_with_exchange(open_runtime, directory, host, "exchange-open", 200, **without("resolve-in-root"))
    record("mount target exchanged with a link during the start", "CVE-2021-30465", 200, held, bit)


def leaked_directory(runtime, **options):
    """CVE-2024-21626: the working directory is a descriptor of the host that is open in what starts or joins."""
    hits = 0
    script = "cat ../../../../../../../../etc/hostname"
    id = runtime.id()
    runtime.run("run", "--detach", "--bundle", runtime.bundle(lambda c: c["process"].update(args=["sleep", "100"])), id)
    for number in range(3, 24):
        hits += runtime.run("exec", "--cwd", f"/proc/self/fd/{number}", id, "sh", "-c", script, check=False, **options).stdout != ""
    runtime.run("delete", "--force", id)
    return hits


def test_a_working_directory_outside_the_root(runtime, open_runtime):
    hits = leaked_directory(runtime)
    for number in range(3, 24):
        done = runtime.once("cat ../../../../../../../../etc/hostname", lambda c: c["process"].update(cwd=f"/proc/self/fd/{number}"))
        hits += done.stdout != ""
    bit = leaked_directory(open_runtime, **without("working-directory,resolve-in-root,closed-descriptors"))
    record("working directory by a descriptor of the host", "CVE-2024-21626", 42, hits == 0, bit > 0)


def open_in_a_waiting_one(runtime, **options):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["true"]))
    runtime.run("create", "--bundle", bundle, id, **options)
    pid = json.loads(runtime.run("state", id).stdout)["pid"]
    found = sorted(os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd") if int(n) > 2)
    os.kill(pid, 9)  # what it holds open may be the lock that delete waits for
    runtime.run("delete", "--force", id)
    return found


def test_what_waits_for_its_start_holds_nothing_of_the_host(runtime, open_runtime):
    found = open_in_a_waiting_one(runtime)
    control = open_in_a_waiting_one(open_runtime, **without("closed-descriptors"))
    sockets_only = lambda names: all(n.startswith("socket:") for n in names) and len(names) == 2
    record("descriptors open in a created container", "CVE-2024-21626", 1, sockets_only(found), not sockets_only(control))


def traced_while_joining(runtime, rounds, **options):
    """CVE-2016-9962: a process inside looks at the descriptors of one that is joining."""
    def change(config):
        capabilities = ["CAP_SYS_PTRACE"]
        config["process"]["capabilities"] = {s: capabilities for s in ("bounding", "effective", "permitted")}
        in_user_namespace(config, 500_000)
        config["process"]["args"] = ["sh", "-c", "while true; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; *) ls -l $p/fd 2>/dev/null | grep -E 'socket|ns/|cgroup' && echo seen >/tmp/seen;; esac; done; done"]
        config["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
    id = runtime.id()
    runtime.run("run", "--detach", "--bundle", runtime.bundle(change), id, **options)
    for _ in range(rounds):
        runtime.run("exec", id, "true", check=False, **options)
    seen = runtime.run("exec", id, "cat", "/tmp/seen", check=False).returncode == 0
    runtime.run("delete", "--force", id)
    return seen


def test_what_joins_cannot_be_looked_into(runtime, open_runtime):
    held = not traced_while_joining(runtime, 300)
    # The kernel itself makes a process undumpable whose ids change: the switch takes that back as well.
    bit = traced_while_joining(open_runtime, 20, **without("undumpable,closed-descriptors"))
    record("descriptors of a joining process seen from inside", "CVE-2016-9962", 300, held, bit)


def test_devices_and_terminals_of_the_image(runtime, directory):
    """CVE-2025-31133, CVE-2025-52565: /dev/null, /dev/console and /dev/pts/0 of the image are links to a file of proc."""
    root = busybox_root(directory / "devices")
    for name in ("null", "console", "ptmx", "tty", "fd"):
        (root / "dev" / name).symlink_to("/proc/sys/kernel/core_pattern")
    (root / "dev" / "pts").mkdir()
    (root / "dev" / "pts" / "0").symlink_to("/proc/sys/kernel/core_pattern")
    before = pathlib.Path("/proc/sys/kernel/core_pattern").read_text()
    count = 0
    for with_dev in (True, False):
        for mapped in (True, False):
            def change(config):
                config["root"]["readonly"] = False
                config["process"]["args"] = ["sh", "-c", "echo x >/dev/null; echo evil >/proc/sys/kernel/core_pattern; grep -c core_pattern /proc/self/mountinfo"]
                if not with_dev:
                    config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/dev"]
                if mapped:
                    in_user_namespace(config)
            done = runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), check=False)
            assert "1" not in done.stdout
            count += 1
    after = pathlib.Path("/proc/sys/kernel/core_pattern").read_text()

    # What is masked by the image's /dev/null shows, and lets write, what that leads to; here a file of the container's own.
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    (root / "dev" / "null").symlink_to("/proc/sys/kernel/hostname")

    def masked(config):
        config["root"]["readonly"] = False
        config["mounts"] = [m for m in config["mounts"] if m["destination"] == "/proc"]
        config["linux"]["maskedPaths"] = ["/proc/version"]
        config["process"]["args"] = ["sh", "-c", "grep /proc/version /proc/self/mountinfo >/found"]
    bundle, found = runtime.bundle(masked, root), root / "found"
    runtime.run("run", "--bundle", bundle, runtime.id(), check=False)
    # A root that is like this may be refused.
    held = not found.exists() or "hostname" not in found.read_text()
    # Debian's runc is open to it.
    found.unlink(missing_ok=True)
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    (root / "dev" / "null").symlink_to("/proc/sys/kernel/hostname")
    with open("/etc/hostname") as file:
        subprocess.run(peer(["runc", "--root", str(directory / "runc"), "run", "--bundle", str(bundle), runtime.id()]), stdin=file, capture_output=True, timeout=60)
    bit = "hostname" in found.read_text()
    record("/dev/null, console and terminals of the image are links", "CVE-2025-31133, 2025-52565", count + 1, after == before and held, bit)


def test_sysctls_reach_only_the_containers_own(runtime):
    values = {name: pathlib.Path("/proc/sys/" + name.replace(".", "/")).read_text() for name in ("kernel.core_pattern", "kernel.shmmni", "vm.swappiness")}
    tries = [{"kernel.core_pattern": "|/x"}, {"kernel.shmmni": "1\n+kernel.core_pattern=|/x"}, {"net/../kernel/core_pattern": "x"}, {"vm.swappiness": "7"},
             {"net.ipv4.x+kernel.core_pattern": "x"}, {"kernel": "x"}]
    for sysctl in tries:
        assert runtime.once("true", lambda c: c["linux"].update(sysctl=sysctl)).returncode == 1
    shared = [n for n in ("ipc",)]
    assert runtime.once("true", lambda c: c["linux"].update(sysctl={"kernel.shmmni": "9"}, namespaces=[n for n in c["linux"]["namespaces"] if n["type"] not in shared])).returncode == 1
    assert runtime.once("cat /proc/sys/kernel/shmmni", lambda c: c["linux"].update(sysctl={"kernel.shmmni": "9"})).stdout == "9\n", "control: its own can be set"
    held = all(pathlib.Path("/proc/sys/" + name.replace(".", "/")).read_text() == value for name, value in values.items())
    record("sysctls of the host", "CVE-2022-0811", len(tries) + 1, held, True)


def test_cgroups_cannot_be_written_from_inside(runtime):
    """CVE-2022-0492: the release agent of a v1 hierarchy."""
    script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x && echo made; echo /x >$d/release_agent && echo agent; echo 1 >$d/cgroup.procs && echo joined; done 2>/dev/null; mkdir /tmp/c; mount -t cgroup -o memory c /tmp/c 2>/dev/null && echo mounted"
    def powerful(config):
        config["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        names = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]
        config["process"]["capabilities"] = {s: names for s in ("bounding", "effective", "permitted")}
        config["mounts"] = [{**m, "options": [o for o in m.get("options", []) if o != "ro"]} for m in config["mounts"]]
    plain = runtime.once(script, lambda c: c["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}))
    control = runtime.once(script, powerful)
    record("release agent, cgroups made or joined from inside", "CVE-2022-0492", 1, plain.stdout == "", "made" in control.stdout)


def test_capabilities_keyring_groups_and_masks(runtime):
    done = runtime.once("grep Cap /proc/self/status", lambda c: c["process"].pop("capabilities"))
    record("capabilities where none was asked for", "CVE-2022-29162", 1, set(line.split()[1] for line in done.stdout.splitlines()) == {"0" * 16}, "CapEff:\t0000000000000000" not in pathlib.Path("/proc/self/status").read_text())
    # Started by one that is in group 123, which the control shows is handed on to any child.
    started = {"preexec_fn": lambda: os.setgroups([0, 123])}
    done = runtime.run("run", "--bundle", runtime.bundle(lambda c: c["process"].update(user={"uid": 5, "gid": 6, "additionalGids": [7]}, args=["id", "-G"])), runtime.id(), **started)
    control = subprocess.run(["id", "-G"], capture_output=True, text=True, **started).stdout.split()
    record("supplementary groups", "CVE-2022-2995", 1, done.stdout == "6 7\n", "123" in control)
    probe = "for f in /proc/kcore /proc/keys /proc/timer_list; do head -c 1 $f; done | wc -c; ls /sys/firmware | wc -l"
    masked, bare = runtime.once(probe), runtime.once(probe, lambda c: c["linux"].update(maskedPaths=[]))
    record("masked paths", "/proc leaks", 4, masked.stdout.split() == ["0", "0"], bare.stdout.split() != ["0", "0"])
    written = "for f in /proc/sys/kernel/hostname /proc/sysrq-trigger; do ( : >>$f ) 2>/dev/null && echo open; done; true"
    held, bare = runtime.once(written), runtime.once(written, lambda c: c["linux"].update(readonlyPaths=[]))
    record("read-only paths", "/proc leaks", 2, held.stdout == "", "open" in bare.stdout)


def test_ids_never_wrap(runtime):
    tries = [2**31, 2**32, 2**32 - 1, 2**63, 2**64, -1, "0", "01", 0.5, True]
    held = all(runtime.once("id -u", lambda c, v=v: c["process"]["user"].update(uid=v)).returncode == 1 for v in tries)
    users = ["2147483648", "4294967296", "4294967295", "-1", "01", "+1", "0x0", "", ":", "1:", "1:-1"]
    id = runtime.id()
    runtime.run("run", "--detach", "--bundle", runtime.bundle(lambda c: c["process"].update(args=["sleep", "100"])), id)
    held = held and all(runtime.run("exec", "--user", u, id, "id", check=False).returncode == 255 for u in users if u)
    control = runtime.run("exec", "--user", "1:1", id, "id", "-u").stdout == "1\n"
    runtime.run("delete", "--force", id)
    record("ids that wrap to root", "CVE-2024-40635, 2026-30892", len(tries) + len(users), held, control)


def test_proc_cannot_be_replaced(runtime, directory):
    folder = directory / "fake-proc"
    (folder / "self").mkdir(parents=True)
    tries = [{"destination": "/proc", "type": "tmpfs", "source": "tmpfs"}, {"destination": "/proc/self", "source": str(folder), "options": ["bind"]},
             {"destination": "/proc/sys/kernel", "source": str(folder), "options": ["bind"]}, {"destination": "/proc/self/attr", "source": str(folder), "options": ["rbind"]}]
    held = all(runtime.once("true", lambda c, m=m: c["mounts"].append(m)).returncode == 1 for m in tries)
    control = runtime.once("cat /data/self/x; true", lambda c: c["mounts"].append({"destination": "/data", "source": str(folder), "options": ["bind"]})).returncode == 0
    record("something else in the place of proc", "CVE-2019-16884, 2025-52881", len(tries), held, control)


def links_to_proc(runtime, directory, prefix, **options):
    """CVE-2019-19921: /proc, or /sys, of the image is a link to a folder of its own; the mounts that follow would go there."""
    followed = count = 0
    for name in ("proc", "sys"):
        root = busybox_root(directory / f"{prefix}-{name}")
        shutil.rmtree(root / name)
        (root / "evil").mkdir()
        (root / name).symlink_to("evil")
        def change(config):
            config["root"]["readonly"] = False
            config["process"]["args"] = ["sh", "-c", "ls /evil | wc -l"]
            config["linux"]["maskedPaths"] = config["linux"]["readonlyPaths"] = []
            config["mounts"] = [m for m in config["mounts"] if not m["destination"].startswith("/sys/")]
        done = runtime.run("run", "--bundle", runtime.bundle(change, root), runtime.id(), check=False, **options)
        followed += done.stdout.strip() not in ("", "0")
        count += 1
    return count, followed


def test_proc_and_sys_are_never_behind_a_link(runtime, open_runtime, directory):
    count, followed = links_to_proc(runtime, directory, "behind")
    _, bit = links_to_proc(open_runtime, directory, "behind-open", **without("resolve-in-root"))
    record("/proc and /sys behind a link of the image", "CVE-2019-19921", count, followed == 0, bit > 0)


def test_no_core_file_handler_of_the_host_is_fed(runtime):
    limit = lambda c: c["process"].update(rlimits=[{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}])
    done = runtime.once("ulimit -c; ulimit -Hc", limit)
    bare = runtime.once("ulimit -Hc")
    record("core files through the host's handler", "core_pattern pipe", 1, done.stdout.split() == ["0", "0"], bare.stdout.split() != ["0"])


@pytest.fixture(scope="module")
def attack(directory):
    """attack.c, on the host and in a root file system of its own."""
    root = busybox_root(directory / "attack-root")
    subprocess.run(["clang", "-O1", "-static", "-o", root / "bin/attack", ROOT / "Tests/Runtime/attack.c"], check=True)
    return root


def test_keys_of_the_host_stay_there(runtime, attack):
    program = attack / "bin/attack"
    bundle = runtime.bundle(lambda c: c["process"].update(args=["attack", "find-key", "carrel-canary"]), attack)
    command = [program, "with-key", "carrel-canary"]
    done = subprocess.run([*command, "timeout", "-s", "KILL", "30", runtime.program, "--root", runtime.state, "run", "--bundle", bundle, runtime.id()],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    control = subprocess.run([*command, program, "find-key", "carrel-canary"], capture_output=True, text=True)
    record("a key of the caller's session keyring", "keyring", 1, done.stdout.startswith("find-key Required key"), control.stdout == "find-key done\n")


def test_nothing_is_typed_into_the_callers_terminal(runtime, attack):
    """CVE-2017-5226: TIOCSTI, with the caller's terminal as standard input and with CAP_SYS_ADMIN out of reach."""
    import pty

    def typed(command):
        master, slave = pty.openpty()
        process = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                   preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0))  # TIOCSCTTY: it is the caller's own
        output = process.communicate(timeout=30)[0]
        os.close(master)
        os.close(slave)
        return output
    bundle = runtime.bundle(lambda c: c["process"].update(args=["attack", "type"]), attack)
    held = typed([runtime.program, "--root", runtime.state, "run", "--bundle", bundle, runtime.id()])
    control = typed([attack / "bin/attack", "type"])
    record("characters typed into the caller's terminal", "CVE-2017-5226", 1, "Operation not permitted" in held, "type done" in control)


def test_no_abstract_sockets(runtime):
    """CVE-2020-15257: while a container waits for its start, its socket is a file that others cannot reach."""
    import socket
    names = lambda: {line.split()[-1] for line in open("/proc/net/unix") if line.split()[-1].startswith("@")}
    before = names()
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["true"]))
    runtime.run("create", "--bundle", bundle, id)
    folder = runtime.state / id
    held = not names() - before and folder.stat().st_mode & 0o077 == 0 and (folder / "start").stat().st_mode & 0o777 == 0o600
    runtime.run("delete", "--force", id)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind("\0carrel-control")
        bit = "@carrel-control" in names()
    record("abstract sockets of the runtime", "CVE-2020-15257", 1, held, bit)


def test_a_stranger_with_the_number_of_a_dead_container(runtime):
    """The state's pid has been given to another process: neither kill nor delete may touch it."""
    def attacked(start):
        id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["true"]))
        runtime.run("run", "--keep", "--bundle", bundle, id)
        time.sleep(0.05)  # the kernel tells starts apart by the hundredth of a second
        stranger = subprocess.Popen(["sleep", "100"])
        path = runtime.state / id / "state.json"
        state = json.loads(path.read_text())
        fields = pathlib.Path(f"/proc/{stranger.pid}/stat").read_text().rsplit(")", 1)[1].split()
        state.update(pid=stranger.pid, processStart=int(fields[19]) if start else state["processStart"])
        path.write_text(json.dumps(state))
        runtime.run("kill", id, "KILL", check=False)
        runtime.run("delete", "--force", id)
        alive = stranger.poll() is None and pathlib.Path(f"/proc/{stranger.pid}/cmdline").read_text() != ""
        stranger.kill()
        stranger.wait()
        return not alive
    record("a process that got a dead container's number", "pid reuse", 2, not attacked(False), attacked(True))


def test_a_configuration_that_is_too_much(runtime, open_runtime):
    """Bounded before it is read: size, depth; and refused quickly."""
    bundle = runtime.bundle()
    tries = ["{\"a\":" * 5000 + "1" + "}" * 5000, "[" * 4_000_000, json.dumps({"ociVersion": "1.0.2", "x": "y" * (5 << 20)}),
             "{\"ociVersion\":\"1.0.2\",\"linux\":{\"namespaces\":[" + ",".join(["{\"type\":\"pid\"}"] * 200_000) + "]}}"]
    begun = time.monotonic()
    for text in tries:
        (bundle / "config.json").write_text(text)
        assert runtime.run("run", "--bundle", bundle, runtime.id(), check=False, timeout=10).returncode == 1
    held = time.monotonic() - begun < 10
    # Without the bound, what is large is read whole and runs.
    large = json.loads((open_runtime.bundle(lambda c: c["process"].update(args=["true"])) / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**large, "x": "y" * (5 << 20)}))
    assert runtime.run("run", "--bundle", bundle, runtime.id(), check=False).returncode == 1
    bit = open_runtime.run("run", "--bundle", bundle, runtime.id(), check=False, **without("bounded-configuration")).returncode == 0
    record("configurations too large or too deep", "set-up denial of service", len(tries) + 1, held, bit)

# SPDX-License-Identifier: Apache-2.0
"""The runtime's own command line against the runtime-spec."""

import array
import json
import os
import pathlib
import socket
import subprocess
import time

import pytest
from conftest import RUNTIME, in_user_namespace


@pytest.fixture
def sleeper(runtime):
    """A running container, and its bundle."""
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "1000"]))
    runtime.run("create", "--bundle", bundle, "--pid-file", f"{bundle}/pid", id)
    runtime.run("start", id)
    yield id, bundle
    runtime.run("delete", "--force", id)


def state(runtime, id):
    return json.loads(runtime.run("state", id).stdout)


def test_life(runtime):
    id, bundle = runtime.id(), runtime.bundle(lambda c: c.update(annotations={"org.x": "y\"\n"}) or c["process"].update(args=["sleep", "1000"]))
    runtime.run("create", "--bundle", bundle, "--pid-file", f"{bundle}/pid", id)
    told = state(runtime, id)
    assert (told["status"], told["id"], told["bundle"], told["ociVersion"]) == ("created", id, str(bundle), "1.0.2")
    assert told["annotations"] == {"org.x": "y\"\n"} and told["pid"] == int((bundle / "pid").read_text())
    assert "sleep" not in pathlib.Path(f"/proc/{told['pid']}/cmdline").read_text()
    assert "exists already" in runtime.run("create", "--bundle", bundle, id, check=False).stderr
    runtime.run("start", id)
    assert state(runtime, id)["status"] == "running"
    assert pathlib.Path(f"/proc/{told['pid']}/cmdline").read_text().startswith("sleep")
    assert "only a created one" in runtime.run("start", id, check=False).stderr
    assert "kill it first" in runtime.run("delete", id, check=False).stderr
    runtime.run("kill", id, "KILL")
    for _ in range(100):
        if state(runtime, id)["status"] == "stopped":
            break
        time.sleep(0.02)
    assert state(runtime, id)["status"] == "stopped" and "pid" in state(runtime, id)
    assert "not running" in runtime.run("kill", id, "TERM", check=False).stderr
    runtime.run("delete", id)
    assert "does not exist" in runtime.run("state", id, check=False).stderr
    assert runtime.run("delete", "--force", id).returncode == 0


def test_exit_codes_of_run(runtime):
    assert runtime.once("exit 9").returncode == 9
    assert runtime.once("kill -KILL $$; sleep 1", lambda c: c["linux"].update(namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "pid"])).returncode == 137


def test_hooks_in_their_order_with_the_state(runtime, tmp_path):
    log = tmp_path / "log"
    script = tmp_path / "hook"
    script.write_text(f"#!/bin/sh\nread -r state\necho \"$1 $state\" >>{log}\nexit ${{2:-0}}\n")
    script.chmod(0o755)
    inside = tmp_path / "root"
    subprocess.run(["cp", "-a", str(runtime.root), str(inside)], check=True)
    (inside / "bin/hook").write_text("#!/bin/sh\nread -r state\necho \"startContainer $state\" >>/data/log\n")
    (inside / "bin/hook").chmod(0o755)
    names = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]

    def change(config):
        config["root"]["readonly"] = False
        config["process"]["args"] = ["sh", "-c", "exit 0"]
        config["hooks"] = {n: [{"path": str(script), "args": ["hook", n]}] for n in names}
        config["hooks"]["startContainer"] = [{"path": "/bin/hook", "args": ["hook"]}]
    id = runtime.id()
    runtime.run("run", "--bundle", runtime.bundle(change, inside), id)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert [name for name, _ in lines] == names
    states = {name: json.loads(text) for name, text in lines}
    assert [states[n]["status"] for n in names] == ["creating", "creating", "creating", "running", "stopped"]
    assert all(s["id"] == id for s in states.values()) and states["prestart"]["pid"] > 1 and states["createContainer"]["pid"] == states["prestart"]["pid"]
    assert json.loads((inside / "data/log").read_text().split(" ", 1)[1])["status"] == "created"


@pytest.mark.parametrize("hook,message", [({"args": ["hook", "x", "3"]}, "Input/output"), ({"args": ["hook", "x"], "timeout": 1}, "canceled")])
def test_a_hook_that_fails_or_hangs_fails_the_create(runtime, tmp_path, hook, message):
    script = tmp_path / "hook"
    script.write_text("#!/bin/sh\ntest -n \"$2\" && exit $2\nsleep 100\n")
    script.chmod(0o755)
    id = runtime.id()
    begun = time.time()
    done = runtime.run("create", "--bundle", runtime.bundle(lambda c: c.update(hooks={"createRuntime": [{"path": str(script), **hook}]})), id, check=False)
    assert done.returncode == 1 and message in done.stderr and time.time() - begun < 5
    assert "does not exist" in runtime.run("state", id, check=False).stderr


def test_exec(runtime, sleeper, tmp_path):
    id, bundle = sleeper
    assert runtime.run("exec", id, "cat", "/proc/1/cmdline").stdout.startswith("sleep")
    assert runtime.run("exec", id, "sh", "-c", "exit 6", check=False).returncode == 6
    done = runtime.run("exec", "--user", "5:6", "--additional-gids", "7", "--cwd", "/tmp", "--env", "X=y", id, "sh", "-c", "id -u; id -G; pwd; echo $X; grep CapEff /proc/self/status")
    assert done.stdout.splitlines() == ["5", "6 7", "/tmp", "y", "CapEff:\t0000000000000000"]
    process = {"user": {"uid": 1, "gid": 1}, "args": ["sh", "-c", "id -u; echo $A"], "env": ["PATH=/bin", "A=b"], "cwd": "/"}
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert runtime.run("exec", "--process", tmp_path / "process.json", id).stdout == "1\nb\n"
    assert "find /nothing" in runtime.run("exec", id, "/nothing", check=False).stderr or "execute /nothing" in runtime.run("exec", id, "/nothing", check=False).stderr
    runtime.run("exec", "--detach", "--pid-file", tmp_path / "pid", id, "sleep", "500")
    pid = int((tmp_path / "pid").read_text())
    assert pathlib.Path(f"/proc/{pid}/cmdline").read_text().startswith("sleep\x00500")
    assert pid in json.loads(runtime.run("ps", "--format", "json", id).stdout)
    inner = {e.name: os.readlink(e) for e in pathlib.Path(f"/proc/{pid}/ns").iterdir()}
    first = {e.name: os.readlink(e) for e in pathlib.Path(f"/proc/{int((bundle / 'pid').read_text())}/ns").iterdir()}
    assert inner == first
    assert pathlib.Path(f"/proc/{pid}/cgroup").read_text() == pathlib.Path(f"/proc/{(bundle / 'pid').read_text()}/cgroup").read_text()


def test_exec_in_a_user_namespace(runtime):
    id = runtime.id()
    def change(config):
        in_user_namespace(config)
        config["process"]["args"] = ["sleep", "1000"]
    runtime.run("run", "--detach", "--bundle", runtime.bundle(change), id)
    assert runtime.run("exec", id, "cat", "/proc/self/uid_map").stdout.split() == ["0", "400000", "65536"]
    runtime.run("delete", "--force", id)


def test_pause_resume_update_events_list(runtime, sleeper):
    id, _ = sleeper
    runtime.run("pause", id)
    assert state(runtime, id)["status"] == "paused" and "is paused" in runtime.run("exec", id, "true", check=False).stderr
    runtime.run("resume", id)
    runtime.run("update", "--memory", str(48 << 20), "--memory-swap", str(48 << 20), "--pids-limit", "33", "--cpu-quota", "40000", "--cpu-period", "100000", id)
    told = json.loads(runtime.run("events", "--stats", id).stdout)
    assert told["data"]["memory"]["usage"]["limit"] == 48 << 20 and told["data"]["pids"] == {"current": 1, "limit": 33}
    limit = lambda: json.loads(runtime.run("events", "--stats", id).stdout)["data"]["memory"]["usage"].get("limit", 0)
    # Raised past the one with swap, which was as small, and taken away, which takes that along.
    runtime.run("update", "--memory", str(96 << 20), "--memory-swap", str(128 << 20), id)
    assert limit() == 96 << 20
    runtime.run("update", "--memory", "-1", id)
    assert limit() == 0 or limit() > 1 << 60
    runtime.run("update", "--memory", str(48 << 20), id)
    subprocess.run([RUNTIME, "--root", runtime.state, "update", "--resources", "-", id], input=json.dumps({"pids": {"limit": 44}}), text=True, check=True)
    assert json.loads(runtime.run("events", "--stats", id).stdout)["data"]["pids"]["limit"] == 44
    assert id in runtime.run("list").stdout and id in runtime.run("list", "-q").stdout.split()
    assert next(c for c in json.loads(runtime.run("list", "--format", "json").stdout) if c["id"] == id)["status"] == "running"


def test_console_socket_and_size(runtime):
    def change(config):
        config["process"].update(terminal=True, consoleSize={"height": 33, "width": 44}, args=["sh", "-c", "test -t 0 && stat -c %t:%T,%g /dev/console; read x; echo got $x"])
    bundle, id = runtime.bundle(change), runtime.id()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bundle}/console")
        listener.listen()
        listener.settimeout(10)
        runtime.run("create", "--bundle", bundle, "--console-socket", f"{bundle}/console", id)
        connection, _ = listener.accept()
        _, ancillary, _, _ = connection.recvmsg(100, socket.CMSG_SPACE(4))
        master = array.array("i", ancillary[0][2])[0]
    assert os.get_blocking(master)
    import fcntl, struct, termios
    assert struct.unpack("HHHH", fcntl.ioctl(master, termios.TIOCGWINSZ, b"\0" * 8))[:2] == (33, 44)
    runtime.run("start", id)
    os.write(master, b"word\n")
    output = b""
    while b"got word" not in output:
        output += os.read(master, 100)
    assert b"88:0,5\r\n" in output, "the group of terminals"
    os.close(master)
    runtime.run("delete", "--force", id)


def test_descriptors_that_are_handed_on(runtime):
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    bundle = runtime.bundle(lambda c: c["process"].update(args=["sh", "-c", "ls /proc/self/fd; echo through >&3"]))
    command = ["bash", "-c", f'exec 3>&{writing} {writing}>&- 9</; exec "$@"', "sh", str(RUNTIME), "--root", str(runtime.state), "run", "--preserve-fds", "1", "--bundle", str(bundle), runtime.id()]
    done = subprocess.run(command, pass_fds=[writing], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"], done
    assert os.read(reading, 100) == b"through\n"


def test_mounts(runtime, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("content")
    os.chown(tmp_path / "file", 1234, 1234)
    subprocess.run(["mount", "-t", "tmpfs", "inner", str(tmp_path / "sub")], check=True)
    try:
        def change(config):
            config["root"]["readonly"] = False
            config["mounts"] += [
                {"destination": "/data/a", "source": str(tmp_path), "type": "bind", "options": ["rbind", "rro"]},
                {"destination": "/data/b", "source": str(tmp_path), "options": ["bind", "ro"]},
                {"destination": "/data/file", "source": str(tmp_path / "file"), "options": ["bind"]},
                {"destination": "/data/mapped", "source": str(tmp_path / "file"), "options": ["bind"],
                 "uidMappings": [{"containerID": 1234, "hostID": 77, "size": 1}], "gidMappings": [{"containerID": 1234, "hostID": 77, "size": 1}]},
                {"destination": "/data/t", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=1755", "noexec"]},
                {"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]},
            ]
        (runtime.root / "etc" / "kept").write_text("kept")
        done = runtime.once("touch /data/a/sub/x 2>/dev/null || echo a-deep-ro; touch /data/b/sub 2>/dev/null || echo b-ro; cat /data/file; echo; stat -c %u /data/mapped; stat -c %a /data/t; cat /etc/kept; touch /etc/new && echo; grep -c ' /data/t .*noexec' /proc/mounts", change, check=True)
        assert done.stdout.splitlines() == ["a-deep-ro", "b-ro", "content", "77", "1755", "kept", "1"], done.stdout
        assert not (runtime.root / "etc" / "new").exists()
    finally:
        subprocess.run(["umount", str(tmp_path / "sub")])


def test_namespaces_by_path_and_offsets_of_time(runtime, sleeper):
    _, bundle = sleeper
    pid = (bundle / "pid").read_text()
    def join(config):
        for entry in config["linux"]["namespaces"]:
            if entry["type"] in ("network", "ipc", "pid", "uts"):
                entry["path"] = f"/proc/{pid}/ns/{'net' if entry['type'] == 'network' else entry['type']}"
        del config["hostname"]
    done = runtime.once("readlink /proc/self/ns/net; ps", join, check=True)
    assert done.stdout.split("\n")[0] == os.readlink(f"/proc/{pid}/ns/net") and "sleep 1000" in done.stdout
    def later(config):
        config["linux"]["namespaces"].append({"type": "time"})
        config["linux"]["timeOffsets"] = {"boottime": {"secs": 1_000_000}}
    assert float(runtime.once("cat /proc/uptime", later, check=True).stdout.split()[0]) > 1_000_000


def test_identity_mask_rlimits_and_sysctls(runtime):
    def change(config):
        config["process"]["user"] = {"uid": 3, "gid": 4, "additionalGids": [8, 9], "umask": 0o027}
        config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]
        config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shmmni": "17"}
        config["domainname"] = "dom"
    done = runtime.once("id -u; id -G; umask; grep 'open files' /proc/self/limits; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni /proc/sys/kernel/domainname", change, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["3", "4 8 9", "0027"] and lines[3].split()[3:5] == ["100", "200"] and lines[4:] == ["1", "17", "dom"]


def test_seccomp_by_profile(runtime):
    def change(action, **rest):
        def apply(config):
            config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": [
                {"names": ["mkdir", "mkdirat", "no_such_call"], "action": action, **rest}]}
        return apply
    assert "Function not implemented" in runtime.once("mkdir /tmp/x", change("SCMP_ACT_ERRNO", errnoRet=38)).stderr
    assert runtime.once("mkdir /tmp/x; exit 3", change("SCMP_ACT_KILL_PROCESS")).returncode in (3, 159)
    assert "listenerPath" in runtime.once("true", change("SCMP_ACT_NOTIFY")).stderr
    # The second time it comes from the cache, and does the same.
    assert "Function not implemented" in runtime.once("mkdir /tmp/x", change("SCMP_ACT_ERRNO", errnoRet=38)).stderr


def test_devices(runtime):
    def change(config):
        config["linux"]["devices"] = [{"path": "/dev/own", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 5, "gid": 6}]
        config["linux"]["resources"]["devices"] = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"}]
        config["process"]["capabilities"] = {s: ["CAP_MKNOD"] for s in ("bounding", "effective", "permitted")}
    done = runtime.once("stat -c '%a %u %g %t:%T' /dev/own; mknod /dev/disk b 254 0; head -c1 /dev/disk; mknod /dev/thing c 10 229; (: </dev/thing) && echo readable; (: >/dev/thing) || echo not writable", change)
    assert "640 5 6 a:c8\n" in done.stdout and "readable\nnot writable" in done.stdout and "/dev/disk: Operation not permitted" in done.stderr, done


def set_at(path, value):
    def apply(config):
        at = config
        *folders, last = path.split(".")
        for part in folders:
            at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
        at[int(last) if last.isdigit() else last] = value
    return apply


BAD = [
    ("ociVersion", "2.0.0", "ociVersion"), ("ociVersion", 1, "ociVersion: expected a string"), ("process.cwd", "tmp", "process.cwd: expected an absolute path"),
    ("process.args", [], "process.args: is empty"), ("process.args", ["a", 1], "process.args[1]: expected a string"), ("process.args", ["a\0b"], "holds a NUL"),
    ("process.env", ["A"], "process.env"), ("process.user.uid", 2**31, "process.user.uid"), ("process.user.uid", 2**32, "process.user.uid"),
    ("process.user.uid", 4294967295, "process.user.uid"), ("process.user.uid", -1, "process.user.uid"), ("process.user.uid", 1.5, "process.user.uid"),
    ("process.user.uid", "0", "process.user.uid"), ("process.user.additionalGids", [2**32], "additionalGids"), ("process.user.umask", 4096, "umask"),
    ("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}], "RLIMIT_X"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}], "above hard"), ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2, "twice"),
    ("process.oomScoreAdj", 2000, "oomScoreAdj"), ("process.apparmorProfile", "x", "apparmorProfile"), ("process.selinuxLabel", "x", "selinuxLabel"),
    ("root.path", "", "root.path"), ("root.path", "missing", "missing"), ("linux.namespaces", [{"type": "pid"}], "mount namespace"),
    ("linux.namespaces", [{"type": "mount"}, {"type": "mount"}], "twice"), ("linux.namespaces", [{"type": "x"}], "not a kind of namespace"),
    ("linux.uidMappings", [{"containerID": 0, "hostID": 1, "size": 1}], "no user namespace"), ("linux.cgroupsPath", "/../x", "leads upwards"),
    ("linux.sysctl", {"kernel.core_pattern": "|/x"}, "kernel.core_pattern"), ("linux.sysctl", {"vm.swappiness": "1"}, "vm.swappiness"),
    ("linux.sysctl", {"net/../kernel/core_pattern": "x"}, "is not a sysctl"), ("linux.sysctl", {"net.x": "1\n2"}, "control character"),
    ("linux.maskedPaths", ["proc/x"], "maskedPaths"), ("linux.intelRdt", {}, "intelRdt"), ("linux.mountLabel", "x", "mountLabel"),
    ("linux.rootfsPropagation", "x", "rootfsPropagation"), ("linux.resources.memory.swappiness", 101, "swappiness"), ("linux.resources.rdma", {"x": 1}, "rdma"),
    ("linux.resources.unified", {"../x": "1"}, "is not a file of a controller"), ("linux.resources.unified", {"cgroup.procs": "1"}, "is not a file of a controller"),
    ("linux.resources.memory", {"limit": 2**26, "swap": 2**25}, "memory and swap together"),
    ("linux.devices", [{"path": "/dev/../x", "type": "c"}], "linux.devices[0].path"), ("linux.devices", [{"path": "/x", "type": "z"}], "expected c, b, u or p"),
    ("linux.seccomp", {"defaultAction": "X"}, "X is not an action"), ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["X"]}, "X is not supported"),
    ("linux.personality", {"domain": "X"}, "X is not an execution domain"),
    ("linux.timeOffsets", {"boottime": {"secs": 1}}, "time namespace"), ("hooks", {"prestart": [{"path": "x"}]}, "hooks.prestart[0].path"),
    ("hooks", {"prestart": [{"path": "/x", "timeout": 0}]}, "timeout"), ("mounts.0.destination", "", "destination"), ("mounts.0.destination", "/a/../..", "leads upwards"),
    ("mounts.0.type", "tmpfs", "only proc may be mounted at /proc"), ("mounts.0", {"destination": "/proc/sys", "source": "/tmp", "options": ["bind"]}, "inside /proc"),
    ("mounts.0", {"destination": "/x", "source": "/tmp", "options": ["bind", "zzz"]}, "zzz"), ("mounts.0", "x", "mounts[0]: expected an object"),
    ("mounts.0", None, "found null"), ("hostname", "x" * 65, "hostname"), ("annotations", {"a": 1}, "annotations.a"),
]


@pytest.mark.parametrize("path,value,message", BAD, ids=[f"{p}-{i}" for i, (p, _, _) in enumerate(BAD)])
def test_what_is_wrong_or_not_supported_is_refused_by_name(runtime, path, value, message):
    id = runtime.id()
    done = runtime.run("create", "--bundle", runtime.bundle(set_at(path, value)), id, check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "does not exist" in runtime.run("state", id, check=False).stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", "{\"a\":" * 100 + "1" + "}" * 100, "{} x", "\xff", "[" * 100_000, "{\"ociVersion\": \"1.0.0\"," + " " * (5 << 20) + "\"a\":1}"], ids=range(9))
def test_what_is_no_configuration(runtime, text):
    bundle = runtime.bundle()
    (bundle / "config.json").write_text(text, encoding="latin-1")
    done = runtime.run("create", "--bundle", bundle, runtime.id(), check=False)
    assert done.returncode == 1 and "config.json" in done.stderr


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "../x", "-x", "a b", "x" * 300, "a\nb"])
def test_ids_that_are_none(runtime, id):
    assert runtime.run("create", "--bundle", runtime.bundle(), "--", id, check=False).returncode == 1
    assert sorted(os.listdir(runtime.state)) == sorted(e for e in os.listdir(runtime.state) if e.startswith((".f", "t")))


def test_commands_that_are_not_supported_say_so(runtime, sleeper, tmp_path):
    for command in (["checkpoint", "x"], ["restore", "x"], ["create", "--no-pivot", "x"]):
        assert "not supported" in runtime.run(*command, check=False).stderr
    assert "unknown option" in runtime.run("create", "--zzz", "x", check=False).stderr
    assert "unknown command" in runtime.run("zzz", check=False).stderr
    log = tmp_path / "log"
    runtime.run("--log", log, "--log-format", "json", "state", "none", check=False)
    assert json.loads(log.read_text())["msg"] == "container none does not exist"
    assert "SCMP_ACT_ERRNO" in json.loads(runtime.run("features").stdout)["linux"]["seccomp"]["actions"]


def test_shared_pid_namespace_leaves_nothing(runtime):
    """Without a pid namespace the first process takes nobody along: the cgroup does."""
    def change(config):
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "pid"]
        config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/proc"]
        config["linux"].update(maskedPaths=[], readonlyPaths=[])
        config["process"]["args"] = ["sh", "-c", "sleep 4321 & exec sleep 4321"]
    id = runtime.id()
    runtime.run("run", "--detach", "--bundle", runtime.bundle(change), id)
    time.sleep(0.2)
    runtime.run("delete", "--force", id)
    assert subprocess.run(["pgrep", "-f", "^sleep 4321"], capture_output=True).returncode == 1


def test_on_a_host_whose_mounts_are_shared(runtime, tmp_path):
    """As systemd leaves them: pivot_root refuses a root in a peer group, and what a container mounts would show outside."""
    def change(config):
        config["process"]["args"] = ["sh", "-c", "mount -t tmpfs t /data/here && echo mounted"]
        config["process"]["capabilities"] = {s: ["CAP_SYS_ADMIN"] for s in ("bounding", "effective", "permitted")}
        config["mounts"].append({"destination": "/data", "source": str(tmp_path), "options": ["rbind"]})
    (tmp_path / "here").mkdir()
    bundle = runtime.bundle(change)
    command = [str(RUNTIME), "--root", str(runtime.state), "run", "--bundle", str(bundle), runtime.id()]
    script = f'mount --bind {tmp_path} {tmp_path} && "$@"; grep -c {tmp_path}/here /proc/self/mountinfo'
    done = subprocess.run(["unshare", "--mount", "--propagation", "shared", "sh", "-c", script, "sh", *command], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60)
    assert done.stdout == "mounted\n0\n", done


def test_a_create_that_is_killed_half_way(runtime):
    """After the clone, before anything is set up: no process stays, and a forced delete takes the rest."""
    id, bundle = runtime.id(), runtime.bundle(lambda c: c["process"].update(args=["sleep", "1000"]))
    done = runtime.run("create", "--bundle", bundle, id, check=False, env={**os.environ, "CARREL_FAULT": "supervisor cloned"})
    assert done.returncode != 0 and not (runtime.state / id / "state.json").exists()
    folders = list(pathlib.Path("/sys/fs/cgroup").glob(f"*/carrel-runtime/{id}"))
    assert folders, "it got as far as its cgroups"
    for _ in range(100):
        if not any((folder / "cgroup.procs").read_text() for folder in folders):
            break
        time.sleep(0.02)
    assert not any((folder / "cgroup.procs").read_text() for folder in folders), "its child outlived it"
    runtime.run("delete", "--force", id)
    assert not any(folder.exists() for folder in folders)

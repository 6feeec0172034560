# SPDX-License-Identifier: Apache-2.0
"""What the tests of all tiers share: where the tree and its programs are, waiting, the client, specs and stubs."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("CARREL_BUILD", ROOT / ".build")) / os.environ.get("CARREL_CONFIGURATION", "debug")


def names(file, enum):
    """The raw values of an enum of the sources, as attributes: a name that is not defined fails the test that uses it. In the emulated
    machine the file is beside this one."""
    source = ROOT / "Sources" / file
    source = source if source.exists() else pathlib.Path(__file__).with_name(source.name)
    text = re.search(rf"^( *)[^\n]*enum {enum}\b.*?^\1}}", source.read_text(), re.S | re.M).group()
    return types.SimpleNamespace(**{name: name for name in re.findall(r'case [\w`]+ = "(\w+)"', text)})


Event = names("domain/Workspaces/StateMachine.swift", "EventType")
Code = names("domain/Workspaces/StateMachine.swift", "Code")


def until(condition, what="the condition", seconds=20, pause=0.02):
    """Waits for a value that is true, and returns it. `what`: a text, or a function that says what is there instead."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")


def run_client(socket, *arguments, timeout=60, **options):
    """The finished `carrel`, without input; one that hangs is killed."""
    options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
    options.setdefault("text", True)
    return subprocess.run(["timeout", "-s", "KILL", str(timeout), BIN / "carrel", *map(str, arguments)], capture_output=True,
                          env={**os.environ, "CARREL_SOCKET": str(socket)}, **options)


def spec(id, script="sleep 100000", *, command=None, tool="command", owner="ada", uid=2001, memory="64Mi", more="", **sections):
    """The spec of a small workspace with busybox. `sections`: further fields, or others in place of these, as values or as YAML; empty ones
    are left out. `more`: lines of YAML."""
    fields = {"id": id, "tool": tool, "image": "busybox:latest", "owner": {"name": owner, "uid": uid, "gid": uid}, "resources": {"memory": memory}}
    if tool == "command" or command:
        fields["command"] = command or ["/bin/sh", "-c", script]
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in {**fields, **sections}.items() if value]
    return "".join(lines) + more


def generate_stubs(folder):
    """Generates the Python stubs of the API, as a stranger's client has them, and puts the folder into sys.path."""
    protos = [str(path.relative_to(ROOT / "proto")) for path in sorted((ROOT / "proto/carrel").rglob("*.proto"))]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}/proto", f"--python_out={folder}", f"--grpc_python_out={folder}", *protos],
                   check=True)
    sys.path.insert(0, str(folder))
    return folder

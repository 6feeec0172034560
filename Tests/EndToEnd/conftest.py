# SPDX-License-Identifier: Apache-2.0
"""One agent for all tests, in a directory of its own, and ways to talk to it."""

import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from support import BIN, ROOT, generate_stubs, run_client, until  # noqa: E402


class Agent:
    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.socket = str(directory / "run" / "carrel.sock")
        self.config = directory / "carreld.yaml"
        self.config.write_text(
            f"socket: {self.socket}\nstate: {directory}/state\nhomes: {directory}/homes\n"
            f"tools: {directory}/tools\ndatasets: {directory}/datasets\nhelper: {BIN}/carrel-shim\nfirstID: 1500000000\ncgroupParent: carrel-e2e\n"
            "network: {subnet: 10.88.0.0/16, table: carrel_e, linkPrefix: cre}\nlog: {segment: 128Ki, segments: 4, rate: 4Mi}\n"
            f"credentials:\n  aws: {{exec: [{directory}/provider/provider.py, \"{{owner}}\", \"{{role}}\", \"{{workspace}}\"], timeout: 2}}\n"
            f"  git:\n    exec: [{directory}/provider/git.py, \"{{owner}}\", \"{{host}}\", \"{{organisation}}\", \"{{workspace}}\"]\n"
            f"    allow: [{{host: \"127.0.0.1:3000\", organisations: [research, data]}}]\n"
            f"  webIdentity: {{exec: [{directory}/provider/identity.py, \"{{owner}}\", \"{{workspace}}\"], arn: \"arn:aws:iam::123456789012:role/{{role}}\"}}\n"
            f"  sshAgent: \"{directory}/agents/{{owner}}.sock\"\n")
        (directory / "provider").mkdir()
        for name in ("provider.py", "git.py", "identity.py"):
            shutil.copy(ROOT / "Tests/EndToEnd/providers" / name, directory / "provider")
        shutil.copytree(ROOT / "manifests" / "tools", directory / "tools")
        self.process = None

    def start(self):
        log = open(self.directory / "carreld.log", "ab")
        self.process = subprocess.Popen([BIN / "carreld", "--config", self.config], stdout=log, stderr=log, start_new_session=True)
        until(lambda: self.run("node", check=False).returncode == 0 or self.process.poll() is not None, "the agent serves")
        assert self.process.poll() is None, (self.directory / "carreld.log").read_text()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def run(self, *arguments, check=True, timeout=120, **options):
        done = run_client(self.socket, *arguments, timeout=timeout, **options)
        if check:
            assert done.returncode == 0, f"carrel {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, command, *arguments):
        return json.loads(self.run(command, "-o", "json", *arguments).stdout)

    def sandbox(self, id):
        """The id of the sandbox that a workspace occupies, or occupied last."""
        with sqlite3.connect(f"file:{self.directory}/state/journal.sqlite?mode=ro", uri=True) as journal:
            (body,) = journal.execute("SELECT body FROM workspace WHERE id = ?", [id]).fetchone()
        return json.loads(body)["sandbox"]["id"]

    def exec(self, id, *command, check=True, **options):
        return self.run("exec", id, "--", *command, check=check, **options)

    def python(self, id, code, check=True):
        return self.exec(id, "python3", "-c", code, check=check).stdout.strip()

    def manifest(self, name, id, **changes):
        """A spec of manifests/, under another id; `changes` replace top-level lines."""
        text = (ROOT / "manifests" / name).read_text()
        for key, value in {"id": id, **changes}.items():
            text, count = re.subn(rf"(?m)^{key}:.*\n(  .*\n)*", f"{key}: {value}\n", text)
            if not count:
                text += f"{key}: {value}\n"
        path = self.directory / f"{id}.yaml"
        path.write_text(text)
        return str(path)

    def launch(self, name, id, *options, check=True, **changes):
        return self.run("launch", *options, self.manifest(name, id, **changes), check=check)

    def remove(self, *ids):
        self.run("rm", "--force", *ids)

    def events(self, id):
        return [json.loads(line)["event"] for line in self.run("events", "-o", "json", "--workspace", id).stdout.splitlines()]


@pytest.fixture(scope="session")
def agent():
    directory = pathlib.Path(f"/tmp/carrel-e2e-{os.getpid()}")
    directory.mkdir(mode=0o711)
    agent = Agent(directory)
    agent.start()
    try:
        for image in ("jupyterlab", "r"):
            agent.run("image", "import", str(ROOT / ".cache/images" / f"{image}.tar"), "--name", f"{image}:latest", timeout=300)
        yield agent
    finally:
        ids = [w["spec"]["id"] for w in agent.json("ps")]
        if ids:
            agent.remove(*ids)
        agent.process.terminate()
        agent.process.wait(30)
        (ROOT / ".cache" / "log").mkdir(parents=True, exist_ok=True)
        shutil.copy(directory / "carreld.log", ROOT / ".cache" / "log" / "carreld-end-to-end.log")
        # An agent that ends with nothing running leaves nothing: no table, no cgroups.
        left = [str(p) for p in pathlib.Path("/sys/fs/cgroup").glob("*/carrel-e2e")]
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
        shutil.rmtree(directory, ignore_errors=True)
        assert not left and "carrel_e" not in tables, (left, tables)


@pytest.fixture(scope="session")
def lab(agent):
    """A JupyterLab workspace that several tests share."""
    agent.launch("jupyterlab.yaml", "lab")
    yield agent.json("get", "lab")
    agent.remove("lab")

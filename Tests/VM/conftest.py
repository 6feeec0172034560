# SPDX-License-Identifier: Apache-2.0
"""The package installed as a platform engineer does it, and a small image for what runs in it."""

import json
import pathlib
import subprocess

import pytest
import support
from busybox import APPLETS, busybox_image


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: what CI runs of these tests (hack/vm --smoke)")


def sh(command, check=True, timeout=300):
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def until(condition, what, seconds=60):
    """An emulated machine takes its time, and a poll costs much of it."""
    return support.until(condition, what, seconds, pause=0.2)


class Host:
    """A host with the package on it."""

    def carrel(self, arguments, check=True, timeout=120):
        return sh(f"carrel {arguments}", check=check, timeout=timeout)

    def json(self, arguments):
        return json.loads(self.carrel(f"{arguments} -o json").stdout)

    def launch(self, id, script, options="", wait=False, check=True, **sections):
        spec = {"id": id, "tool": "command", "image": "busybox:latest", "owner": {"name": "ada", "uid": 2001, "gid": 2001},
                "command": ["/bin/sh", "-c", script], "network": "none",
                "resources": {"memory": "64Mi", "cpu": "1", "pids": "64"}, **sections}
        path = pathlib.Path(f"/tmp/{id}.yaml")
        path.write_text(json.dumps(spec))  # JSON is YAML
        return self.carrel(f"launch {options} {'' if wait else '--no-wait'} {path}", check=check)

    def state(self, id):
        return self.json(f"get {id}")["state"]

    def running(self, id):
        until(lambda: self.state(id) == "STATE_READY", f"{id} runs")

    def ended(self, id):
        until(lambda: self.state(id) in ("STATE_STOPPED", "STATE_FAILED"), f"{id} ended")
        return self.json(f"get {id}")["reason"]

    def agent(self):
        return int(sh("systemctl show -p MainPID --value carreld").stdout)

    def serves(self):
        until(lambda: self.carrel("node", check=False).returncode == 0, "the agent serves")


@pytest.fixture(scope="session")
def host():
    sh("dpkg -i /job/carrel.deb", timeout=300)
    host = Host()
    busybox_image(pathlib.Path("/tmp/busybox.tar"))
    host.carrel("image import /tmp/busybox.tar --name busybox:latest")
    return host

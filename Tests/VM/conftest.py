# SPDX-License-Identifier: Apache-2.0
"""The package installed as a platform engineer does it, and a small image for what runs in it."""

import gzip
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import time

import pytest

APPLETS = "sh cat id ls sleep dd stat yes head httpd wget mkdir seq echo true kill".split()


def sh(command, check=True, timeout=300):
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def until(condition, what, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


def busybox_image(path: pathlib.Path):
    """An OCI layout in a tar archive whose one layer is Debian's static busybox (image-spec v1.1)."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for folder in ("tmp", "home/user", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
    blobs = {}

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    raw = layer.getvalue()
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(raw).hexdigest()}"]}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob(json.dumps(config).encode(), "config.v1+json"),
                "layers": [blob(gzip.compress(raw, 1), "layer.v1.tar+gzip")]}
    index = {"schemaVersion": 2, "manifests": [blob(json.dumps(manifest).encode(), "manifest.v1+json")]}
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


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

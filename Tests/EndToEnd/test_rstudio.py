# SPDX-License-Identifier: Apache-2.0
"""The rstudio tool definition, against a stand-in for rserver that checks the documented flags."""

import hashlib
import io
import json
import pathlib
import tarfile

import requests

from conftest import ROOT


def with_layer(archive, folder, files):
    """An OCI layout: the archive's image and one more layer on top."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # an archive of our own
    blobs = folder / "blobs/sha256"

    def load(entry):
        return json.loads((blobs / entry["digest"][7:]).read_text())

    def store(data):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    index = json.loads((folder / "index.json").read_text())
    manifest = load(index["manifests"][0])
    config = load(manifest["config"])
    added = store(layer.getvalue())
    config["rootfs"]["diff_ids"].append(added["digest"])
    manifest["layers"].append({"mediaType": "application/vnd.oci.image.layer.v1.tar", **added})
    manifest["config"].update(store(json.dumps(config).encode()))
    index["manifests"][0].update(store(json.dumps(manifest).encode()))
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_the_tool_definition_calls_rserver_as_documented(agent, tmp_path):
    stand_in = (pathlib.Path(__file__).parent / "rserver_stand_in.py").read_bytes()
    layout = with_layer(ROOT / ".cache/images/r.tar", tmp_path, {"usr/local/bin/rserver": stand_in})
    agent.run("image", "import", str(layout), "--name", "rstudio:latest", timeout=300)
    done = agent.launch("rstudio.yaml", "rstudio", check=False)
    assert done.returncode == 0, agent.run("logs", "rstudio").stderr
    workspace = agent.json("get", "rstudio")
    assert requests.get(workspace["url"], timeout=10).text == "stand-in for RStudio"
    used = agent.run("image", "rm", "rstudio", check=False)
    assert used.returncode == 1 and "in use by a workspace" in used.stderr
    agent.remove("rstudio")
    # It shares layers with images that other workspaces run: those stay, and this name goes.
    agent.run("image", "rm", "rstudio")
    agent.run("image", "inspect", "r")
    assert "rstudio:latest" not in agent.run("image", "ls").stdout

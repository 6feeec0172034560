# SPDX-License-Identifier: Apache-2.0
"""Real JupyterLab with homes that keep it from its start; packages that real pip and R install and find again."""

import os

import pytest
from support import Event

BROKEN = {
    "certificate": (".config/jupyter/jupyter_server_config.py", "c.ServerApp.certfile = '/nonexistent'\n"),
    "exits": (".config/jupyter/jupyter_server_config.py", "import os; os._exit(3)\n"),
    # Since its runtime files are not in the home, it comes up with this one as it is.
    "file": (".local/share/jupyter", "a file where a folder belongs\n"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_jupyterlab_comes_up_with_a_broken_home(agent, how):
    owner = f"broken-{how}"
    home = agent.directory / "homes" / owner
    name, text = BROKEN[how]
    (home / name).parent.mkdir(parents=True)
    (home / name).write_text(text)
    for path in (home, *home.rglob("*")):
        os.chown(path, 2301, 2301)
    launched = agent.launch("jupyterlab.yaml", owner, owner=f"{{name: {owner}, uid: 2301, gid: 2301}}", check=False)
    found = agent.json("get", owner)
    assert launched.returncode == 0 and found["state"] == "STATE_READY", (launched, found)
    if how == "file":
        assert found["attempt"] == 1 and (home / name).read_text() == text
        return agent.remove(owner)
    assert any(c.startswith("Rescue:") for c in found["conditions"]) and found["attempt"] == 2, found
    kept = [p for p in home.rglob("*") if "set-aside" in p.name]
    assert kept and list(home.glob("CARREL-RESCUE-*.txt")), list(home.rglob("*"))
    assert Event.Rescue in [e["type"] for e in agent.events(owner)]
    agent.remove(owner)


def test_a_home_that_is_full_does_not_keep_jupyterlab_from_its_start(agent):
    storage = "{driver: image, size: 32Mi}"
    owner = "{name: full, uid: 2302, gid: 2302}"
    agent.launch("batch.yaml", "filler", command='["sh", "-c", "yes | dd of=big bs=1M; true"]', image="jupyterlab:latest", owner=owner, storage=storage)
    agent.remove("filler")
    agent.launch("jupyterlab.yaml", "full", owner=owner, storage=storage)
    found = agent.json("get", "full")
    assert found["state"] == "STATE_READY" and any("the home is full" in c for c in found["conditions"]), found
    agent.remove("full")


@pytest.mark.parametrize("language", ["python", "r"])
def test_what_was_installed_is_there_again_and_not_for_another_image(agent, language):
    owner = f"{{name: packs-{language}, uid: 2303, gid: 2303}}"
    image = "r:latest"

    def start(id, image):
        agent.launch("jupyterlab.yaml", id, owner=owner, image=image)
    if language == "python":
        install = ("mkdir -p /tmp/p && cd /tmp/p && printf 'from setuptools import setup\\nsetup(name=\"carrelcheck\", version=\"1\", py_modules=[\"carrelcheck\"], "
                   "scripts=[\"carrel-check\"])\\n' > setup.py && printf 'value = 42\\n' > carrelcheck.py && printf '#!/bin/sh\\necho script\\n' > carrel-check && "
                   "pip install --quiet --no-build-isolation --no-index . 2>&1")
        use = "python3 -c 'import carrelcheck; print(carrelcheck.value)' && carrel-check"
        expected = "42\nscript\n"
    else:
        install = ("mkdir -p /tmp/carrelcheck/R && cd /tmp && printf 'Package: carrelcheck\\nVersion: 1.0\\nTitle: x\\nDescription: x.\\nLicense: GPL-2\\nAuthor: x\\nMaintainer: x <x@x.invalid>\\n' "
                   "> carrelcheck/DESCRIPTION && printf 'export(value)\\n' > carrelcheck/NAMESPACE && printf 'value <- function() 42\\n' > carrelcheck/R/x.R && R CMD INSTALL carrelcheck 2>&1")
        use = "Rscript -e 'cat(carrelcheck::value(), \"\\n\")'"
        expected = "42 \n"
    start("packs", image)
    done = agent.exec("packs", "bash", "-c", install, check=False)
    assert done.returncode == 0, done
    assert agent.exec("packs", "bash", "-c", use).stdout == expected
    agent.remove("packs")
    start("packs", image)
    assert agent.exec("packs", "bash", "-c", use).stdout == expected and not agent.json("get", "packs").get("conditions")
    agent.remove("packs")
    start("packs", "jupyterlab:latest")
    assert agent.exec("packs", "bash", "-c", use, check=False).returncode != 0
    assert any(c.startswith("ImageChanged:") for c in agent.json("get", "packs")["conditions"])
    agent.remove("packs")
    home = agent.directory / "homes" / f"packs-{language}"
    assert {p.stat().st_uid for p in home.rglob("*")} == {2303}

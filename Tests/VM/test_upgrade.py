# SPDX-License-Identifier: Apache-2.0
"""The package itself; in a file that sorts last, since it removes what the others test."""

import pathlib

import pytest
from conftest import sh


@pytest.mark.smoke
def test_an_upgrade_keeps_and_a_removal_leaves_nothing(host):
    host.launch("kept", "sleep 600")
    host.running("kept")
    before = host.agent()
    sh("dpkg -i /job/carrel.deb")
    host.serves()
    assert host.agent() != before and host.state("kept") == "STATE_READY"
    host.carrel("rm --force kept")
    sh("dpkg -r carrel")
    assert not list(pathlib.Path("/sys/fs/cgroup").glob("**/carrel-workspaces.service"))
    assert "carrel" not in sh("nft list tables").stdout
    assert not sh("busybox pgrep -f carrel-shim", check=False).stdout

# SPDX-License-Identifier: Apache-2.0
"""What a service manager sees of the agent, over the socket that systemd would listen on."""

import os
import socket
import subprocess
import time

from conftest import BIN


def test_readiness_watchdog_and_end_are_told(agent, tmp_path):
    config = tmp_path / "carreld.yaml"
    text = agent.config.read_text().replace(str(agent.directory), str(tmp_path)).replace("carrel_e", "carrel_s").replace("linkPrefix: cre", "linkPrefix: crs").replace("10.88", "10.87")
    config.write_text(text.replace(f"tools: {tmp_path}", f"tools: {agent.directory}").replace("cgroupParent: carrel-e2e", "cgroupParent: carrel-e2e-service"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(10)
        process = subprocess.Popen([BIN / "carreld", "--config", config], stderr=subprocess.DEVNULL,
                                   env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"})
        try:
            assert b"READY=1" in notify.recv(4096)
            begun = time.time()
            assert b"WATCHDOG=1" in notify.recv(4096) and b"WATCHDOG=1" in notify.recv(4096)
            assert time.time() - begun < 0.4, "at least twice within the time that was asked for"
            process.terminate()
            while b"STOPPING=1" not in notify.recv(4096):
                pass
            assert process.wait(10) == 0
        finally:
            process.kill()
            subprocess.run(["nft", "delete", "table", "inet", "carrel_s"], check=False)


def test_a_configuration_is_checked_with_line_numbers(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("state: /tmp/x\ncolour: red\n")
    done = subprocess.run([BIN / "carreld", "--check-config", "--config", config], capture_output=True, text=True)
    assert done.returncode == 78 and "line 2: colour: is not a known key" in done.stderr

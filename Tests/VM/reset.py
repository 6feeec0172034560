# SPDX-License-Identifier: Apache-2.0
"""A hard reset of the host under load: what the agent has accepted is known after it, and each end is told once.

`reset.py before` installs the package, launches without pause and resets the machine in between;
`reset.py after` runs at the next boot and judges. No file system is synced before the reset.
"""

import collections
import json
import os
import pathlib
import sys
import threading
import time

import conftest
from busybox import busybox_image
from conftest import sh, until
from support import Event

ACCEPTED = pathlib.Path("/var/lib/carrel-reset")
HOME = {"home": "/srv/homes/ada", "driver": "directory"}


def install():
    sh("dpkg -i /job/carrel.deb", timeout=300)
    host = conftest.Host()
    host.serves()
    return host


def stream(host):
    return [json.loads(line)["event"] for line in host.carrel("events -o json").stdout.splitlines()]


def before():
    host = install()
    pathlib.Path(HOME["home"]).mkdir(parents=True)
    os.chown(HOME["home"], 2001, 2001)
    busybox_image(pathlib.Path("/tmp/busybox.tar"))
    host.carrel("image import /tmp/busybox.tar --name busybox:latest")
    record = os.open(ACCEPTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    lock = threading.Lock()

    def accept(id, *arguments, **sections):
        if host.launch(id, *arguments, check=False, **sections).returncode == 0:
            with lock:
                os.write(record, f"{id}\n".encode())
                os.fsync(record)

    for index in range(3):
        accept(f"kept-{index}", "sleep 6000")
        accept(f"again-{index}", "sleep 6000", lifecycle={"restartPolicy": "always"})
    accept("homed", "echo written >file; sync; sleep 6000", storage=HOME, lifecycle={"restartPolicy": "always"})
    for id in ("kept-2", "again-2", "homed"):
        host.running(id)
    accept("over", "exit 5")
    host.ended("over")

    def load(thread):
        for index in range(1000):
            accept(f"load-{thread}-{index}", "sleep 1; exit 6")

    for thread in range(3):
        threading.Thread(target=load, args=[thread], daemon=True).start()
    time.sleep(12)
    os.fsync(os.open("/", os.O_RDONLY))
    pathlib.Path("/proc/sysrq-trigger").write_text("b")


def after():
    host = conftest.Host()
    until(lambda: host.carrel("node", check=False).returncode == 0, "the agent serves after the reset", 120)
    accepted = ACCEPTED.read_text().split()
    assert host.carrel("node --check-journal").stdout.startswith("the journal is sound")
    states = {}

    def settled():
        states.update({w["spec"]["id"]: w for w in json.loads(host.carrel("ps -o json").stdout)})
        busy = [id for id in accepted if id not in states or (
            states[id]["state"] not in ("STATE_STOPPED", "STATE_FAILED") and not id.startswith(("again", "homed")))]
        return not busy
    until(settled, "what was accepted has ended", 120)
    for id in ("again-0", "again-1", "again-2", "homed"):
        host.running(id)
    events = collections.defaultdict(list)
    for event in stream(host):
        events[event.get("workspace")].append(event)
    ends = {id: [e["reason"]["code"] for e in events[id] if e["type"] in (Event.Stopped, Event.Failed)] for id in accepted}
    # What ran is lost to the reset, told once; what is to be restarted is.
    for id in [i for i in accepted if not i.startswith(("load", "over"))]:
        assert ends[id] == ["Lost"], (id, ends[id], [e["type"] for e in events[id]])
    assert ends["over"] == ["Exited"], ends["over"]
    load = [id for id in accepted if id.startswith("load")]
    for id in load:
        assert ends[id] in (["Exited"], ["Lost"]), (id, ends[id])
        if ends[id] == ["Exited"]:
            assert states[id]["reason"]["exit_code"] == 6, states[id]
    assert host.carrel("exec homed -- cat file").stdout == "written\n"
    again = host.launch("next", "exit 7", wait=True, check=False)
    assert host.ended("next")["exit_code"] == 7, again
    sequences = [int(event["sequence"]) for event in stream(host)]
    assert sequences == list(range(1, len(sequences) + 1)), "dense"
    count = collections.Counter(code for id in load for code in ends[id])
    print(f"reset: {len(accepted)} accepted; of {len(load)} under load {dict(count)}; 3 lost, 4 lost and restarted, none twice")
    for id in [i for i in accepted if not i.startswith(("load", "over"))]:
        host.carrel(f"rm --force {id}")


if __name__ == "__main__":
    {"before": before, "after": after}[sys.argv[1]]()

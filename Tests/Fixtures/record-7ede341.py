# SPDX-License-Identifier: Apache-2.0
"""Records what lies beside it: what an agent of commit 7ede341 leaves on disk when it is killed. See journal-7ede341.md.

usage: record-7ede341.py CHECKOUT      a checkout of that commit with its debug programs built, as root
"""

import json
import pathlib
import shutil
import signal
import sqlite3
import sys

HERE = pathlib.Path(__file__).resolve().parent
JOURNAL, WORKSPACES = HERE / "journal-7ede341.sqlite", HERE / "workspaces-7ede341"
CHECKOUT = pathlib.Path(sys.argv[1]).resolve()
sys.path.insert(0, str(CHECKOUT / "Tests" / "Faults"))
import conftest  # noqa: E402

conftest.SUBNETS["crv"] = 92
# Whoever uses the recording puts another place here.
PLACE = pathlib.Path("/tmp/carrel-7ede341")
PROVIDER = """#!/bin/sh
echo '{"Version": 1, "AccessKeyId": "ASIA'$2'", "SecretAccessKey": "secret", "SessionToken": "session", "Expiration": "2100-01-01T00:00:00Z"}'
"""
# Says who it is, ticks at port 9000, and ends with the status that somebody writes into its home.
TOOL = """echo "hello from $CARREL_WORKSPACE"
while true; do while true; do echo tick; sleep 0.1; done | nc -l -p 9000; done &
while [ ! -e ~/$CARREL_WORKSPACE.end ]; do sleep 0.1; done
status=$(cat ~/$CARREL_WORKSPACE.end)
rm ~/$CARREL_WORKSPACE.end
echo "bye from $CARREL_WORKSPACE"
exit $status
"""


def launch(agent, id, script=TOOL, more="", command=None, options=(), owner="{name: ada, uid: 2001, gid: 2001}"):
    path = agent.directory / f"{id}.yaml"
    path.write_text(f"id: {id}\ntool: command\nimage: busybox:latest\nresources: {{memory: 64Mi}}\nowner: {owner}\n"
                    f"command: {json.dumps(command or ['/bin/sh', '-c', script])}\n{more}")
    say(agent, "launch", "--no-wait", *options, path)


def say(agent, *arguments):
    done = agent.run(*arguments)
    assert done.returncode == 0, (arguments, done)
    return done


def record(agent):
    secret = agent.directory / "secret"
    secret.write_text("of the request\n")
    for name in ("sales", "extra"):
        folder = agent.directory / "datasets" / f"{name}-1"
        folder.mkdir(parents=True)
        (folder / "rows").write_text(f"{name} 1\n")
        (folder.parent / f"{name}-1.yaml").write_text(f"name: {name}\nversion: \"1\"\npath: {folder}\nreaders: [ada]\nwriters: [ada]\n")
    say(agent, "drain", "--deadline", "1")
    say(agent, "resume")
    # What has ended.
    launch(agent, "batch", "echo rows: 45; exit 3")
    launch(agent, "missing", command=["/nonexistent"])
    launch(agent, "boxed", "true", "storage: {driver: image, size: 32Mi}\n", owner="{name: grace, uid: 2002, gid: 2002}")
    launch(agent, "asked", more="labels: {team: blue}\n", options=("--credential", f"password={secret}"))
    launch(agent, "forgotten", "exit 0")
    for id in ("batch", "boxed", "forgotten"):
        agent.wait(id, "STOPPED")
    agent.wait("missing", "FAILED")
    agent.wait("asked", "READY")
    say(agent, "credentials", "put", "--expires", "2s", "asked", f"short={secret}")
    conftest.until(lambda: agent.get("asked").get("conditions"), "a condition")
    say(agent, "stop", "asked", "--time", "0")
    say(agent, "rm", "forgotten")
    # What runs.
    launch(agent, "desk", options=("--credential", f"password={secret}"))
    launch(agent, "loop", more="lifecycle: {restartPolicy: onFailure}\nenvironment: {MODE: loop}\n")
    launch(agent, "sales", more="network: none\nstorage: {datasets: [{dataset: sales, target: /data/sales}]}\n")
    launch(agent, "roles", more="aws: {roles: [reader, writer]}\n")
    launch(agent, "late", more="lifecycle: {maxLifetimeSeconds: 604800, gracePeriodSeconds: 5}\n")
    for id in ("desk", "loop", "sales", "roles", "late"):
        agent.wait(id, "READY")
    say(agent, "credentials", "put", "--expires", "8h", "desk", f"day={secret}")
    say(agent, "dataset", "attach", "--write", "--expires", "8h", "sales", "extra", "/data/extra")
    say(agent, "credentials", "revoke", "roles", "--role", "writer")


def keep(agent):
    shutil.rmtree(WORKSPACES, ignore_errors=True)
    for folder in (agent.state / "workspaces").iterdir():
        kept = WORKSPACES / folder.name
        kept.mkdir(parents=True)
        for name in ("plan", "record.json", "exit"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, kept / name)
        # Of what has ended; and not as NUMBER.log, which git is told to leave alone.
        if (folder / "exit").exists():
            (kept / "output").write_bytes(b"".join(part.read_bytes() for part in sorted((folder / "log").iterdir())))
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{agent.state}/journal.sqlite{suffix}", f"{JOURNAL}{suffix}")
    database = sqlite3.connect(JOURNAL)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()  # the last connection removes what lies beside it


def main():
    shutil.rmtree(PLACE, ignore_errors=True)
    panel = conftest.Controller(pathlib.Path("/tmp"), "carrel-7ede341-panel")
    provider = pathlib.Path("/tmp/carrel-7ede341-provider")
    provider.write_text(PROVIDER)
    provider.chmod(0o755)
    panel.start()
    agent = conftest.make(PLACE, f"credentials: {{aws: {{exec: [{provider}, \"{{owner}}\", \"{{role}}\"]}}}}\n"
                          f"controllers: [{{name: panel, socket: {panel.socket}, owner: true}}]\n", prefix="crv")
    try:
        record(agent)
        conftest.until(lambda: agent.records()[3].get("panel") == agent.records()[2]["head"], "all is acknowledged")
        agent.stop(signal.SIGKILL)
        keep(agent)
    finally:
        conftest.destroy(agent, panel)
        for file in (provider, panel.state, panel.log):
            file.unlink(missing_ok=True)


main()

# SPDX-License-Identifier: Apache-2.0
"""Git with tokens of the broker's, against git http-backend behind an HTTP server that asks for them; web identities; ssh-agents. The
server stands in the workspace itself, since a workspace reaches no service of the host."""

import json
import os
import socket
import struct
import threading

import pytest
from conftest import ROOT, until
from support import Event

URL = "http://127.0.0.1:3000"


@pytest.fixture
def workspace(agent):
    server = (ROOT / "Tests/EndToEnd/git_server.py").read_text()
    agent.launch("batch.yaml", "git", "--no-wait", command='["sleep", "1000"]', image="jupyterlab:latest", owner="{name: linus, uid: 2201, gid: 2201}",
                 git="[{host: \"127.0.0.1:3000\", organisations: [research]}]",
                 environment="{GIT_AUTHOR_NAME: Ada, GIT_AUTHOR_EMAIL: a@x.invalid, GIT_COMMITTER_NAME: Ada, GIT_COMMITTER_EMAIL: a@x.invalid, GIT_TERMINAL_PROMPT: \"0\"}")
    until(lambda: agent.json("get", "git")["state"] == "STATE_READY")
    agent.python("git", f"""
import pathlib, subprocess, socket, time
pathlib.Path('/tmp/server.py').write_text({server!r})
for name in ('research/survey', 'secret/plans'):
    subprocess.run(['git', 'init', '-q', '--bare', '-b', 'main', f'/tmp/repositories/{{name}}.git'], check=True)
    subprocess.run(['git', '-C', f'/tmp/repositories/{{name}}.git', 'config', 'http.receivepack', 'true'], check=True)
subprocess.Popen(['python3', '/tmp/server.py', '3000', '/tmp/repositories'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
for _ in range(100):
    try: socket.create_connection(('127.0.0.1', 3000)).close(); break
    except OSError: time.sleep(0.05)
""")
    yield "git"
    agent.remove("git")


def sh(agent, id, script, check=True):
    return agent.exec(id, "bash", "-c", script, check=check)


def test_clone_commit_and_push(agent, workspace):
    done = sh(agent, workspace, f"cd /tmp && git clone -q {URL}/research/survey.git && cd survey && echo x > x && git add x && git commit -qm first && git push -q origin main && git ls-remote")
    assert "refs/heads/main" in done.stdout, done
    # Elsewhere: a sentence, and no question.
    for place in ("secret/plans", "other/thing"):
        refused = sh(agent, workspace, f"cd /tmp/survey && git push {URL}/{place}.git main", check=False)
        assert refused.returncode != 0 and "carrel: git has credentials for 127.0.0.1:3000/research here, and for nothing else" in refused.stderr, refused
    # The control: with the other organisation's token the same push works.
    control = sh(agent, workspace, "cd /tmp/survey && git -c credential.helper= push -q http://x-access-token:CANARY-git-secret-x@127.0.0.1:3000/secret/plans.git main")
    assert control.returncode == 0
    shown = sh(agent, workspace, "cat /tmp/survey/.git/config; git config --list --show-origin")
    assert "CANARY" not in shown.stdout
    issued = until(lambda: [e["attributes"] for e in agent.events(workspace) if e["type"] == Event.CredentialsIssued])
    assert issued[0]["role"] == "git/127.0.0.1:3000/research", issued
    agent.run("credentials", "revoke", workspace)
    revoked = sh(agent, workspace, "cd /tmp/survey && git fetch", check=False)
    assert revoked.returncode != 0 and "carrel: git's access was revoked" in revoked.stderr, revoked


def test_what_the_helper_makes_of_odd_questions(agent, workspace):
    ask = lambda text, how="get": sh(agent, workspace, f"printf '{text}' | /run/carrel/git-credential-carrel {how}", check=False)
    assert "password=CANARY-git-research-linus" in ask("protocol=http\\nhost=127.0.0.1:3000\\npath=research/survey.git\\n").stdout
    for text in ("protocol=http\\nhost=github.com\\npath=research/x\\n", "protocol=http\\nhost=127.0.0.1:3000.evil.com\\npath=research/x\\n"):
        assert ask(text).stdout == "quit=1\n" and "https only" in ask(text).stderr
    for text in ("", "x", "protocol=https\\nhost=github.com\\n", "protocol=https\\nhost=../x\\npath=a/b\\n", "protocol=https\\nhost=a b\\npath=a/b\\n",
                 "protocol=https\\nhost=a\\npath=../b\\n", "protocol=https\\nhost=a\\r\\nX:y\\npath=a/b\\n"):
        done = ask(text)
        assert done.stdout == "quit=1\n" and "carrel: no credentials for this address" in done.stderr, (text, done)
    assert ask("password=x\\n", "store").stdout == ask("password=x\\n", "erase").stdout == ""
    # The program is the host's own: it cannot be changed from here.
    assert sh(agent, workspace, "echo x > /run/carrel/git-credential-carrel", check=False).returncode != 0
    assert sh(agent, workspace, "rm -f /run/carrel/git-credential-carrel", check=False).returncode != 0


@pytest.mark.parametrize("changes, message", [
    ({"git": "[{host: github.com, organisations: [x]}]"}, "git[0]: this node gives no credentials for github.com/x"),
    ({"git": "[{host: \"127.0.0.1:3000\", organisations: [secret]}]"}, "no credentials for 127.0.0.1:3000/secret; it does for research, data"),
    ({"git": "[{host: GitHub, organisations: [x]}]"}, "git[0].host"), ({"git": "[{host: \"127.0.0.1:3000\", organisations: []}]"}, "git[0].organisations"),
    ({"git": "[{host: \"127.0.0.1:3000\", organisations: [../x]}]"}, "git[0].organisations"), ({"aws": "{roles: [a, b], webIdentity: true}"}, "aws.webIdentity: is for one role")])
def test_bad_inputs(agent, changes, message):
    refused = agent.launch("batch.yaml", "refused", check=False, **changes)
    assert refused.returncode == 1 and message in refused.stderr, refused


def test_a_web_identity_is_a_file_that_is_replaced(agent):
    (agent.directory / "provider" / "lifetime").write_text("4")
    try:
        agent.launch("batch.yaml", "identity", "--no-wait", command='["sleep", "1000"]', image="jupyterlab:latest", aws="{roles: [analyst], webIdentity: true}",
                     owner="{name: linus, uid: 2201, gid: 2201}", environment="{PYTHONPATH: /home/analyst/aws, AWS_DEFAULT_REGION: eu-west-1, AWS_ENDPOINT_URL: \"http://127.0.0.1:5555\"}")
        until(lambda: agent.json("get", "identity")["state"] == "STATE_READY")
        home = agent.directory / "homes" / "linus"
        if not (home / "aws").exists():
            import shutil
            shutil.copytree(ROOT / ".cache/aws", home / "aws")
        assert sh(agent, "identity", "echo $AWS_ROLE_ARN").stdout == "arn:aws:iam::123456789012:role/analyst\n"
        token = lambda: sh(agent, "identity", "cat $AWS_WEB_IDENTITY_TOKEN_FILE", check=False).stdout
        first = token()
        assert first.startswith("CANARY-identity-linus-")
        until(lambda: token() not in ("", first))
        used = json.loads(agent.python("identity", """
import boto3, json, subprocess, sys, time, botocore.exceptions
subprocess.Popen([sys.executable, '-m', 'moto.server', '-p', '5555'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
for _ in range(200):
    try: boto3.Session().client('s3').list_buckets(); break
    except botocore.exceptions.EndpointConnectionError: time.sleep(0.1)
session = boto3.Session()
print(json.dumps([session.get_credentials().method, session.client('sts').get_caller_identity()['Arn']]))
"""))
        assert used[0] == "assume-role-with-web-identity" and "analyst" in used[1], used
        agent.run("credentials", "revoke", "identity")
        assert token() == ""
    finally:
        (agent.directory / "provider" / "lifetime").unlink()
        agent.remove("identity")


def test_an_ssh_agent_of_the_owner(agent):
    """A stand-in for the owner's agent: ssh-agent itself takes nobody but its own uid and root. What asks is ssh-add."""
    (agent.directory / "agents").mkdir()
    path = agent.directory / "agents" / "linus.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    os.chown(path, 2201, 2201)
    path.chmod(0o600)
    listener.listen()

    def serve():
        while True:
            connection, _ = listener.accept()
            while head := connection.recv(4):
                connection.recv(struct.unpack(">I", head)[0])
                connection.sendall(struct.pack(">IBI", 5, 12, 0))  # SSH2_AGENT_IDENTITIES_ANSWER, none
    threading.Thread(target=serve, daemon=True).start()
    agent.launch("batch.yaml", "ssh", "--no-wait", command='["sleep", "1000"]', image="jupyterlab:latest", owner="{name: linus, uid: 2201, gid: 2201}", sshAgent="true")
    until(lambda: agent.json("get", "ssh")["state"] == "STATE_READY")
    assert "no identities" in sh(agent, "ssh", "ssh-add -l 2>&1", check=False).stdout
    agent.remove("ssh")
    agent.launch("batch.yaml", "without", "--no-wait", command='["sleep", "1000"]', image="jupyterlab:latest", owner="{name: linus, uid: 2201, gid: 2201}")
    until(lambda: agent.json("get", "without")["state"] == "STATE_READY")
    assert "Could not open a connection" in sh(agent, "without", "ssh-add -l 2>&1", check=False).stdout
    agent.remove("without")

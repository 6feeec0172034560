# SPDX-License-Identifier: Apache-2.0
"""Credentials that cannot go stale: real boto3 and awswrangler in a workspace, against moto (which speaks S3, STS, Glue and Athena over
HTTP and stands beside it in the workspace, since a workspace reaches no service of the host)."""

import json
import pathlib
import shutil
import socket
import time

import pytest

from conftest import ROOT, until
from support import Event

HOME = "/home/analyst"
ENDPOINT = "http://127.0.0.1:5555"
FETCH = """
import json, os, sys, time, urllib.request, urllib.error
def fetch(path=None, token=None, method='GET'):
    token = open(os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE']).read() if token is None else token
    url = os.environ['AWS_CONTAINER_CREDENTIALS_FULL_URI'] if path is None else 'http://127.0.0.1:15170' + path
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={'Authorization': token}, method=method), timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
"""


@pytest.fixture
def place(agent):
    """Where the stand-in provider lies; its lifetimes are an hour until a test says otherwise."""
    place = agent.directory / "provider"
    yield place
    for name in ("lifetime", "refuse", "hang"):
        (place / name).unlink(missing_ok=True)


MOTO = f"""
import boto3, subprocess, botocore.exceptions
subprocess.Popen([sys.executable, '-m', 'moto.server', '-p', '5555'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
session = boto3.Session()
client = lambda name: session.client(name, endpoint_url={ENDPOINT!r})
for _ in range(200):
    try:
        client('s3').create_bucket(Bucket='research', CreateBucketConfiguration={{'LocationConstraint': 'eu-west-1'}}); break
    except botocore.exceptions.EndpointConnectionError: time.sleep(0.1)
"""


@pytest.fixture
def workspace(agent, place, request):
    id = f"aws-{request.node.name[5:25].rstrip('_').replace('_', '-')}"
    changes = getattr(request, "param", {})
    (place / "lifetime").write_text(str(changes.get("lifetime", 3600)))
    for name in ("refuse", "hang"):
        if changes.get(name):
            (place / name).touch()
    agent.launch("batch.yaml", id, "--no-wait", command='["sleep", "1000"]', image=changes.get("image", "jupyterlab:latest"), aws="{roles: [analyst, writer]}",
                 environment=f"{{PYTHONPATH: {HOME}/aws, PYTHONDONTWRITEBYTECODE: \"1\", AWS_DEFAULT_REGION: eu-west-1}}")
    until(lambda: agent.json("get", id)["state"] == "STATE_READY")
    home = agent.directory / "homes" / "ada"
    if not (home / "aws").exists():
        # What an analyst would install; a dataset's files cannot be mapped as programs.
        shutil.copytree(ROOT / ".cache/aws", home / "aws")
    yield id
    agent.remove(id)


def cmdline(process):
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def status(process, field):
    return next(line.split()[1] for line in (process / "status").read_text().splitlines() if line.startswith(field))


def spent(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def fetch(agent, id, *arguments):
    return json.loads(agent.python(id, FETCH + f"print(json.dumps(fetch({', '.join(map(repr, arguments))})))"))


@pytest.mark.parametrize("workspace", [pytest.param({"lifetime": 6}, id="short")], indirect=True)
def test_boto3_goes_on_across_rotations_until_it_is_revoked(agent, workspace):
    script = FETCH + MOTO + """
s3, keys, end = client('s3'), [], time.time() + 15
while time.time() < end:
    s3.put_object(Bucket='research', Key=f'row-{len(keys)}', Body=b'1,2,3')
    keys.append(session.get_credentials().get_frozen_credentials().access_key)
    time.sleep(0.3)
read = [s3.get_object(Bucket='research', Key=o['Key'])['Body'].read() for o in s3.list_objects_v2(Bucket='research')['Contents']]
athena = client('athena')
query = athena.start_query_execution(QueryString='SELECT 1', ResultConfiguration={'OutputLocation': 's3://research/'})['QueryExecutionId']
state = athena.get_query_execution(QueryExecutionId=query)['QueryExecution']['Status']['State']
print(json.dumps([session.get_credentials().method, sorted(set(keys)), len(read), set(map(bytes.decode, read)) == {'1,2,3'}, state, client('sts').get_caller_identity()['Arn']]))
"""
    method, keys, read, whole, state, arn = json.loads(agent.python(workspace, script))
    assert method == "container-role" and read > 10 and whole and state == "SUCCEEDED" and arn
    assert len(keys) >= 3, f"two rotations at the least: {keys}"
    agent.run("credentials", "revoke", workspace)
    assert fetch(agent, workspace)[0] == 403
    lost = agent.exec(workspace, "python3", "-c", f"import boto3; boto3.client('s3', endpoint_url={ENDPOINT!r}).list_buckets()", check=False)
    assert lost.returncode != 0 and "this role was revoked" in lost.stderr, lost.stderr
    events = agent.events(workspace)
    issued = [e["attributes"] for e in events if e["type"] == Event.CredentialsIssued]
    assert sum(int(i["count"]) for i in issued) > 10 and {i["role"] for i in issued} == {"analyst"}
    assert [e["attributes"] for e in events if e["type"] == Event.CredentialsRevoked] == [{"roles": "analyst writer"}]


@pytest.mark.parametrize("workspace", [pytest.param({"lifetime": 6}, id="wrangler")], indirect=True)
def test_tables_with_awswrangler(agent, workspace):
    """As analysts write it: a table in S3 and Glue, read back and queried, until the role is revoked."""
    script = FETCH + MOTO + f"""
import awswrangler as wr, pandas as pd
for name in ('s3', 'athena', 'glue', 'sts'): setattr(wr.config, name + '_endpoint_url', {ENDPOINT!r})
boto3.setup_default_session()
wr.catalog.create_database('justice')
keys, end = [], time.time() + 10
while time.time() < end:
    wr.s3.to_parquet(pd.DataFrame({{'region': ['north', 'south'], 'cases': [3, 4]}}), 's3://research/cases/', dataset=True, database='justice', table='cases')
    keys.append(boto3.DEFAULT_SESSION.get_credentials().get_frozen_credentials().access_key)
    time.sleep(0.5)
read = wr.s3.read_parquet('s3://research/cases/', dataset=True)
# moto runs no SQL: what a query answers is told to it first.
column = {{'CatalogName': '', 'SchemaName': '', 'TableName': '', 'Name': 'n', 'Label': 'n', 'Type': 'bigint', 'Precision': 19, 'Scale': 0, 'Nullable': 'UNKNOWN', 'CaseSensitive': False}}
rows = [{{'Data': [{{'VarCharValue': text}}]}} for text in ('n', str(read.cases.sum()))]
urllib.request.urlopen(urllib.request.Request({ENDPOINT!r} + '/moto-api/static/athena/query-results',
    json.dumps({{'results': [{{'rows': rows, 'column_info': [column]}}], 'region': 'eu-west-1'}}).encode(), {{'Content-Type': 'application/json'}}))
answer = wr.athena.read_sql_query('SELECT sum(cases) AS n FROM cases', 'justice', ctas_approach=False, s3_output='s3://research/out/')
print(json.dumps([len(set(keys)), len(keys), len(read), list(wr.catalog.table('justice', 'cases')['Column Name']), int(answer.n[0])]))
"""
    rotations, writes, rows, columns, answer = json.loads(agent.python(workspace, script).splitlines()[-1])
    assert rotations >= 3 and rows == 2 * writes and columns == ["region", "cases"] and answer == 7 * writes, (rotations, writes, rows, columns, answer)
    agent.run("credentials", "revoke", workspace)
    lost = agent.exec(workspace, "python3", "-c", f"import awswrangler as wr; wr.config.s3_endpoint_url = {ENDPOINT!r}; wr.s3.list_objects('s3://research/')", check=False)
    assert lost.returncode != 0 and "this role was revoked" in lost.stderr, lost.stderr


@pytest.mark.parametrize("workspace", [pytest.param({"lifetime": 6, "image": "r:latest"}, id="r")], indirect=True)
def test_from_r_with_a_stand_in_for_paws(agent, workspace):
    agent.python(workspace, FETCH + MOTO)
    shutil.copy(ROOT / "Tests/EndToEnd/providers/s3.R", agent.directory / "homes" / "ada" / "s3.R")
    said = json.loads(agent.exec(workspace, "Rscript", "s3.R", ENDPOINT, "research", "14").stdout)
    assert len(said["keys"]) >= 3 and said["keys"][0].startswith("ASIAANALYST"), said
    assert said["count"] > 10 and said["whole"] and said["listed"] == said["count"], said
    agent.run("credentials", "revoke", workspace)
    lost = agent.exec(workspace, "Rscript", "s3.R", ENDPOINT, "research", "1", check=False)
    assert lost.returncode != 0 and "this role was revoked" in lost.stderr, lost


def test_the_broker_answers_while_the_agent_is_away(agent, workspace, place):
    status, first = fetch(agent, workspace)
    assert status == 200 and set(first) == {"AccessKeyId", "SecretAccessKey", "Token", "Expiration"} and first["AccessKeyId"] == "ASIAANALYST000001"
    assert fetch(agent, workspace, "/aws/writer")[1]["AccessKeyId"].startswith("ASIAWRITER")
    script = FETCH + """
took = []
for _ in range(300):
    begun = time.monotonic(); status, answer = fetch(); took.append(time.monotonic() - begun); assert status == 200; time.sleep(0.01)
took.sort()
print(json.dumps([took[150] * 1000, took[297] * 1000]))
"""
    agent.python(workspace, FETCH + f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {script!r}], stdout=open(os.path.expanduser('~/seen'), 'w'))")
    agent.kill()
    median, p99 = json.loads(until(lambda: next(iter(agent.directory.glob("homes/*/seen"))).read_text(), seconds=30))
    print(f"a credential request without an agent: median {median:.1f} ms, p99 {p99:.1f} ms")
    assert p99 < 100
    agent.start()
    # The new agent renews, and hears what was given while there was none.
    until(lambda: fetch(agent, workspace)[1]["AccessKeyId"] == "ASIAANALYST000002")
    until(lambda: sum(int(e["attributes"]["count"]) for e in agent.events(workspace) if e["type"] == Event.CredentialsIssued) >= 300)
    agent.run("credentials", "revoke", workspace, "--role", "writer")
    agent.kill()
    agent.start()
    assert fetch(agent, workspace, "/aws/writer")[0] == 403 and fetch(agent, workspace)[0] == 200
    time.sleep(1)
    assert fetch(agent, workspace, "/aws/writer")[0] == 403, "a new agent does not bring back what was revoked"


@pytest.mark.parametrize("workspace", [pytest.param({"refuse": True}, id="refused")], indirect=True)
def test_a_provider_that_fails_delays_nothing_and_is_told_once(agent, workspace, place):
    assert fetch(agent, workspace)[0] == 404
    time.sleep(2)
    failed = [e["attributes"] for e in agent.events(workspace) if e["type"] == Event.CredentialsFailed]
    assert sorted(f["role"] for f in failed) == ["analyst", "writer"] and "exited with status" in failed[0]["error"], failed
    (place / "refuse").unlink()
    until(lambda: fetch(agent, workspace)[0] == 200)


@pytest.mark.parametrize("workspace", [pytest.param({"hang": True}, id="hangs")], indirect=True)
def test_a_provider_that_hangs_is_ended_with_all_that_it_started(agent, workspace, place):
    """The start has waited for its time-out and no longer."""
    assert fetch(agent, workspace)[0] == 404
    phases = {p["name"]: p["milliseconds"] for p in agent.json("get", workspace)["phases"]}
    assert 1900 < phases["network"] < 6000, phases
    assert len([e for e in agent.events(workspace) if e["type"] == Event.CredentialsFailed]) == 2
    (place / "hang").unlink()
    until(lambda: fetch(agent, workspace)[0] == 200)
    until(lambda: not [p for p in pathlib.Path("/proc").glob("[0-9]*") if cmdline(p) == "sleep 1234"])


def test_attacks_on_the_broker(agent, workspace):
    address = agent.json("get", workspace)["address"]
    for where in (address, "127.0.0.1"):
        with pytest.raises(OSError):
            socket.create_connection((where, 15170), timeout=1)
    assert fetch(agent, workspace, None, "")[0] == 401
    assert fetch(agent, workspace, None, "0" * 48)[0] == 401
    for path in ("/aws/", "/aws/other", "/", "/aws/analyst/", "/aws/../aws/analyst", "/aws/analyst?x"):
        assert fetch(agent, workspace, path)[0] == 404, path
    assert fetch(agent, workspace, None, None, "PUT")[0] == 405
    # Half-open by the hundred, garbage and heads without an end: whoever asks properly is still answered.
    agent.python(workspace, FETCH + """
import socket
crowd = [socket.create_connection(('127.0.0.1', 15170)) for _ in range(300)]
for s in crowd[-20:]: s.sendall(b'GET / HTTP/1.1\\r\\nX: ')
for junk in (b'\\0' * 9000, b'\\n', b'\\r\\n\\r\\n', b'GET\\r\\n\\r\\n', os.urandom(9000), b'A' * 100_000):
    s = socket.create_connection(('127.0.0.1', 15170))
    try: s.sendall(junk); s.settimeout(2); s.recv(100)
    except OSError: pass
begun = time.monotonic()
assert fetch()[0] == 200 and time.monotonic() - begun < 1
""")
    assert agent.json("get", workspace)["state"] == "STATE_READY"
    # A flood costs its own workspace, not the host: the supervisor is outside the workspace's limits.
    name = f"carrel-shim {agent.sandbox(workspace)} {workspace}"
    shim = next(int(p.name) for p in pathlib.Path("/proc").glob("[0-9]*") if (p / "cmdline").exists() and cmdline(p) == name
                and cmdline(pathlib.Path("/proc") / status(p, "PPid")) != name)
    before = spent(shim)
    asked = int(agent.python(workspace, FETCH + """
import socket
end, count = time.monotonic() + 4, 0
while time.monotonic() < end:
    s = socket.create_connection(('127.0.0.1', 15170)); s.sendall(b'GET /aws/x HTTP/1.1\\r\\n\\r\\n'); count += 1
    if count % 50 == 0: s.recv(10)
    s.close()
print(count)
"""))
    assert asked > 1000, "the attacker makes progress"
    share = (spent(shim) - before) / 4
    print(f"{asked} connections in 4 s cost the supervisor {share:.0%} of a CPU")
    assert share < 0.2
    until(lambda: fetch(agent, workspace)[0] == 200, seconds=5)
    # The token is a file of the workspace's user, and the port cannot be taken by the tool.
    agent.python(workspace, "import os, socket\ns = os.stat(os.environ['AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE'])\nassert s.st_mode & 0o777 == 0o400 and s.st_uid == os.getuid()\n"
                 "try: socket.socket().bind(('127.0.0.1', 15170)); raise SystemExit('taken')\nexcept OSError: pass")


def test_secrets_are_in_nothing(agent, workspace):
    _, given = fetch(agent, workspace)
    canary = given["SecretAccessKey"].encode()
    assert canary.startswith(b"CANARY-secret")
    for file in [*agent.directory.glob("state/**/*"), agent.directory / "carreld.log"]:
        if file.is_file() and "images" not in file.parts:
            assert canary[:13] not in file.read_bytes(), file
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                assert canary[:13] not in (process / name).read_bytes(), process
            except OSError:
                pass
    shown = agent.run("get", workspace, "-o", "json").stdout + agent.run("events", "-o", "json").stdout + agent.run("explain", workspace, check=False).stdout
    assert "CANARY" not in shown


def test_variables_that_hide_the_broker_are_found(agent, workspace):
    pid = agent.python(workspace, "import os, subprocess\nprint(subprocess.Popen(['sleep', '300'], env={**os.environ, 'AWS_SECRET_ACCESS_KEY': 'CANARY-stale', 'AWS_PROFILE': 'x'}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)")
    condition = until(lambda: agent.json("get", workspace).get("conditions"), seconds=15)
    assert condition[0].startswith("StaleCredentials: sleep (pid ") and "AWS_SECRET_ACCESS_KEY, AWS_PROFILE" in condition[0], condition
    told = [e["attributes"] for e in agent.events(workspace) if e["type"] == Event.StaleCredentials]
    assert len(told) == 1 and told[0]["variables"] == "AWS_SECRET_ACCESS_KEY AWS_PROFILE" and "CANARY" not in str(told)
    agent.exec(workspace, "kill", pid)
    until(lambda: not agent.json("get", workspace).get("conditions"), seconds=15)


@pytest.mark.parametrize("changes, message", [
    ({"aws": "{roles: []}"}, "aws.roles: 0 roles"), ({"aws": "{roles: [a, a]}"}, "aws.roles: contains a role twice"),
    ({"aws": "{roles: [../x]}"}, "aws.roles[0]: expected 1 to 128 letters"), ({"aws": "{role: x}"}, "role"),
    ({"aws": "{roles: [a]}", "environment": "{AWS_PROFILE: x}"}, "environment.AWS_PROFILE: hides the renewed credentials"),
    ({"credentials": "[broker-token]"}, "is reserved for the agent")])
def test_bad_inputs(agent, changes, message):
    refused = agent.launch("batch.yaml", "refused", check=False, **changes)
    assert refused.returncode == 1 and message in refused.stderr, refused
    assert agent.run("get", "refused", check=False).returncode == 3
    unknown = agent.run("credentials", "revoke", "nobody", check=False)
    assert unknown.returncode == 3

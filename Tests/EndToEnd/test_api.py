# SPDX-License-Identifier: Apache-2.0
"""The socket as a stranger's client sees it: plain grpcio, stubs made from the .proto, nothing of ours."""

import os
import pathlib
import subprocess
import sys

import grpc
import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stubs")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}/proto", f"--python_out={folder}", f"--grpc_python_out={folder}",
                    "carrel/v1/carrel.proto", "grpc/health/v1/health.proto", "grpc/reflection/v1/reflection.proto"], check=True)
    sys.path.insert(0, str(folder))
    # The package "grpc" of the stubs would hide grpcio's own: these two are loaded by path.
    import importlib.util
    modules = {}
    for name, file in {"pb": "carrel/v1/carrel_pb2.py", "rpc": "carrel/v1/carrel_pb2_grpc.py", "health": "grpc/health/v1/health_pb2.py",
                       "reflection": "grpc/reflection/v1/reflection_pb2.py"}.items():
        spec = importlib.util.spec_from_file_location(f"carrel_test_{name}", folder / file)
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture(scope="module")
def channel(agent):
    with grpc.insecure_channel(f"unix:{agent.socket}") as channel:
        yield channel


def test_health_and_reflection_answer(stubs, channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=stubs["health"].HealthCheckResponse.FromString)
    assert check(stubs["health"].HealthCheckRequest(), timeout=5).status == 1
    reflection = stubs["reflection"]
    info = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", request_serializer=lambda m: m.SerializeToString(),
                                 response_deserializer=reflection.ServerReflectionResponse.FromString)
    answers = list(info(iter([reflection.ServerReflectionRequest(list_services=""),
                              reflection.ServerReflectionRequest(file_containing_symbol="carrel.v1.WorkspaceService")]), timeout=5))
    assert "carrel.v1.WorkspaceService" in [s.name for s in answers[0].list_services_response.service]
    assert answers[1].file_descriptor_response.file_descriptor_proto


def spec(pb, **changes):
    fields = dict(id="api", owner=pb.Owner(name="ada", uid=2001, gid=2001), tool="command", image="jupyterlab", command=["true"])
    return pb.WorkspaceSpec(**{**fields, **changes})


BAD = [
    (dict(id=""), "id"), (dict(id="../x"), "id"), (dict(id="a" * 300), "id"), (dict(id="-a"), "id"), (dict(tool="nosuch"), "tool"), (dict(command=[]), "command"),
    (dict(image=""), "image"), (dict(network=9), "network"), (dict(environment={"A=B": "x"}), "environment"),
    (dict(environment={"JUPYTER_TOKEN": "x"}), "environment.JUPYTER_TOKEN"),
]


def details(error):
    """The rich error model's details (google.rpc.Status), as text."""
    return dict(error.trailing_metadata()).get("grpc-status-details-bin", b"").decode(errors="replace")


@pytest.mark.parametrize("changes,field", BAD)
def test_bad_specs_are_refused_by_field_and_leave_nothing(agent, stubs, channel, changes, field):
    pb = stubs["pb"]
    with pytest.raises(grpc.RpcError) as error:
        stubs["rpc"].WorkspaceServiceStub(channel).Launch(pb.LaunchRequest(spec=spec(pb, **changes)), timeout=5)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and error.value.details().startswith(field)
    status = details(error.value)
    assert "google.rpc.ErrorInfo" in status and "INVALID_FIELD" in status and "google.rpc.BadRequest" in status and field in status, status
    assert "api" not in [w["spec"]["id"] for w in agent.json("ps")]


def test_uids_out_of_range_are_refused(stubs, channel):
    pb = stubs["pb"]
    for uid in (0, 999, 2**31, 2**32 - 1):
        with pytest.raises(grpc.RpcError) as error:
            stubs["rpc"].WorkspaceServiceStub(channel).Launch(pb.LaunchRequest(spec=spec(pb, owner=pb.Owner(name="a", uid=uid, gid=2001))), timeout=5)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "owner.uid" in error.value.details()


def test_launch_is_idempotent_by_id(agent, stubs, channel):
    pb, service = stubs["pb"], stubs["rpc"].WorkspaceServiceStub(channel)
    first = service.Launch(pb.LaunchRequest(spec=spec(pb)), timeout=10)
    second = service.Launch(pb.LaunchRequest(spec=spec(pb)), timeout=10)
    assert first.created and not second.created
    with pytest.raises(grpc.RpcError) as error:
        service.Launch(pb.LaunchRequest(spec=spec(pb, command=["false"])), timeout=5)
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS and "WORKSPACE_EXISTS" in details(error.value)
    agent.remove("api")


def test_what_is_not_there_and_what_is_too_much(stubs, channel):
    pb, service = stubs["pb"], stubs["rpc"].WorkspaceServiceStub(channel)
    cases = [
        (lambda: service.Get(pb.GetRequest(id="nosuch"), timeout=5), grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND"),
        (lambda: service.Stop(pb.StopRequest(id="nosuch"), timeout=5), grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND"),
        (lambda: service.Delete(pb.DeleteRequest(id="nosuch"), timeout=5), grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND"),
        (lambda: service.Launch(pb.LaunchRequest(), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (lambda: service.Launch(pb.LaunchRequest(spec=spec(pb, image="nosuch")), timeout=5), grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"),
        (lambda: service.Launch(pb.LaunchRequest(spec=spec(pb, resources=pb.Resources(memory="999Gi"))), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (lambda: list(service.Watch(pb.WatchRequest(cursor=10**9), timeout=5)), grpc.StatusCode.OUT_OF_RANGE, ""),
        (lambda: list(service.Watch(pb.WatchRequest(stream_id="other"), timeout=5)), grpc.StatusCode.OUT_OF_RANGE, ""),
    ]
    for call, code, reason in cases:
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() == code and reason in details(error.value), error.value.details()


def test_another_user_is_refused_and_logged(agent, stubs):
    """The directory keeps other users out; with its mode opened, the peer check still does, and says so."""
    folder = pathlib.Path(agent.socket).parent
    assert folder.stat().st_mode & 0o777 == 0o700 and pathlib.Path(agent.socket).stat().st_mode & 0o777 == 0o600
    program = f"""
import os, grpc
os.setgid(65534); os.setuid(65534)
with grpc.insecure_channel('unix:{agent.socket}') as c:
    try:
        c.unary_unary('/carrel.v1.NodeService/Info')(b'', timeout=5, metadata=[('x-carrel-peer', '0 1')])
        print('answered')
    except grpc.RpcError as e: print(e.code().name)
"""
    def call():
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip()
    assert call() == "UNAVAILABLE", "closed by the file system"
    try:
        folder.chmod(0o755)
        os.chmod(agent.socket, 0o666)
        assert call() == "PERMISSION_DENIED", "even with a forged header"
    finally:
        folder.chmod(0o700)
        os.chmod(agent.socket, 0o600)
    assert 'peer refused' in (agent.directory / "carreld.log").read_text() and 'uid="65534"' in (agent.directory / "carreld.log").read_text()


def test_the_plan_is_shown(agent):
    plan = agent.run("plan", str(ROOT / "manifests/jupyterlab.yaml")).stdout
    assert "load seccomp filter" in plan and "pivot root" in plan and "new user namespace" in plan

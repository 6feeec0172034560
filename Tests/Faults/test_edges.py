# SPDX-License-Identifier: Apache-2.0
"""Each number, enum, text and list of each request of the API with the values at the edges of its type. The fields come from the proto's
descriptors, so that a new one is tried as well. None may end the agent, hang it, or be an internal error."""

import os
import pathlib

import grpc
import pytest
from conftest import destroy, make, until

# What the agent would do as it is told: end the run, or act on the whole node for as long as a test lasts.
AFTER = {"Drain": ("Uncordon", "UncordonRequest")}
DEPTH = 5


@pytest.fixture(scope="module")
def agent():
    agent = make(pathlib.Path(f"/tmp/carrel-edges-{os.getpid()}"))
    agent.launch("edge", "echo x; sleep 100000")
    agent.wait("edge", "READY")
    yield agent
    destroy(agent)


def edges(field):
    """The values to try of a field that is no message."""
    kinds = field.CPPTYPE_UINT64, field.CPPTYPE_INT64, field.CPPTYPE_UINT32, field.CPPTYPE_INT32
    if field.cpp_type in kinds:
        bits = 64 if field.cpp_type in kinds[:2] else 32
        if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32):
            return [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, *([1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1] if bits == 64 else [])]
        return [0, 1, -1, -(1 << bits - 1), (1 << bits - 1) - 1]
    if field.cpp_type == field.CPPTYPE_ENUM:
        return [0, 1, 99, (1 << 31) - 1, -1]
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return [0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e308]
    if field.cpp_type == field.CPPTYPE_BOOL:
        return [True, False]
    texts = ["", " ", "\0", "..", "/", "../../etc/passwd", "-x", "a" * 256, "a" * 100_000, "\x1b[2J", "\u202ex", "%n%s", "é", "a\nb"]
    return [t.encode() for t in texts] if field.type == field.TYPE_BYTES else texts


def is_list(field):
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def paths(descriptor, depth=DEPTH):
    """Each field of a message that is no message itself, with the way to it."""
    for field in descriptor.fields:
        if field.message_type is None:
            yield [field]
        elif depth and field.message_type.GetOptions().map_entry:
            yield [field]
        elif depth:
            for rest in paths(field.message_type, depth - 1):
                yield [field, *rest]


def put(message, path, value):
    *way, field = path
    for step in way:
        found = getattr(message, step.name)
        message = (found[0] if len(found) else found.add()) if is_list(step) else found
        if not is_list(step):
            message.SetInParent()
    if field.message_type is not None:
        key, kind = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        try:
            getattr(message, field.name)[value if key.cpp_type == key.CPPTYPE_STRING else 1] = value if kind.cpp_type == kind.CPPTYPE_STRING else 1
        except (TypeError, ValueError):
            return
    elif is_list(field):
        getattr(message, field.name).extend([value] * (1 if not isinstance(value, (str, bytes)) or len(value) > 10 else 3))
    else:
        setattr(message, field.name, value)


def base(pb, kind, number):
    """A request that would be carried out, or comes near that."""
    message = getattr(pb, kind)()
    if kind == "LaunchRequest":
        message.spec.id, message.spec.tool, message.spec.image = f"e-{number}", "command", "busybox:latest"
        message.spec.owner.name, message.spec.owner.uid, message.spec.owner.gid = "ada", 2001, 2001
        message.spec.command.extend(["/bin/true"])
    for name in ("id", "workspace"):
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is not None and field.type == field.TYPE_STRING and kind not in ("LaunchRequest", "DeleteRequest", "StopRequest"):
            setattr(message, name, "edge")
    return message


def requests():
    from carrel.v1 import carrel_pb2, carrel_pb2_grpc, storage_pb2, storage_pb2_grpc
    for pb, rpc in ((storage_pb2, storage_pb2_grpc), (carrel_pb2, carrel_pb2_grpc)):
        for service in pb.DESCRIPTOR.services_by_name.values():
            # A drain with a deadline stops what the other calls are tried on.
            for method in sorted(service.methods, key=lambda method: method.name in AFTER):
                yield pb, rpc, service, method


def test_each_field_at_its_edges(agent, stubs):
    pid, calls, odd = agent.process.pid, 0, []
    options = [("grpc.use_local_subchannel_pool", 1)]
    for pb, rpc, service, method in requests():
        if method.name in AFTER:
            assert agent.get("edge")["state"] == "STATE_READY", "one of the calls ended another's workspace"
        with grpc.insecure_channel(f"unix:{agent.socket}", options=options) as channel:
            stub = getattr(rpc, f"{service.name}Stub")(channel)
            for path in paths(method.input_type):
                values = edges(path[-1] if path[-1].message_type is None else path[-1].message_type.fields_by_name["value"])
                for value in values:
                    message = base(pb, method.input_type.name, calls)
                    try:
                        put(message, path, value)
                    except (TypeError, ValueError):
                        continue  # Not of this type on the wire, such as a number of 33 bits.
                    calls += 1
                    where = f"{method.name}: {'.'.join(f.name for f in path)} = {str(value)[:40]!r}"
                    code = outcome(getattr(stub, method.name), method, message)
                    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE):
                        odd.append(f"{where}: {code.name}")
                    assert agent.lives and agent.process.pid == pid, f"the agent ended: {where}"
            if method.name in AFTER:
                name, kind = AFTER[method.name]
                getattr(stub, name)(getattr(pb, kind)(), timeout=10)
    assert not odd, f"{len(odd)} of {calls}:\n" + "\n".join(odd[:40])
    assert calls > 1000, calls
    until(lambda: agent.run("node").returncode == 0, "it answers")


def outcome(call, method, message):
    """The status of a call; a stream is ended after its first message, and one that does not end by then has none."""
    try:
        if method.client_streaming:
            responses = call(iter([message]), timeout=2)
            for _ in responses:
                break
            responses.cancel()
        elif method.server_streaming:
            responses = call(message, timeout=0.3)
            for _ in responses:
                break
            responses.cancel()
        else:
            call(message, timeout=10)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK

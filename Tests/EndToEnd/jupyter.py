# SPDX-License-Identifier: Apache-2.0
"""The Jupyter protocol as a notebook speaks it: kernels over HTTP and a websocket, terminals over another."""

import json
import time
import uuid

import requests
import websocket


class Jupyter:
    def __init__(self, workspace):
        self.base = f"http://{workspace['address']}:8888"
        self.headers = {"Authorization": f"token {workspace['token']}"}

    def request(self, method, path, **options):
        answer = requests.request(method, self.base + path, headers=self.headers, timeout=30, **options)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def socket(self, path):
        return websocket.create_connection(self.base.replace("http", "ws") + path, header=[f"Authorization: {self.headers['Authorization']}"], timeout=60)

    def start_kernel(self, name="python3"):
        return self.request("POST", "/api/kernels", json={"name": name})["id"]

    def execute(self, kernel, code):
        """Runs a cell; returns its text output and results."""
        channel = self.socket(f"/api/kernels/{kernel}/channels")
        message = {"header": {"msg_id": uuid.uuid4().hex, "username": "", "session": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.3"},
                   "parent_header": {}, "metadata": {}, "channel": "shell", "content": {"code": code, "silent": False}}
        channel.send(json.dumps(message))
        output = ""
        try:
            while True:
                answer = json.loads(channel.recv())
                if answer["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                    continue
                content = answer["content"]
                if answer["msg_type"] == "stream":
                    output += content["text"]
                elif answer["msg_type"] in ("execute_result", "display_data"):
                    output += content["data"].get("text/plain", "")
                elif answer["msg_type"] == "error":
                    output += content["ename"] + ": " + content["evalue"]
                elif answer["msg_type"] == "status" and content["execution_state"] == "idle":
                    return output
        finally:
            channel.close()

    def terminal(self, command, until):
        name = self.request("POST", "/api/terminals")["name"]
        channel = self.socket(f"/terminals/websocket/{name}")
        channel.send(json.dumps(["stdin", command + "\r"]))
        seen, end = "", time.time() + 30
        while until not in seen and time.time() < end:
            kind, *rest = json.loads(channel.recv())
            if kind == "stdout":
                seen += rest[0]
        channel.close()
        return seen

"""A DICOM node with DCMTK's programs as its peers, in this process or one of its own: for tests."""

import io
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.runtime.node import Node
from medmo_edge.runtime.node_config import read_node_config
from medmo_edge.runtime.node_log import NodeLog
from medmo_edge.runtime.node_status import node_status
from medmo_edge.runtime.session import load

WriteSource = Callable[..., Path]
ANSWER = "fake:nodule <box>[[100, 200, 300, 400]]</box>"
RULES = """
[node]
ae_title = "MEDMO"
spool = "spool"
port = 0
accept_from = ["CT1", "PACS"]
min_free_mb = 1
retry_seconds = 0.1
max_retry_seconds = 0.2
{node}
[destinations.pacs]
kind = "c-store"
host = "127.0.0.1"
port = {port}
ae_title = "PACS"
{destination}
[[rules]]
name = "locate"
modality = ["CT", "US"]
questions = ["Locate the nodule.", "Describe it."]
results = ["sr", "gsps"]
send_to = ["pacs"]
{rule}
"""
#: one question and one result for every image, which can be sent nowhere
LONE_RULES = """
[node]
ae_title = "MEDMO"
spool = "spool"
port = {port}
accept_from = ["CT1"]
min_free_mb = 1
retry_seconds = 0.2

[destinations.nobody]
kind = "c-store"
host = "127.0.0.1"
port = 1
ae_title = "NOBODY"

[[rules]]
name = "all"
questions = ["Locate the nodule."]
results = ["sr"]
send_to = ["nobody"]
"""


def tool(name: str) -> str:
    """Path of a program that is no part of Python, most often of DCMTK; or a skip."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connects(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def write_lone_rules(folder: Path) -> int:
    """rules.toml with ``LONE_RULES``; the port that the node will have."""
    port = free_port()
    (folder / "rules.toml").write_text(LONE_RULES.format(port=port))
    return port


def store(port: int, *paths: Path, calling: str = "CT1", called: str = "MEDMO") -> int:
    """Exit code of storescu."""
    command = [tool("storescu"), "-aet", calling, "-aec", called, "127.0.0.1", str(port)]
    return subprocess.run([*command, *map(str, paths)], capture_output=True).returncode


def until(done: Callable[[], Any], seconds: float = 40) -> None:
    """Wait for ``done``, or fail."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Bench:
    """A node in this process, its log, and the folder of a storescp that may run or not."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.port = free_port()
        self.got = folder / "got"
        self.got.mkdir()
        self.log = io.StringIO()

    def configure(self, *, node: str = "", destination: str = "", rule: str = "") -> None:
        """Write rules.toml."""
        text = RULES.format(port=self.port, node=node, destination=destination, rule=rule)
        (self.folder / "rules.toml").write_text(text)
        self.config = read_node_config(self.folder / "rules.toml")

    def start(self, answer: str = ANSWER) -> Node:
        """A running node."""
        node = Node(self.config, load(answer), NodeLog(self.log))
        node.start()
        self.stack.callback(node.stop)
        return node

    def receive(self, *options: str) -> None:
        """Start the destination."""
        command = [tool("storescp"), "-q", "+uf", "-od", str(self.got), *options, str(self.port)]
        peer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.stack.callback(peer.wait)
        self.stack.callback(peer.terminate)

    def send(self, node: Node, *paths: Path, calling: str = "CT1", called: str = "MEDMO") -> int:
        """See ``store``."""
        return store(node.port, *paths, calling=calling, called=called)

    def counts(self) -> dict[str, int]:
        """States of instances and deliveries."""
        status = node_status(self.config)
        destination = status["destinations"]["pacs"]
        return {
            **status["instances"],
            "sent": destination["sent"],
            "failed": destination["failed"],
            "unsent": destination["waiting"],
        }

"""Flip bytes in DICOM files and in DICOM messages, and watch that only one-line errors come out.

    python benchmarks/dicom_fuzz.py [--minutes 10] [--seed 0] [--json]

For a third of the time damaged files are read in this process and made into all four results;
anything but a MedmoError is a failure. For a third damaged compressed files go to the decoders of a
pool, which may crash there, but every hundredth file is whole and must give the right pixels, and
processes and open files must not pile up. For a third damaged associations (a recorded C-STORE with
bytes flipped, cut or repeated) go to a node on the loopback interface, which must still answer
C-ECHO afterwards, keep its threads and set aside what it cannot read. The model is ``fake:``. Not
fuzzed: TLS.
"""

import argparse
import io
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pydicom

from medmo_edge.dicom_pool import DecoderPool
from medmo_edge.dicom_process import IN_PROCESS
from medmo_edge.errors import MedmoError
from medmo_edge.images import read_image
from medmo_edge.runtime.node import Node
from medmo_edge.runtime.node_config import read_node_config
from medmo_edge.runtime.node_log import NodeLog
from medmo_edge.runtime.quiet import silence_libraries
from medmo_edge.runtime.results import KINDS, ResultOptions
from medmo_edge.runtime.session import load

INSTALLED = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = ("CT_small.dcm", "MR_small.dcm", "examples_rgb_color.dcm", "examples_palette.dcm")
COMPRESSED = (
    *("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    *("SC_rgb_jpeg_gdcm.dcm", "JPEG2000.dcm", "SC_rgb_rle_2frame.dcm", "CT_small.dcm"),
)
ANSWER = "fake:nodule <box>[[100, 200, 300, 400]]</box>"
RULES = """
[node]
ae_title = "MEDMO"
spool = "spool"
port = 0
accept_from = ["CT1"]
max_associations = 50
max_instance_mb = 4
timeout_seconds = 2
min_free_mb = 1

[destinations.web]
kind = "stow-rs"
url = "http://127.0.0.1:1/studies"

[[rules]]
name = "all"
questions = ["Locate the nodule."]
results = ["sr", "gsps"]
send_to = ["web"]
"""


def damage(content: bytes, chance: random.Random, header: int) -> bytes:
    """``content`` with a few bytes changed, mostly among the first ``header``, or cut."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(header if chance.random() < 0.9 else len(changed))
        changed[min(place, len(changed) - 1)] = chance.choice((0, 255, chance.randrange(256)))
    if chance.random() < 0.05:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


def fuzz_files(folder: Path, seconds: float, chance: random.Random) -> dict[str, Any]:
    """Damaged files to results; counts by outcome and the first failures."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    originals = [(INSTALLED / name).read_bytes() for name in FILES]
    path = folder / "damaged.dcm"
    deadline = time.monotonic() + seconds
    with load(ANSWER) as session:
        while time.monotonic() < deadline:
            path.write_bytes(damage(chance.choice(originals), chance, 2500) or b"0")
            try:
                frame = read_image(path)
                answer = session.ask(frame, "Locate the nodule.")
                for kind, make in KINDS.items():
                    outcomes[f"{kind} made"] += bool(make([frame], answer, ResultOptions()))
            except MedmoError as error:
                outcomes[type(error).__name__] += 1
                if "\n" in str(error):
                    failures.append(f"two lines: {error!r}")
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
                (folder / f"failure-{len(failures)}.dcm").write_bytes(path.read_bytes())
    return {"outcomes": dict(outcomes), "failures": failures[:10], "count": len(failures)}


def fuzz_pool(folder: Path, seconds: float, chance: random.Random) -> dict[str, Any]:
    """Damaged compressed files to a decoder pool; counts by outcome and the first failures."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    originals = [(INSTALLED / name).read_bytes() for name in COMPRESSED]
    path, whole = folder / "damaged.dcm", INSTALLED / "CT_small.dcm"
    expected = read_image(whole).pixels.tobytes()
    with DecoderPool(1) as pool:
        read_image(whole, decoders=pool)
        files = len(os.listdir("/proc/self/fd"))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            content = chance.choice(originals)
            path.write_bytes(damage(content, chance, len(content)) or b"0")
            try:
                outcomes["read"] += bool(read_image(path, decoders=pool).pixels.size)
            except MedmoError as error:
                outcomes[_kind(str(error))] += 1
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
                (folder / f"pool-{len(failures)}.dcm").write_bytes(path.read_bytes())
            if sum(outcomes.values()) % 100 == 0:
                if read_image(whole, decoders=pool).pixels.tobytes() != expected:
                    failures.append("a whole file was read wrongly after a damaged one")
                if len(os.listdir("/proc/self/fd")) > files:
                    failures.append("open files pile up")
    return {"outcomes": dict(outcomes), "failures": failures[:10], "count": len(failures)}


def _kind(message: str) -> str:
    """What became of the process, in a word."""
    words = ("crashed", "memory", "processor time", "was stopped", "damaged answer", "exit code")
    return next((word for word in words if word in message), "ImageError")


class Recorder:
    """A proxy that writes down what an honest storescu says, to be damaged later."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.said: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = int(self._listener.getsockname()[1])
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        node = socket.create_connection(("127.0.0.1", self.port))
        back = threading.Thread(target=self._copy, args=(node, client, None), daemon=True)
        back.start()
        self._copy(client, node, self.said)
        back.join(5)

    def _copy(self, source: socket.socket, target: socket.socket, keep: list[bytes] | None) -> None:
        try:
            while data := source.recv(65536):
                if keep is not None:
                    keep.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side hung up


def echo(port: int, file: str = "") -> bool:
    """Whether the node answers C-ECHO, or takes ``file`` by C-STORE."""
    from pynetdicom import AE

    entity = AE(ae_title="CT1")
    entity.add_requested_context("1.2.840.10008.1.1")
    entity.add_requested_context("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.1")
    association = entity.associate("127.0.0.1", port, ae_title="MEDMO")
    if not association.is_established:
        return False
    status = association.send_c_store(file) if file else association.send_c_echo()
    association.release()
    return bool(status.get("Status") == 0)


def shout(port: int, messages: list[bytes], chance: random.Random) -> None:
    """Say damaged messages to the node; what it answers does not matter."""
    victim = chance.randrange(len(messages))
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.settimeout(0.5)
        try:
            for number, message in enumerate(messages):
                head = min(3000, len(message))
                peer.sendall(damage(message, chance, head) if number == victim else message)
                if number == 0 and not peer.recv(4096):
                    return  # the association was refused
            while peer.recv(4096):
                pass
        except OSError:
            pass  # it hung up, or waits for the rest


def fuzz_node(folder: Path, seconds: float, chance: random.Random) -> dict[str, Any]:
    """Damaged associations to a node; whether it still works afterwards."""
    (folder / "rules.toml").write_text(RULES)
    log = io.StringIO()
    sent = 0
    with Node(read_node_config(folder / "rules.toml"), load(ANSWER), NodeLog(log)) as node:
        recorder = Recorder(node.port)
        works = echo(recorder.own_port, str(INSTALLED / "MR_small.dcm"))
        recorder.thread.join(10)
        before = threading.active_count()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shout(node.port, recorder.said, chance)
            sent += 1
        time.sleep(5)  # the last associations time out
        after = threading.active_count()
        return {
            "associations": sent,
            "recorded_messages": len(recorder.said),
            "stored_damaged": log.getvalue().count(" stored ") - 1,
            "quarantined": log.getvalue().count(" quarantined "),
            "threads_before": before,
            "threads_after": after,
            "works": works and echo(node.port) and after <= before + 1,
        }


def main() -> None:
    """Run and print; exit code 1 when anything but a one-line error came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    silence_libraries(lambda where, kind: None)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        pool = fuzz_pool(Path(name), options.minutes * 20, chance)
        os.environ[IN_PROCESS] = "1"
        files = fuzz_files(Path(name), options.minutes * 20, chance)
        node = fuzz_node(Path(name), options.minutes * 20, chance)
    passed = not files["count"] and not pool["count"] and node["works"]
    result = {"files": files, "pool": pool, "node": node, "passed": passed}
    print(json.dumps(result, indent=2) if options.json else result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()

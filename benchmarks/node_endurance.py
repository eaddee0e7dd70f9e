"""Kill the DICOM node at random moments and count what its destinations got; DCMTK is the peer.

    python benchmarks/node_endurance.py [--instances 1000] [--kills 20]
        [--chunk 20] [--seed 0] [--json]

storescu sends CT instances, repeating every chunk that was not acknowledged whole (so duplicates
happen by themselves), while the node is killed with SIGKILL. Three storescp receive the results: a
good one, a slow one (a second per object) that gets every twentieth, and one that is dead until the
end. Passes when every acknowledged instance has exactly one result object at each destination, and
every repetition of an object is byte for byte the same. The model is ``fake:``: the node is the
subject. Everything stays on the loopback interface.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dcmtk_programs import prefer_dcmtk

ANSWER = "fake:nodule <box>[[100, 200, 300, 400]]</box>"
PATIENT = "ENDURANCE^PATIENT"
EVERY = 20  # every so many chunks go to the slow destination too
DESTINATIONS = ("good", "slow", "dead")
RULES = """
[node]
ae_title = "MEDMO"
spool = "spool"
port = {node}
accept_from = ["CT1", "FEW"]
min_free_mb = 1
retry_seconds = 0.2
max_retry_seconds = 2.0

[destinations.good]
kind = "c-store"
host = "127.0.0.1"
port = {good}
ae_title = "GOOD"

[destinations.slow]
kind = "c-store"
host = "127.0.0.1"
port = {slow}
ae_title = "SLOW"

[destinations.dead]
kind = "c-store"
host = "127.0.0.1"
port = {dead}
ae_title = "DEAD"

[[rules]]
name = "all"
modality = ["CT"]
questions = ["Locate the nodule."]
results = ["sr"]
send_to = ["good", "dead"]

[[rules]]
name = "few"
calling_ae_title = "FEW"
questions = ["What is shown?"]
results = ["gsps"]
send_to = ["slow"]
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def write_instances(folder: Path, count: int) -> list[Path]:
    """CT instances of one synthetic patient, each with its own SOP Instance UID."""
    import pydicom

    installed = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
    dataset = pydicom.dcmread(installed)
    dataset.PatientName, dataset.PatientID = PATIENT, "ENDURANCE-1"
    folder.mkdir()
    paths = []
    for number in range(count):
        dataset.SOPInstanceUID = f"2.25.{1000000 + number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = number + 1
        paths.append(folder / f"{number:05}.dcm")
        dataset.save_as(paths[-1])
    return paths


class Node:
    """The process under test, in ``folder``; started again after each kill."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.log = (folder / "node.log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "medmo_edge", "node", ANSWER, "--config", "rules.toml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stderr=self.log, stdout=self.log, env=environment
        )
        deadline = time.monotonic() + 180  # a busy machine
        while not listens(self.port):
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                said = (self.folder / "node.log").read_text()[-500:]
                raise SystemExit(f"the node did not start (exit code {code}): {said}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Without a chance to clean up."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """After a failed trial."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()

    def stop(self) -> int:
        """As a service manager does; its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(60)
        self.log.close()
        return code

    def status(self) -> dict[str, Any]:
        """What ``medmo-edge node status --json`` says."""
        command = [sys.executable, "-m", "medmo_edge", "node", "status", "--config", "rules.toml"]
        run = subprocess.run([*command, "--json"], cwd=self.folder, capture_output=True, check=True)
        values: dict[str, Any] = json.loads(run.stdout)
        return values


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def receive(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    """A storescp that keeps every object it gets, repetitions too."""
    folder.mkdir()
    command = ["storescp", "-q", "+uf", "-od", str(folder), *options, str(port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def send(paths: list[Path], port: int, calling: str) -> int:
    """Send until acknowledged, as a modality does; how many times it took."""
    command = ["storescu", "-aec", "MEDMO", "-aet", calling, "127.0.0.1", str(port)]
    for tries in range(1, 10_000):
        run = subprocess.run([*command, *map(str, paths)], capture_output=True)
        if run.returncode == 0:
            return tries
        time.sleep(0.2)
    raise SystemExit("the node never acknowledged a chunk")


def send_all(paths: list[Path], chunk_size: int, port: int, tries: list[int]) -> None:
    """Send everything in chunks; every EVERY-th chunk also wants the slow destination."""
    chunks = [paths[at : at + chunk_size] for at in range(0, len(paths), chunk_size)]
    for number, chunk in enumerate(chunks):
        tries.append(send(chunk, port, "FEW" if number % EVERY == 0 else "CT1"))


def torment(
    node: Node, kills: int, pause: float, chance: random.Random, sending: threading.Thread
) -> int:
    """Kill and restart; the number of kills while instances were on their way or in work."""
    done = 0
    while done < kills:
        time.sleep(chance.uniform(0.05, 1.0) * pause)
        waiting = sending.is_alive() or node.status()["instances"]["waiting"] > 0
        if not waiting:
            break
        node.kill()
        done += 1
        node.start()
    return done


def drain(node: Node, deadline: float) -> dict[str, Any]:
    """Wait until nothing waits; the last status."""
    while True:
        status = node.status()
        left = status["instances"]["waiting"]
        left += sum(one["waiting"] for one in status["destinations"].values())
        if left == 0 or time.monotonic() > deadline:
            return status
        time.sleep(1.0)


def examine(folder: Path) -> dict[str, Any]:
    """What a destination got: objects, the sources they are about, and whether repeats differ."""
    import pydicom

    copies: dict[str, set[str]] = defaultdict(set)
    arrivals: Counter[str] = Counter()
    about: dict[str, set[str]] = defaultdict(set)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        uid = str(dataset.SOPInstanceUID)
        arrivals[uid] += 1
        copies[uid].add(hashlib.sha256(path.read_bytes()).hexdigest())
        about[source_of(dataset)].add(uid)
    return {
        "objects": len(arrivals),
        "repeated": sum(count - 1 for count in arrivals.values()),
        "repeats_differ": sum(len(each) > 1 for each in copies.values()),
        "sources": set(about),
        "sources_with_several": sum(len(each) > 1 for each in about.values()),
    }


def source_of(dataset: Any) -> str:
    """SOP Instance UID of the image that a result is about."""
    if "CurrentRequestedProcedureEvidenceSequence" in dataset:
        series = dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
        return str(series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
    series = dataset.ReferencedSeriesSequence[0]
    return str(series.ReferencedImageSequence[0].ReferencedSOPInstanceUID)


def run(
    folder: Path, instances: int, kills: int, pause: float, chunk: int, seed: int
) -> dict[str, Any]:
    """The whole trial; what came of it."""
    ports = dict(zip(("node", *DESTINATIONS), free_ports(4), strict=True))
    (folder / "rules.toml").write_text(RULES.format(**ports))
    paths = write_instances(folder / "source", instances)
    start = time.monotonic()
    with ExitStack() as stack:
        for name, options in (("good", ()), ("slow", ("--sleep-after", "1"))):
            peer = receive(folder / name, ports[name], *options)
            stack.callback(peer.terminate)
        node = Node(folder, ports["node"])
        node.start()
        stack.callback(node.end)
        tries: list[int] = []
        sending = threading.Thread(target=send_all, args=(paths, chunk, ports["node"], tries))
        sending.start()
        killed = torment(node, kills, pause, random.Random(seed), sending)
        sending.join()
        peer = receive(folder / "dead", ports["dead"])
        stack.callback(peer.terminate)
        status = drain(node, time.monotonic() + 60 + 2 * instances)
        code = node.stop()
    got = {name: examine(folder / name) for name in DESTINATIONS}
    return {
        "instances": instances,
        "kills": killed,
        "seconds": round(time.monotonic() - start, 1),
        "chunks_sent_again": sum(tries) - len(tries),
        "exit_code": code,
        "status": status,
        **judge(instances, chunk, got, (folder / "node.log").read_text()),
    }


def judge(instances: int, chunk: int, got: dict[str, dict[str, Any]], log: str) -> dict[str, Any]:
    """Whether everything arrived exactly once, and nothing of the patient is in the log."""
    every = {f"2.25.{1000000 + number}" for number in range(instances)}
    few = {
        f"2.25.{1000000 + number}" for number in range(instances) if number // chunk % EVERY == 0
    }
    wanted = {"good": every, "dead": every, "slow": few}
    complete = all(
        got[name]["sources"] == wanted[name] and got[name]["objects"] == len(wanted[name])
        for name in DESTINATIONS
    )
    same = not any(got[name]["repeats_differ"] for name in DESTINATIONS)
    leaks = re.findall(rf"{re.escape(PATIENT)}|ENDURANCE|2\.25\.1\d{{6}}|Traceback", log)
    for one in got.values():
        one["sources"] = len(one["sources"])
    return {
        "destinations": got,
        "log_lines": log.count("\n"),
        "leaks": len(leaks),
        "passed": complete and same and not leaks,
    }


def main() -> None:
    """Run and print; exit code 1 when something was lost, doubled or told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.0, help="longest time between kills, s")
    parser.add_argument("--chunk", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prefer_dcmtk()
    for tool in ("storescu", "storescp"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed: it is in DCMTK")
    with tempfile.TemporaryDirectory() as folder:
        values = (options.instances, options.kills, options.pause, options.chunk, options.seed)
        result = run(Path(folder), *values)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()

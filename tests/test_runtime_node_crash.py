"""Kill -9 at random, in small; benchmarks/node_endurance.py is the same trial with 1,000."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from node_bench import connects, store, tool, until, write_lone_rules

pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
pydicom = pytest.importorskip("pydicom")
TRIAL = Path(__file__).parents[1] / "benchmarks" / "node_endurance.py"


def _run(*options: str) -> None:
    for name in ("storescu", "storescp"):
        tool(name)
    command = [sys.executable, str(TRIAL), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout, run.stderr
    result = json.loads(run.stdout)
    assert result["passed"] and run.returncode == 0, result
    assert result["kills"] >= 1 and result["exit_code"] == 0
    assert result["status"]["instances"]["answered"] == result["instances"]


def test_every_accepted_instance_is_answered_once() -> None:
    # Pauses shorter than the sending of one chunk, so that a fast machine is hit, too.
    _run("--instances", "16", "--kills", "2", "--pause", "0.15", "--chunk", "2")


@pytest.mark.slow
def test_every_one_of_a_thousand_instances_is_answered_once() -> None:
    _run("--instances", "1000", "--kills", "20")


def test_nothing_of_a_data_set_is_printed(
    tmp_path: Path, write_source: Callable[..., Path]
) -> None:
    """Libraries warn with the value that they find odd; a node's log is for everybody."""
    tool("storescu")
    port = write_lone_rules(tmp_path)
    bad_uid = write_source("ct", tmp_path / "a.dcm")
    content = bad_uid.read_bytes()
    uid = str(pydicom.dcmread(bad_uid).SOPInstanceUID).encode()
    bad_uid.write_bytes(content.replace(uid, b"../SECRET".ljust(len(uid), b"A")))
    odd = write_source("ct", tmp_path / "b.dcm", PatientName="SECRET^NAME", PatientAge=None)
    odd.write_bytes(odd.read_bytes().replace(b"DA\x08\x0020040119", b"DA\x08\x00SECRETDA"))
    command = [sys.executable, "-m", "medmo_edge", "node", "fake:yes", "--config", "rules.toml"]
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            until(lambda: connects(port))
            assert store(port, bad_uid) != 0 and store(port, odd) == 0
            until(lambda: " answered " in (tmp_path / "log").read_text())
        finally:
            node.terminate()
            node.wait()
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.fullmatch(r"\S+Z [a-z_]+( [a-z]+=\S+)*", line.strip()) for line in lines), lines
    assert "SECRET" not in "".join(lines)


def test_a_disk_that_is_really_full(tmp_path: Path, write_source: Callable[..., Path]) -> None:
    """The spool is a file system of 4 MB; what does not fit is refused, not lost."""
    for name in ("storescu", "unshare"):
        tool(name)
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m t spool && exec "$@"', "-"]
    (tmp_path / "spool").mkdir()
    if subprocess.run([*inside, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace")
    port = write_lone_rules(tmp_path)
    command = [sys.executable, "-m", "medmo_edge", "node", "fake:yes", "--config", "rules.toml"]
    environment = {**os.environ, "MEDMO_EDGE_DICOM_IN_PROCESS": "1"}
    node = subprocess.Popen(
        [*inside, *command], cwd=tmp_path, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        spool = Path(f"/proc/{node.pid}/root{tmp_path}/spool")
        until(lambda: connects(port))
        sent = [
            store(port, write_source("ct", tmp_path / "a.dcm", SOPInstanceUID=f"1.2.{n}"))
            for n in range(4)
        ]
        until(lambda: len(list((spool / "results").glob("*.dcm"))) == 4)
        fill = spool / "somebody-elses-file"
        fill.write_bytes(bytes(os.statvfs(spool).f_bavail * os.statvfs(spool).f_bsize))
        refused = write_source("ct", tmp_path / "b.dcm", SOPInstanceUID="1.2.9")
        assert store(port, refused) != 0
        fill.unlink()
        assert sent == [0] * 4 and store(port, refused) == 0
        until(lambda: len(list((spool / "results").glob("*.dcm"))) == 5)
        assert not list((spool / "incoming").iterdir())
    finally:
        node.kill()
        node.wait()

"""``ask --sr --gsps --sc --fhir`` and ``node`` as a user types them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("highdicom", reason="DICOM results need the dicom extra")
pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
FAKE = "fake:nodule <box>[[100, 200, 300, 400]]</box>"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medmo_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def _refused(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("medmo-edge: ") and run.stderr.count("\n") == 1
    for word in words:
        assert word in run.stderr


def test_ask_writes_all_results(write_source: Callable[..., Path], tmp_path: Path) -> None:
    source = write_source("dx", tmp_path / "source.dcm")
    places = {kind: tmp_path / f"result.{kind}" for kind in ("sr", "gsps", "sc", "fhir")}
    options = [text for kind, path in places.items() for text in (f"--{kind}", path)]
    run = _run("ask", FAKE, source, "Where?", "--json", *options)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["boxes"][0]["label"] == "nodule"
    for kind in ("sr", "gsps", "sc"):
        assert places[kind].read_bytes()[128:132] == b"DICM"
    assert json.loads(places["fhir"].read_text())["resourceType"] == "Bundle"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(
        [".dcm", ".sr", ".gsps", ".sc", ".fhir"]
    )
    _refused(_run("ask", FAKE, source, "Where?", "--sr", places["sr"]), "exists already")
    _refused(
        _run("ask", FAKE, source, "Where?", "--sr", tmp_path / "x", "--sc", tmp_path / "x"),
        "named for two results",
    )


def test_ask_refuses_results_about_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    _refused(_run("ask", FAKE, picture, "Where?", "--sr", tmp_path / "x"), "is no DICOM file")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_node_refuses_bad_rules_and_empty_spools(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[node]\n")
    _refused(_run("node", FAKE, "--config", rules), "rules.toml", "is missing")
    rules.write_text(
        '[node]\nae_title = "A"\nspool = "spool"\naccept_from = "B"\n'
        '[destinations.web]\nkind = "stow-rs"\nurl = "http://127.0.0.1:1/studies"\n'
        '[[rules]]\nname = "r"\nquestions = "What?"\nresults = "sr"\nsend_to = "web"\n'
    )
    _refused(_run("node", "status", "--config", rules), "no node has run there yet")
    _refused(_run("node", tmp_path / "no-artifact", "--config", rules), "no-artifact")

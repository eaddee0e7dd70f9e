"""The on-site self-test and the reading side of certificates, on a random checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from medmo_edge.boxes import Geometry, to_source
from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.cli import cli
from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest, read_manifest, record_file, write_manifest
from medmo_edge.runtime.certified import coverage, device_class, run_key, subject_sha256
from medmo_edge.runtime.device import Cuda, Device
from medmo_edge.runtime.golden import read_golden
from medmo_edge.runtime.self_test import format_self_test, self_test

pytest.importorskip("gguf", reason="needs the export extra")
pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")

from medmo_edge.export.export import export_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as gguf-f16 with golden cases. Do not write into it."""
    folder = tmp_path_factory.mktemp("golden") / "artifact"
    export_checkpoint(tiny_checkpoint, "gguf-f16", folder)
    return folder


def edit(artifact: Path, folder: Path, **changes: Any) -> Path:
    """A copy with other manifest entries, its hashes fitting."""
    shutil.copytree(artifact, folder)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, **changes))
    return folder


def edit_golden(artifact: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose golden.json was changed, its hashes fitting."""
    shutil.copytree(artifact, folder)
    path = folder / "golden.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    manifest = _raw(folder)
    write_manifest(
        folder, replace(manifest, files={**manifest.files, path.name: record_file(path, "golden")})
    )
    return folder


def _raw(folder: Path) -> Manifest:
    """The manifest without looking at the files."""
    return Manifest(**json.loads((folder / "manifest.json").read_text()))


def test_a_sound_artifact_passes_in_seconds_and_says_where_the_truth_is_from(
    artifact: Path,
) -> None:
    found = self_test(artifact, threads=1)
    assert found.passed and found.cases == 3
    names = [check.name for check in found.checks]
    assert names == [
        "tokenizer",
        "preprocessing",
        "vision",
        "answer",
        "boxes",
        "vision as exported",
        "answer as exported",
    ]
    assert found.source["truth"].startswith("float32 forward pass of the checkpoint")
    assert format_self_test(found).splitlines()[-1].startswith("PASS (3 golden cases")
    json.dumps(found.to_dict(), allow_nan=False)


def test_expected_boxes_are_those_of_the_convention(tiny_checkpoint: Path, artifact: Path) -> None:
    """By hand: 125..500 of a thousand in x, 250..875 in y."""
    golden = read_golden(read_manifest(artifact))
    for case in golden.cases:
        height, width = case.frame().pixels.shape[:2]
        assert case.boxes == [[width / 8, height / 4, width / 2, height * 0.875]]
        size = Geometry(
            width=width,
            height=height,
            frame_width=width,
            frame_height=height,
            resized_width=1,
            resized_height=1,
        )
        assert to_source((125, 250, 500, 875), size, "norm1000") == pytest.approx(case.boxes[0])


@pytest.mark.parametrize("coords", ["pixel_resized", "pixel_original"])
def test_golden_cases_follow_the_checkpoints_convention(
    coords: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", coords=coords)
    export_checkpoint(checkpoint, "gguf-f16", tmp_path / "artifact")
    assert self_test(tmp_path / "artifact", threads=1).passed
    other = "pixel_original" if coords == "pixel_resized" else "pixel_resized"
    broken = edit(tmp_path / "artifact", tmp_path / "broken", coords=other)
    failed = [each.name for each in self_test(broken, threads=1).checks if not each.passed]
    assert failed == ["boxes"]


def test_a_failure_names_its_stage_and_exits_with_one(artifact: Path, tmp_path: Path) -> None:
    broken = edit(artifact, tmp_path / "broken", coords="pixel_resized")
    done = CliRunner().invoke(
        cli, ["verify", str(broken), "--on-device", "--threads", "1"], standalone_mode=False
    )
    assert done.return_value == 1 and "FAIL, first at stage boxes" in done.output
    good = CliRunner().invoke(
        cli, ["verify", str(artifact), "--on-device", "--json"], standalone_mode=False
    )
    assert good.return_value == 0 and json.loads(good.output)["passed"] is True


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("tokenizer", lambda golden: golden.update(tokenizer_sha256="0" * 64)),
        ("tokenizer", lambda golden: golden["cases"][1]["prompt_ids"].append(3)),
        ("preprocessing", lambda golden: golden["cases"][0]["patches"].__setitem__(5, 0.5)),
        (
            "preprocessing",
            lambda golden: golden["cases"][0]["patch_places"].__setitem__(5, 1 << 40),
        ),
        ("vision", lambda golden: golden["cases"][2]["truth"]["features"][3].__setitem__(7, 50.0)),
        ("vision", lambda golden: golden["cases"][0]["rows"].__setitem__(15, 1 << 40)),
        ("answer", lambda golden: golden["cases"][0]["truth"]["top"].__setitem__(1, -0.1)),
        ("answer", lambda golden: golden["cases"][0]["truth"]["chosen"].__setitem__(9, -0.001)),
        ("boxes", lambda golden: golden["cases"][0]["boxes"].append([0, 0, 1, 1])),
        (
            "vision as exported",
            lambda golden: golden["cases"][0]["exported"]["features"][0].reverse(),
        ),
        (
            "answer as exported",
            lambda golden: golden["cases"][0]["exported"]["chosen"].__setitem__(0, -9.0),
        ),
    ],
)
def test_every_stage_can_fail(
    stage: str, change: Callable[[dict[str, Any]], None], artifact: Path, tmp_path: Path
) -> None:
    found = self_test(edit_golden(artifact, tmp_path / "broken", change), threads=1)
    assert stage in [check.name for check in found.checks if not check.passed]


def test_exported_values_count_only_on_the_same_kind_of_device(
    artifact: Path, tmp_path: Path
) -> None:
    def elsewhere(golden: dict[str, Any]) -> None:
        golden["source"]["exported"]["device_class"] = "cuda sm90"
        golden["cases"][0]["exported"]["chosen"] = [-9.0]

    found = self_test(edit_golden(artifact, tmp_path / "other", elsewhere), threads=1)
    assert found.passed and [check.name for check in found.checks][-1] == "boxes"


def test_an_artifact_without_golden_cases_says_so(tiny_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_artifact)
    assert "golden.json" not in manifest.files
    with pytest.raises(ArtifactError, match="has no golden cases: export it again"):
        self_test(tiny_artifact, threads=1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"cases": []}, "schema"),
        ({"x": 1}, "cannot be read"),
    ],
)
def test_a_strange_golden_file_is_refused(
    values: dict[str, Any], words: str, artifact: Path, tmp_path: Path
) -> None:
    broken = edit_golden(artifact, tmp_path / "a", lambda golden: golden.update(values))
    with pytest.raises(ArtifactError, match=words):
        self_test(broken, threads=1)


def test_the_self_test_needs_neither_torch_nor_checkpoint(artifact: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf'): sys.modules[name] = None\n"
        "from medmo_edge.cli import cli\n"
        f"code = cli.main(['verify', {str(artifact)!r}, '--on-device'], standalone_mode=False)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout


def test_truth_comes_from_the_checkpoint_not_from_the_artifact(
    artifact: Path, tiny_checkpoint: Path
) -> None:
    """The stored sample equals the checkpoint's float32 features where it was taken."""
    from medmo_edge.evaluation.plain_forward import encode
    from medmo_edge.preprocess import resize

    case = read_golden(read_manifest(artifact)).cases[1]
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        features = encode(checkpoint, resize(case.frame().pixels, checkpoint.preprocessing))
    sampled = features[np.ix_(case.rows, case.columns)]
    np.testing.assert_allclose(np.array(case.truth.features), sampled, rtol=2e-5, atol=1e-5)


def certified(artifact: Path, **changes: Any) -> Manifest:
    """The manifest with a passing certificate for this library on "cpu test"."""
    from medmo_edge.runtime.certified import libraries_of

    manifest = read_manifest(artifact)
    run = {"verdict": "pass", "libraries": libraries_of("llamacpp")} | changes
    certificate = {
        "schema": 1,
        "subject_sha256": subject_sha256(manifest),
        "runs": {run_key("llamacpp", "cpu test"): run},
    }
    return replace(manifest, certificate=certificate)


def test_a_certificate_covers_one_backend_library_and_device_class(artifact: Path) -> None:
    good = certified(artifact)
    assert coverage(good, "llamacpp", "cpu test").obstacle is None
    assert good.certificate is not None
    cases: list[tuple[Manifest, tuple[str, str], str]] = [
        (good, ("llamacpp", "cuda sm90"), "covers llamacpp on cpu test, not llamacpp on cuda sm90"),
        (good, ("ort", "cpu test"), "not ort on cpu test"),
        (replace(good, coords="pixel_resized"), ("llamacpp", "cpu test"), "was changed after"),
        (replace(good, certificate=None), ("llamacpp", "cpu test"), "has no certificate"),
        (certified(artifact, verdict="fail"), ("llamacpp", "cpu test"), "ended with 'fail'"),
        (
            certified(artifact, libraries={"llama-cpp-python": "0.0.1"}),
            ("llamacpp", "cpu test"),
            "certified with llama-cpp-python 0.0.1, here is llama-cpp-python",
        ),
        (
            replace(good, certificate=good.certificate | {"schema": 9}),
            ("llamacpp", "cpu test"),
            "cannot read",
        ),
    ]
    for manifest, where, words in cases:
        assert words in str(coverage(manifest, *where).obstacle)


def test_device_classes_are_coarse_for_cpus_and_by_capability_for_gpus() -> None:
    device = Device(
        system="",
        cpu="",
        cores=1,
        features=(),
        ram_bytes=0,
        ram_available_bytes=0,
        cuda=(Cuda(name="x", sm=90, memory_bytes=1),),
        jetson=None,
    )
    assert device_class(device, "cuda (x)") == "cuda sm90"
    assert device_class(device, "cpu (Xeon, 4 threads)").startswith("cpu ")
    assert device_class(replace(device, cuda=()), "cpu (a)") == device_class(device, "cpu (b)")

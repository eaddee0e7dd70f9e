"""Verification of real artifacts of nano: sound ones, broken ones, interrupted runs, bad input."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.cli import cli
from medmo_edge.errors import ArtifactError, MedmoError, SampleError, UsageError
from medmo_edge.manifest import read_manifest
from medmo_edge.phantoms import draw
from medmo_edge.prompts import user_message
from medmo_edge.runtime.session import load
from medmo_edge.samples import Sample, write_samples

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")
pytest.importorskip("gguf", reason="needs the export extra")
pytest.importorskip("llama_cpp", reason="needs the llamacpp extra")

from medmo_edge.evaluation.reference import (  # noqa: E402
    Reference,
    Remembered,
    StreamedReference,
    WholeReference,
    open_reference,
)
from medmo_edge.evaluation.sabotage import FAULTS, Fault, damaged_copy  # noqa: E402
from medmo_edge.evaluation.verify_cases import Case, open_cases, read_checked  # noqa: E402
from medmo_edge.export.export import export_checkpoint  # noqa: E402
from medmo_edge.runtime.self_test import self_test  # noqa: E402
from medmo_edge.verify import Task, verify  # noqa: E402

#: gates that a handful of samples can pass
LENIENT = """
[samples]
min_stable_answers = 1
[full]
min_answers_retained = 0.0
min_iou_retained = 0.0
"""


@pytest.fixture(scope="session")
def nano() -> Iterator[Checkpoint]:
    """The packaged checkpoint."""
    with open_checkpoint("nano") as checkpoint:
        yield checkpoint


@pytest.fixture(scope="session")
def reference(nano: Checkpoint) -> Reference:
    """transformers on nano; every sample is traced once for all tests."""
    return Remembered(WholeReference(nano))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano as gguf-f16 with golden cases. Do not write into it."""
    folder = tmp_path_factory.mktemp("verify") / "f16"
    export_checkpoint("nano", "gguf-f16", folder)
    return folder


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn pictures, three questions."""
    from PIL import Image

    folder, listed = tmp_path_factory.mktemp("samples"), []
    for seed, size in ((11, (600, 440)), (12, (400, 840))):
        phantom = draw(seed, size=size, nodule=True)
        path = folder / f"{seed}.png"
        Image.fromarray(phantom.pixels).save(path)
        nodules = tuple(box for box in phantom.boxes if box.label == "nodule")
        asked = [user_message("Locate the nodule.", 1)]
        listed.append(
            Sample(id=f"n{seed}", task="locate", images=(path,), messages=asked, boxes=nodules)
        )
    asked = [user_message("Is there a pleural effusion?", 1)]
    truth = "yes" if phantom.facts["effusions"] else "no"
    listed.append(Sample(id="e", task="vqa", images=(path,), messages=asked, answer=truth))
    write_samples(folder / "samples.jsonl", listed)
    return folder / "samples.jsonl"


def task_of(artifact: Path, samples: Path, **changes: Any) -> Task:
    """A verification against nano with short answers."""
    values: dict[str, Any] = {"threads": 1, "max_new_tokens": 40}
    return Task(artifact=artifact, checkpoint="nano", samples=samples, **(values | changes))


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def failed(run: dict[str, Any]) -> list[str]:
    """Names of the stages that failed, in order."""
    return [stage["name"] for stage in run["stages"] if stage["verdict"] == "fail"]


def run_cli(*arguments: str | Path) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)], standalone_mode=False)


def test_a_sound_artifact_fails_nothing_and_few_samples_certify_nothing(
    sound: Path, samples: Path, reference: Reference, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "a"))
    run = verify(task_of(copy, samples), silent, reference)
    assert failed(run) == [] and run["verdict"] == "undecided"
    stages = {stage["name"]: stage for stage in run["stages"]}
    assert stages["vision"]["figures"]["main_worst_cosine"] > 0.99999
    assert stages["answer"]["figures"]["mean_kl"] < 1e-6
    assert stages["boxes"]["figures"]["same_text_iou"] == pytest.approx(1)
    with pytest.raises(ArtifactError, match="ended with 'undecided'"):
        load(copy, require_certificate=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # no journal is left


def test_a_certificate_opens_the_door_and_any_change_closes_it(
    sound: Path, samples: Path, reference: Reference, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "a"))
    before = read_manifest(copy)
    with pytest.raises(ArtifactError, match="it has no certificate; run `medmo-edge verify"):
        load(copy, require_certificate=True)
    gates = tmp_path / "gates.toml"
    gates.write_text(LENIENT)
    run = verify(task_of(copy, samples, gates=gates), silent, reference)
    assert run["verdict"] == "pass", run["stages"]
    after = read_manifest(copy)
    assert after.sha256 != before.sha256 and after.files == before.files
    assert after.certificate is not None and list(after.certificate["runs"].values()) == [run]
    assert {"weights_sha256", "preprocessing_sha256", "libraries", "device_class"} <= set(run)
    assert run["samples"]["count"] == 3 and run["samples"]["pictures"] == 2
    load(copy, require_certificate=True).close()
    values = json.loads((copy / "manifest.json").read_text())
    values["coords"] = "pixel_original"
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="it was changed after it was certified"):
        load(copy, require_certificate=True)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_caught_where_it_is(
    fault: Fault,
    sound: Path,
    samples: Path,
    reference: Reference,
    nano: Checkpoint,
    tmp_path: Path,
) -> None:
    copy = damaged_copy(sound, fault, tmp_path / "a")
    read_manifest(copy)  # the hashes fit: only measuring can notice
    with fault.patched("llamacpp", nano):
        run = verify(task_of(copy, samples), silent, reference)
        site = self_test(copy, threads=1)
    assert run["verdict"] == "fail"
    assert run["failed_stage"] in fault.stages
    assert not site.passed, "the on-site test must notice, too"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf-q8_0", "onnx-fp32", "onnx-int4"])
def test_every_fault_is_caught_in_other_formats(
    target: str,
    sound: Path,
    samples: Path,
    reference: Reference,
    nano: Checkpoint,
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    export_checkpoint("nano", target, tmp_path / "sound")
    backend, base = read_manifest(tmp_path / "sound").backend, None
    if target == "gguf-q8_0":
        base = sound
    elif target == "onnx-int4":
        base = tmp_path / "base"
        export_checkpoint("nano", "onnx-fp32", base, golden=False)
    healthy = verify(task_of(tmp_path / "sound", samples, unquantised=base), silent, reference)
    assert failed(healthy) == [] and self_test(tmp_path / "sound", threads=1).passed
    passed = []
    for fault in (each for each in FAULTS if each.fits(backend)):
        copy = damaged_copy(tmp_path / "sound", fault, tmp_path / fault.name)
        with fault.patched(backend, nano):
            run = verify(task_of(copy, samples, unquantised=base), silent, reference)
            site = self_test(copy, threads=1)
        if run["failed_stage"] not in fault.stages or site.passed:
            passed.append((fault.name, run["failed_stage"], site.passed))
    assert not passed


def test_the_stages_after_the_first_see_weight_faults_too(
    sound: Path, samples: Path, reference: Reference, tmp_path: Path
) -> None:
    """Swapped layers must not depend on the exporter's own table of tensors."""
    (fault,) = (each for each in FAULTS if each.name == "layers-swapped")
    run = verify(task_of(damaged_copy(sound, fault, tmp_path / "a"), samples), silent, reference)
    assert {"prefill", "answer"} <= set(failed(run))


def test_gaps_of_runtime_and_quantisation_are_told_apart(
    sound: Path, samples: Path, reference: Reference, tmp_path: Path
) -> None:
    export_checkpoint("nano", "gguf-q4_k_m", tmp_path / "q", golden=False)
    given = verify(task_of(tmp_path / "q", samples, unquantised=sound), silent, reference)
    figures = {stage["name"]: stage["figures"] for stage in given["stages"]}
    assert figures["answer"]["max_difference"] < 0.02 < figures["quantisation"]["max_difference"]
    assert failed(given) == [] and given["unquantised"] == "gguf-f16"
    exported = verify(task_of(tmp_path / "q", samples), silent, reference)
    drop = {"issued", "seconds"}
    assert {k: v for k, v in exported.items() if k not in drop} == {
        k: v for k, v in given.items() if k not in drop
    }


def test_an_interrupted_run_goes_on_after_its_last_sample(
    sound: Path, samples: Path, reference: Reference, tmp_path: Path
) -> None:
    class Counting:
        """Another reference, with the number of cases it traced."""

        chunk, traced = 1, 0

        def trace(self, cases: Sequence[Case], *rest: Any) -> Any:
            self.traced += len(cases)
            return reference.trace(cases, *rest)

        def describe(self) -> dict[str, Any]:
            return reference.describe()

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("samples", 2):
            raise KeyboardInterrupt

    copy = Path(shutil.copytree(sound, tmp_path / "a"))
    counting = Counting()
    with pytest.raises(KeyboardInterrupt, match="after 2 of 5 samples: the same command goes on"):
        verify(task_of(copy, samples), stop, counting)
    assert read_manifest(copy).certificate is None and counting.traced == 2
    resumed = verify(task_of(copy, samples), silent, counting)
    assert counting.traced == 5 and resumed["samples"]["count"] == 3  # two probes come first
    whole = verify(task_of(copy, samples), silent, reference)
    assert whole["stages"] == resumed["stages"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_layer_by_layer_gives_the_same_traces_whatever_is_guessed(
    nano: Checkpoint, samples: Path, reference: Reference
) -> None:
    cases = list(open_cases(read_checked(samples)))
    calls: list[int] = []

    def wrong(case: Case, begun: tuple[int, ...]) -> tuple[int, ...]:
        """The right answer but for one token early on, then but for one later."""
        (right,) = reference.trace([case], lambda *_: (), 40)
        calls.append(len(begun))
        spoilt = list(right.tokens)
        for place in (3, 9):
            if place >= len(begun) and place < len(spoilt):
                spoilt[place] = 5
                break
        return tuple(spoilt)

    streamed = StreamedReference(nano).trace(cases, wrong, 40)
    whole = reference.trace(cases, lambda *_: (), 40)
    for one, other in zip(streamed, whole, strict=True):
        assert one.complete and one.tokens == other.tokens and one.text == other.text
        assert one.boxes == other.boxes and one.prompt_ids == other.prompt_ids
        np.testing.assert_allclose(one.logits_TV, other.logits_TV, atol=2e-4)
        for ours, theirs in zip(one.features, other.features, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert max(calls) > 3  # it did have to guess anew


def test_memory_decides_how_the_checkpoint_is_run(nano: Checkpoint) -> None:
    assert isinstance(open_reference(nano, 8 << 30, 0), WholeReference)
    assert isinstance(open_reference(nano, 8 << 30, 7 << 30), StreamedReference)
    assert open_reference(nano, 1 << 20, 0).describe()["how"] == "layer by layer"


def test_report_and_exit_code(
    sound: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "a"))
    report = tmp_path / "report.html"
    done = run_cli(copy, "--against", "nano", "--samples", samples, "-o", report)
    assert done.exception is None, done.output
    assert done.return_value == 1  # undecided is no pass
    assert "verdict: UNDECIDED, not certified" in done.output
    html = report.read_text()
    assert "UNDECIDED" in html and "http" not in html and "src=" not in html
    again = run_cli(copy, "--against", "nano", "--samples", samples, "-o", report)
    assert isinstance(again.exception, UsageError) and "exists already" in str(again.exception)


def test_bad_input_is_one_line(sound: Path, samples: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost.jsonl"
    lost.write_text(samples.read_text().replace("11.png", "gone.png"))
    for image in samples.parent.glob("*.png"):
        shutil.copy(image, tmp_path)
    cases: list[tuple[type[MedmoError], str, dict[str, Any]]] = [
        (SampleError, "1 images are missing, the first is .*gone.png", {"samples": lost}),
        (SampleError, "cannot be read", {"samples": tmp_path / "none.jsonl"}),
        (UsageError, "gguf-f16 is not quantised", {"unquantised": sound}),
        (ArtifactError, "does not exist", {"artifact": tmp_path / "none"}),
        (UsageError, "cannot be read", {"gates": tmp_path / "none.toml"}),
    ]
    for kind, words, changes in cases:
        with pytest.raises(kind, match=words) as caught:
            verify(replace(task_of(sound, samples), **changes), silent)
        assert "\n" not in str(caught.value)
    assert read_manifest(sound).certificate is None


def test_another_checkpoint_is_refused(sound: Path, samples: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="was exported from MedMO-nano .* give the checkpoint"):
        verify(replace(task_of(sound, samples), checkpoint=str(tiny_checkpoint)), silent)


def test_the_command_wants_one_of_its_two_ways(sound: Path, samples: Path) -> None:
    for arguments in ((), ("--against", "nano"), ("--on-device", "--samples", samples)):
        assert isinstance(run_cli(sound, *arguments).exception, UsageError)

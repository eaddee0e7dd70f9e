"""``medmo-edge eval`` as a user runs it: figures, files, going on, refusals, comparison, probe."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from medmo_edge.boxes import Box, Coords
from medmo_edge.cli import cli
from medmo_edge.errors import GenerationError, SampleError, UsageError
from medmo_edge.evaluation import probe_coords as probes
from medmo_edge.evaluation.compare import compare_runs, format_comparison, paired
from medmo_edge.evaluation.evaluate import EvalOptions, evaluate, load_scorer
from medmo_edge.evaluation.models import ModelAnswer, Request, geometry_of
from medmo_edge.evaluation.nano_cases import phantom_cases, phantom_items
from medmo_edge.evaluation.predictions import FILE, identity, predict, read_predictions
from medmo_edge.preprocess import Preprocessing
from medmo_edge.samples import Sample, write_samples

BOX = "lesion <box>[[0, 0, 500, 1000]]</box>"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Twelve pictures of different sizes; the nodule fills the left half, and a yes/no question."""
    made = []
    for number in range(12):
        width, height = 100 + 10 * number, 160 - 5 * number
        picture = tmp_path / f"{number}.png"
        Image.new("L", (width, height), 20 * number).save(picture)
        box = Box("nodule", 0, 0, width / 2, height)
        question = [{"type": "image"}, {"type": "text", "text": "Locate the nodule."}]
        made.append(
            Sample(
                id=f"locate-{number}",
                task="locate",
                images=(picture,),
                messages=[{"role": "user", "content": question}],
                boxes=(box,),
            )
        )
        answer = "yes" if number < 9 else "no"
        asked = [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]
        made.append(
            Sample(
                id=f"ask-{number}",
                task="vqa",
                images=(picture,),
                messages=[{"role": "user", "content": asked}],
                answer=answer,
            )
        )
    path = tmp_path / "samples.jsonl"
    write_samples(path, made)
    return path


def _options(samples: Path, model: str = f"fake:{BOX}", **changes: Any) -> EvalOptions:
    return EvalOptions(model=model, benchmark="samples", data=samples, **changes)


def test_figures_of_a_constant_answer(samples: Path) -> None:
    result = evaluate(_options(samples)).result
    assert result["benchmark"] == "samples" and result["metric"] == "accuracy"
    assert (result["num_samples"], result["num_questions"]) == (24, 24)
    assert result["accuracy"] == 0 and result["baseline"] == 0.75
    assert result["mean_iou"] == pytest.approx(1) and result["mean_iou_baseline"] == 1
    assert result["figures"]["f1_at_0.5"] == pytest.approx(1)
    assert result["groups"]["task"]["locate"]["mean_iou"] == 1


def test_json_of_the_command_line(samples: Path) -> None:
    arguments = ["eval", "fake:Yes.", "--benchmark", "samples", "--data", str(samples), "--json"]
    result = json.loads(CliRunner().invoke(cli, arguments).output)
    assert result["accuracy"] == 0.75 and result["baseline"] == 0.75
    low, high = result["interval"]
    assert low < 0.75 < high
    assert result["mean_iou"] == 0 and result["parse_rate"] == 1
    words = CliRunner().invoke(cli, arguments[:-1]).output
    assert "samples: accuracy 0.750" in words and "baseline 0.750 (yes)" in words


def test_pubmedqa_majority(data_dir: Path) -> None:
    options = EvalOptions(model="fake:yes", benchmark="pubmedqa", data=data_dir)
    result = evaluate(options).result
    assert (result["num_samples"], result["accuracy"], result["baseline"]) == (500, 0.552, 0.552)


def test_limit_takes_the_first_samples(samples: Path) -> None:
    assert evaluate(_options(samples, limit=5)).result["num_samples"] == 5


def test_a_run_leaves_everything_to_read(samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = evaluate(_options(samples, output=output))
    names = {path.name for path in output.iterdir()}
    assert names == {"predictions.jsonl", "samples.jsonl", "result.json", "report.html"}
    assert json.loads((output / "result.json").read_text()) == run.result
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert lines[0]["value"] == 1 and lines[0]["text"] == BOX
    assert lines[0]["truth_boxes"][0]["xyxy"] == lines[0]["boxes"][0]["xyxy"]


def test_the_report_is_one_file_without_addresses(samples: Path, tmp_path: Path) -> None:
    model = "fake:<script>alert(1)</script> <box>[[0, 0, 100, 100]]</box>"
    evaluate(_options(samples, model=model, output=tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    outside = page.replace("data:image/jpeg;base64,", "")
    assert "://" not in outside and "<script" not in page and 'src="/' not in page
    assert "&lt;script&gt;" in page and page.count("data:image/jpeg;base64,") >= 3
    assert "Research use only" in page


class _Counting:
    """Answers every request with ``text``; ``fail_after`` answers it stops as if killed."""

    name = "counting"
    coords: Coords = "norm1000"
    preprocessing = Preprocessing()

    def __init__(self, text: str = "yes", fail_after: int | None = None) -> None:
        self.text, self.fail_after = text, fail_after
        self.asked: list[str] = []

    def answer_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, ModelAnswer]]:
        for index, request in enumerate(requests):
            if "impossible" in request.question:
                raise GenerationError("the context is full")
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(request.question)
            yield (
                index,
                ModelAnswer(
                    text=self.text,
                    boxes=(),
                    rejected_boxes=(),
                    seconds=0.1,
                    decode_seconds=0.05,
                    new_tokens=2,
                    prompt_tokens=9,
                    finish_reason="stop",
                ),
            )

    def answer(self, *_: Any) -> ModelAnswer:
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        return {"kind": "test", "text": self.text}

    def close(self) -> None: ...

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, *_: object) -> None: ...


def _cases() -> list[Any]:
    return [case for item in phantom_items(2) for case in phantom_cases(item)]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    cases, path = _cases(), tmp_path / "run" / FILE
    killed = _Counting(fail_after=5)
    with pytest.raises(KeyboardInterrupt, match="stopped after 5 of 12 answers: the same command"):
        predict(killed, cases, identity(killed, "phantoms", cases), path)
    path.write_text(path.read_text() + '{"id": "cut off in the mid', "utf-8")
    fresh = _Counting()
    steps: list[tuple[int, int]] = []
    found = predict(
        fresh,
        cases,
        identity(fresh, "phantoms", cases),
        path,
        lambda done, total: steps.append((done, total)),
    )
    assert len(fresh.asked) == len(cases) - 5
    assert steps[0] == (5, len(cases)) and steps[-1] == (len(cases), len(cases))
    assert [each.id for each in found] == [case.id for case in cases]
    again = _Counting()
    assert predict(again, cases, identity(again, "phantoms", cases), path) == found
    assert again.asked == []


def test_predictions_of_another_run_are_refused(samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    evaluate(_options(samples, model="fake:yes", output=output))
    with pytest.raises(SampleError, match=r"another run \(model.name: 'fake:yes' there, 'fake:no'"):
        evaluate(_options(samples, model="fake:no", output=output))
    with pytest.raises(SampleError, match="num_questions: 24 there, 3 here"):
        evaluate(_options(samples, model="fake:yes", output=output, limit=3))


def test_folders_that_are_not_runs_are_refused(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        evaluate(_options(samples, output=tmp_path / "full"))
    with pytest.raises(UsageError, match="is a file"):
        evaluate(_options(samples, output=samples))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / FILE).write_text("{}\n")
    with pytest.raises(SampleError, match="holds no run"):
        evaluate(_options(samples, output=broken))


def test_a_question_that_cannot_be_asked_counts_as_wrong() -> None:
    cases = _cases()
    cases[3] = type(cases[3])(id="x", sample="x", question="impossible", rule="yes_no", gold="yes")
    model = _Counting()
    found = predict(model, cases, identity(model, "phantoms", cases))
    assert [each.error for each in found if each.error] == ["the context is full"]
    assert len(model.asked) == len(cases) - 1


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"run": {}}\n{"id": 1}\n')
    with pytest.raises(SampleError, match=":2: not a prediction"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("judge", "never contacts"),
        ("RaTEScore", "needs the weights"),
        ("chexbert", "needs the CheXbert weights"),
        ("nonsense", "is not package.module:function"),
        ("no.such:thing", "cannot be imported"),
        ("math:pi", "is not a function"),
    ],
)
def test_scorers_that_are_not_there(name: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        load_scorer(name)


def test_a_plug_in_scorer(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local_scorer.py").write_text(
        "def lengths(answers, golds):\n    return [len(text) for text in answers]\n"
        "def broken(answers, golds):\n    raise ValueError('no weights')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = _options(samples, model="fake:four", scorers=("local_scorer:lengths",))
    assert evaluate(options).result["figures"]["local_scorer:lengths"] == 4
    with pytest.raises(UsageError, match="local_scorer:broken failed: ValueError: no weights"):
        evaluate(_options(samples, model="fake:x", scorers=("local_scorer:broken",)))


def test_a_comparison_of_two_runs(samples: Path, tmp_path: Path) -> None:
    for name, text in (("a", "yes"), ("b", "no")):
        evaluate(_options(samples, model=f"fake:{text}", output=tmp_path / name))
    result = compare_runs(tmp_path / "a", tmp_path / "b")
    accuracy = result["metrics"]["accuracy"]
    assert (accuracy["first"], accuracy["second"]) == (0.75, 0.25)
    assert accuracy["difference"] == -0.5 and accuracy["retention"] == pytest.approx(1 / 3)
    assert result["same_text"] == 0
    assert "accuracy 0.750 -> 0.250: -0.500" in format_comparison(result)
    same = compare_runs(tmp_path / "a", tmp_path / "a")["metrics"]["accuracy"]
    assert same["p_value"] == 1 and not same["significant"]
    output = CliRunner().invoke(
        cli, ["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]
    )
    assert json.loads(output.output) == json.loads(json.dumps(result))


def test_comparisons_that_cannot_be_made(samples: Path, tmp_path: Path) -> None:
    evaluate(_options(samples, model="fake:yes", output=tmp_path / "a", limit=4))
    with pytest.raises(SampleError, match="holds no finished run"):
        compare_runs(tmp_path / "a", tmp_path / "nothing")
    text = samples.read_text().replace('"answer": "yes"', '"answer": "no"')
    samples.write_text(text)
    evaluate(_options(samples, model="fake:yes", output=tmp_path / "b", limit=4))
    with pytest.raises(SampleError, match="has another gold"):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_pairing_by_hand() -> None:
    """Four items of one question; one changes from wrong to right: the exact sign test gives 1."""
    found = paired([0, 1, 1, 0], [1, 1, 1, 0], ["a", "b", "c", "d"])
    assert (found.first, found.second, found.difference) == (0.5, 0.75, 0.25)
    assert found.retention == 1.5 and found.p_value == 1 and not found.significant
    # Eight improvements of eight: two of 256 sign patterns are as extreme, p = 1 / 128.
    many = paired([0] * 8, [1] * 8, [str(n) for n in range(8)])
    assert many.p_value == pytest.approx(1 / 128, abs=0.003) and many.significant
    assert math.isnan(many.retention)


def test_questions_of_one_picture_are_one_unit() -> None:
    first, second = [0.0] * 40, [1.0] * 40
    apart = paired(first, second, [str(n) for n in range(40)])
    together = paired(first, second, [str(n // 20) for n in range(40)])
    assert apart.significant and not together.significant


class _Located(_Counting):
    """Knows the truth and writes it in one convention."""

    def __init__(self, coords: Coords, samples: Path) -> None:
        super().__init__()
        self.spoken = coords

    def answer_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, ModelAnswer]]:
        from medmo_edge.boxes import render_boxes

        for index, request in enumerate(requests):
            geometry = geometry_of(request.frames[0], self.preprocessing)
            truth = Box("nodule", 0, 0, geometry.width / 2, geometry.height)
            self.text = render_boxes([truth], geometry, self.spoken)
            ((_, answer),) = super().answer_all([request])
            yield index, answer


@pytest.mark.parametrize("coords", ["norm1000", "pixel_resized", "pixel_original"])
def test_the_probe_finds_the_convention(
    coords: Coords, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "open_model", lambda *_, **__: _Located(coords, samples))
    result = probes.probe_coords(_options(samples, model="x"))
    assert result["recommended"] == coords and result["margin"] > 0.1
    assert result["agrees"] is (coords == "norm1000")
    assert result["mean_iou"][coords] == pytest.approx(1, abs=0.02)
    assert ("export again" in probes.format_probe(result)) is (coords != "norm1000")


def test_the_probe_refuses_to_guess(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(UsageError, match="finds too little under every convention"):
        probes.probe_coords(_options(samples, model="fake:No nodule found."))
    made = []
    for number in range(10):  # 1000 pixels a side: norm1000 and pixel_original are the same
        picture = tmp_path / f"big-{number}.png"
        Image.new("L", (1000, 1000)).save(picture)
        made.append(
            Sample(
                id=str(number),
                task="locate",
                images=(picture,),
                messages=[{"role": "user", "content": "Locate the nodule."}],
                boxes=(Box("nodule", 0, 0, 500, 1000),),
            )
        )
    write_samples(tmp_path / "big.jsonl", made)
    with pytest.raises(UsageError, match="do not separate on samples"):
        probes.probe_coords(_options(tmp_path / "big.jsonl"))
    with pytest.raises(UsageError, match="has 2 questions with boxes"):
        probes.probe_coords(_options(samples, limit=4))


def test_probe_and_options_on_the_command_line(samples: Path) -> None:
    run = CliRunner()
    base = ["eval", f"fake:{BOX}", "--benchmark", "samples", "--data", str(samples)]
    result = run.invoke(cli, [*base, "--probe-coords"])
    assert "recommended: norm1000" in result.output
    for wrong in (
        ["eval"],
        ["eval", "fake:x"],
        [*base, "--compare", "a", "b"],
        [*base, "--probe-coords", "-o", "x"],
    ):
        assert isinstance(run.invoke(cli, wrong).exception, UsageError)


def test_bad_input_is_one_line(samples: Path) -> None:
    (samples.parent / "3.png").unlink()
    command = [sys.executable, "-m", "medmo_edge", "eval", "fake:yes", "--benchmark", "samples"]
    done = subprocess.run([*command, "--data", str(samples)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "samples: 2 pictures are missing of 24 items" in done.stderr


def test_a_checkpoint_takes_the_same_road(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="asking a checkpoint needs the train extra")
    asked = [{"role": "user", "content": "Is there a nodule?"}]
    made = [Sample(id=f"{n}", task="text_qa", messages=asked, answer="yes") for n in range(2)]
    write_samples(tmp_path / "text.jsonl", made)
    result = evaluate(_options(tmp_path / "text.jsonl", model=str(tiny_checkpoint))).result
    assert result["num_samples"] == 2 and result["model"]["kind"] == "checkpoint"
    assert result["speed"]["new_tokens"] > 0


def test_phantoms_need_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EvalOptions(model="fake:Yes.", benchmark="phantoms", limit=3)
    result = evaluate(options).result
    assert result["num_samples"] == 3 and result["num_questions"] == 18
    truth = [case.gold for item in phantom_items(3) for case in phantom_cases(item) if case.gold]
    assert result["accuracy"] == pytest.approx(float(np.mean([g == "yes" for g in truth])))

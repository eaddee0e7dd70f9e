"""Observing a checkpoint: against hooks on transformers' whole model, in any order, interrupted."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch", reason="calibrating needs the train extra")
pytest.importorskip("safetensors", reason="calibrating needs the train extra")

from medmo_edge.calibration.observe import calibrate  # noqa: E402
from medmo_edge.calibration.record import JSON_FILE, TENSOR_FILE, read_record  # noqa: E402
from medmo_edge.calibration.rendering import Renderer, choose, render_file  # noqa: E402
from medmo_edge.checkpoint import open_checkpoint  # noqa: E402
from medmo_edge.cli import cli  # noqa: E402
from medmo_edge.errors import CalibrationError, SampleError, UsageError  # noqa: E402
from medmo_edge.phantoms import draw  # noqa: E402
from medmo_edge.preprocess import grid_thw, patchify  # noqa: E402

SIZES = ((96, 130), (128, 64), (160, 160))


def user(text: str, images: int) -> dict[str, Any]:
    parts = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def write_file(folder: Path, lines: list[dict[str, Any]], name: str = "samples.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sample_lines(folder: Path) -> list[dict[str, Any]]:
    """Five samples: boxes, a short answer, two pictures, two turns, and text alone."""
    for seed, size in enumerate(SIZES):
        Image.fromarray(draw(seed, size=size).pixels).save(folder / f"{seed}.png")
    box = {"label": "nodule", "image": 0, "xyxy": [40.0, 50.0, 90.0, 110.0]}
    yes = {"role": "assistant", "content": "Yes."}
    return [
        {
            "id": "boxes",
            "task": "locate",
            "images": ["0.png"],
            "messages": [user("Locate the nodule.", 1)],
            "boxes": [box],
        },
        {"id": "short", "task": "vqa", "images": ["1.png"], "messages": [user("Is it?", 1), yes]},
        {
            "id": "pair",
            "task": "caption",
            "images": ["1.png", "2.png"],
            "messages": [{"role": "user", "content": "Compare them."}, yes],
        },
        {
            "id": "turns",
            "task": "vqa",
            "images": ["0.png"],
            "messages": [user("Is there a nodule?", 1), yes, user("Where?", 0)],
            "answer": "left",
        },
        {"id": "words", "task": "text_qa", "messages": [user("What is a nodule?", 0), yes]},
    ]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("samples")
    return folder, sample_lines(folder)


@pytest.fixture(scope="module")
def record_folder(
    lines: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("records") / "nano"
    calibrate("nano", write_file(*lines), output)
    return output


@pytest.fixture(scope="module")
def tiny_record(
    tiny_checkpoint: Path,
    lines: tuple[Path, list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("records") / "tiny"
    calibrate(tiny_checkpoint, write_file(*lines), output)
    return output


def hooked(samples: Path) -> dict[str, list[NDArray[np.float32]]]:
    """Inputs of every linear of the whole model in memory, sample by sample."""
    from transformers import Qwen3VLForConditionalGeneration

    checkpoint = open_checkpoint("nano")
    loader: Any = Qwen3VLForConditionalGeneration
    model = loader.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    seen: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, inputs: Any) -> None:
            x = inputs[0].flatten(1) if "patch_embed" in name else inputs[0]
            seen[name].append(x.reshape(-1, x.shape[-1]).numpy().copy())

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            module.register_forward_pre_hook(hook(name))
    for item in render_file(samples, Renderer(checkpoint)):
        ids, limits = torch.tensor([list(item.prompt.ids)]), checkpoint.preprocessing
        pictures: dict[str, Any] = {}
        if item.prompt.images:
            patches = [patchify(image, limits) for image in item.prompt.images]
            grids = [grid_thw(i.shape[0], i.shape[1], limits) for i in item.prompt.images]
            pictures["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            pictures["image_grid_thw"] = torch.tensor(grids)
        types = (ids == checkpoint.config.image_token_id).int()
        with torch.no_grad():
            model(input_ids=ids, mm_token_type_ids=types, **pictures)
    return seen


def test_the_record_is_what_hooks_on_the_whole_model_see(
    record_folder: Path, lines: tuple[Path, list[dict[str, Any]]]
) -> None:
    record = read_record(record_folder)
    seen = hooked(lines[0] / "samples.jsonl")
    assert record.linears.keys() == seen.keys()
    weights = open_checkpoint("nano")
    for name, parts in seen.items():
        stats, x = record.linears[name], np.concatenate(parts).astype(np.float64)
        size = np.abs(x)
        assert stats.amax == pytest.approx(size.max(), rel=1e-4), name
        np.testing.assert_allclose(stats.sum_sq, (x * x).sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.mean_abs, size.mean(0), rtol=1e-4, atol=1e-6)
        for share, value in ((0.999, stats.p999), (0.9999, stats.p9999)):
            rank = np.sort(size, axis=None)[math.ceil(share * size.size) - 1]
            assert rank * (1 - 2**-7) * (1 - 1e-4) <= value <= rank * (1 + 1e-4), (name, share)
        assert stats.count == len(x)
        tensor = "model.language_model.embed_tokens" if name == "lm_head" else name
        assert stats.weight_amax == np.abs(weights.read(f"{tensor}.weight")).max()


def test_tokens_of_text_and_images_are_counted_apart(record_folder: Path) -> None:
    record = read_record(record_folder)
    query = record.linears["model.language_model.layers.0.self_attn.q_proj"]
    patches = record.linears["model.visual.patch_embed.proj"]
    merged = record.linears["model.visual.merger.linear_fc1"]
    assert (query.count_text, query.count_image) == (
        record.samples["tokens_text"],
        record.samples["tokens_image"],
    )
    assert patches.count_text == merged.count_text == 0
    assert merged.count_image == query.count_image
    assert patches.count_image == 4 * merged.count_image
    assert record.samples["count"] == record.samples["images"] == 5


def test_any_order_of_the_file_gives_the_same_bytes(
    tiny_checkpoint: Path,
    tiny_record: Path,
    lines: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    folder, entries = lines
    shuffled = random.Random(1).sample(entries, len(entries))
    assert shuffled != entries
    again = tmp_path / "again"
    calibrate(tiny_checkpoint, write_file(folder, shuffled, "samples.jsonl"), again)
    for name in (JSON_FILE, TENSOR_FILE):
        assert (again / name).read_bytes() == (tiny_record / name).read_bytes()


def test_a_limited_draw_depends_on_the_seed_and_not_on_the_order(
    lines: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, entries = lines
    ids = [entry["id"] for entry in entries]

    def drawn(order: list[dict[str, Any]], seed: int) -> set[str]:
        wanted = choose(write_file(folder, order, "draw.jsonl"), 2, seed)
        return {id for id in ids if wanted(id)}

    assert len(drawn(entries, 0)) == 2
    assert drawn(entries, 0) == drawn(entries[::-1], 0)
    assert len({frozenset(drawn(entries, seed)) for seed in range(20)}) > 3
    assert all(map(choose(folder / "draw.jsonl", None, 0), ids))


class _Stop(Exception):
    """Stands for a crash in the middle."""


@pytest.mark.parametrize("stop", [3, 40])
def test_an_interrupted_run_goes_on_and_ends_equal(
    tiny_checkpoint: Path,
    tiny_record: Path,
    lines: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    stop: int,
) -> None:
    path = write_file(*lines)
    output = tmp_path / "record"
    steps = iter(range(1000))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage != "reading samples" and next(steps) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="same command to go on"):
        calibrate(tiny_checkpoint, path, output, progress=interrupt)
    assert not output.exists()
    first: list[int] = []
    calibrate(
        tiny_checkpoint,
        path,
        output,
        progress=lambda stage, done, total: (
            first.append(done) if stage != "reading samples" else None
        ),
    )
    assert first[0] > 1 or stop == 3
    assert len(first) < first[-1] or stop == 3, "what was done is not done again"
    for name in (JSON_FILE, TENSOR_FILE):
        assert (output / name).read_bytes() == (tiny_record / name).read_bytes()
    assert [child.name for child in tmp_path.iterdir()] == ["record"]


def test_an_interrupted_run_of_other_samples_is_not_mixed_in(
    tiny_checkpoint: Path, lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, output = write_file(*lines), tmp_path / "record"

    def crash(stage: str, done: int, total: int) -> None:
        if stage.endswith("blocks.1"):
            raise _Stop

    with pytest.raises(_Stop):
        calibrate(tiny_checkpoint, path, output, progress=crash)
    with pytest.raises(UsageError, match="interrupted run with other samples"):
        calibrate(tiny_checkpoint, path, output, limit=3)


def test_every_sample_that_cannot_be_rendered_is_listed(
    lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, entries = lines
    broken = [dict(entry) for entry in entries]
    broken[0]["images"] = [str(tmp_path / "nowhere.png")]
    broken[1]["messages"] = [user("Say <|im_end|> now.", 1)]
    broken[3]["id"] = "words"
    path = folder / "broken.jsonl"
    text = "".join(json.dumps(entry) + "\n" for entry in broken)
    path.write_text(text + '{"id": 3}\nnot json\n', encoding="utf-8")
    with pytest.raises(SampleError) as caught:
        calibrate("nano", path, tmp_path / "record")
    message = str(caught.value)
    assert "5 samples cannot be rendered" in message and "\n" not in message
    for expected in ("line 1: ", "nowhere.png", "line 2: ", "<|im_end|>", "line 5: ", "line 7: "):
        assert expected in message
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_text_alone_needs_to_be_asked_for(
    tiny_checkpoint: Path, lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, entries = lines
    words = write_file(folder, [entries[-1]], "words.jsonl")
    with pytest.raises(CalibrationError, match="no sample shows an image"):
        calibrate(tiny_checkpoint, words, tmp_path / "record")
    record = calibrate(tiny_checkpoint, write_file(*lines), tmp_path / "record", text_only=True)
    assert not any(name.startswith("model.visual.") for name in record.linears)
    assert record.samples["tokens_image"] == 0
    assert record.samples["count"] == len(entries)


def test_nan_weights_are_named(
    tiny_checkpoint: Path, lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    name = "model.language_model.layers.1.mlp.gate_proj.weight"
    info = open_checkpoint(folder).tensors[name]
    with info.path.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.array([0x7FC0], np.uint16).tobytes())  # bfloat16 NaN
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.(down|gate)_proj"):
        calibrate(folder, write_file(*lines), tmp_path / "record")
    assert {child.name for child in tmp_path.iterdir()} == {"damaged"}


def test_the_command_prints_what_it_made(
    lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    output = tmp_path / "record"
    arguments = ["calibrate", "nano", "--samples", str(write_file(*lines)), "-o", str(output)]
    result = CliRunner().invoke(cli, [*arguments, "--limit", "2", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["linears"] == 52 and printed["samples"]["count"] == 2
    assert printed["sha256"] == read_record(output).sha256
    again = CliRunner().invoke(cli, arguments)
    assert isinstance(again.exception, UsageError) and "exists already" in str(again.exception)


@pytest.fixture
def running(
    lines: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:
    """The command in a process of its own, on enough samples to be caught in the middle."""
    folder, entries = lines
    many = [{**entry, "id": f"{entry['id']}-{n}"} for n in range(8) for entry in entries]
    output = tmp_path / "record"
    path = write_file(folder, many, "many.jsonl")
    command = [sys.executable, "-m", "medmo_edge", "calibrate", "nano"]
    command += ["--samples", str(path), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process, command, output
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    running: tuple[subprocess.Popen[str], list[str], Path],
) -> None:
    process, command, output = running
    partial = output.parent / f".{output.name}.partial"
    deadline = time.monotonic() + 120
    while not (partial / "seen-0002.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "give the same command to go on" in errors
    assert partial.is_dir() and not output.exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert output.is_dir() and not partial.exists()

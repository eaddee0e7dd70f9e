"""Observe a checkpoint over samples, once: ``medmo-edge calibrate``.

The pass is streamed layer by layer (streamed.py), and what each layer saw is written down as soon
as it is done, so an interrupted run goes on where it stopped. Samples are run one by one in the
order of their ids: the order of the file cannot change a bit of the record. Choosing samples and
judging the result are the caller's business.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from medmo_edge import __version__
from medmo_edge.calibration.layout import Layout
from medmo_edge.calibration.record import Record, read_record, write_record
from medmo_edge.calibration.rendering import Rendered, Renderer, choose, render_file
from medmo_edge.calibration.statistics import LinearStats, Tally, stats_from
from medmo_edge.calibration.streamed import HEAD, Pass, Stage, check_device
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]

_SETTINGS = "run.json"
_HEAD_BYTES = 64 << 20


def calibrate(
    checkpoint: str | Path,
    samples: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    text_only: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Record:
    """Observe ``checkpoint`` (a folder, or "nano") over a JSONL file; write the record ``output``.

    ``limit`` samples are drawn by ``seed``. ``text_only`` drops the images. "auto" is CUDA with
    bfloat16 where there is a GPU, else the CPU with float32; statistics are float32 or wider in any
    case. A run that was interrupted goes on by itself. Errors: UsageError, CheckpointError,
    SampleError (every line that cannot be rendered), CalibrationError, OSError.
    """
    output = Path(output)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists already: choose another folder or remove it")
    device, dtype = _choose_device(device, dtype)
    report = progress or (lambda stage, done, total: None)
    with open_checkpoint(checkpoint) as opened:
        rendered = _render(opened, samples, report, limit, seed, text_only)
        settings = _settings(opened, Path(samples), rendered, seed, device, dtype)
        with _work_folder(output, settings) as folder:
            linears = _observe(opened, rendered, folder, device, dtype, report)
            record = replace(_record(settings, linears), path=folder / "record")
            record.path.mkdir(exist_ok=True)
            write_record(record)
            record.path.rename(output)
    return read_record(output)


def _choose_device(device: str, dtype: str) -> tuple[str, str]:
    check_device("cpu", "float32")  # torch itself
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    check_device(device, dtype)
    return device, dtype


def _render(
    checkpoint: Checkpoint,
    samples: str | Path,
    report: Progress,
    limit: int | None,
    seed: int,
    text_only: bool,
) -> list[Rendered]:
    total = 0
    path = Path(samples)
    if path.is_file():
        with path.open("rb") as file:
            total = sum(1 for _ in file)
    rendered = render_file(
        path,
        Renderer(checkpoint, text_only=text_only),
        wanted=choose(path, limit, seed),
        progress=lambda done: report("reading samples", done, total),
    )
    if not text_only and not any(item.prompt.images for item in rendered):
        raise CalibrationError(
            f"{samples}: no sample shows an image, so the vision tower would stay unseen: "
            "add samples with images, or give --text-only"
        )
    return rendered


def _settings(
    checkpoint: Checkpoint,
    samples: Path,
    rendered: Sequence[Rendered],
    seed: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Everything the numbers depend on; also what the record says about itself."""
    import hashlib

    import torch

    together = hashlib.sha256("".join(item.sha256 for item in rendered).encode()).hexdigest()
    image_token = checkpoint.config.image_token_id
    tokens = sum(len(item.prompt.ids) for item in rendered)
    of_images = sum(list(item.prompt.ids).count(image_token) for item in rendered)
    return {
        "checkpoint": checkpoint.identity(),
        "samples": {
            "file": samples.name,
            "sha256": together,
            "count": len(rendered),
            "images": sum(len(item.prompt.images) for item in rendered),
            "tokens_text": tokens - of_images,
            "tokens_image": of_images,
        },
        "preprocessing": checkpoint.preprocessing.sha256,
        "coords": checkpoint.coords,
        "seed": seed,
        "run": {
            "medmo_edge": __version__,
            "torch": str(torch.__version__),
            "device": device.split(":")[0],
            "dtype": dtype,
        },
    }


@contextmanager
def _work_folder(output: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The hidden folder beside ``output`` in which a run is, or was interrupted.

    Ctrl-C, a full disk or a crash leave it for the next run with equal settings; it goes when the
    run is done and when its error would come again.
    """
    folder = output.parent / f".{output.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        _hold(lock, output)
        _check_settings(folder, settings)
        try:
            yield folder
        except CalibrationError:
            shutil.rmtree(folder)
            raise
    shutil.rmtree(folder)


def _hold(lock: TextIO, output: Path) -> None:
    """Keep other processes out for as long as the file is open; Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"another calibration is writing {output}: wait for it") from error


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / _SETTINGS
    text = json.dumps(settings, indent=1, sort_keys=True)
    if not path.exists():
        _write_whole(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{folder} holds an interrupted run with other samples, settings or weights: "
            "remove it, or choose another output folder"
        )


def _observe(
    checkpoint: Checkpoint,
    rendered: Sequence[Rendered],
    folder: Path,
    device: str,
    dtype: str,
    report: Progress,
) -> dict[str, LinearStats]:
    watcher = _Watcher.over(rendered, checkpoint)
    run = Pass(
        layout=Layout(checkpoint, [item.prompt for item in rendered]),
        folder=folder,
        device=device,
        dtype=dtype,
        on_linear=watcher.on_linear,
        on_weights=watcher.on_weights,
    )
    done = _stages_done(folder, run.plan)
    if not done:
        _check_space(run)
    linears = dict(item for number in range(done) for item in _read_stage(folder, number).items())
    number = done
    try:
        for number, _ in enumerate(run.stages(first=done, progress=report), start=done):
            found = watcher.take()
            _write_stage(folder, number, found)
            linears |= found
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped in layer {number + 1} of {len(run.plan)}: give the same command to go on"
        ) from stop
    return linears


def _check_space(run: Pass) -> None:
    """Two generations of hidden states, and the features of every level, must fit."""
    layout = run.layout
    levels = 1 + len(run.checkpoint.config.vision.deepstack_indexes)
    states = 2 * max(layout.text_shapes.nbytes, layout.vision_shapes.nbytes)
    needed = states + levels * layout.feature_shapes.nbytes
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise UsageError(
            f"{run.folder.parent} has {free:,} bytes free, the hidden states need {needed:,}: "
            "free some space, or calibrate with fewer samples (--limit)"
        )


@dataclass(slots=True)
class _Watcher:
    """Collects what the linears of the running stage see."""

    ids: Sequence[str]
    image_tokens: Sequence[int]
    lengths: Sequence[int]
    checkpoint: Checkpoint
    tallies: dict[tuple[str, ...], Tally]
    weights: dict[str, float]

    @classmethod
    def over(cls, rendered: Sequence[Rendered], checkpoint: Checkpoint) -> "_Watcher":
        token = checkpoint.config.image_token_id
        prompts = [list(item.prompt.ids) for item in rendered]
        return cls(
            ids=[item.id for item in rendered],
            image_tokens=[ids.count(token) for ids in prompts],
            lengths=[len(ids) for ids in prompts],
            checkpoint=checkpoint,
            tallies={},
            weights={},
        )

    def on_weights(self, layer: str, tensors: "Mapping[str, Tensor]") -> None:
        prefix = "model.visual." if layer.endswith("patch_embed") else f"{layer}."
        for name, tensor in tensors.items():
            if name.endswith(".weight") and tensor.ndim > 1:
                self.weights[prefix + name.removesuffix(".weight")] = float(tensor.abs().max())

    def on_linear(self, names: tuple[str, ...], x: "Tensor", prompt: int) -> None:
        is_vision = names[0].startswith("model.visual.")
        num_image = x.shape[0] if is_vision else self.image_tokens[prompt]
        tally = self.tallies.setdefault(names, Tally(names[0]))
        tally.add(x, num_image, self.ids[prompt])

    def take(self) -> dict[str, LinearStats]:
        """The statistics of the stage that ended; the next one starts empty."""
        found = {}
        for names, tally in self.tallies.items():
            stats = tally.finish(0.0)
            for name in names:
                found[name] = replace(stats, weight_amax=self._weight_amax(name))
        self.tallies.clear()
        self.weights.clear()
        return found

    def _weight_amax(self, name: str) -> float:
        amax = self.weights[name] if name != HEAD else _head_amax(self.checkpoint)
        if not math.isfinite(amax):
            raise CalibrationError(
                f"{name}.weight holds NaN or infinity: the checkpoint is damaged"
            )
        return amax


def _head_amax(checkpoint: Checkpoint) -> float:
    tied = checkpoint.config.text.tie_word_embeddings
    name = "model.language_model.embed_tokens.weight" if tied else f"{HEAD}.weight"
    blocks = checkpoint.row_blocks(name, _HEAD_BYTES)
    return float(np.max([np.abs(block).max() for block in blocks]))


def _stages_done(folder: Path, plan: Sequence[Stage]) -> int:
    """How many stages an earlier run completed; what it left of a stage in between is ignored."""
    return next((n for n in range(len(plan)) if not _stage_path(folder, n).exists()), len(plan))


def _stage_path(folder: Path, number: int) -> Path:
    return folder / f"seen-{number:04}.json"


def _write_stage(folder: Path, number: int, found: Mapping[str, LinearStats]) -> None:
    """Numbers as JSON: float32 values survive it unchanged."""
    plain = {
        name: {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in asdict(stats).items()
        }
        for name, stats in found.items()
    }
    _write_whole(_stage_path(folder, number), json.dumps(plain).encode())


def _read_stage(folder: Path, number: int) -> dict[str, LinearStats]:
    plain = json.loads(_stage_path(folder, number).read_bytes())
    return {name: stats_from(values) for name, values in plain.items()}


def _write_whole(path: Path, data: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    draft.replace(path)


def _record(settings: Mapping[str, Any], linears: Mapping[str, LinearStats]) -> Record:
    return Record(path=Path(), linears=linears, **settings)

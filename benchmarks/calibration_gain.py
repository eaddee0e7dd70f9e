"""What calibration gains on MedMO-nano: quantised with and without it, on held-out samples.

    python benchmarks/calibration_gain.py --data DATA --work-dir DIR [--only NAME ...]

Calibrates nano on drawn radiographs, training smears and VQA-RAD, once with images and once with
the same words alone, quantises with neither and with each, and compares with the checkpoint in
fp32: mean KL divergence of the next-token distributions along the labelled answers, and the IoU of
greedy boxes with the labels. Held out: other phantoms, validation smears, other pictures of
VQA-RAD, which nano was never trained on and whose KL is therefore shown apart. GGUF and ONNX are
run by the product's own backends; FP8 (per-tensor inputs, per-channel weights) is rounded inside
transformers, which the fp8 graphs equal. Every variant is kept in DIR: a run that was stopped goes
on. Intervals are 95 % bootstraps over pictures, paired. DATA holds bccd/ and vqa-rad/.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nano_samples import write_nano_samples
from numpy.typing import NDArray

from medmo_edge import load
from medmo_edge.boxes import parse_boxes
from medmo_edge.calibration.observe import calibrate
from medmo_edge.calibration.record import read_record
from medmo_edge.calibration.rendering import Rendered, Renderer, render_file
from medmo_edge.calibration.scales import Range, fp8_scales
from medmo_edge.calibration.streamed import forward
from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.evaluation.gaps import logit_gap
from medmo_edge.evaluation.scores import bootstrap, match_image
from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import read_image
from medmo_edge.preprocess import grid_thw, patchify
from medmo_edge.runtime.observe import Observer
from medmo_edge.samples import Sample, question_of, read_samples, write_samples

CALIBRATION_SEED, HELD_OUT_SEED = 5_000_000, 6_000_000
MAX_ANSWER = 96  # tokens of an answer that are compared
BOX_TOKENS = 64
RECORDS = ("none", "text", "image+text")
RUNTIME = ("gguf-q4_k_m", "gguf-iq4_xs", "onnx-int4")
# What maps to 448: nothing known (values are cast as they are), the maximum, a percentile.
FP8: tuple[tuple[str, Range], ...] = (("fp8", "amax"), ("fp8-p99.99", "p9999"))

Logits = NDArray[np.float32]


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", help="variants to run, e.g. onnx-int4 or onnx-int4/none"
    )
    parser.add_argument("--pictures", type=int, default=16, help="of each kind, held out")
    parser.add_argument("--calibration-samples", type=int, default=128)
    options = parser.parse_args()
    folder: Path = options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options.data, options.pictures, options.calibration_samples)
    held = HeldOut(folder)
    for name, record in variants():
        path = folder / f"{name}-{record}.json"
        is_wanted = not options.only or name in options.only or f"{name}/{record}" in options.only
        if not path.exists() and is_wanted:
            path.write_text(json.dumps(held.measure(name, record)))
            print(path.stem, flush=True)
    print_table(folder, held)


def variants() -> Iterator[tuple[str, str]]:
    """Every (target, record) that is compared; f16 shows what the runtime itself costs."""
    yield "gguf-f16", "none"
    for target in RUNTIME:
        for record in RECORDS:
            yield target, record
    yield "fp8", "none"
    for name, _ in FP8:
        for record in RECORDS[1:]:
            yield name, record


def prepare(folder: Path, data: Path, pictures: int, samples: int) -> None:
    """Sample files and both records."""
    if not (folder / "calibration").exists():
        drawn = write_nano_samples(
            folder / "calibration",
            num_phantoms=32,
            first_seed=CALIBRATION_SEED,
            data=data,
            num_smears=32,
        )
        others = vqa_rad(data, 2 * pictures, held_out=False)
        write_samples(folder / "calibration.jsonl", [*read_samples(drawn), *others])
    if not (folder / "held-out.jsonl").exists():
        drawn = write_nano_samples(
            folder / "held-out",
            num_phantoms=pictures,
            first_seed=HELD_OUT_SEED,
            data=data,
            split="val",
            num_smears=pictures,
        )
        # A list of all red cells is as long as all other answers together.
        kept = [s for s in read_samples(drawn) if not s.id.endswith("locate-RBC")]
        write_samples(
            folder / "held-out.jsonl", [*kept, *vqa_rad(data, 2 * pictures, held_out=True)]
        )
    for name in RECORDS[1:]:
        if not (folder / name).exists():
            path = folder / "calibration.jsonl"
            calibrate("nano", path, folder / name, limit=samples, text_only=name == "text")


def vqa_rad(data: Path, number: int, *, held_out: bool) -> list[Sample]:
    """One question per picture of the published file: ``number`` held-out pictures, or the rest."""
    from medmo_edge.evaluation.format_vqa_rad import read_vqa_rad

    items = {str(item.images[0]): item for item in read_vqa_rad(data / "vqa-rad")}
    kept = list(items)[:: max(1, len(items) // number)][:number]
    chosen = [item for name, item in items.items() if (name in kept) == held_out]
    return [
        Sample(
            id=item.id,
            task="vqa",
            images=tuple(image for image in item.images if isinstance(image, Path)),
            messages=[
                {"role": "user", "content": [{"type": "image"}, text_part(item.question)]},
                {"role": "assistant", "content": item.target or ""},
            ],
        )
        for item in chosen
    ]


def text_part(text: str) -> dict[str, str]:
    """A text as part of a message."""
    return {"type": "text", "text": text}


class HeldOut:
    """The held-out samples, and what the checkpoint itself says along their answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint("nano")
        self.rendered = render_file(folder / "held-out.jsonl", Renderer(self.checkpoint))
        by_id = {sample.id: sample for sample in read_samples(folder / "held-out.jsonl")}
        # By picture, so that a backend encodes each one once.
        self.rendered.sort(key=lambda item: (str(by_id[item.id].images), item.id))
        self.samples = [by_id[item.id] for item in self.rendered]
        self.pictures = [str(sample.images[0]) for sample in self.samples]
        foreign = np.array([sample.id.startswith("vqa-rad") for sample in self.samples])
        self.parts = (np.flatnonzero(~foreign), np.flatnonzero(foreign))
        prompts = [item.prompt for item in self.rendered]
        path = folder / "reference.npz"
        if not path.exists():
            length = self.checkpoint.load_tokenizer().length  # ids beyond it mean nothing
            outputs = forward(self.checkpoint, prompts)
            np.savez(path, *[each.logits[:MAX_ANSWER, :length] for each in outputs])
        with np.load(path) as kept:
            self.reference: list[Logits] = [kept[f"arr_{index}"] for index in range(len(prompts))]

    def measure(self, name: str, record: str) -> dict[str, list[float | None]]:
        """KL per sample, and mean IoU per sample with boxes (None for the others)."""
        opened = self._rounded(name, record) if "fp8" in name else self._artifact(name, record)
        with opened as model:
            kl, iou = [], []
            for sample, item, base in zip(self.samples, self.rendered, self.reference, strict=True):
                logits = model.follow(sample, item)[: len(base), : base.shape[1]]
                kl.append(logit_gap(logits, base).mean_kl)
                iou.append(self._iou(model, sample, item))
        return {"kl": list(kl), "iou": iou}

    def _iou(self, model: Any, sample: Sample, item: Rendered) -> float | None:
        label = sample.id.rpartition("-")[2]
        if sample.task != "locate" or not sample.boxes or label == "Platelets":
            return None
        text = model.ask(sample, item)
        found = parse_boxes(text, item.geometries, self.checkpoint.coords).boxes
        predicted = [box.xyxy for box in found if box.label == label]
        return float(np.mean(match_image([box.xyxy for box in sample.boxes], predicted).ious))

    @contextmanager
    def _artifact(self, target: str, record: str) -> Iterator["Artifact"]:
        folder = self.folder / f"{target}-{record}"
        shutil.rmtree(folder, ignore_errors=True)
        calibration = None if record == "none" else self.folder / record
        export_checkpoint("nano", target, folder, calibration=calibration, golden=False)
        with load(folder, max_context=1024) as session:
            yield Artifact(Observer(session), self.checkpoint.config.eos_token_ids[0])
        shutil.rmtree(folder)

    @contextmanager
    def _rounded(self, name: str, record: str) -> Iterator["Rounded"]:
        scales = None
        if record != "none":
            scales = fp8_scales(read_record(self.folder / record), dict(FP8)[name])
        yield Rounded(self.checkpoint, scales)


class Artifact:
    """An exported artifact behind the product's own session."""

    def __init__(self, observer: Observer, end: int) -> None:
        self._observer, self._end = observer, end

    def follow(self, sample: Sample, item: Rendered) -> Logits:
        """Logits along the labelled answer."""
        answer = list(item.prompt.ids)[item.answer_start :]
        tokens = [*answer, self._end][:MAX_ANSWER]
        frames = self._frames(sample)
        return self._observer.follow(frames, question_of(sample), tokens)

    def ask(self, sample: Sample, item: Rendered) -> str:
        """The greedy answer."""
        frames = self._frames(sample)
        return self._observer.ask(frames, question_of(sample), BOX_TOKENS).answer.text

    def _frames(self, sample: Sample) -> list[Any]:
        if getattr(self, "_shown", None) != sample.images:
            self._shown, self._pictures = sample.images, [read_image(p) for p in sample.images]
        return self._pictures


class Rounded:
    """transformers' model in fp32 with the linears of the text layers rounded to fp8."""

    def __init__(self, checkpoint: Checkpoint, scales: dict[str, float] | None) -> None:
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        loader: Any = Qwen3VLForConditionalGeneration
        self._model = loader.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.load_tokenizer()
        for name, module in self._model.named_modules():
            if "language_model.layers" in name and isinstance(module, torch.nn.Linear):
                step = module.weight.data.abs().amax(dim=1, keepdim=True) / 448
                module.weight.data = rounded(module.weight.data, step)
                scale = torch.tensor(1.0 if scales is None else scales[name])
                module.register_forward_pre_hook(partial(round_input, scale))

    def follow(self, sample: Sample, item: Rendered) -> Logits:
        """Logits along the labelled answer."""
        import torch

        with torch.no_grad():
            found = self._model(**self._inputs(item, len(item.prompt.ids))).logits[0]
        logits: Logits = found[item.answer_start - 1 :].numpy()
        return logits

    def ask(self, sample: Sample, item: Rendered) -> str:
        """The greedy answer."""
        import torch

        inputs = self._inputs(item, item.answer_start)
        ends = list(self._checkpoint.config.eos_token_ids)
        with torch.no_grad():
            made = self._model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=BOX_TOKENS,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        return self._tokenizer.decode(made[0, item.answer_start :].tolist())

    def _inputs(self, item: Rendered, length: int) -> dict[str, Any]:
        import torch

        limits = self._checkpoint.preprocessing
        ids = torch.tensor([list(item.prompt.ids)[:length]])
        images = item.prompt.images
        grids = [grid_thw(image.shape[0], image.shape[1], limits) for image in images]
        patches = np.concatenate([patchify(image, limits) for image in images])
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == self._checkpoint.config.image_token_id).int(),
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.tensor(grids),
        }


def rounded(values: Any, step: Any) -> Any:
    """Values as float8 e4m3 with this step stores them, saturated."""
    import torch

    scaled = (values / step).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).to(torch.float32) * step


def round_input(step: Any, module: Any, inputs: tuple[Any, ...]) -> tuple[Any]:
    """Forward pre-hook: the input of a linear, rounded."""
    return (rounded(inputs[0], step),)


def print_table(folder: Path, held: HeldOut) -> None:
    """One row per variant that was run; gains are against the same target without calibration."""
    found = {
        (name, record): {key: np.array(values, float) for key, values in json.loads(text).items()}
        for name, record in variants()
        if (text := read_text(folder / f"{name}-{record}.json"))
    }
    boxes = int(np.isfinite(next(iter(found.values()))["iou"]).sum())
    print(
        f"\n{len(held.samples)} samples of {len(set(held.pictures))} pictures, {boxes} with boxes"
    )
    print(f"\n| target | calibration |{' KL x 1000 | of without |' * 2} IoU | more than without |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, record), values in found.items():
        base = found.get(("fp8" if "fp8" in name else name, "none")) if record != "none" else None
        cells = [f"{1000 * values['kl'][part].mean():.3f}" for part in held.parts]
        gains = compared(values, base, held) if base else ("", "", "")
        print(
            f"| {name} | {record} | {cells[0]} | {gains[0]} | {cells[1]} | {gains[1]} "
            f"| {np.nanmean(values['iou']):.3f} | {gains[2]} |"
        )
    print("\nimage+text against text alone: KL ratio on nano's pictures, on VQA-RAD; IoU")
    for name in dict.fromkeys(name for name, _ in found):
        with_images, words = found.get((name, "image+text")), found.get((name, "text"))
        if with_images and words:
            print(f"{name}: {'; '.join(compared(with_images, words, held))}")


def read_text(path: Path) -> str:
    """What a file says, "" when it is not there."""
    return path.read_text() if path.exists() else ""


def compared(
    values: dict[str, NDArray[np.float64]], base: dict[str, NDArray[np.float64]], held: HeldOut
) -> tuple[str, ...]:
    """Ratios of mean KL in both parts and difference of mean IoU, each with its interval."""

    def ratio(chosen: NDArray[np.intp]) -> float:
        return float(values["kl"][chosen].mean() / base["kl"][chosen].mean())

    everywhere = np.arange(len(held.samples))
    step = values["iou"] - base["iou"]
    return (
        *(interval(ratio, part, held.pictures) for part in held.parts),
        interval(lambda chosen: nan_mean(step[chosen]), everywhere, held.pictures),
    )


def nan_mean(values: NDArray[np.float64]) -> float:
    """Mean of what is there; NaN when nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def interval(
    score: Callable[[NDArray[np.intp]], float], part: NDArray[np.intp], pictures: Sequence[str]
) -> str:
    """``score`` of the samples ``part`` with its 95 % interval over resampled pictures."""
    members: dict[str, list[int]] = {}
    for index in part:
        members.setdefault(pictures[index], []).append(int(index))
    groups = [np.array(indexes) for indexes in members.values()]

    def of_pictures(drawn: NDArray[np.intp]) -> float:
        return score(np.concatenate([groups[index] for index in drawn]))

    low, high = bootstrap(of_pictures, len(groups))
    return f"{score(part):.3f} ({low:.3f} .. {high:.3f})"


if __name__ == "__main__":
    main()

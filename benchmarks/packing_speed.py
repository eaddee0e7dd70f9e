"""Supervised training speed: packed rows against the stock collator of TRL's SFTTrainer.

    python benchmarks/packing_speed.py [--checkpoint nano] [--samples 64] [--batch 8] [--rounds 3]

The same checkpoint, samples, batch and AdamW in one process, in rounds that take turns; every round
passes over all samples once. The samples are drawn radiographs of many sizes with short and long
answers, a fifth is text alone. Prints medians of samples and of the samples' own tokens a second
(wall clock and processor time), and ratios with TRL. The forms:

    trl             SFTTrainer as it comes: padded batches, prompt and completion
    packed          our rows, with the library's Conv3d and attention
    packed+linear   and the patch embedding as a linear layer
    ours            and attention within samples only: what our engine does
    ... frozen      the same with the vision tower and its mergers frozen
    ours cached     frozen, the tower's features read from disk instead of computed

TRL takes pictures through a ProcessorMixin only, and Qwen3-VL's needs torchvision for videos: here
it gets the same class without the video part. Needs trl, datasets and medmo-edge[train].
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.phantoms import draw
from medmo_edge.train.architecture import use_linear_patches
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packed_attention import use_packed
from medmo_edge.train.packing import Chat, row_loss
from medmo_edge.train.stages import DataSource, Stage, load_stages
from medmo_edge.train.vision_cache import VisionCache

# Untyped: their own annotations stop at half of what is called here.
datasets: Any = import_module("datasets")
transformers: Any = import_module("transformers")
trl: Any = import_module("trl")

OURS = (use_linear_patches, use_packed)
LEARNING_RATE = 1e-5
SIDES = (96, 128, 192, 256, 320, 448)
WORDS = "no nodule in the left lung . normal heart size . one nodule in the right lung .".split()


@dataclass(frozen=True, slots=True)
class Pace:
    """One pass over the data: seconds of wall clock and of the processor."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What all forms share."""

    checkpoint: Checkpoint
    folder: Path
    samples: int
    batch: int
    stage: Stage

    def mixture(self) -> Mixture:
        """The samples as our own training draws them."""
        opened = self.checkpoint
        return Mixture(
            self.stage,
            1,
            Chat.of(opened),
            opened.preprocessing,
            opened.coords,
            folder=self.folder,
            devices=1,
        )


class PictureProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without the video part."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        mixin: Any = ProcessorMixin
        mixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def main() -> None:
    """Write samples, build every form, let them take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name, open_checkpoint(options.checkpoint) as checkpoint:
        folder = Path(name)
        write_samples(folder, options.samples)
        stage = make_stage(options.samples, options.batch, options.row_tokens)
        setting = Setting(checkpoint, folder, options.samples, options.batch, stage)
        tokens = describe(setting)
        forms = make_forms(setting)
        paces: dict[str, list[Pace]] = {form: [] for form in forms}
        for number in range(options.rounds + 1):
            for form, run in forms.items():
                pace = run(number)
                gc.collect()
                if number:  # the first round warms up
                    paces[form].append(pace)
        print_table(paces, options.samples, tokens)


def write_samples(folder: Path, count: int) -> None:
    """Pictures and a JSONL file of ``count`` samples, from a fixed seed."""
    random = np.random.default_rng(0)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            images = []
            if random.random() >= 0.2:
                height, width = (int(side) for side in random.choice(SIDES, 2))
                picture = draw(number, size=(height, width)).pixels
                images = [f"{number}.png"]
                Image.fromarray(picture).convert("RGB").save(folder / images[0])
            length = int(min(240, random.lognormal(3.0, 1.2))) + 1  # yes/no to whole reports
            answer = " ".join(random.choice(WORDS, length))
            asked = {"role": "user", "content": "Describe this medical image."}
            told = {"role": "assistant", "content": answer}
            sample = {"id": str(number), "task": "vqa", "images": images, "messages": [asked, told]}
            file.write(json.dumps(sample) + "\n")


def make_stage(samples: int, batch: int, row_tokens: int) -> Stage:
    """A stage that passes over the file once."""
    source = DataSource(path="samples.jsonl", weight=1.0, tasks=(), augment="none")
    return replace(
        load_stages("medmo-4b").stages[2],
        data=(source,),
        mixture={"vqa": 1.0},
        samples=samples,
        rows=batch,
        accumulation=1,
        row_tokens=row_tokens,
        min_pixels=9216,
        max_pixels=448 * 448,
    )


def describe(setting: Setting) -> int:
    """Say what is trained on; gives the samples' own tokens."""
    mixture = setting.mixture()
    rows = [row for step in range(mixture.steps) for row in mixture.rows(step, 0, 1)]
    tokens = sum(row.tokens for row in rows)
    answers = sum(row.answer_tokens for row in rows)
    alone = replace(setting, stage=replace(setting.stage, rows=1)).mixture()
    lengths = [alone.rows(step, 0, 1)[0].tokens for step in range(setting.samples)]
    print(
        f"{setting.checkpoint.name}: {setting.samples} samples of {min(lengths)} to {max(lengths)} "
        f"tokens, {tokens} in all ({answers} of answers), batch {setting.batch}\n"
        f"padded to the longest of a batch {padded(lengths, setting.batch) / tokens:.2f} positions "
        f"a token; packed {len(rows)} rows of {setting.stage.row_tokens} tokens at most\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl "
        f"{trl.__version__}, {torch.get_num_threads()} thread(s), float32"
    )
    return tokens


def padded(lengths: Sequence[int], batch: int) -> float:
    """Positions of padded batches over all samples, on average over 200 random orders."""
    random = np.random.default_rng(0)
    orders = (random.permutation(lengths) for _ in range(200))
    return statistics.mean(
        sum(
            batch * int(order[start : start + batch].max()) for start in range(0, len(order), batch)
        )
        for order in orders
    )


def make_forms(setting: Setting) -> dict[str, Callable[[int], Pace]]:
    """Every form as a function that makes one pass and says how long it took."""
    cache = VisionCache.open(
        setting.folder / "cache", load(setting, True), setting.mixture().limits
    )
    cache.fill(load(setting, True), setting.mixture().pictures())
    return {
        "trl": trl_form(setting, frozen=False),
        "packed": our_form(setting, (), frozen=False),
        "packed+linear": our_form(setting, (use_linear_patches,), frozen=False),
        "ours": our_form(setting, OURS, frozen=False),
        "trl frozen": trl_form(setting, frozen=True),
        "ours frozen": our_form(setting, OURS, frozen=True),
        "ours cached": our_form(setting, OURS, frozen=True, cache=cache),
    }


def load(setting: Setting, frozen: bool) -> Any:
    """A fresh copy of the model in training mode."""
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        setting.checkpoint.path, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.visual.requires_grad_(not frozen)
    return model.train()


def our_form(
    setting: Setting,
    changes: Sequence[Callable[[Any], None]],
    *,
    frozen: bool,
    cache: VisionCache | None = None,
) -> Callable[[int], Pace]:
    """Packed rows and a plain loop; ``changes`` are made to the model."""
    model = load(setting, frozen)
    for change in changes:
        change(model)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.0)
    mixture = setting.mixture()
    if cache is not None:
        mixture.use(cache)

    def run(number: int) -> Pace:
        start = now()
        for step in range(number * mixture.steps, (number + 1) * mixture.steps):
            rows = mixture.rows(step, 0, 1)
            answers = sum(row.answer_tokens for row in rows)
            for row in rows:
                loss: Any = row_loss(model, row) / answers
                loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return since(start)

    return run


class Clock(TrainerCallback):
    """Times what the trainer does between its first batch and its last step."""

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        """The data loader has not been asked yet."""
        self.start = now()

    def on_train_end(self, *args: Any, **options: Any) -> None:
        """All steps are done."""
        self.pace = since(self.start)


def trl_form(setting: Setting, *, frozen: bool) -> Callable[[int], Pace]:
    """SFTTrainer with its own collator, data loader and loop."""
    clock = Clock()
    config = trl.SFTConfig(
        output_dir=str(setting.folder / "trl"),
        per_device_train_batch_size=setting.batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=load(setting, frozen),
        args=config,
        train_dataset=dataset(setting.folder),
        processing_class=processor(setting),
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def run(number: int) -> Pace:
        trainer.train()
        return clock.pace

    return run


def processor(setting: Setting) -> PictureProcessor:
    """TRL's way to tokens and patches, with the stage's limits."""
    path, stage = setting.checkpoint.path, setting.stage
    images = transformers.AutoImageProcessor.from_pretrained(path)
    images.size = {"shortest_edge": stage.min_pixels, "longest_edge": stage.max_pixels}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return PictureProcessor(images, tokenizer, chat_template=setting.checkpoint.chat_template)


def dataset(folder: Path) -> Any:
    """The samples as TRL wants them: pictures decoded when they are used."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    columns = {
        "images": [[str(folder / name) for name in value["images"]] for value in values],
        "prompt": [value["messages"][:1] for value in values],
        "completion": [value["messages"][1:] for value in values],
    }
    features = datasets.Dataset.from_dict(columns).features
    features["images"] = datasets.List(datasets.Image())
    return datasets.Dataset.from_dict(columns, features=features)


def now() -> Pace:
    """Both clocks."""
    return Pace(time.perf_counter(), time.process_time())


def since(start: Pace) -> Pace:
    """Both clocks, from ``start``."""
    end = now()
    return Pace(end.wall - start.wall, end.cpu - start.cpu)


def print_table(paces: dict[str, list[Pace]], samples: int, tokens: int) -> None:
    """Medians over rounds; ratios are medians of the ratios within each round."""
    print(f"{'form':22}{'samples/s':>10}{'tokens/s':>10}{'cpu s':>8}{'ratio':>8}{'cpu ratio':>11}")
    for form, rounds in paces.items():
        peer = paces["trl frozen" if form.endswith(("frozen", "cached")) else "trl"]
        wall = statistics.median(pace.wall for pace in rounds)
        cpu = statistics.median(pace.cpu for pace in rounds)
        walls = statistics.median(ratios(peer, rounds, "wall"))
        cpus = statistics.median(ratios(peer, rounds, "cpu"))
        print(
            f"{form:22}{samples / wall:10.2f}{tokens / wall:10.0f}{cpu:8.1f}"
            f"{walls:8.2f}{cpus:11.2f}"
        )


def ratios(peer: list[Pace], rounds: list[Pace], clock: str) -> Iterator[float]:
    """How many times faster each round was than the peer's of the same number."""
    for theirs, ours in zip(peer, rounds, strict=True):
        yield getattr(theirs, clock) / getattr(ours, clock)


if __name__ == "__main__":
    main()

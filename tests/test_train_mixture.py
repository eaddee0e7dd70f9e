"""Mixtures: a pure function of seed and step, fair to weights, and one line per broken sample."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("torch")

import torch

from medmo_edge.checkpoint import Checkpoint, open_checkpoint
from medmo_edge.errors import RecipeError, SampleError
from medmo_edge.train.mixture import Mixture, share_out
from medmo_edge.train.packing import IGNORE, Chat
from medmo_edge.train.prefetch import ahead
from medmo_edge.train.stages import DataSource, RlStage, Stage, load_stages

Value = dict[str, Any]
Make = Callable[..., Mixture]

INSTRUCT, RL = (load_stages("medmo-8b").stages[index] for index in (2, 3))
SMALL: Value = {
    "min_pixels": 1024,
    "max_pixels": 16384,
    "row_tokens": 160,
    "rows": 3,
    "accumulation": 3,
}


def source(path: str, weight: float = 1.0, *tasks: str, augment: Any = "none") -> DataSource:
    return DataSource(path=path, weight=weight, tasks=tasks, augment=augment)


def vqa(index: int, **changes: Any) -> Value:
    value = {
        "id": f"vqa-{index}",
        "task": "vqa",
        "images": [f"{index % 5}.png"],
        "messages": [
            {"role": "user", "content": "Is there a nodule?" + " Or not?" * (index % 7)},
            {"role": "assistant", "content": "Yes." * (1 + index % 3)},
        ],
    }
    return value | changes


def text_qa(index: int) -> Value:
    return vqa(index, id=f"text-{index}", task="text_qa", images=[])


def locate(index: int) -> Value:
    return {
        "id": f"box-{index}",
        "task": "locate",
        "images": [f"{index % 5}.png"],
        "messages": [{"role": "user", "content": "Locate the mass."}],
        "boxes": [{"label": "mass", "xyxy": [5 + index, 7, 21 + index, 30]}],
    }


def write(path: Path, values: list[Value]) -> None:
    path.write_text("\n".join(map(json.dumps, values)) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    random = np.random.default_rng(3)
    for index, size in enumerate([(64, 96), (128, 64), (40, 40), (32, 160), (90, 70)]):
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    Image.new("RGB", (300, 1)).save(path / "line.png")
    write(path / "mixed.jsonl", [*map(vqa, range(11)), *map(text_qa, range(4))])
    write(path / "more.jsonl", [vqa(index, id=f"more-{index}") for index in range(5)])
    write(path / "boxes.jsonl", list(map(locate, range(7))))
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def make(folder: Path, checkpoint: Checkpoint) -> Make:
    chat = Chat.of(checkpoint)

    def call(stage: Stage, seed: int = 42, devices: int = 1, **options: Any) -> Mixture:
        options = {"folder": folder, "devices": devices, **options}
        return Mixture(stage, seed, chat, checkpoint.preprocessing, checkpoint.coords, **options)

    return call


def stage(**changes: Any) -> Stage:
    data = (source("mixed.jsonl", 2.0), source("more.jsonl"), source("boxes.jsonl"))
    mixture = {"vqa": 0.5, "text_qa": 0.2, "locate": 0.3}
    return replace(INSTRUCT, **({"data": data, "mixture": mixture} | SMALL | changes))


def ids(mixture: Mixture, step: int, world: int) -> list[list[str]]:
    return [
        [id for row in mixture.rows(step, rank, world) for id in row.sample_ids]
        for rank in range(world)
    ]


def test_rows_depend_on_seed_and_step_alone(make: Make) -> None:
    kept = make(stage())
    for step in (5, 0, 2, 5):  # in any order, asked before or not
        for one, other in zip(kept.rows(step, 0, 1), make(stage()).rows(step, 0, 1), strict=True):
            assert one.sample_ids == other.sample_ids
            assert torch.equal(one.labels, other.labels)
            assert one.inputs.keys() == other.inputs.keys()
            assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
    assert ids(kept, 0, 1) != ids(kept, 1, 1)
    assert ids(kept, 0, 1) != ids(make(stage(), seed=43), 0, 1)
    assert ids(kept, 0, 1) != ids(make(stage(name="other")), 0, 1)


@pytest.mark.parametrize("world", [2, 3, 16])
def test_many_processes_learn_from_what_one_does(make: Make, world: int) -> None:
    mixture = make(stage())
    for step in range(3):
        (alone,) = ids(mixture, step, 1)
        together = ids(mixture, step, world)
        assert sorted(alone) == sorted(sum(together, []))
        assert len(alone) == mixture.batch == 9
        rows = [mixture.rows(step, rank, world) for rank in range(world)]
        assert len({len(own) for own in rows}) == 1  # or they would wait for each other forever
        assert all(row.inputs["input_ids"].shape[1] <= 161 for own in rows for row in own)
        assert all("pixel_values" in row.inputs for own in rows for row in own)


def test_a_process_without_samples_gets_an_idle_row(make: Make) -> None:
    rows = [make(stage(rows=1, accumulation=1)).rows(0, rank, 2) for rank in (0, 1)]
    (busy,), (idle,) = sorted(rows, key=lambda own: -own[0].tokens)
    assert (idle.tokens, idle.answer_tokens, idle.sample_ids) == (0, 0, ())
    assert bool((idle.labels == IGNORE).all()) and len(busy.sample_ids) == 1


def test_every_sample_comes_once_before_any_comes_again(make: Make) -> None:
    mixture = make(stage())
    seen: dict[int, list[str]] = {}
    for step in range(40):
        for draw in mixture.draws(step):
            seen.setdefault(draw.stream, []).append(mixture._read(draw).id)
            assert draw.count == len(seen[draw.stream]) - 1
    for number, stream in enumerate(mixture.streams):
        order, size = seen[number], stream.size
        epochs = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]  # and in another order


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(0.05, 10), min_size=3, max_size=3),
    files=st.tuples(st.floats(0.05, 10), st.floats(0.05, 10)),
    rows=st.integers(1, 40),
)
def test_weights_are_respected(
    make: Make, weights: list[float], files: tuple[float, float], rows: int
) -> None:
    tasks = dict(zip(("vqa", "text_qa", "locate"), weights, strict=True))
    data = (source("mixed.jsonl", files[0]), source("more.jsonl", files[1]), source("boxes.jsonl"))
    mixture = make(stage(mixture=tasks, data=data, rows=rows))
    steps, batch, total = 200, mixture.batch, sum(weights)
    drawn: Counter[int] = Counter()
    for step in range(steps):
        now = Counter(draw.stream for draw in mixture.draws(step))
        assert sum(now.values()) == batch
        drawn += now
        for number, stream in enumerate(mixture.streams):
            assert abs(now[number] - batch * stream.share) < 1
    for task, weight in tasks.items():
        part = sum(drawn[n] for n, stream in enumerate(mixture.streams) if stream.task == task)
        # A step is off by less than 1 with mean 0: its deviation is 0.5 at most, this is 5 sigma.
        assert abs(part - steps * batch * weight / total) <= 5 * 0.5 * 2 * steps**0.5
    vqa_files = [stream.share for stream in mixture.streams if stream.task == "vqa"]
    assert vqa_files[0] / vqa_files[1] == pytest.approx(files[0] / files[1])


def test_composition_goes_on_over_the_chunks_it_is_drawn_in(make: Make) -> None:
    mixture = make(stage())
    counts: Counter[int] = Counter()
    for step in range(1100):
        for draw in mixture.draws(step):
            assert draw.count == counts[draw.stream]
            counts[draw.stream] += 1


@given(
    sizes=st.lists(st.integers(1, 100), max_size=60),
    capacity=st.integers(100, 300),
    world=st.integers(1, 9),
)
def test_sharing_out_keeps_everything_and_the_budget(
    sizes: list[int], capacity: int, world: int
) -> None:
    bins = share_out(sizes, capacity, world)
    assert sorted(sum(bins, [])) == list(range(len(sizes)))
    assert all(sum(sizes[place] for place in places) <= capacity for places in bins)
    assert len(bins) % world == 0 and bins


def test_the_tasks_of_a_source_are_a_filter(make: Make) -> None:
    data = (source("mixed.jsonl", 1.0, "text_qa"), source("more.jsonl"))
    mixture = make(stage(data=data, mixture={"vqa": 1.0, "text_qa": 1.0}))
    assert [(s.source.path, s.task, s.size) for s in mixture.streams] == [
        ("more.jsonl", "vqa", 5),
        ("mixed.jsonl", "text_qa", 4),
    ]
    assert set(mixture.identity()) == {"mixed.jsonl", "more.jsonl"}


def test_the_plan_counts_steps_and_devices(make: Make) -> None:
    mixture = make(stage(samples=1000, epochs=2.0), devices=4)
    assert (mixture.batch, mixture.steps) == (36, 56)


def test_prompts_are_shared_out_in_groups(make: Make) -> None:
    small = {**SMALL, "rows": 4, "accumulation": 5}
    data = (source("mixed.jsonl"), source("boxes.jsonl"))
    tasks = {"vqa": 0.5, "locate": 0.5}
    mixture = make(replace(RL, data=data, mixture=tasks, **small), devices=2)
    assert isinstance(RL, RlStage) and mixture.batch == 40 // RL.rollouts.num_generations
    shares = [mixture.samples(1, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 3, 3]
    alone = mixture.samples(1, 0, 1)
    assert sorted(s.id for s in alone) == sorted(s.id for share in shares for s in share)


def test_rows_made_ahead_are_the_rows(make: Make) -> None:
    mixture = make(stage())
    made = list(ahead(lambda step: mixture.rows(step, 0, 1), range(3, 8), 2))
    asked = [mixture.rows(step, 0, 1) for step in range(3, 8)]
    assert [[r.sample_ids for r in rows] for rows in made] == [
        [r.sample_ids for r in rows] for rows in asked
    ]


def test_views_have_the_tokens_that_were_planned_without_pixels(make: Make) -> None:
    data = (source("boxes.jsonl", augment="geometric"), source("more.jsonl", augment="geometric"))
    mixture = make(stage(data=data, mixture={"locate": 0.6, "vqa": 0.4}))
    plain = make(
        stage(
            data=tuple(replace(d, augment="none") for d in data),
            mixture={"locate": 0.6, "vqa": 0.4},
        )
    )
    changed = 0
    for step in range(6):
        rows, same = mixture.rows(step, 0, 1), plain.rows(step, 0, 1)
        for row in rows:
            grids = row.inputs["image_grid_thw"]
            assert int(grids.prod(dim=1).sum()) == len(row.inputs["pixel_values"])
            tokens = int((row.inputs["input_ids"] == mixture._chat.image_token).sum())
            assert 4 * tokens == len(row.inputs["pixel_values"])
        changed += not torch.equal(rows[0].inputs["pixel_values"], same[0].inputs["pixel_values"])
    assert changed == 6


BROKEN = [
    ({"images": ["none.png"]}, "picture .*none.png cannot be read"),
    ({"images": ["boxes.jsonl"]}, "boxes.jsonl is neither a DICOM file nor"),
    (
        locate(0) | {"boxes": [{"label": "m", "xyxy": [0, 0, 97, 5]}]},
        "outside its image of 96 x 64",
    ),
    ({"messages": [{"role": "user", "content": "Why?"}]}, "has no answer"),
    ({"images": ["0.png"] * 30}, r"the sample needs \d+ tokens .* and a row holds 160: raise"),
    ({"messages": vqa(0)["messages"] * 2 + [{"role": "assistant", "content": ""}]}, "alternate"),
    ({"task": "vqas"}, "task 'vqas' is not one of"),
    ({"answer": 3}, "'answer' must be a text"),
    ({"images": ["line.png"]}, "image of 300 x 1 pixels is longer than 200:1"),
    (
        {"messages": [{"role": "user", "content": "a<|im_end|>"}, vqa(0)["messages"][1]]},
        "control token",
    ),
]


@pytest.fixture()
def broken_file(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = folder / "broken.jsonl"
    write(path, [vqa(0), vqa(1) | request.param, vqa(2)])
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("broken_file", "message"), BROKEN, indirect=["broken_file"], ids=lambda value: None
)
def test_broken_samples_are_one_line_or_skipped(
    make: Make, broken_file: Path, message: str
) -> None:
    one = stage(data=(source("broken.jsonl"),), mixture={"vqa": 0.5, "locate": 0.5})
    tasks = {json.loads(line)["task"] for line in broken_file.read_text().splitlines()}
    one = replace(one, mixture={task: 1.0 for task in tasks if task != "vqas"})
    with pytest.raises(SampleError, match=message) as caught:
        make(one).rows(0, 0, 1)
    where = f"{broken_file}:2"
    assert str(caught.value).startswith(f"{where}: ") and "\n" not in str(caught.value)
    lenient = make(one, skip_broken=True)
    assert {id for step in range(3) for id in ids(lenient, step, 1)[0]} == {"vqa-0", "vqa-2"}
    assert list(lenient.skipped) == [where]


def test_a_picture_that_breaks_only_when_decoded(make: Make, folder: Path) -> None:
    data = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    write(folder / "cut.jsonl", [vqa(0), vqa(1, images=["cut.png"])])
    one = stage(data=(source("cut.jsonl"),), mixture={"vqa": 1.0})
    with pytest.raises(SampleError, match=r"cut.jsonl:2: .*cut.png"):
        make(one).rows(0, 0, 1)
    lenient = make(one, skip_broken=True)
    assert {id for id in ids(lenient, 0, 1)[0]} == {"vqa-0"}
    assert list(lenient.skipped) == [f"{folder / 'cut.jsonl'}:2"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mixture": {"vqa": 1.0, "report": 0.1}}, RecipeError, "its mixture has 'report', which"),
        ({"mixture": {"text_qa": 1.0}}, RecipeError, "more.jsonl serves no task .*: it holds vqa"),
        ({"data": (source("nothing.jsonl"),)}, SampleError, "nothing.jsonl cannot be read"),
    ],
)
def test_data_that_cannot_serve_the_mixture(
    make: Make, changes: Value, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        make(stage(**changes))
    assert "\n" not in str(caught.value)

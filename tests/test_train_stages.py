"""Recipes of stages: the published values, and every mistake with its line."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.errors import RecipeError
from medmo_edge.train.recipe import load_recipe, read_document
from medmo_edge.train.recipe_toml import parse, suggest
from medmo_edge.train.rewards import REWARDS
from medmo_edge.train.stages import RlStage, load_stages, read_stages

MEDMO = (resources.files("medmo_edge.train") / "medmo-8b.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["medmo-4b", "medmo-8b"])
def test_the_published_values(name: str) -> None:
    """MedMO's paper and README; devices * rows * accumulation is the global batch."""
    recipe = load_stages(name)
    assert recipe.base.startswith("Qwen/Qwen3-VL-") and recipe.machine.devices == 64
    values = [
        (s.kind, s.samples, s.max_pixels, s.rows, s.accumulation, s.tuning.learning_rate)
        for s in recipe.stages
    ]
    assert values == [
        ("pretrain", 18_500_000, 768 * 768, 10, 2, 1e-5),
        ("pretrain", 3_000_000, 1280 * 1280, 2, 8, 8e-6),
        ("instruct", 4_300_000, 768 * 768, 10, 2, 5e-6),
        ("rl", 300_000, 768 * 768, 4, 4, 1e-5),
    ]
    assert [s.tuning.schedule for s in recipe.stages][:2] == ["cosine", "cosine"]
    assert all(s.tuning.warmup_ratio == 0.05 for s in recipe.stages[:3])
    last = recipe.stages[-1]
    assert isinstance(last, RlStage)
    assert (last.objective.loss_type, last.objective.epsilon) == ("dapo", 0.15)
    assert (last.objective.epsilon_high, last.rollouts.num_generations) == (0.25, 4)
    assert (last.rollouts.max_prompt_tokens, last.rollouts.max_completion_tokens) == (4096, 1024)
    assert last.sharding == "zero3" and last.offload and set(last.rewards) == set(REWARDS)


@pytest.mark.slow  # importing TRL takes 8 s
def test_objective_settings_are_fields_of_trl() -> None:
    config = pytest.importorskip("trl", reason="compares names with TRL's").GRPOConfig
    known = set(config.__dataclass_fields__)
    last = load_stages("medmo-8b").stages[-1]
    assert isinstance(last, RlStage)
    assert set(last.objective.__dataclass_fields__) <= known


def test_what_is_not_published_is_marked_as_ours() -> None:
    """Every value that the sources give has no such mark, and the known gaps have one."""
    marked = {line.split("=")[0].strip() for line in MEDMO.splitlines() if "# ours" in line}
    assert marked >= {"beta", "betas", "weight_decay", "epochs", "text_tokens", "utilisation"}
    published = {"learning_rate", "rows", "accumulation", "num_generations", "epsilon", "samples"}
    assert not marked & published


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lora_rank = 0", "lora_rang = 0", "stages: unknown key 'lora_rang', did you mean"),
        ("[machine] ", "[machines] ", "unknown key 'machines', did you mean 'machine'?"),
        ("clip_norm = 1.0", "norm = 1.0", "unknown key 'norm', did you mean 'clip_norm'?"),
        ("rope_theta = 5000000.0", "", "key 'rope_theta' is missing"),
        ('kind = "rl"', 'kind = "rlhf"', "kind must be one of pretrain, instruct, rl, not 'rlhf'"),
        ('kind = "rl"', 'kind = "instruct"', "unknown key 'curriculum'"),
        ('kind = "instruct"', 'kind = "rl"', "key 'curriculum' is missing"),
        ("guided = false", "guided = true", "guided needs our own loop: set engine to generate"),
        ("iou_from = 0.0", "iou_from = 1.5", "iou_from and iou_to must be in 0..1"),
        ("until = 1.0", "until = 0.0", "until above 0 and at most 1"),
        ("seed = 42 ", 'seed = "42" ', "seed must be of type int, not '42'"),
        ("betas = [0.9, 0.999]", "betas = [0.9]", "betas must have 2 entries, not 1"),
        ("betas = [0.9, 0.999]", "betas = 0.9", "betas must be a list"),
        ("caption = 0.6", "captions = 0.6", "unknown 'captions', did you mean 'caption'?"),
        ("yes_no = 1.0", "yesno = 1.0", "unknown 'yesno', did you mean 'yes_no'?"),
        ("caption = 0.6", "caption = -0.6", "mixture needs weights, none below 0"),
        ("num_generations = 4 ", "num_generations = 1 ", "num_generations must be 2 or more"),
        ("num_generations = 4 ", "num_generations = 5 ", "must be a multiple of num_generations"),
        ("epsilon_high = 0.25", "epsilon_high = 0.1", "epsilon_high no less"),
        ("answer_tokens = 120", "answer_tokens = 999", "answer_tokens must be above 0 and at most"),
        ("samples = 18500000", "samples = 0", "samples, epochs, rows and accumulation must be"),
        ("max_pixels = 589824", "max_pixels = 1000", "max_pixels no less"),
        ('name = "pretrain-1280"', 'name = "pretrain-768"', "stages need different names"),
        ('sharding = "zero3" ', 'sharding = "zero2" ', "offload needs sharding zero3 or fsdp2"),
        ('["vision", "merger", "language"]', "[]", "trainable must name each module once"),
        ('["vision", "merger", "language"]', '["visual"]', "must be one of vision, merger, lang"),
        ("text_tokens = 150", "text_tokens = 300000", "300576 tokens do not fit max_positions"),
        ("max_prompt_tokens = 4096", "max_prompt_tokens = 600", "676 prompt tokens do not fit"),
        (
            "row_tokens = 8192",
            "row_tokens = 512",
            "row_tokens must be 726 (one sample of max_pixels",
        ),
        ("row_tokens = 8192", "row_tokens = 999999", "no more than max_positions 262144"),
        ("row_tokens = 8192", "", "key 'row_tokens' is missing"),
        ('tasks = ["vqa"]', 'tasks = ["vqas"]', "tasks has unknown ['vqas'], did you mean 'vqa'?"),
        ("weight = 1.0", "weight = 0.0", "stages.data: weight must be above 0"),
        ("weight = 1.0", "wait = 1.0", "stages.data: unknown key 'wait'"),
        ('augment = "geometric"', 'augment = "flip"', "augment must be one of none, geometric"),
        ('path = "vqa.jsonl"', 'path = ""', "path must name a JSONL file below the data folder"),
        ("devices = 64", "devices = 0", "devices, memory and speed must be above 0"),
        ("num_kv_heads = 8", "num_kv_heads = 0", "num_heads must be a multiple of num_kv_heads"),
        ("[stages.tuning]", "[[stages.tuning]]", "tuning must be a table"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MEDMO
    path = tmp_path / "mine.toml"
    path.write_text(MEDMO.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_stages(path)
    text = str(caught.value)
    assert message in text and "\n" not in text
    line = int(text.removeprefix(f"recipe {path}:").split(":")[0])
    at = MEDMO[: MEDMO.index(old)].count("\n") + 1
    # The line itself, or the header of its table where the key is gone or the rule is the table's.
    headers = [n for n, row in enumerate(MEDMO.splitlines(), start=1) if row.startswith("[")]
    assert line == at or line in headers


def test_a_wrong_value_of_a_later_stage_names_its_own_line(tmp_path: Path) -> None:
    lines = MEDMO.splitlines()
    places = [index for index, line in enumerate(lines) if line.startswith("clip_norm")]
    for place in places:
        text = "\n".join([*lines[:place], 'clip_norm = "1"', *lines[place + 1 :]])
        with pytest.raises(RecipeError, match=f":{place + 1}: stages.tuning: clip_norm must be of"):
            read_stages(parse(text, "mine"))


def test_the_two_kinds_of_recipe_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe smoke has no stages: it trains from nothing"):
        load_stages("smoke")
    with pytest.raises(RecipeError, match="starts from the checkpoint 'Qwen/.* --dry-run"):
        load_recipe("medmo-8b")
    empty = MEDMO[: MEDMO.index("[[stages]]")].replace('name = "MedMO-8B"', "stages = []")
    with pytest.raises(RecipeError, match=r":\d+: stages must be a list of tables"):
        read_stages(parse(empty, "mine"))
    assert read_document("medmo-8b").values["name"] == "MedMO-8B"


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("lr", ["learning_rate", "rows"], " (known here: learning_rate, rows)"),
        ("rate", ["learning_rate", "rows"], ", did you mean 'learning_rate'?"),
        ("epoch", ["epochs", "rows"], ", did you mean 'epochs'?"),
    ],
)
def test_suggestions(name: str, known: list[str], suggestion: str) -> None:
    assert suggest(name, known) == suggestion


def test_lines_of_nested_arrays_comments_and_blanks() -> None:
    text = "a = 1\n\n# b = 2\n[t]\n b=2\n[[s]]\nc = 3\n[s.u]\nd = 4\n"
    text += "[[s]] # again\nc = 5\n[s.u]\nd = 6"
    document = parse(text, "x")
    wanted: dict[tuple[Any, ...], int] = {
        ("a",): 1,
        ("t", "b"): 5,
        ("s", 0, "c"): 7,
        ("s", 0, "u", "d"): 9,
        ("s", 1): 10,
        ("s", 1, "u", "d"): 13,
    }
    for path, line in wanted.items():
        assert document.where(path).startswith(f"recipe x:{line}: ")
    assert document.where(("nowhere",)) == "recipe x: "

"""Recipes: what is packaged loads, and every mistake is named with its place."""

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import RecipeError
from medmo_edge.train.recipe import load_recipe

SMOKE = (resources.files("medmo_edge.train") / "smoke.toml").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["nano", "smoke"])
def test_packaged_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.rl is not None and recipe.stages == ("pretrain", "instruct", "rl")
    steps = [recipe.only(stage).num_steps for stage in recipe.stages]
    assert recipe.num_steps == sum(steps) and min(steps) > 0
    assert steps[-1] == recipe.rl.steps
    assert len(recipe.sha256) == 64


def test_a_file_with_the_same_text_is_the_same_recipe(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, SMOKE)) == load_recipe("smoke")


def test_any_change_changes_the_identity() -> None:
    recipe = load_recipe("smoke")
    assert dataclasses.replace(recipe, seed=recipe.seed + 1).sha256 != recipe.sha256
    shorter = (dataclasses.replace(recipe.phases[0], steps=5), *recipe.phases[1:])
    assert dataclasses.replace(recipe, phases=shorter).sha256 != recipe.sha256


def test_the_packaged_nano_names_its_recipe() -> None:
    """The checkpoint that ships says which recipe it came from: the one that ships."""
    notes = json.loads((resources.files("medmo_edge") / "medmo-nano/medmo_edge.json").read_text())
    stage = load_recipe("nano").only(notes["training"]["stage"])
    assert notes["training"]["recipe_sha256"] == stage.sha256


def test_a_recipe_may_end_before_reinforcement(tmp_path: Path) -> None:
    """Its other stages are then the same as with it, so that saved runs can go on."""
    recipe = load_recipe(write(tmp_path, SMOKE[: SMOKE.index("[rl]")]))
    assert recipe.rl is None and recipe.stages == ("pretrain", "instruct")
    for stage in recipe.stages:
        assert recipe.only(stage).sha256 == load_recipe("smoke").only(stage).sha256


def test_the_sizes_are_a_checkpoints() -> None:
    """[text] is the reader's own TextConfig, with what follows from the rest filled in."""
    recipe = load_recipe("nano")
    with open_checkpoint("nano") as checkpoint:
        assert recipe.text == checkpoint.config.text
        assert recipe.vision.config(recipe.text.hidden_size) == checkpoint.config.vision


def test_phases_follow_each_other() -> None:
    recipe = load_recipe("smoke").only("pretrain")
    first, second = recipe.phases
    assert [recipe.phase_at(step) for step in (0, 5, 6, 11)] == [first, first, second, second]
    assert recipe.phase_at(99) == second


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "seed = 7\nsed = 7", ":4: unknown key 'sed', did you mean 'seed'?"),
        ("seed = 7", "", "key 'seed' is missing"),
        ("seed = 7", 'seed = "7"', "seed must be of type int, not '7'"),
        ("seed = 7", "seed = true", "seed must be of type int, not True"),
        ("clip_norm = 1.0", "clip = 1.0", "optimizer: unknown key 'clip'"),
        ("learning_rate = 3e-3", "learning_rate = 0.0", "learning_rate must be above 0"),
        ('stage = "pretrain"', 'stage = "instruct"', "pretrain must come before instruct"),
        ('stage = "pretrain"', 'stage = "rl"', "stage must be"),
        ("radiology_share = 0.0", "radiology_share = -0.1", "together at most 1"),
        ("platelet_share = 0.0", "platelet_share = 1.5", "platelet_share must be in 0..1"),
        ("betas = [0.9, 0.98]", "betas = 0.9", "betas must be a list"),
        ("[data]", "[dada]", "unknown key 'dada'"),
        ("mrope_section = [6, 5, 5]", "mrope_section = [6, 5, 4]", "mrope_section must sum"),
        ("num_heads = 2\nnum_kv", "num_heads = 3\nnum_kv", None),
        ("num_kv_heads = 1", "num_kv_heads = 3", "num_heads must be a multiple of num_kv_heads"),
        ("deepstack_layers = [0]", "deepstack_layers = [2]", "deepstack_layers must be"),
        ("blood_share = 0.0", "blood_share = 1.5", "together at most 1"),
        ("phantoms = 8", "phantoms = 0", "phantoms must be at least 1"),
        ("min_pixels = 4096", "min_pixels = 64", "one vision token of pixels"),
        ("min_pixels = 4096", "min_pixels = 99999", "one vision token of pixels"),
        ("steps = 6", "steps = 0", "phases need steps"),
        ("max_positions = 512", "max_positions = 140", "144 tokens do not fit max_positions 140"),
        ("num_kv_heads = 1", "num_kv_heads = 0", "num_heads must be a multiple of num_kv_heads"),
        ("seed = 7", "seed =", "is not valid TOML"),
        ("prompts = 3", "prompts = 0", "steps, prompts and completion tokens must be above 0"),
        ("located = 0.7", "located = 0.9", "located and present must be 0 or more, together"),
        ("num_generations = 3", "num_generations = 1", "num_generations must be 2 or more"),
        ("iou = 0.8", "iouu = 0.8", "rewards has unknown 'iouu', did you mean 'iou'?"),
        ("beta = 0.0", "beta = -0.1", "beta must be 0 or more"),
        ("temperature = 1.0", "temperature = 0.0", "temperature must be above 0"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    assert old in SMOKE
    path = write(tmp_path, SMOKE.replace(old, new, 1))
    if message is None:  # a legal change: the check above must not be too strict
        assert load_recipe(path).text.num_heads == 3
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.toml", "huge"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe {name} cannot be read: give nano, smoke"):
        load_recipe(name)

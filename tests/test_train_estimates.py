"""Estimates of training against transformers' modules, torch's counter and published figures."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from click.testing import CliRunner

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.cli import cli
from medmo_edge.errors import UsageError
from medmo_edge.model_config import ModelConfig, TextConfig, VisionConfig
from medmo_edge.train.dry_run import advice, dry_run, format_plan
from medmo_edge.train.estimates import (
    GIB,
    MODULES,
    Load,
    Memory,
    count_parameters,
    count_trained,
    estimate_stage,
    forward_flop,
    load_of,
    stage_memory,
    training_flop,
)
from medmo_edge.train.recipe import load_recipe
from medmo_edge.train.stages import Machine, Module, Stage, StagedRecipe, load_stages, model_of

NAMES = ("medmo-4b", "medmo-8b")


@pytest.fixture(scope="module", params=NAMES)
def recipe(request: pytest.FixtureRequest) -> StagedRecipe:
    return load_stages(request.param)


def on_meta(config: ModelConfig) -> Any:
    """transformers' own model of these sizes, without memory behind it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text, vision = dataclasses.asdict(config.text), dataclasses.asdict(config.vision)
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_interleaved": True,
        "mrope_section": list(text.pop("mrope_section")),
    }
    renamed = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings",
    }
    text = {renamed.get(name, name): value for name, value in text.items()}
    vision["spatial_merge_size"] = vision.pop("merge_size")
    vision["deepstack_visual_indexes"] = list(vision.pop("deepstack_indexes"))
    values = transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=config.text.tie_word_embeddings,
    )
    with torch.device("meta"):
        return transformers.Qwen3VLForConditionalGeneration(values)


def test_parameters_are_those_of_transformers(recipe: StagedRecipe) -> None:
    model = on_meta(recipe.model)
    counts = dict.fromkeys(MODULES, 0)
    for name, weight in model.named_parameters():  # a tied head comes once
        visual, merger = ".visual." in name, "merger" in name
        counts["merger" if merger else "vision" if visual else "language"] += weight.numel()
    assert count_parameters(recipe.model) == counts


def test_parameters_are_the_published_ones() -> None:
    """8.77 B and 4.83 B; the smaller counts its tied head a second time, which nobody stores."""
    large, small = (load_stages(name).model for name in ("medmo-8b", "medmo-4b"))
    assert sum(count_parameters(large).values()) / 1e9 == pytest.approx(8.77, abs=0.005)
    head = small.text.vocab_size * small.text.hidden_size
    stored = sum(count_parameters(small).values())
    assert (stored + head) / 1e9 == pytest.approx(4.83, abs=0.005)
    assert stored / 1e9 == pytest.approx(4.44, abs=0.005)


def test_trained_parameters_in_full_and_as_adapters(recipe: StagedRecipe) -> None:
    torch = pytest.importorskip("torch")
    config = recipe.model
    everything = count_parameters(config)
    assert count_trained(config, MODULES, 0) == everything
    merger: tuple[Module, ...] = ("merger",)
    language: tuple[Module, ...] = ("language",)
    assert count_trained(config, merger, 0) == {
        "vision": 0,
        "merger": everything["merger"],
        "language": 0,
    }
    layers = on_meta(config).model.language_model.layers
    linears = [one for one in layers.modules() if isinstance(one, torch.nn.Linear)]
    assert len(linears) == 7 * 36
    wanted = sum(8 * (one.in_features + one.out_features) for one in linears)
    assert count_trained(config, language, 8) == {"vision": 0, "merger": 0, "language": wanted}


def tiny(text_length: int) -> tuple[ModelConfig, Load]:
    """A narrow but deep enough model, one picture of 16 x 16 patches."""
    text = TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e4,
        mrope_section=(12, 10, 10),
        rms_norm_eps=1e-6,
        vocab_size=320,
        max_positions=2048,
        tie_word_embeddings=True,
    )
    vision = VisionConfig(
        depth=3,
        hidden_size=128,
        intermediate_size=512,
        num_heads=4,
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        num_position_embeddings=64,
        out_hidden_size=256,
        deepstack_indexes=(0, 1),
        in_channels=3,
    )
    base = model_of(text, load_recipe("smoke").vision)
    config = dataclasses.replace(base, vision=vision)
    load = Load(
        rows=1,
        patches=256,
        vision_tokens=64,
        text_tokens=text_length,
        answer_tokens=text_length + 64,
    )
    return config, load


@pytest.mark.parametrize("trainable", [MODULES, ("merger", "language"), ("merger",)])
def test_operations_are_those_that_torch_counts(trainable: tuple[Module, ...]) -> None:
    """Forward and backward of transformers' model, counted by torch, attention written out."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    config, load = tiny(192)
    model = on_meta(config).to_empty(device="cpu").train()
    model.set_attn_implementation("eager")
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.02)
        visual, merger = ".visual." in name, "merger" in name
        module = "merger" if merger else "vision" if visual else "language"
        weight.requires_grad_(module in trainable)
    for buffer in model.buffers():
        buffer.fill_(0.1)  # the frequencies of rope; their values cost nothing
    ids = torch.full((1, load.tokens), 7)
    ids[0, :64] = model.config.image_token_id = 3
    grid = torch.tensor([[1, 16, 16]])
    kinds = (ids == 3).int()
    with FlopCounterMode(display=False) as counter:
        loss = model(
            input_ids=ids,
            pixel_values=torch.zeros(256, 1536),
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
            labels=ids,
        ).loss
        loss.backward()
    # torch counts the upper half of causal attention too; 3: forward, and twice backward.
    causal = 3 * forward_flop(config, load)["language"][1]
    estimate = training_flop(config, load, trainable, 0) + causal
    assert counter.get_total_flops() == pytest.approx(estimate, rel=0.03)


def test_frozen_parts_cost_their_forward_pass_only() -> None:
    config, load = tiny(50)
    parts = forward_flop(config, load)
    total = sum(linears + attention for linears, attention in parts.values())
    language, attention = parts["language"]

    def flop(trainable: tuple[Module, ...], rank: int = 0) -> Any:
        return pytest.approx(training_flop(config, load, trainable, rank))

    assert flop(MODULES) == 3 * total
    assert flop(("language",)) == total + 2 * language + 2 * attention
    assert flop(("merger",)) == total + 2 * parts["merger"][0] + language + 2 * attention
    assert flop(("language",), 8) == total + language + 2 * attention


def test_speeds_that_the_published_hours_imply() -> None:
    """225 and 155 hours on 64 devices, one epoch: about 16 and 9 TFLOP/s a device (by hand)."""
    recipe = load_stages("medmo-8b")
    for index, hours, wanted in ((0, 225, 16), (1, 155, 9)):
        stage = recipe.stages[index]
        estimate = estimate_stage(recipe.model, stage, recipe.machine)
        implied = stage.samples * estimate.teraflop_per_sample / (hours * 3600 * 64)
        assert implied == pytest.approx(wanted, rel=0.15)
        assert estimate.hours == pytest.approx(hours * implied / (181 * 0.3))


def changed(stage: Stage, **changes: Any) -> Stage:
    return dataclasses.replace(stage, **changes)


def test_memory_follows_sharding_and_offloading(recipe: StagedRecipe) -> None:
    """16 bytes a parameter: 71 and 140 GB on one device, whatever it is then divided by."""
    stage, machine = recipe.stages[0], recipe.machine
    total = sum(count_parameters(recipe.model).values())

    def states(**changes: Any) -> float:
        memory = stage_memory(recipe.model, changed(stage, **changes), machine)
        return memory.weights + memory.gradients + memory.optimizer

    whole = states(sharding="none") * GIB
    assert whole == pytest.approx(16 * total)
    assert whole / 1e9 == pytest.approx(140 if total > 6e9 else 71, abs=1)
    assert states(sharding="zero2") * GIB == pytest.approx((2 + 14 / 64) * total)
    gathered = 4 * total / 36
    assert states(sharding="fsdp2") * GIB == pytest.approx(16 * total / 64 + gathered)
    offloaded = stage_memory(recipe.model, changed(stage, sharding="zero3", offload=True), machine)
    assert offloaded.optimizer == 0 and offloaded.host * GIB == pytest.approx(12 * total / 64)
    adapters = stage_memory(recipe.model, changed(stage, lora_rank=16), machine)
    assert adapters.optimizer < 0.05 < offloaded.host


def test_activations_grow_with_rows_pixels_and_without_checkpointing() -> None:
    recipe = load_stages("medmo-8b")
    stage, machine = recipe.stages[0], recipe.machine

    def activations(**changes: Any) -> float:
        return stage_memory(recipe.model, changed(stage, **changes), machine).activations

    assert activations(rows=20) == pytest.approx(2 * activations())
    assert activations(max_pixels=1280 * 1280) > 2 * activations()
    assert activations(gradient_checkpointing=False) > 5 * activations()
    # 726 tokens, 2304 patches: the input of every layer and all of one; then 10 rows of 120 logits
    language = 36 * 726 * 4096 + 726 * (4 * 4096 + 10240 + 36864)
    vision = 27 * 2304 * 1152 + 2304 * (8 * 1152 + 2 * 4304)
    wanted = 10 * (2 * (language + vision) + 1200 * 151936)
    assert activations() * GIB == pytest.approx(wanted)
    assert load_of(recipe.model, stage).tokens == 576 + 150


def test_steps_tokens_and_groups_of_answers() -> None:
    recipe = load_stages("medmo-8b")
    first, *_, last = (estimate_stage(recipe.model, s, recipe.machine) for s in recipe.stages)
    assert first.steps == -(-18_500_000 // 1280) and first.tokens_per_step == 1280 * 726
    assert last.steps == -(-300_000 * 4 // 1024)
    assert last.memory.engine == pytest.approx(0.3 * 64) and first.memory.engine == 0


# The command -----------------------------------------------------------------------------------


def test_a_device_too_small_is_said_with_the_setting_to_change() -> None:
    recipe = load_stages("medmo-8b")
    small = Machine(devices=1, device_memory_gib=24, peak_teraflops=100, utilisation=0.3)
    estimate = estimate_stage(recipe.model, recipe.stages[0], small)
    assert not estimate.fits
    assert advice(estimate.memory).startswith('set sharding = "zero2" or "fsdp2"')
    zero = {name: 0.0 for name in Memory.__dataclass_fields__}
    assert "lower rows" in advice(Memory(**zero | {"activations": 1.0}))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["train", *arguments])


@pytest.mark.parametrize("name", [*NAMES, "nano", "smoke"])
def test_the_dry_run_prints_every_figure(name: str) -> None:
    shown = run(name, "--dry-run")
    assert shown.exit_code == 0, shown.exception
    for word in ("trained", "language", "merger", "vision", "tokens", "GiB a device", "time"):
        assert word in shown.output
    plan = json.loads(run(name, "--dry-run", "--json").output)
    assert [stage["stage"] for stage in plan["stages"]] == re.findall(
        r"^(\S.*) \(\w+\)$", shown.output, re.MULTILINE
    )
    assert format_plan(dry_run(name)) == shown.output.strip()
    assert all(stage["memory_gib"]["device"] > 1 for stage in plan["stages"])


def test_the_dry_run_of_nano_fits_its_record() -> None:
    """The parameters of the packaged checkpoint, and 71 minutes on two cores, as its card says."""
    plan = dry_run("nano", "pretrain")
    with open_checkpoint("nano") as checkpoint:
        stored = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert sum(plan["parameters"].values()) == stored
    minutes = 60 * sum(stage["hours"] for stage in plan["stages"])
    assert minutes == pytest.approx(71, rel=0.02)


def test_stages_are_chosen_and_refused() -> None:
    plan = json.loads(run("medmo-8b", "--dry-run", "--json", "--stage", "pretrain").output)
    assert [stage["stage"] for stage in plan["stages"]] == ["pretrain-768", "pretrain-1280"]
    cases: list[tuple[list[str], type[Exception], str]] = [
        (["medmo-8b", "--dry-run", "--stage", "sft"], UsageError, "has no stage 'sft': it has pre"),
        (["medmo-8b", "-o", "x"], UsageError, "starts from Qwen/Qwen3-VL-8B-Instruct, which is no"),
        (["medmo-8b", "-o", "x", "--stage", "rl"], UsageError, "x/instruct/checkpoint, which does"),
        (["medmo-8b", "-o", "x", "--stage", "no"], UsageError, "has no stage 'no'"),
        (["smoke", "-o", "x", "--stage", "sft"], UsageError, "has no stage .sft.: it has"),
        (["smoke", "-o", "x", "--stage", "rl"], UsageError, "x/instruct/checkpoint, which does"),
        (["smoke"], UsageError, "needs a new folder: give it with -o"),
    ]
    for arguments, kind, message in cases:
        error = run(*arguments).exception
        assert isinstance(error, kind) and re.search(message, str(error)), arguments


def test_planning_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None;"
        "from medmo_edge.train.dry_run import dry_run; print(dry_run('medmo-8b')['name'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MedMO-8B"

"""What a stage of training needs, from sizes alone: parameters, tokens, memory, operations, time.

Every figure is an estimate by the formulas below, made before anything runs; only the parameter
counts are exact. No torch, no device is looked at. Pictures count at the stage's largest size, so
smaller ones need less of everything. Communication, data loading and saving are not in the time.

Operations (multiply and add are two):
    a linear on T tokens: 2 * parameters * T; its gradients the same twice, once for the weights
    (only when trained) and once for its input (only when something at or below it is trained)
    attention: 2 * 2 * T^2 * width, half of it in the causal language model; twice that backward
    utilisation is of these; what checkpointing computes again is not counted (MFU)
Memory of one device, in bytes:
    weights 2 each, gradients 2 and AdamW 12 (fp32 copy and two moments) per trained parameter,
    divided by the devices as the sharding says; recipes from nothing: 4, 4 and 8, undivided
    activations: one layer's input per layer, and one whole layer, with checkpointing; else every
    layer whole; logits of the answer tokens, 10 per value
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from medmo_edge.model_config import ModelConfig, Shape, expected_tensors
from medmo_edge.train.recipe import Phase, Recipe
from medmo_edge.train.reinforcement import Reinforcement
from medmo_edge.train.stages import Machine, Module, RlStage, Stage, model_of

GIB = 2**30
#: operations per processor thread and second that MedMO-nano's training reached, by these formulas:
#: its 2400 steps took 71 minutes on two shared cores in bf16. Other machines and widths differ.
CPU_GIGAFLOPS = 28.0
_QUESTION_TOKENS = 24  # of a question about a scene, with its turn's marks
CONTEXT_GIB = 1.0  # the driver, the libraries and what the allocator loses; a guess
MODULES: tuple[Module, ...] = ("vision", "merger", "language")  # in the order data pass them


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a device has in hand at once: ``rows`` sequences of one picture and text."""

    rows: int
    patches: int
    vision_tokens: int
    text_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Language model tokens of one sequence."""
        return self.vision_tokens + self.text_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """GiB of one device; ``host`` is what offloading puts into the machine's own memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    engine: float
    context: float
    host: float

    @property
    def device(self) -> float:
        """All that must fit the device."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.engine + self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One stage: what is trained, how much passes per step, what a device holds, how long."""

    stage: str
    kind: str
    parameters: Mapping[Module, int]
    trained: Mapping[Module, int]
    tokens_per_step: int
    steps: int
    teraflop_per_sample: float
    memory: Memory
    device_memory_gib: float | None
    hours: float

    @property
    def fits(self) -> bool:
        """Whether the memory of one device suffices; where none is planned for, it does."""
        return self.device_memory_gib is None or self.memory.device <= self.device_memory_gib


def module_of(name: str) -> Module:
    """The part of the model that a tensor belongs to; the deepstack mergers are the merger's."""
    if not name.startswith("model.visual."):
        return "language"
    return "merger" if "merger" in name else "vision"


def count_parameters(config: ModelConfig) -> dict[Module, int]:
    """Stored parameters by module; a tied head is counted once."""
    counts: dict[Module, int] = dict.fromkeys(MODULES, 0)
    for name, shape in expected_tensors(config).items():
        counts[module_of(name)] += math.prod(shape)
    return counts


def count_trained(
    config: ModelConfig, trainable: Collection[Module], lora_rank: int
) -> dict[Module, int]:
    """Parameters that learn: whole modules, or rank * (inputs + outputs) of each linear in them."""
    counts: dict[Module, int] = dict.fromkeys(MODULES, 0)
    for name, shape in expected_tensors(config).items():
        module = module_of(name)
        if module in trainable and (lora_rank == 0 or _is_linear(name, shape)):
            counts[module] += math.prod(shape) if lora_rank == 0 else lora_rank * sum(shape)
    return counts


def _is_linear(name: str, shape: Shape) -> bool:
    """A matrix of a block or merger: not a table, not the head (TRL cannot adapt it either)."""
    tables = ("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")
    return len(shape) == 2 and not name.endswith(tables)


def load_of(config: ModelConfig, stage: Stage) -> Load:
    """One picture of the largest size per sequence, and the stage's mean text."""
    patch, merge = config.vision.patch_size, config.vision.merge_size
    patches = stage.max_pixels // patch**2
    return Load(
        rows=stage.rows,
        patches=patches,
        vision_tokens=patches // merge**2,
        text_tokens=stage.text_tokens,
        answer_tokens=stage.answer_tokens,
    )


def forward_flop(config: ModelConfig, load: Load) -> dict[Module, tuple[float, float]]:
    """Operations of one sequence forward, by module: (of linears, of attention).

    The head works only where there is an answer.
    """
    text, vision = config.text, config.vision
    sizes = count_parameters(config)
    table = text.vocab_size * text.hidden_size
    inner = sizes["language"] - table * (1 if text.tie_word_embeddings else 2)
    width = text.num_heads * text.head_dim
    seen = sizes["vision"] - vision.num_position_embeddings * vision.hidden_size
    return {
        "vision": (
            2 * seen * load.patches,
            4 * load.patches**2 * vision.hidden_size * vision.depth,
        ),
        "merger": (2 * sizes["merger"] * load.vision_tokens, 0),
        "language": (
            2 * inner * load.tokens + 2 * table * load.answer_tokens,
            2 * load.tokens**2 * width * text.num_layers,
        ),
    }


def training_flop(
    config: ModelConfig, load: Load, trainable: Collection[Module], lora_rank: int
) -> float:
    """Operations of one sequence forward and backward."""
    total, reached = 0.0, False
    for module, (linears, attention) in forward_flop(config, load).items():
        own = module in trainable
        reached = reached or own  # gradients flow down to the first module that learns
        total += linears * (1 + reached + (own and lora_rank == 0)) + attention * (1 + 2 * reached)
    return total


def activation_bytes(config: ModelConfig, load: Load, *, checkpointing: bool, width: int) -> float:
    """Bytes kept for the backward pass; ``width`` is of one value (2 in bf16, 4 in fp32)."""
    text, vision = config.text, config.vision
    heads = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    inner = 4 * vision.hidden_size + 2 * vision.intermediate_size
    stacks = (
        (text.num_layers, load.tokens, text.hidden_size, heads + 3 * text.intermediate_size),
        (vision.depth, load.patches, vision.hidden_size, inner),
    )
    total = 0.0
    for layers, tokens, hidden, inside in stacks:
        whole = tokens * (4 * hidden + inside)
        total += layers * tokens * hidden + whole if checkpointing else layers * whole
    logits = 10 * load.answer_tokens * text.vocab_size
    return load.rows * (total * width + logits)


def stage_memory(config: ModelConfig, stage: Stage, machine: Machine) -> Memory:
    """What one device of ``machine`` holds while ``stage`` runs."""
    total = sum(count_parameters(config).values())
    trained = sum(count_trained(config, stage.trainable, stage.lora_rank).values())
    adapters = trained if stage.lora_rank else 0
    all_shards = machine.devices if stage.sharding in ("zero3", "fsdp2") else 1
    state_shards = 1 if stage.sharding == "none" else machine.devices
    layer = (total / config.text.num_layers) * 2 * 2  # gathered: the one in use and the next
    optimizer = 12 * trained / state_shards / GIB
    activations = activation_bytes(
        config, load_of(config, stage), checkpointing=stage.gradient_checkpointing, width=2
    )
    weights = 2 * (total + adapters) / all_shards + (layer if all_shards > 1 else 0)
    return Memory(
        weights=(weights + _reference(stage, total) / all_shards) / GIB,
        gradients=2 * trained / state_shards / GIB,
        optimizer=0.0 if stage.offload else optimizer,
        activations=activations / GIB,
        engine=_engine_share(stage) * machine.device_memory_gib,
        context=CONTEXT_GIB,
        host=optimizer if stage.offload else 0.0,
    )


def _reference(stage: Stage, parameters: int) -> int:
    """Bytes of the frozen copy that a KL term compares with; LoRA switches its adapters off."""
    if not isinstance(stage, RlStage) or stage.objective.beta == 0 or stage.lora_rank:
        return 0
    return 2 * parameters


def _engine_share(stage: Stage) -> float:
    """The part of the device that an inference engine beside the trainer takes."""
    if isinstance(stage, RlStage) and stage.rollouts.engine == "vllm-colocate":
        return stage.rollouts.engine_memory
    return 0.0


def estimate_stage(config: ModelConfig, stage: Stage, machine: Machine) -> Estimate:
    """All figures of one stage."""
    load = load_of(config, stage)
    group = stage.rollouts.num_generations if isinstance(stage, RlStage) else 1
    sequences = stage.samples * stage.epochs * group
    per_step = stage.rows * stage.accumulation * machine.devices
    flop = training_flop(config, load, stage.trainable, stage.lora_rank)
    speed = machine.devices * machine.peak_teraflops * 1e12 * machine.utilisation
    seconds = sequences * flop / speed
    if isinstance(stage, RlStage):
        rate = machine.devices * stage.rollouts.tokens_per_second
        seconds += sequences * stage.rollouts.mean_completion_tokens / rate
    return Estimate(
        stage=stage.name,
        kind=stage.kind,
        parameters=count_parameters(config),
        trained=count_trained(config, stage.trainable, stage.lora_rank),
        tokens_per_step=per_step * load.tokens,
        steps=math.ceil(sequences / per_step),
        teraflop_per_sample=flop / 1e12,
        memory=stage_memory(config, stage, machine),
        device_memory_gib=machine.device_memory_gib,
        hours=seconds / 3600,
    )


def estimate_phase(recipe: Recipe, index: int) -> Estimate:
    """One phase of a recipe from nothing, on this kind of processor: fp32, everything trained."""
    phase = recipe.phases[index]
    config = model_of(recipe.text, recipe.vision)
    load = _phase_load(config, phase)
    return _from_nothing(
        recipe,
        config,
        load,
        stage=f"phase {index + 1}",
        kind=phase.stage,
        rows=phase.rows,
        steps=phase.steps,
        flop=training_flop(config, load, MODULES, 0),
    )


def estimate_rl(recipe: Recipe, spec: Reinforcement) -> Estimate:
    """The rl stage of a recipe from nothing: a prompt and its answers are one row, read twice.

    Pictures are as large as in the last phase, and answers as long as they may be.
    """
    phase, group = recipe.phases[-1], spec.rollouts
    config = model_of(recipe.text, recipe.vision)
    answers = group.num_generations * group.max_completion_tokens
    picture = _phase_load(config, phase)
    load = replace(picture, text_tokens=_QUESTION_TOKENS + answers, answer_tokens=answers)
    learned = max(1, 2 * spec.row_tokens // load.tokens)  # rows that are learned from at once
    drawn = sum(linears + attention for linears, attention in forward_flop(config, load).values())
    return _from_nothing(
        recipe,
        config,
        replace(load, rows=learned),
        stage="rl",
        kind="rl",
        rows=spec.prompts,
        steps=spec.steps,
        flop=drawn + training_flop(config, load, MODULES, 0),
    )


def _from_nothing(
    recipe: Recipe,
    config: ModelConfig,
    load: Load,
    *,
    stage: str,
    kind: str,
    rows: int,
    steps: int,
    flop: float,
) -> Estimate:
    """``rows`` sequences a step of ``flop`` each; memory is that of ``load``."""
    counts = count_parameters(config)
    total = sum(counts.values())
    memory = Memory(
        weights=4 * total / GIB,
        gradients=4 * total / GIB,
        optimizer=8 * total / GIB,
        activations=activation_bytes(config, load, checkpointing=False, width=4) / GIB,
        engine=0.0,
        context=CONTEXT_GIB,
        host=0.0,
    )
    return Estimate(
        stage=stage,
        kind=kind,
        parameters=counts,
        trained=counts,
        tokens_per_step=rows * load.tokens,
        steps=steps,
        teraflop_per_sample=flop / 1e12,
        memory=memory,
        device_memory_gib=None,
        hours=steps * rows * flop / (recipe.threads * CPU_GIGAFLOPS * 1e9) / 3600,
    )


def _phase_load(config: ModelConfig, phase: Phase) -> Load:
    """Rows at their bounds: the largest picture, every turn token an answer's."""
    patches = phase.max_pixels // config.vision.patch_size**2
    return Load(
        rows=phase.rows,
        patches=patches,
        vision_tokens=patches // config.vision.merge_size**2,
        text_tokens=phase.turn_tokens,
        answer_tokens=phase.turn_tokens,
    )

"""A Qwen3-VL of the recipe's size, initialised so that small ones learn, fast on a CPU.

The classes are transformers' own; only starting values and the arithmetic of the patch embedding
are ours. Loading a big checkpoint to fine-tune it is not done here.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import CheckpointError, one_line
from medmo_edge.train.recipe import MERGE, PATCH, TEMPORAL, Recipe
from medmo_edge.train.vocabulary import SpecialIds

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "linear_fc2.weight")


def config_values(recipe: Recipe, ids: SpecialIds) -> dict[str, Any]:
    """config.json of the checkpoint, with the rotary settings in 4.57's and in 5.x's form."""
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": list(recipe.text.mrope_section),
    }
    theta = {"rope_theta": recipe.text.rope_theta}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "dtype": "bfloat16",
        "model_type": "qwen3_vl",
        "image_token_id": ids.image,
        "video_token_id": ids.video,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "tie_word_embeddings": True,
        "text_config": _text_values(recipe, ids)
        | theta
        | {"rope_scaling": rope, "rope_parameters": rope | theta},
        "vision_config": _vision_values(recipe),
    }


def _text_values(recipe: Recipe, ids: SpecialIds) -> dict[str, Any]:
    text = recipe.text
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.end_of_text,
        "dtype": "bfloat16",
        "eos_token_id": ids.turn_end,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_positions,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "pad_token_id": ids.end_of_text,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": recipe.tokenizer.vocab_size,
    }


def _vision_values(recipe: Recipe) -> dict[str, Any]:
    vision = recipe.vision
    return {
        "deepstack_visual_indexes": list(vision.deepstack_layers),
        "depth": vision.num_layers,
        "dtype": "bfloat16",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate_size,
        "model_type": "qwen3_vl",
        "num_heads": vision.num_heads,
        "num_position_embeddings": vision.position_side**2,
        "out_hidden_size": recipe.text.hidden_size,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }


def build_model(recipe: Recipe, ids: SpecialIds) -> "Qwen3VLForConditionalGeneration":
    """The untrained model in float32, the same for the same recipe seed."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    values = config_values(recipe, ids)
    for part in (values, values["text_config"], values["vision_config"]):
        part["dtype"] = "float32"
    del values["text_config"]["rope_scaling"], values["text_config"]["rope_theta"]
    torch.manual_seed(recipe.seed)
    config = Qwen3VLConfig(**values)
    config._attn_implementation = "sdpa"
    model = Qwen3VLForConditionalGeneration(config)
    initialise(model, torch.Generator().manual_seed(recipe.seed))
    use_linear_patches(model)
    return model


def load_weights(model: "Qwen3VLForConditionalGeneration", checkpoint: Path) -> None:
    """Replace the starting values by a checkpoint's. Errors: CheckpointError when it differs."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checkpoint / "model.safetensors"
    try:
        found = load_file(path)
        found["lm_head.weight"] = found["model.language_model.embed_tokens.weight"]  # tied
        model.load_state_dict(found)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot start this recipe's next stage: {one_line(error)}"
        ) from error


def initialise(model: "Qwen3VLForConditionalGeneration", generator: "torch.Generator") -> None:
    """Fan-in starts, small residual outputs, and a sine table for the vision positions.

    The library's 0.02 for everything leaves a narrow model inside the plateau of one constant box.
    """
    import torch

    depth = {
        "visual": len(model.model.visual.blocks),
        "language": len(model.model.language_model.layers),
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            scale = 1 / math.sqrt(weight[0].numel())
            if name.endswith(RESIDUAL_OUTPUTS) and "merger" not in name:
                scale /= math.sqrt(2 * depth["visual" if "visual" in name else "language"])
            weight.normal_(0, scale, generator=generator)
        table = model.model.visual.pos_embed.weight
        table.copy_(0.5 * sine_table(math.isqrt(table.shape[0]), table.shape[1]))


def sine_table(side: int, width: int) -> "torch.Tensor":
    """[side * side, width]: sin y, cos y, sin x, cos x at width / 4 frequencies."""
    import torch

    quarter = width // 4
    frequency = 30.0 ** (-torch.arange(quarter) / quarter) * math.pi / 4
    angle = torch.arange(side)[:, None] * frequency[None, :]
    rows = torch.cat([angle.sin(), angle.cos()], dim=1)
    grid = torch.cat(
        [rows[:, None].expand(-1, side, -1), rows[None, :].expand(side, -1, -1)], dim=2
    )
    return grid.reshape(side * side, -1)


def use_linear_patches(model: "Qwen3VLForConditionalGeneration") -> None:
    """Compute the patch embedding as the matrix product it is; Conv3d is slow in bf16."""
    import torch

    embed: Any = model.model.visual.patch_embed

    def forward(patches: "torch.Tensor") -> "torch.Tensor":
        weight = embed.proj.weight
        return torch.nn.functional.linear(patches, weight.flatten(1), embed.proj.bias)

    embed.forward = forward

"""Write a checkpoint folder that transformers 4.57, 5.x and our own readers load alike.

bf16 safetensors, config with both rotary forms, tokenizer and processor files written out in
full (transformers 5's save_pretrained leaves out what 4.57 needs). The folder appears at once or
not at all.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.boxes import Coords
from medmo_edge.preprocess import BICUBIC, Preprocessing
from medmo_edge.train.architecture import config_values
from medmo_edge.train.folders import replaced, write_json
from medmo_edge.train.recipe import Phase, Recipe
from medmo_edge.train.vocabulary import special_ids, tokenizer_config

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

COORDS: Coords = "norm1000"

# Qwen3-VL's prompt form without tools and videos, which this checkpoint never learned.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def processing(phase: Phase) -> Preprocessing:
    """The image processor that training in ``phase`` used."""
    return Preprocessing(min_pixels=phase.min_pixels, max_pixels=phase.max_pixels)


def write_checkpoint(
    weights: "dict[str, torch.Tensor]",
    recipe: Recipe,
    tokenizer: "Tokenizer",
    limits: Preprocessing,
    folder: Path,
    notes: dict[str, Any],
) -> None:
    """Replace ``folder`` by the checkpoint; ``notes`` (step, scores) go into medmo_edge.json."""
    with replaced(folder) as staging:
        _write_weights(weights, staging / "model.safetensors")
        (staging / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        tokenizer.save(str(staging / "tokenizer.json"))
        for name, values in _documents(recipe, tokenizer, limits, notes).items():
            write_json(staging / name, values)


def _documents(
    recipe: Recipe, tokenizer: "Tokenizer", limits: Preprocessing, notes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    ids = special_ids(tokenizer)
    return {
        "config.json": config_values(recipe, ids),
        "generation_config.json": {
            "bos_token_id": ids.end_of_text,
            "do_sample": False,
            "eos_token_id": [ids.turn_end, ids.end_of_text],
            "pad_token_id": ids.end_of_text,
        },
        "medmo_edge.json": {"coords": COORDS, "name": recipe.name, "training": notes},
        "preprocessor_config.json": _processor(
            limits, "image_processor_type", "Qwen2VLImageProcessorFast"
        ),
        "tokenizer_config.json": tokenizer_config(tokenizer, recipe.text.max_positions),
        "video_preprocessor_config.json": _processor(
            limits, "video_processor_type", "Qwen3VLVideoProcessor"
        ),
    }


def _processor(limits: Preprocessing, key: str, kind: str) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(limits.image_mean),
        "image_std": list(limits.image_std),
        key: kind,
        "merge_size": limits.merge_size,
        "patch_size": limits.patch_size,
        "processor_class": "Qwen3VLProcessor",
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": limits.max_pixels, "shortest_edge": limits.min_pixels},
        "temporal_patch_size": limits.temporal_patch_size,
    }


def _write_weights(weights: "dict[str, torch.Tensor]", path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    kept = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in sorted(weights.items())
        if name != "lm_head.weight"  # tied: the embedding is the head
    }
    save_file(kept, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes for the owner alone

"""LoRA: small matrices beside the frozen linears, by the peft library and in its file format.

Which linears: every matrix of the blocks and mergers of the chosen modules; no tables, no head.
Scale 2 (alpha twice the rank) and no dropout, so that a step draws no random numbers. The adapter
is kept apart from its base; ``merge`` joins the two.
"""

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmo_edge.errors import CheckpointError, UsageError, one_line
from medmo_edge.train.stages import Module

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: names of the linears that are adapted, by module, as peft matches them: whole
LINEARS: Mapping[Module, str] = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
    "merger": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    "language": r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
_PREFIX = "base_model.model."  # peft's names of a model inside its wrapper
_PART = "default"


def adapter_config(modules: Collection[Module], rank: int, base: str = "") -> Any:
    """peft's settings for adapters of ``rank`` on ``modules`` of the checkpoint ``base``.

    Errors: UsageError without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError("lora_rank needs peft: install medmo-edge[train]") from error

    wanted = "|".join(LINEARS[module] for module in sorted(modules))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=f"(?:{wanted})",
        base_model_name_or_path=base or None,
    )


def add_adapters(
    model: "Qwen3VLForConditionalGeneration", modules: Collection[Module], rank: int
) -> None:
    """Put float32 adapters into ``model``, which changes nothing until they have learned."""
    config = adapter_config(modules, rank)
    from peft import inject_adapter_in_model

    with _quiet():
        inject_adapter_in_model(config, model, adapter_name=_PART)


@contextmanager
def _quiet() -> Iterator[None]:
    """peft 0.21 asks transformers for an attribute that is on its way out, and warns of misfits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused instead
        yield


def adapter_weights(weights: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The adapters within a state dict, under the names that peft's own files have."""
    return {
        _PREFIX + name.replace(f".{_PART}.", "."): value.detach().cpu().contiguous()
        for name, value in sorted(weights.items())
        if f".{_PART}." in name
    }


def write_adapter(weights: "Mapping[str, torch.Tensor]", config: Any, folder: Path) -> None:
    """Write peft's two files into the existing ``folder``. Errors: OSError."""
    from safetensors.torch import save_file

    save_file(adapter_weights(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # the library writes for the owner alone
    config.inference_mode = True
    config.save_pretrained(str(folder))


def base_of(folder: Path) -> str:
    """The checkpoint that an adapter was trained on. Errors: CheckpointError when not named."""
    path = folder / ADAPTER_CONFIG
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{path} does not name its base checkpoint: give it with --base")
    return named


def merge_into(model: "Qwen3VLForConditionalGeneration", folder: Path) -> None:
    """Add the adapters in ``folder`` to the weights of ``model`` and leave no trace of them.

    Errors: CheckpointError for an adapter that is damaged or of another model; UsageError without
    peft.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError("a LoRA adapter needs peft: install medmo-edge[train]") from error
    try:
        with _quiet():
            wrapped = PeftModel.from_pretrained(model, str(folder))
        _require_same_names(folder, adapter_weights(model.state_dict()))
        wrapped.merge_and_unload(safe_merge=True)
    except CheckpointError:
        raise
    except Exception as error:  # peft passes on whatever its parts raise
        raise CheckpointError(
            f"{folder} does not fit its base checkpoint: {one_line(error)}"
        ) from error


def _require_same_names(folder: Path, used: Collection[str]) -> None:
    """peft leaves out what does not fit, with a warning or without one."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if odd := sorted(stored.symmetric_difference(used)):
        which = "the base" if odd[0] in stored else "the adapter"
        raise CheckpointError(f"{folder} does not fit its base checkpoint: {which} lacks {odd[0]}")

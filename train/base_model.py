"""The checkpoint that a stage starts from: loaded to be trained, and written back as a checkpoint.

Numbers: what learns is kept in float32 (master weights), what is frozen in bfloat16; both compute
in bfloat16. Nothing is downloaded, initialised or trained here, and no other architecture than
Qwen3-VL opens. Model classes are transformers' own; only the patch embedding's arithmetic is ours.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medmo_edge.boxes import Coords
from medmo_edge.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from medmo_edge.errors import CheckpointError, UsageError, one_line
from medmo_edge.preprocess import Preprocessing
from medmo_edge.prompts import ChatTemplate
from medmo_edge.tokenizer import Tokenizer
from medmo_edge.train.architecture import use_linear_patches
from medmo_edge.train.estimates import module_of
from medmo_edge.train.folders import replaced, write_json
from medmo_edge.train.lora import add_adapters
from medmo_edge.train.packing import Chat
from medmo_edge.train.stages import Module

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

Precision = Literal["bfloat16", "float32"]
Weights = Mapping[str, "torch.Tensor"]

SHARD_BYTES = 5_000_000_000
_TIED = "lm_head.weight"
_TABLE = "model.language_model.embed_tokens.weight"
# Everything beside weights and config.json that a checkpoint's readers may want; copied unchanged,
# because what transformers 5 writes of it does not load in 4.57.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """A loaded checkpoint and all that turns samples into its inputs.

    ``path`` is the folder that tokenizer and processor files are copied from; ``limits`` are the
    checkpoint's own, which a stage narrows. ``precision`` is what the network computes in.
    """

    model: "Qwen3VLForConditionalGeneration"
    tokenizer: Tokenizer
    template: ChatTemplate
    limits: Preprocessing
    coords: Coords
    config: ModelConfig
    path: Path
    name: str
    precision: Precision
    device: str

    @property
    def chat(self) -> Chat:
        """How the checkpoint writes conversations."""
        return Chat(tokenizer=self.tokenizer, template=self.template)


def load_base(path: str | Path, *, precision: Precision = "bfloat16", device: str = "cpu") -> Base:
    """Load a checkpoint folder, or "nano".

    Errors: CheckpointError for a folder that is damaged or of another model, or an adapter (see
    ``merge``); UsageError without the training libraries.
    """
    with open_checkpoint(path) as opened:
        return _load(opened, precision, device)


def _load(opened: Checkpoint, precision: Precision, device: str) -> Base:
    torch, transformers = _libraries()
    transformers.utils.logging.disable_progress_bar()  # ours counts steps
    loader = transformers.Qwen3VLForConditionalGeneration
    try:
        model = loader.from_pretrained(
            opened.path, dtype=getattr(torch, precision), attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{opened.path} cannot be loaded: {one_line(error)}") from error
    model.config.use_cache = False
    use_linear_patches(model)
    return Base(
        model=model.to(device),
        tokenizer=opened.load_tokenizer(),
        template=ChatTemplate(opened.chat_template),
        limits=opened.preprocessing,
        coords=opened.coords,
        config=opened.config,
        path=opened.path,
        name=opened.name,
        precision=precision,
        device=device,
    )


def _libraries() -> tuple[Any, Any]:
    """torch and transformers, untyped: their own annotations stop at half of what is called."""
    try:
        return import_module("torch"), import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "training needs torch and transformers: install medmo-edge[train]"
        ) from error


def set_trainable(
    base: Base, modules: Collection[Module], lora_rank: int = 0
) -> "dict[Module, list[torch.nn.Parameter]]":
    """Let ``modules`` learn, or adapters of ``lora_rank`` on their linears; freeze the rest.

    Gives the parameters that learn, by module, in float32.
    """
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)
    if lora_rank:
        add_adapters(base.model, modules, lora_rank)
    learning: dict[Module, list[torch.nn.Parameter]] = {module: [] for module in modules}
    for name, parameter in base.model.named_parameters():
        if lora_rank == 0 and module_of(name) in modules:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            learning[module_of(name)].append(parameter)
    return learning


def save_checkpoint(
    base: Base, folder: Path, notes: Mapping[str, Any], weights: "Weights | None" = None
) -> None:
    """Replace ``folder`` by a whole checkpoint in bfloat16 that transformers 4.57 and 5.x load.

    ``weights``: the state dict to write, default that of the model (no adapters in it). ``notes``
    (recipe, stage, hashes of the data) go into medmo_edge.json. Errors: OSError.
    """
    state = base.model.state_dict() if weights is None else weights
    card = {"coords": base.coords, "name": base.name, "training": dict(notes)}
    with replaced(folder) as staging:
        _write_weights(state, base.config, staging)
        copy_files(base.path, staging)
        write_json(staging / "config.json", both_rope_forms(base.path))
        write_json(staging / "medmo_edge.json", card)


def copy_files(source: Path, target: Path) -> None:
    """Tokenizer, processor, template and licence files of a checkpoint, byte for byte."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def both_rope_forms(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint for bfloat16 weights, with 4.57's and 5.x's rotary settings."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = values["text_config"]
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or text["rope_theta"]
    text["rope_theta"] = theta
    text["rope_scaling"] = rope
    text["rope_parameters"] = rope | {"rope_theta": theta}
    for level in (values, text, values["vision_config"]):
        level.pop("torch_dtype", None)
        level["dtype"] = "bfloat16"
    return values


def _write_weights(weights: "Weights", config: ModelConfig, folder: Path) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    tied = config.text.tie_word_embeddings
    kept = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in sorted(weights.items())
        if not (tied and name == _TIED and _TABLE in weights)  # the embedding is the head
    }
    save_torch_state_dict(kept, folder, max_shard_size=SHARD_BYTES)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # the library writes for the owner alone

"""Which tensors the two GGUF files hold, and where in the checkpoint each comes from.

Every tensor of the checkpoint is translated exactly once, or the export fails before it writes.
Nothing is permuted or fused: llama.cpp reads Qwen3-VL's own layout. Source of the names: llama.cpp,
conversion/qwen3vl.py and gguf-py/gguf/constants.py.
"""

from dataclasses import dataclass
from pathlib import Path

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ExportError
from medmo_edge.model_config import expected_tensors

_TEXT, _VISION, _LM_HEAD = "model.language_model.", "model.visual.", "lm_head.weight"

_TEXT_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION_NAMES = {
    "pos_embed": "v.position_embd",
    "patch_embed.proj": "v.patch_embd",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_BLOCK_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_DEEPSTACK_NAMES = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One tensor of a GGUF file.

    ``source_shape`` is its shape in the checkpoint; ``frame`` picks one temporal slice of the patch
    convolution, [D, C, T, h, w] -> [D, C, h, w], which llama.cpp wants as two tensors.
    """

    name: str
    source: str
    source_shape: tuple[int, ...]
    frame: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, outermost dimension first (GGUF stores it reversed)."""
        if self.frame is None:
            return self.source_shape
        return self.source_shape[:2] + self.source_shape[3:]


def plan_tensors(checkpoint: Checkpoint) -> tuple[list[Planned], list[Planned]]:
    """Tensors of the language file and of the vision file, in the checkpoint's order.

    Errors: ExportError naming a tensor that has no place, or one that nothing provides.
    """
    language: list[Planned] = []
    vision: list[Planned] = []
    is_tied = checkpoint.config.text.tie_word_embeddings
    for source, info in checkpoint.tensors.items():
        if source == _LM_HEAD and is_tied:
            continue  # a copy of the embedding that some trainers save
        if source.startswith(_VISION):
            vision += _vision_tensors(source, info.shape, checkpoint)
        else:
            name = _language_name(source, checkpoint.path)
            language.append(Planned(name=name, source=source, source_shape=info.shape))
    _check_complete(checkpoint, [*language, *vision])
    return language, vision


def _check_complete(checkpoint: Checkpoint, planned: list[Planned]) -> None:
    provided = {each.source for each in planned}
    for source in expected_tensors(checkpoint.config):
        if source not in provided:
            raise ExportError(f"{checkpoint.path}: tensor {source} is missing: copy it again")
    if len({each.name for each in planned}) != len(planned):
        raise ExportError(f"{checkpoint.path}: two tensors have the same place in the GGUF file")


def _language_name(source: str, path: Path) -> str:
    if source == _LM_HEAD:
        return "output.weight"
    module = source.removeprefix(_TEXT).removesuffix(".weight")
    kind, _, rest = module.partition(".")
    if module in _TEXT_NAMES:
        return f"{_TEXT_NAMES[module]}.weight"
    layer, _, part = rest.partition(".")
    if kind == "layers" and layer.isdecimal() and part in _LAYER_NAMES:
        return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"
    raise _unknown(source, path)


def _vision_tensors(source: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> list[Planned]:
    module, _, suffix = source.removeprefix(_VISION).rpartition(".")
    name = f"{_vision_name(module, source, checkpoint)}.{suffix}"
    if name != "v.patch_embd.weight":
        return [Planned(name=name, source=source, source_shape=shape)]
    if shape[2] != 2:
        raise ExportError(f"{checkpoint.path}: patches span {shape[2]} frames, llama.cpp knows 2")
    return [
        Planned(name=name, source=source, source_shape=shape, frame=0),
        Planned(name=f"{name}.1", source=source, source_shape=shape, frame=1),
    ]


def _vision_name(module: str, source: str, checkpoint: Checkpoint) -> str:
    if module in _VISION_NAMES:
        return _VISION_NAMES[module]
    kind, _, rest = module.partition(".")
    number, _, part = rest.partition(".")
    if kind == "blocks" and part in _BLOCK_NAMES:
        return f"v.blk.{number}.{_BLOCK_NAMES[part]}"
    if kind == "deepstack_merger_list" and part in _DEEPSTACK_NAMES:
        # llama.cpp counts by vision layer, the checkpoint by merger.
        layer = checkpoint.config.vision.deepstack_indexes[int(number)]
        return f"v.deepstack.{layer}.{_DEEPSTACK_NAMES[part]}"
    raise _unknown(source, checkpoint.path)


def _unknown(source: str, path: Path) -> ExportError:
    return ExportError(
        f"{path}: tensor {source} belongs to no part of Qwen3-VL: "
        "merge or remove what was added to the model"
    )

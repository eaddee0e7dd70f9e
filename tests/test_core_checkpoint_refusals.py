"""Checkpoints that cannot be used: one line each that names the trouble and the way out."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import CheckpointError

MakeCheckpoint = Callable[..., Path]
Change = Callable[[Path], object]


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; ``section__key`` reaches one level down, None deletes."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = values
        for section in sections:
            target = target[section]
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    path.write_text(json.dumps(values))


def config(**changes: Any) -> Change:
    return lambda folder: edit(folder / "config.json", **changes)


def write(name: str, text: str | bytes) -> Change:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def delete(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


REFUSALS: dict[str, tuple[Change, str]] = {
    "no config": (delete("config.json"), r"config.json is missing"),
    "broken JSON": (write("config.json", '{"a": '), r"config.json is not valid JSON"),
    "binary config": (write("config.json", b"\xff\xfe\x00"), r"config.json is not valid JSON"),
    "deep JSON": (write("config.json", "[" * 100_000), r"config.json is not valid JSON"),
    "list config": (write("config.json", "[]"), r"config.json is not a JSON object"),
    "other model": (
        config(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl"),
        r"is Qwen2_5_VLForConditionalGeneration: only Qwen3VLForConditionalGeneration works",
    ),
    "no model": (config(architectures=None, model_type=None), r"of no named architecture"),
    "experts": (
        config(architectures=["Qwen3VLMoeForConditionalGeneration"], model_type="qwen3_vl_moe"),
        r"Qwen3VLMoeForConditionalGeneration, a mixture of experts",
    ),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\).*bf16"),
    "no text": (config(text_config=None), r"no section text_config"),
    "no hidden size": (config(text_config__hidden_size=None), r"hidden_size is None"),
    "word as size": (config(text_config__hidden_size="256"), r"hidden_size is '256'"),
    "true as size": (config(vision_config__depth=True), r"depth is True"),
    "negative size": (config(vision_config__depth=-1), r"depth is -1"),
    "zero size": (config(text_config__num_hidden_layers=0), r"num_hidden_layers is 0"),
    "endless layers": (config(text_config__num_hidden_layers=1 << 40), r"cannot be a size"),
    "zero eps": (config(text_config__rms_norm_eps=0), r"rms_norm_eps is 0"),
    "yarn": (config(text_config__rope_parameters__rope_type="yarn"), r"rope_type is 'yarn'"),
    "chunked rope": (
        config(text_config__rope_parameters__mrope_interleaved=False),
        r"mrope_interleaved is False",
    ),
    "rope sections": (
        config(text_config__rope_parameters__mrope_section=[16, 24, 24]),
        r"does not add up to head_dim / 2 = 32",
    ),
    "no rope": (config(text_config__rope_parameters=None, text_config__rope_scaling=None), "rope"),
    "no theta": (
        config(text_config__rope_parameters__rope_theta=None, text_config__rope_theta=None),
        "rope_theta is None",
    ),
    "activation": (config(text_config__hidden_act="gelu"), r"hidden_act is 'gelu'"),
    "vision activation": (config(vision_config__hidden_act="quick_gelu"), r"'quick_gelu'"),
    "biased": (config(text_config__attention_bias=True), r"attention_bias is True"),
    "head groups": (config(text_config__num_key_value_heads=3), r"num_key_value_heads"),
    "widths": (config(vision_config__out_hidden_size=128), r"out_hidden_size differs"),
    "grid": (config(vision_config__num_position_embeddings=250), r"is no square"),
    "deepstack": (config(vision_config__deepstack_visual_indexes=[9]), r"deepstack_visual_ind"),
    "deepstack order": (config(vision_config__deepstack_visual_indexes=[2, 1]), r"do not rise"),
    "token id": (config(image_token_id=5000), r"token id 5000 is beyond vocab_size 448"),
    "no token id": (config(image_token_id=None), r"image_token_id is None"),
    "wrong width": (
        config(text_config__intermediate_size=768),
        r"tensor model.language_model.layers.0.mlp.\w+.weight has shape .* implies",
    ),
    "more layers": (
        config(text_config__num_hidden_layers=5),
        r"lacks tensor model.language_model.layers.4.\S+ and 10 more",
    ),
    "fewer layers": (config(text_config__num_hidden_layers=3), r"has tensor \S+layers.3.\S+"),
    "untied": (
        config(tie_word_embeddings=False, text_config__tie_word_embeddings=False),
        r"lacks tensor lm_head.weight, which",
    ),
    "no preprocessor": (delete("preprocessor_config.json"), r"preprocessor_config.json is missing"),
    "preprocessor": (
        write("preprocessor_config.json", "{}"),
        r"preprocessor_config.json: image processor config is incomplete",
    ),
    "patch size": (
        lambda folder: edit(folder / "preprocessor_config.json", patch_size=14),
        r"do not fit config.json",
    ),
    "no template": (delete("chat_template.jinja"), r"chat_template.jinja is missing"),
    "coords": (write("medmo_edge.json", '{"coords": "percent"}'), r"coords is 'percent', not one"),
    "no weights": (delete("model.safetensors"), r"the folder holds no weights"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    change, message = REFUSALS[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    open_checkpoint(folder)  # good before the change
    change(folder)
    refuse(folder, message)


def refuse(folder: Path, message: str) -> str:
    """Assert that opening fails in one line that matches ``message`` and names the folder."""
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text and folder.name in text
    return text


def test_no_folder_or_a_file(tmp_path: Path) -> None:
    refuse(tmp_path / "MedMO-8B", r"does not exist: nothing is downloaded")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "model.gguf", r"is a file: give the Hugging Face folder")


def test_end_token_nowhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", text_config__eos_token_id=None)
    refuse(folder, "neither config names eos_token_id")


def test_lora_names_the_merge_command(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "MBZUAI/MedMO-8B"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    text = refuse(folder, "is a LoRA adapter of MBZUAI/MedMO-8B: merge the two first")
    assert text.endswith(f"medmo-edge merge {folder} --base FOLDER -o MERGED")


def test_weights_in_other_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(folder, r"\*.bin weights")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    refuse(folder, r"model.safetensors.index.json is missing")


@pytest.fixture
def sharded(tiny_untied_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_untied_checkpoint, tmp_path / "sharded"))


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refuse(sharded, f"{SHARD} is missing")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    whole = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(whole[:keep])
    refuse(sharded, f"{SHARD} is truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 1}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 5]}}',
        b'{"a": {"dtype": "BF16", "shape": [-2], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4, 8]}}',
        b"[" * 50_000,
    ],
)
def test_damaged_header(sharded: Path, header: bytes) -> None:
    (sharded / SHARD).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    refuse(sharded, f"{SHARD}")


def test_header_larger_than_the_file(sharded: Path) -> None:
    (sharded / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refuse(sharded, f"{SHARD} is truncated or not a safetensors file")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../x.safetensors"}, {"a": "x"}])
def test_damaged_index(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refuse(sharded, f"{INDEX} is damaged")


def test_index_that_promises_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = SHARD
    (sharded / INDEX).write_text(json.dumps(index))
    refuse(sharded, f"{SHARD} lacks tensor model.extra")


def _rewrite_header(path: Path, old: bytes, new: bytes) -> None:
    """Change the header in place; ``new`` must be as long as ``old``."""
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new, 1))


def test_other_storage_types(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "typed")
    _rewrite_header(folder / "model.safetensors", b'"dtype": "BF16"', b'"dtype": "I16" ')
    refuse(folder, r"tensor \S+ is stored as I16, only BF16, F16 and F32 work")


def test_quantised_weights_without_saying_so(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "scaled")
    old = b'"model.language_model.layers.0.self_attn.q_norm.weight"'
    new = b'"model.language_model.layers.0.q.weight_scale_inv"'
    _rewrite_header(folder / "model.safetensors", old, new.ljust(len(old)))
    refuse(folder, r"is quantised \(tensor \S+weight_scale_inv\)")

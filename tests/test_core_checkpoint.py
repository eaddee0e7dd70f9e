"""Checkpoints: what opening reads, in every config form, compared with transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmo_edge.boxes import COORDS
from medmo_edge.checkpoint import NANO_FOLDER, open_checkpoint
from medmo_edge.errors import CheckpointError
from medmo_edge.model_config import expected_tensors

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change; the weights are a link."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_is_read(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        text, vision = checkpoint.config.text, checkpoint.config.vision
        assert (text.hidden_size, text.num_layers, text.num_heads, text.num_kv_heads) == (
            256,
            4,
            4,
            2,
        )
        assert text.rope_theta == 5e6 and text.mrope_section == (12, 10, 10)
        assert text.tie_word_embeddings and text.vocab_size == 448
        assert vision.deepstack_indexes == (1,) and vision.num_position_embeddings == 256
        ids = checkpoint.load_tokenizer().special_ids
        config = checkpoint.config
        assert config.eos_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
        assert config.image_token_id == ids["<|image_pad|>"]
        assert config.pad_token_id == config.bos_token_id == ids["<|endoftext|>"]
        assert checkpoint.preprocessing.max_pixels == 262144
        assert checkpoint.generation["top_k"] == 20
        assert checkpoint.coords == "norm1000" and checkpoint.name == "tiny"
        assert "<|vision_start|>" in checkpoint.chat_template


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_untied_checkpoint"])
def test_every_tensor_equals_transformers(request: pytest.FixtureRequest, which: str) -> None:
    torch = pytest.importorskip("torch", reason="the reference loader needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    path: Path = request.getfixturevalue(which)
    model, info = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters())
        tied = set() if which == "tiny_untied_checkpoint" else {"lm_head.weight"}
        assert (
            set(state) - tied == set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
        )
        for name in checkpoint.tensors:
            assert np.array_equal(checkpoint.read(name), state[name].numpy()), name


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_raw_rows_and_whole_agree(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: str
) -> None:
    with open_checkpoint(make_checkpoint(tmp_path / "c", dtype=dtype)) as checkpoint:
        name = "model.language_model.layers.0.mlp.gate_proj.weight"
        raw, whole = checkpoint.raw(name), checkpoint.read(name)
        assert isinstance(raw, np.memmap) and not raw.flags.writeable
        assert raw.dtype == {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
        widened = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw
        assert whole.dtype == np.float32 and np.array_equal(widened.astype(np.float32), whole)
        for max_bytes in (1, 4 * 256, 10_000, 1 << 30):
            blocks = list(checkpoint.row_blocks(name, max_bytes))
            assert all(block.nbytes <= max(max_bytes, 4 * 256) for block in blocks)
            assert np.array_equal(np.concatenate(blocks), whole)
        assert len(list(checkpoint.row_blocks(name, 4 * 256))) == 512
        vector = "model.language_model.norm.weight"
        parts = np.concatenate(list(checkpoint.row_blocks(vector, 100)))
        assert np.array_equal(parts, checkpoint.read(vector))
        with pytest.raises(CheckpointError, match="no tensor nothing"):
            checkpoint.read("nothing")


def test_arrays_outlive_the_checkpoint(tiny_checkpoint: Path) -> None:
    name = "model.language_model.norm.weight"
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        raw = checkpoint.raw(name)
        assert checkpoint.raw(name) is raw
    assert np.array_equal(raw, checkpoint.raw(name))


def _only_4_57(config: dict[str, Any]) -> None:
    del config["text_config"]["rope_parameters"]


def _only_5(config: dict[str, Any]) -> None:
    del config["text_config"]["rope_theta"], config["text_config"]["rope_scaling"]


def _flat_tie(config: dict[str, Any]) -> None:
    del config["text_config"]["tie_word_embeddings"]


def _nested_tie(config: dict[str, Any]) -> None:
    del config["tie_word_embeddings"]


def _contradicting_tie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False


def _no_head_dim(config: dict[str, Any]) -> None:
    del config["text_config"]["head_dim"]


def _mrope_type(config: dict[str, Any]) -> None:
    _only_4_57(config)
    rope = config["text_config"]["rope_scaling"]
    rope["type"] = rope.pop("rope_type")


def _no_interleaving_key(config: dict[str, Any]) -> None:
    for form in ("rope_parameters", "rope_scaling"):
        del config["text_config"][form]["mrope_interleaved"]


@pytest.mark.parametrize(
    "change",
    [
        _only_4_57,
        _only_5,
        _flat_tie,
        _nested_tie,
        _contradicting_tie,
        _no_head_dim,
        _mrope_type,
        _no_interleaving_key,
    ],
)
def test_every_config_form_reads_the_same(
    copy: Path, tiny_checkpoint: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit(copy / "config.json", change)
    assert open_checkpoint(copy).config == open_checkpoint(tiny_checkpoint).config


def test_saved_by_transformers_5(tiny_untied_checkpoint: Path, tmp_path: Path) -> None:
    """A folder that transformers wrote itself: rope_parameters and processor_config.json."""
    torch = pytest.importorskip("torch", reason="the writer needs torch")
    transformers = pytest.importorskip("transformers", reason="the writer is transformers")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_untied_checkpoint, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(tiny_untied_checkpoint / name, tmp_path)
    processor = json.loads((tiny_untied_checkpoint / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    saved, original = open_checkpoint(tmp_path), open_checkpoint(tiny_untied_checkpoint)
    assert len({info.path for info in saved.tensors.values()}) > 2
    assert (saved.config, saved.preprocessing) == (original.config, original.preprocessing)
    for name in original.tensors:
        assert np.array_equal(saved.raw(name), original.raw(name))


def test_processor_config_wins_as_in_transformers(copy: Path) -> None:
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 1024, "longest_edge": 2048}
    path = copy / "processor_config.json"
    path.write_text(json.dumps({"image_processor": processor}))
    assert open_checkpoint(copy).preprocessing.max_pixels == 2048
    path.write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    assert open_checkpoint(copy).preprocessing.max_pixels == 262144


def test_a_duplicate_of_a_tied_head_is_tolerated(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "c", tied=False)

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    edit(folder / "config.json", tie)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.text.tie_word_embeddings
    assert "lm_head.weight" in checkpoint.tensors
    assert "lm_head.weight" not in expected_tensors(checkpoint.config)


def test_end_tokens_of_the_generation_config_win(copy: Path, tiny_checkpoint: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(eos_token_id=5, bos_token_id=6))
    assert open_checkpoint(copy).config == open_checkpoint(tiny_checkpoint).config


def test_end_tokens_without_generation_config(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    checkpoint = open_checkpoint(copy)
    end = checkpoint.load_tokenizer().special_ids["<|im_end|>"]
    assert checkpoint.config.eos_token_ids == (end,)
    assert checkpoint.config.pad_token_id == end and checkpoint.generation == {}


@pytest.mark.parametrize("form", ["json", "string", "list"])
def test_chat_template_in_older_places(copy: Path, form: str) -> None:
    source = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    if form == "json":
        (copy / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    else:
        named = [{"name": "rag", "template": "x"}, {"name": "default", "template": source}]
        value = source if form == "string" else named
        edit(copy / "tokenizer_config.json", lambda c: c.update(chat_template=value))
    assert open_checkpoint(copy).chat_template == source


@pytest.mark.parametrize("coords", COORDS)
def test_card(copy: Path, coords: str) -> None:
    (copy / "medmo_edge.json").write_text(json.dumps({"coords": coords, "name": "mine"}))
    checkpoint = open_checkpoint(copy)
    assert checkpoint.coords == coords and checkpoint.name == "mine" == checkpoint.card["name"]
    (copy / "medmo_edge.json").unlink()
    assert open_checkpoint(copy).coords == "norm1000"


def test_identity_follows_every_byte_that_matters(copy: Path, tiny_checkpoint: Path) -> None:
    def sha(folder: Path) -> str:
        return open_checkpoint(folder).identity()["sha256"]

    assert sha(copy) == sha(tiny_checkpoint)  # the folder's place and name do not matter
    before = {sha(copy)}
    weights = bytearray((tiny_checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").write_bytes(weights)
    before.add(sha(copy))
    (copy / "medmo_edge.json").write_text('{"coords": "pixel_resized"}')
    before.add(sha(copy))
    edit(copy / "generation_config.json", lambda g: g.update(top_k=1))
    before.add(sha(copy))
    (copy / "README.md").write_text("not part of the identity")
    assert sha(copy) in before and len(before) == 4


def test_nano_is_the_embedded_folder() -> None:
    with open_checkpoint("nano") as nano:
        assert nano.path == NANO_FOLDER and nano.coords == "norm1000"
        assert nano.load_tokenizer().length <= nano.config.text.vocab_size
        # The limits that the package promises for what it ships.
        assert 1_000_000 < nano.num_parameters < 8_000_000
        assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) < 16 << 20

"""The streamed forward pass against transformers' whole model, layer by layer and in the end."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="running a checkpoint needs the train extra")
pytest.importorskip("transformers", reason="the reference is transformers")

from medmo_edge.calibration.layout import Layout  # noqa: E402
from medmo_edge.calibration.streamed import Pass, Prompt, forward  # noqa: E402
from medmo_edge.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from medmo_edge.errors import CalibrationError, PromptError, UsageError  # noqa: E402
from medmo_edge.preprocess import grid_thw, num_vision_tokens, patchify, resize  # noqa: E402

Size = tuple[int, int]
PROMPTS: tuple[tuple[Size, ...], ...] = (
    (),
    ((100, 150),),
    ((300, 200), (90, 95)),
    ((64, 64), (64, 64), (70, 300)),
    ((33, 500),),
)
# Position tables and the patch convolution round otherwise; logits are about 10.
CLOSE = 5e-5


def grid_of(checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> tuple[int, int, int]:
    return grid_thw(pixels.shape[0], pixels.shape[1], checkpoint.preprocessing)


def make_prompt(checkpoint: Checkpoint, sizes: Sequence[Size], seed: int) -> Prompt:
    """Random pictures between random tokens; logits wanted everywhere."""
    random = np.random.default_rng(seed)
    config, limits = checkpoint.config, checkpoint.preprocessing
    ids, images = random.integers(5, 400, 4).tolist(), []
    for height, width in sizes:
        images.append(resize(random.integers(0, 256, (height, width, 3), np.uint8), limits))
        tokens = num_vision_tokens(grid_of(checkpoint, images[-1]), limits)
        ids += [config.vision_start_token_id, *[config.image_token_id] * tokens]
        ids += [config.vision_end_token_id, *random.integers(5, 400, 2).tolist()]
    ids += random.integers(5, 400, 7).tolist()
    return Prompt(ids=ids, images=images, positions=range(len(ids)))


def make_prompts(checkpoint: Checkpoint) -> list[Prompt]:
    return [make_prompt(checkpoint, sizes, seed) for seed, sizes in enumerate(PROMPTS)]


def load_whole(folder: Path, dtype: str = "float32") -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    loader: Any = Qwen3VLForConditionalGeneration
    return loader.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def pictures(checkpoint: Checkpoint, prompt: Prompt) -> dict[str, Any]:
    limits = checkpoint.preprocessing
    if not prompt.images:
        return {}
    patches = np.concatenate([patchify(pixels, limits) for pixels in prompt.images])
    grids = [grid_of(checkpoint, pixels) for pixels in prompt.images]
    return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor(grids)}


def run_whole(model: Any, checkpoint: Checkpoint, prompt: Prompt) -> NDArray[np.float32]:
    ids = torch.tensor([list(prompt.ids)])
    types = (ids == checkpoint.config.image_token_id).int()
    with torch.no_grad():
        found = model(input_ids=ids, mm_token_type_ids=types, **pictures(checkpoint, prompt))
    logits: NDArray[np.float32] = found.logits[0].float().numpy()
    return logits


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    name = {"tied": "tiny_checkpoint", "untied": "tiny_untied_checkpoint"}[request.param]
    return open_checkpoint(request.getfixturevalue(name))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Any:
    return load_whole(checkpoint.path)


def test_logits_and_features_are_those_of_the_whole_model(
    checkpoint: Checkpoint, whole: Any
) -> None:
    prompts = make_prompts(checkpoint)
    for prompt, outputs in zip(prompts, forward(checkpoint, prompts), strict=True):
        wanted = run_whole(whole, checkpoint, prompt)
        np.testing.assert_allclose(outputs.logits, wanted, rtol=0, atol=CLOSE)
        if prompt.images:
            inputs = pictures(checkpoint, prompt)
            with torch.no_grad():
                found = whole.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
            features = torch.cat([found.pooler_output, *found.deepstack_features], 1).numpy()
            np.testing.assert_allclose(
                np.concatenate(outputs.features), features, rtol=0, atol=CLOSE
            )
        else:
            assert np.array_equal(outputs.logits, wanted), "text alone is equal to the bit"
            assert outputs.features == ()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads split a matrix by its rows, and images one by one have fewer of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _one_by_one(tower: Any) -> None:
    """Let the tower see each picture of a prompt apart."""
    whole = tower.forward

    def apart(patches: Any, grid_thw: Any, **options: Any) -> Any:
        pieces = patches.split(grid_thw.prod(dim=1).tolist())
        first, *rest = (
            whole(piece, grid[None], **options)
            for piece, grid in zip(pieces, grid_thw, strict=True)
        )
        first.pooler_output = torch.cat([each.pooler_output for each in (first, *rest)])
        levels = zip(*(each.deepstack_features for each in (first, *rest)), strict=True)
        first.deepstack_features = [torch.cat(level) for level in levels]
        return first

    tower.forward = apart


@pytest.mark.usefixtures("one_thread")
def test_nano_in_bfloat16_is_the_whole_model_to_the_bit() -> None:
    """With the convolution computed as the matrix product it is, nothing is left that differs.

    Pictures go through the tower one by one here too: with the patches of several in one product
    the library adds in another order, and a value may round to its bfloat16 neighbour.
    """
    checkpoint = open_checkpoint("nano")
    model = load_whole(checkpoint.path, "bfloat16")
    embed = model.model.visual.patch_embed
    embed.forward = lambda x: torch.nn.functional.linear(
        x.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1), embed.proj.bias
    )
    _one_by_one(model.model.visual)
    prompts = make_prompts(checkpoint)
    for prompt, outputs in zip(
        prompts, forward(checkpoint, prompts, dtype="bfloat16"), strict=True
    ):
        wanted = run_whole(model, checkpoint, prompt)
        assert np.array_equal(outputs.logits, wanted)


def test_every_linear_is_seen_with_the_input_it_has_in_the_whole_model(
    checkpoint: Checkpoint, whole: Any
) -> None:
    prompt = make_prompt(checkpoint, PROMPTS[2], seed=2)
    seen: dict[str, NDArray[np.float32]] = {}

    def note(names: tuple[str, ...], x: Any, item: int) -> None:
        for name in names:
            earlier = [seen[name]] if name in seen else []  # the vision tower runs image by image
            seen[name] = np.concatenate([*earlier, x.numpy()])

    forward(checkpoint, [prompt], on_linear=note)
    wanted: dict[str, NDArray[np.float32]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: Any) -> None:
            x = inputs[0].flatten(1) if "patch_embed" in name else inputs[0]
            wanted[name] = x.reshape(-1, x.shape[-1]).numpy()

        return keep

    kinds = (torch.nn.Linear, torch.nn.Conv3d)
    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in whole.named_modules()
        if isinstance(module, kinds)
    ]
    run_whole(whole, checkpoint, prompt)
    for handle in handles:
        handle.remove()
    assert seen.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(seen[name], values, rtol=0, atol=CLOSE, err_msg=name)


def test_layers_report_their_outputs(checkpoint: Checkpoint) -> None:
    prompts = [make_prompt(checkpoint, ((64, 64),), seed=3), make_prompt(checkpoint, (), seed=4)]
    seen: dict[str, list[int]] = {}
    forward(
        checkpoint, prompts, on_layer=lambda name, item, x: seen.setdefault(name, []).append(item)
    )
    last = checkpoint.config.text.num_layers - 1
    assert seen[f"model.language_model.layers.{last}"] == [0, 1]
    assert seen["model.visual.merger"] == [0]


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_pass_that_stopped_goes_on_where_it_was(
    tiny_untied_checkpoint: Path, tmp_path: Path, stop: int
) -> None:
    """Stages 2, 4 and 6 are deepstack mergers, which leave the states of the block before them."""
    checkpoint = open_checkpoint(tiny_untied_checkpoint)
    prompts = make_prompts(checkpoint)[:3]
    layout = Layout(checkpoint, prompts)
    for done, _ in enumerate(Pass(layout=layout, folder=tmp_path).stages(), start=1):
        if done == stop:
            break
    again = Pass(layout=layout, folder=tmp_path)
    names = [stage.name for stage in again.stages(first=stop)]
    assert names == [stage.name for stage in again.plan[stop:]]
    straight = forward(checkpoint, prompts)
    for resumed, wanted in zip(again.outputs(), straight, strict=True):
        assert np.array_equal(resumed.logits, wanted.logits)
        assert all(map(np.array_equal, resumed.features, wanted.features))


def test_only_the_states_of_the_last_stage_are_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    forward(checkpoint, make_prompts(checkpoint)[:2], folder=tmp_path)
    levels = len(checkpoint.config.vision.deepstack_indexes)
    states = [path.name for path in tmp_path.iterdir() if path.name.startswith("state")]
    assert len(states) == 1
    assert len(list(tmp_path.iterdir())) == 1 + 1 + levels


def test_no_more_than_one_layer_is_read_before_it_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of weights and runs of layers alternate: nothing is read ahead, nothing twice."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    events: list[str] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, name: str) -> Any:
        events.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", noted)
    forward(
        checkpoint,
        make_prompts(checkpoint)[:2],
        on_layer=lambda name, item, x: events.append(f"ran {name}"),
    )
    reads = [event for event in events if not event.startswith("ran ")]
    assert len(reads) == len(set(reads))
    layer = "model.language_model.layers.1"
    first = next(i for i, event in enumerate(events) if event.startswith(f"{layer}."))
    assert events[first - 1] == "ran model.language_model.layers.0"
    assert events.index(f"ran {layer}") > first


def test_what_cannot_run_is_refused(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    prompt = make_prompt(checkpoint, ((64, 64),), seed=5)
    with pytest.raises(UsageError, match="float16 overflows"):
        forward(checkpoint, [prompt], dtype="float16")
    with pytest.raises(UsageError, match="device 'tpu' is not here"):
        forward(checkpoint, [prompt], device="tpu")
    with pytest.raises(PromptError, match="image tokens"):
        forward(checkpoint, [Prompt(ids=prompt.ids, images=[])])
    with pytest.raises(CalibrationError, match="nothing to run"):
        forward(checkpoint, [])

"""A checkpoint's forward pass over many prompts with the weights of one layer in memory at a time.

Every layer runs over all prompts before the next one is read; hidden states wait in files as
float32. Equal to the whole model run prompt by prompt (layers.py says how exactly), so an 8B
checkpoint passes through a small machine. Nothing is generated and no cache is kept.

The pass is a list of stages, each of which reads the states that the stage before it wrote: a
caller that remembers how many stages are done can go on from there.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medmo_edge.calibration.layers import (
    Layer,
    Watch,
    merger,
    patch_embedding,
    rms_norm,
    text_layer,
    text_rope,
    vision_block,
    vision_rope,
)
from medmo_edge.calibration.layout import Layout, Prompt
from medmo_edge.calibration.rows import RowFile
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import UsageError
from medmo_edge.preprocess import patchify
from medmo_edge.tensors import to_float32
from medmo_edge.vision_inputs import VisionGeometry, merge_order, vision_inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DTYPES", "Outputs", "Pass", "Prompt", "Stage", "check_device", "forward"]

DTYPES = ("float32", "bfloat16")
HEAD = "lm_head"  # name of the head's linear, tied or not
_TEXT, _VISION = "model.language_model.", "model.visual."
_EMBEDDINGS = f"{_TEXT}embed_tokens.weight"
_HEAD_BYTES = 256 << 20  # rows of the head that are multiplied at a time

#: (names of linears that read the same input, input [rows, in], number of the prompt)
OnLinear = Callable[[tuple[str, ...], "Tensor", int], None]
#: (name of the layer, number of the prompt, its output [rows, hidden] in float32)
OnLayer = Callable[[str, int, NDArray[np.float32]], None]
#: (name of the layer, its tensors under their names within the layer)
OnWeights = Callable[[str, "Mapping[str, Tensor]"], None]
#: (what is running, steps done, steps in all)
Progress = Callable[[str, int, int], None]

Kind = Literal["patches", "block", "deepstack", "merger", "embed", "layer", "norm"]
_VISION_KINDS = ("patches", "block", "deepstack", "merger")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """What came out for one prompt, in float32.

    ``logits`` [wanted positions, vocabulary]. ``features``: per image [tokens, (1 + levels) *
    hidden], the main features and then each deepstack level's.
    """

    logits: NDArray[np.float32]
    features: tuple[NDArray[np.float32], ...]


def forward(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    on_linear: OnLinear | None = None,
    on_layer: OnLayer | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> list[Outputs]:
    """Run all prompts; hidden states go to ``folder``, else to a temporary one.

    Errors: UsageError for a device or dtype that cannot be used, PromptError when the image tokens
    of a prompt do not fit its images, CheckpointError for weights that cannot be read.
    """
    check_device(device, dtype)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medmo-edge-")))
        run = Pass(
            layout=Layout(checkpoint, prompts),
            folder=folder,
            device=device,
            dtype=dtype,
            on_linear=on_linear,
            on_layer=on_layer,
        )
        for _ in run.stages(progress=progress):
            pass
        return run.outputs()


def check_device(device: str, dtype: str) -> None:
    """Errors: UsageError unless torch is installed, has the device, and the dtype is safe."""
    if dtype not in DTYPES:
        raise UsageError(
            f"dtype {dtype!r} cannot be used: choose {' or '.join(DTYPES)} (float16 overflows)"
        )
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"running a checkpoint needs torch ({error}): pip install 'medmo-edge[train]'"
        ) from error
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device {device!r} is not here: use cpu, or cuda where torch finds a GPU")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pass: the layer ``name``, run over ``items`` prompts or images."""

    name: str
    kind: Kind
    items: int
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass in stages, with its states in ``folder``."""

    layout: Layout
    folder: Path
    device: str = "cpu"
    dtype: str = "float32"
    on_linear: OnLinear | None = None
    on_layer: OnLayer | None = None
    on_weights: OnWeights | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """Whose weights are run."""
        return self.layout.checkpoint

    @cached_property
    def plan(self) -> tuple[Stage, ...]:
        """Every stage in order; the vision tower is left out when there is no image."""
        prompts = len(self.layout.prompts)
        layers = [
            Stage(f"{_TEXT}layers.{index}", "layer", prompts, index)
            for index in range(self.checkpoint.config.text.num_layers)
        ]
        first = Stage(f"{_TEXT}embed_tokens", "embed", prompts)
        return (*self._vision_plan(), first, *layers, Stage(f"{_TEXT}norm", "norm", prompts))

    def _vision_plan(self) -> list[Stage]:
        vision, images = self.checkpoint.config.vision, len(self.layout.images)
        if not images:
            return []
        stages = [Stage(f"{_VISION}patch_embed", "patches", images)]
        for index in range(vision.depth):
            stages.append(Stage(f"{_VISION}blocks.{index}", "block", images, index))
            if index in vision.deepstack_indexes:
                level = vision.deepstack_indexes.index(index)
                name = f"{_VISION}deepstack_merger_list.{level}"
                stages.append(Stage(name, "deepstack", images, level))
        return [*stages, Stage(f"{_VISION}merger", "merger", images)]

    def stages(self, first: int = 0, progress: Progress | None = None) -> Iterator[Stage]:
        """Run the stages from number ``first`` on; yields each one when it is done.

        The states it read are removed when the caller asks for the next one.
        """
        import torch

        total = sum(stage.items for stage in self.plan)
        done = sum(stage.items for stage in self.plan[:first])
        for number, stage in enumerate(self.plan[first:], start=first):
            weights = self._weights(stage)
            if self.on_weights:
                self.on_weights(stage.name, weights)
            for item in range(stage.items):
                with torch.no_grad():
                    self._run(number, item, weights)
                done += 1
                if progress:
                    progress(stage.name, done, total)
            yield stage
            self._forget(number)

    def outputs(self) -> list[Outputs]:
        """Logits and vision features of every prompt, once all stages are done."""
        levels = range(len(self.checkpoint.config.vision.deepstack_indexes))
        files = [self._features("main"), *(self._features(level) for level in levels)]
        return [
            Outputs(
                logits=logits,
                features=tuple(
                    np.concatenate([file.read(item) for file in files], axis=1) for item in own
                ),
            )
            for logits, own in zip(self._logits(), self.layout.of_prompt, strict=True)
        ]

    def _weights(self, stage: Stage) -> "dict[str, Tensor]":
        """The tensors of one stage on the device, under their names within the layer."""
        if stage.kind == "embed":  # only the rows of the tokens that occur are read
            return {}
        prefix = _VISION if stage.kind == "patches" else f"{stage.name}."
        wanted = ("patch_embed.", "pos_embed.") if stage.kind == "patches" else ("",)
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        within = [name.removeprefix(prefix) for name in names]
        return {name: self._read(prefix + name) for name in within if name.startswith(wanted)}

    def _read(self, name: str) -> "Tensor":
        import torch

        values = torch.from_numpy(self.checkpoint.read(name))
        return values.to(device=self.device, dtype=self._dtype)

    @property
    def _dtype(self) -> "torch.dtype":
        import torch

        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _run(self, number: int, item: int, weights: "dict[str, Tensor]") -> None:
        stage = self.plan[number]
        is_vision = stage.kind in _VISION_KINDS
        prompt = self.layout.images[item].prompt if is_vision else item
        layer = Layer(weights, self._watch(stage, prompt))
        values = self._compute(number, stage, item, layer).float().cpu().numpy()
        self._target(number).write(item, values)
        if self.on_layer:
            self.on_layer(stage.name, prompt, values)

    def _compute(self, number: int, stage: Stage, item: int, layer: Layer) -> "Tensor":
        if stage.kind == "patches":
            return self._embed_patches(item, layer)
        if stage.kind == "embed":
            return self._embed_tokens(item)
        x = self._state(number, item)
        if stage.kind == "block":
            return self._block(x, item, layer)
        if stage.kind == "layer":
            return self._layer(x, stage.index, item, layer)
        if stage.kind == "norm":
            return self._norm(x, item, layer)
        return merger(layer, x, norm_last=stage.kind == "deepstack")

    def _watch(self, stage: Stage, prompt: int) -> Watch | None:
        if self.on_linear is None:
            return None
        tell = self.on_linear
        prefix = _VISION if stage.kind == "patches" else f"{stage.name}."

        def watch(names: tuple[str, ...], x: "Tensor") -> None:
            tell(tuple(prefix + name for name in names), x, prompt)

        return watch

    def _embed_patches(self, item: int, layer: Layer) -> "Tensor":
        image = self.layout.images[item]
        vision = self.checkpoint.config.vision
        geometry = VisionGeometry(
            head_dim=vision.hidden_size // vision.num_heads,
            num_position_embeddings=vision.num_position_embeddings,
            merge_size=vision.merge_size,
        )
        inputs = vision_inputs(image.grid, geometry)
        rows = layer.weights["pos_embed.weight"][self._put(inputs.pos_idx.T)]
        positions = (rows * self._put(inputs.pos_weight.T)[:, :, None]).sum(1)
        pixels = self.layout.prompts[image.prompt].images[image.number]
        patches = patchify(pixels, self.checkpoint.preprocessing)
        return patch_embedding(layer, self._put(patches), positions)

    def _block(self, x: "Tensor", item: int, layer: Layer) -> "Tensor":
        vision = self.checkpoint.config.vision
        _, height, width = self.layout.images[item].grid
        places = self._put(merge_order(np.indices((height, width)), vision.merge_size).T)
        return vision_block(layer, x, vision_rope(places, vision), vision)

    def _embed_tokens(self, item: int) -> "Tensor":
        """Embeddings with the images' main features in their places."""
        info = self.checkpoint.tensors[_EMBEDDINGS]
        ids = np.asarray(self.layout.prompts[item].ids, np.int64)
        rows = to_float32(self.checkpoint.raw(_EMBEDDINGS)[ids], info.dtype)
        x = self._put(rows).to(self._dtype)
        x[self._put(self.layout.is_image(item))] = self._joined("main", item)
        return x

    def _layer(self, x: "Tensor", index: int, item: int, layer: Layer) -> "Tensor":
        text = self.checkpoint.config.text
        rope = text_rope(self._put(self.layout.rope_positions(item)), text, self._dtype)
        x = text_layer(layer, x[None], rope, text)[0]
        if index < len(self.checkpoint.config.vision.deepstack_indexes):
            x[self._put(self.layout.is_image(item))] += self._joined(index, item)
        return x

    def _norm(self, x: "Tensor", item: int, layer: Layer) -> "Tensor":
        x = rms_norm(x, layer.weights["weight"], self.checkpoint.config.text.rms_norm_eps)
        if self.on_linear:
            self.on_linear((HEAD,), x, item)
        return x

    def _joined(self, level: int | str, prompt: int) -> "Tensor":
        """Features of all images of a prompt, in order: [image tokens, hidden]."""
        file, width = self._features(level), self.layout.feature_shapes.width
        parts = [file.read(item) for item in self.layout.of_prompt[prompt]]
        joined = np.concatenate(parts or [np.empty((0, width), np.float32)])
        return self._put(joined).to(self._dtype)

    def _logits(self) -> list[NDArray[np.float32]]:
        """Logits at the wanted positions; the head is read in blocks of rows."""
        import torch

        last = RowFile(self._path(len(self.plan) - 1), self.layout.text_shapes)
        wanted = [
            self._put(last.read(item)[prompt.wanted]).to(self._dtype)
            for item, prompt in enumerate(self.layout.prompts)
        ]
        tied = self.checkpoint.config.text.tie_word_embeddings
        name = _EMBEDDINGS if tied else f"{HEAD}.weight"
        found: list[list[NDArray[np.float32]]] = [[] for _ in wanted]
        for block in self.checkpoint.row_blocks(name, _HEAD_BYTES):
            head = self._put(block).to(self._dtype)
            for parts, x in zip(found, wanted, strict=True):
                with torch.no_grad():
                    parts.append(torch.nn.functional.linear(x, head).float().cpu().numpy())
        return [np.concatenate(parts, axis=1) for parts in found]

    def _put(self, values: NDArray[np.generic]) -> "Tensor":
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _state(self, number: int, item: int) -> "Tensor":
        """What the nearest stage before ``number`` that has a state wrote for ``item``."""
        before = number - 1
        while self.plan[before].kind == "deepstack":
            before -= 1
        return self._put(self._states(before).read(item)).to(self._dtype)

    def _target(self, number: int) -> RowFile:
        stage = self.plan[number]
        if stage.kind == "deepstack":
            return self._features(stage.index)
        return self._features("main") if stage.kind == "merger" else self._states(number)

    def _states(self, number: int) -> RowFile:
        is_vision = self.plan[number].kind in _VISION_KINDS
        shapes = self.layout.vision_shapes if is_vision else self.layout.text_shapes
        return RowFile(self._path(number), shapes)

    def _features(self, level: int | str) -> RowFile:
        return RowFile(self.folder / f"features-{level}", self.layout.feature_shapes)

    def _path(self, number: int) -> Path:
        return self.folder / f"state-{number:04}"

    def _forget(self, number: int) -> None:
        """Remove the states that led to stage ``number``, unless the next stage reads them too."""
        if self.plan[number].kind != "deepstack":
            for earlier in range(number):
                self._path(earlier).unlink(missing_ok=True)

"""What a TensorRT artifact needs of a machine: precision, JetPack, GPU memory, context length.

Judged by the manifest, the probed device and an engine's record; nothing is loaded here. Whether
there is an engine for this machine is for ``trt_engines`` to say.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Device, release_numbers
from medmo_edge.runtime.model_facts import Facts, file_bytes
from medmo_edge.runtime.ort_fit import graph_dtype
from medmo_edge.runtime.ort_values import NUMBERS, Number

NO_GPU = "no CUDA GPU: TensorRT needs one; export an onnx or gguf target for a CPU"
_OLDEST_JETPACK = 7  # JetPack 6 has TensorRT 10.3 and stays with it
_NO_TENSORRT_SM = 75  # older GPUs are served by no TensorRT that can run these graphs
# CUDA context and kernels; what TensorRT's activations take is known once an engine is loaded.
_CONTEXT_BYTES = 700 << 20
_PRECISION = {
    "trt-bf16": "bfloat16",
    "trt-fp16": "float16",
    "trt-fp8": "fp8",
    "trt-int4-awq": "int4",
    "trt-nvfp4": "nvfp4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to build engines of an artifact, from its manifest.

    ``capacity``: cells of the KV cache; ``chunk``: most tokens of one call in prefill, ``opt``:
    what it is tuned for; ``patches``: fewest, tuned-for and most patches of a picture.
    """

    capacity: int
    chunk: int
    opt: int
    patches: tuple[int, int, int]
    min_tensorrt: str
    min_sm: int
    instead: dict[int, str]

    @classmethod
    def of(cls, manifest: Manifest) -> "Recipe":
        """Errors: ArtifactError when the manifest lacks it."""
        try:
            build = manifest.weights["build"]
            fewest, usual, most = (int(count) for count in build["vision_patches"])
            recipe = cls(
                capacity=int(build["capacity"]),
                chunk=int(build["chunk"]),
                opt=int(build["opt"]),
                patches=(fewest, usual, most),
                min_tensorrt=str(build["min_tensorrt"]),
                min_sm=int(build["min_sm"]),
                instead={int(sm): str(name) for sm, name in build.get("refused_sm", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{manifest.folder}: manifest.json lacks or garbles the build recipe ({error}): "
                "export again"
            ) from error
        if not (0 < recipe.opt <= recipe.chunk <= recipe.capacity and 0 < fewest <= usual <= most):
            raise ArtifactError(
                f"{manifest.folder}: manifest.json has a build recipe that cannot be: export again"
            )
        return recipe

    def profiles(self) -> dict[str, Any]:
        """What an engine is bound to, as it stands in its record."""
        return {
            "capacity": self.capacity,
            "chunk": self.chunk,
            "opt": self.opt,
            "vision_patches": list(self.patches),
        }


def number_of(manifest: Manifest) -> Number:
    """Number format of activations and KV cache."""
    return NUMBERS[graph_dtype(manifest)]


def precision_obstacle(manifest: Manifest, sm: int, what: str) -> str | None:
    """Why a GPU of compute capability ``sm`` cannot run this artifact, and what it can, else None.

    ``what`` names the GPU, e.g. "this Orin".
    """
    recipe = Recipe.of(manifest)
    if sm >= recipe.min_sm:
        return None
    known = [threshold for threshold in recipe.instead if threshold <= sm]
    target = recipe.instead[max(known)] if known and sm >= _NO_TENSORRT_SM else "gguf-q4_k_m"
    precision = _PRECISION.get(manifest.target, manifest.target)
    return f"{precision} needs SM {recipe.min_sm}, {what} is SM {sm}: export --target {target}"


def version_obstacle(manifest: Manifest, name: str, version: str) -> str | None:
    """Why this TensorRT cannot read this artifact, else None."""
    needed = Recipe.of(manifest).min_tensorrt
    if name == "tensorrt" and release_numbers(version, 2) < release_numbers(needed, 2):
        return f"its graphs need TensorRT {needed}, here is {version}: update it"
    opset, newest = manifest.weights.get("opset"), _newest_opset(name, version)
    if not isinstance(opset, int) or opset > newest:
        # Checked here because parsers read on and guess.
        return (
            f"its graphs are of opset {opset}, {name} {version} reads up to {newest}: update "
            "TensorRT, or export with this version of medmo-edge"
        )
    return None


def _newest_opset(name: str, version: str) -> int:
    """By NVIDIA's support matrices: 24 for TensorRT 10 and RTX, 25 from 11 on."""
    return 25 if name == "tensorrt" and release_numbers(version, 1)[0] >= 11 else 24


def device_obstacle(manifest: Manifest, device: Device) -> str | None:
    """Why this machine cannot run this artifact with any engine, else None."""
    if not device.cuda:
        return NO_GPU
    jetson = device.jetson
    if jetson and jetson.jetpack and release_numbers(jetson.jetpack, 1)[0] < _OLDEST_JETPACK:
        return (
            f"JetPack {jetson.jetpack} has a TensorRT that is too old for a KV cache (10.15 is "
            "needed): export a gguf target for llama.cpp, or update to JetPack 7.2"
        )
    gpu = device.cuda[0]
    obstacle = precision_obstacle(manifest, gpu.sm, f"this {gpu.name}")
    return obstacle or memory_obstacle(manifest, device, engine_bytes=None)


def memory_obstacle(manifest: Manifest, device: Device, engine_bytes: int | None) -> str | None:
    """Why engine and cache do not fit the GPU, else None; ``engine_bytes`` None: estimated."""
    weights = engine_bytes or file_bytes(manifest, "vision_data", "decoder_data")
    cache = cache_bytes(manifest)
    needed, has = weights + cache + _CONTEXT_BYTES, device.cuda[0].memory_bytes
    if has >= needed:
        return None
    capacity = Recipe.of(manifest).capacity
    return (
        f"needs about {needed / 1e9:.1f} GB ({weights / 1e9:.1f} weights, {cache / 1e9:.1f} for "
        f"{capacity} tokens), the GPU has {has / 1e9:.1f} GB: {smaller(manifest, has)}"
    )


def smaller(manifest: Manifest, has_bytes: int) -> str:
    """What to do about too little memory: a shorter cache where that suffices."""
    recipe = Recipe.of(manifest)
    spare = has_bytes - file_bytes(manifest, "vision_data", "decoder_data") - _CONTEXT_BYTES
    affordable = spare // (cache_bytes(manifest) // recipe.capacity) // 256 * 256
    if 1024 <= affordable < recipe.capacity:
        return f"export again with --cache-length {affordable}"
    return "export a smaller target, e.g. trt-int4-awq"


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of the KV cache."""
    cell = Facts.of(manifest).cell_bytes(np.dtype(number_of(manifest).storage).itemsize)
    return Recipe.of(manifest).capacity * cell

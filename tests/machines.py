"""Machines that are described, not present, and artifacts that exist only as their manifests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmo_edge.manifest import Manifest
from medmo_edge.runtime.device import Cuda, Device, Jetson
from medmo_edge.runtime.trt_engines import EngineRecord, Engines

GB = 1 << 30
# Bytes of a 4B model: language model and vision tower of each target.
SIZES = {
    "onnx-fp16": 9.7,
    "onnx-int8": 6.3,
    "onnx-int4": 4.2,
    "gguf-q4_k_m": 3.3,
    "gguf-f16": 8.9,
    "trt-bf16": 8.9,
    "trt-fp8": 5.8,
    "trt-int4-awq": 3.7,
    "trt-nvfp4": 3.7,
}
DTYPES = {
    "onnx-fp16": "float16",
    "onnx-int8": "float32",
    "onnx-int4": "float32",
    "trt-bf16": "bfloat16",
    "trt-fp8": "bfloat16",
    "trt-int4-awq": "float16",
    "trt-nvfp4": "bfloat16",
}
# What the recipes of the trt targets say: oldest GPU, and what to take instead from which GPU on.
GPUS: dict[str, tuple[int, dict[str, str]]] = {
    "trt-bf16": (80, {"75": "trt-fp16"}),
    "trt-fp8": (89, {"75": "trt-int4-awq"}),
    "trt-int4-awq": (75, {}),
    "trt-nvfp4": (100, {"75": "trt-int4-awq", "89": "trt-fp8"}),
}
BACKENDS_OF = {"onnx": "ort", "gguf": "llamacpp", "trt": "trt"}
FACTS = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "deepstack_levels": 3,
    "num_layers": 36,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 262144,
}


def artifact(target: str) -> Manifest:
    """A 4B artifact that exists only as its manifest."""
    is_gguf = target.startswith("gguf")
    roles = ("language", "vision") if is_gguf else ("decoder_data", "vision_data")
    sizes = (int((SIZES[target] - 0.8) * 1e9), int(0.8e9))
    return Manifest(
        target=target,
        backend=BACKENDS_OF[target.partition("-")[0]],
        model=dict(FACTS),
        coords="norm1000",
        preprocessing={},
        files={
            role: {"sha256": "", "bytes": size, "role": role}
            for role, size in zip(roles, sizes, strict=True)
        },
        weights=_weights(target),
        checkpoint={"name": "4b", "sha256": "same"},
        calibration=None,
        exporter={},
        certificate=None,
        licence="",
        folder=Path(target),
    )


def _weights(target: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if target in DTYPES:
        found = {"graph_dtype": DTYPES[target], "opset": 24 if target in GPUS else 21}
    if target in GPUS:
        min_sm, instead = GPUS[target]
        found["build"] = {
            "capacity": 4096,
            "chunk": 1024,
            "opt": 512,
            "vision_patches": [256, 4096, 16384],
            "min_tensorrt": "10.15",
            "min_sm": min_sm,
            "refused_sm": instead,
        }
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device, and whether its onnxruntime is the one for GPUs."""

    device: Device
    gpu_library: bool


def _machine(
    memory_gb: float,
    *features: str,
    system: str = "Linux x86_64",
    gpu: Cuda | None = None,
    cuda: str | None = None,
    jetson: Jetson | None = None,
) -> Machine:
    device = Device(
        system=system,
        cpu="a CPU",
        cores=8,
        features=features,
        ram_bytes=int(memory_gb * GB),
        ram_available_bytes=int(memory_gb * GB * 0.8),
        cuda=(gpu,) if gpu else (),
        jetson=jetson,
        driver="580.65.06" if gpu else None,
        cuda_version=cuda,
    )
    return Machine(device=device, gpu_library=gpu is not None)


def _jetson(model: str, jetpack: str) -> Jetson:
    return Jetson(model=model, l4t="36.4.3" if jetpack < "7" else "38.4", jetpack=jetpack)


ARM = ("neon", "dotprod", "i8mm")
MACHINES = {
    "H200": _machine(
        1500, "avx2", "avx512", gpu=Cuda(name="H200", sm=90, memory_bytes=141 * GB), cuda="13.0"
    ),
    "RTX 4090": _machine(
        64, "avx2", gpu=Cuda(name="RTX 4090", sm=89, memory_bytes=24 * GB), cuda="13.0"
    ),
    "RTX 2080": _machine(
        32, "avx2", gpu=Cuda(name="RTX 2080", sm=75, memory_bytes=8 * GB), cuda="13.0"
    ),
    "Orin Nano JP6": _machine(
        8,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Orin", sm=87, memory_bytes=8 * GB),
        cuda="12.6",
        jetson=_jetson("NVIDIA Jetson Orin Nano", "6.2"),
    ),
    "Orin JP7": _machine(
        64,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Orin", sm=87, memory_bytes=64 * GB),
        cuda="13.2",
        jetson=_jetson("NVIDIA Jetson AGX Orin", "7.2"),
    ),
    "Thor": _machine(
        128,
        *ARM,
        system="Linux aarch64",
        gpu=Cuda(name="Thor", sm=110, memory_bytes=128 * GB),
        cuda="13.2",
        jetson=_jetson("NVIDIA Jetson AGX Thor", "7.2"),
    ),
    "AVX2 laptop": _machine(16, "avx2", "fma"),
    "ARM server": _machine(256, *ARM, "sve", system="Linux aarch64"),
}


def engines_of(manifest: Manifest) -> Engines:
    """Engines as large as the weights they were built from."""
    decoder = int((SIZES[manifest.target] - 0.8) * 1e9)
    record = EngineRecord(
        target=manifest.target,
        library="tensorrt",
        version="10.16.1.11",
        sm=0,
        system="",
        gpu="",
        driver=None,
        cuda_version=None,
        graphs={},
        profiles={},
        settings={},
        files={"vision.engine": int(0.8e9), "decoder.engine": decoder},
        seconds={},
        layers={},
        created="",
    )
    return Engines(folder=Path("engines"), record=record)

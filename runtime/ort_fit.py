"""What an ONNX artifact needs of a machine: provider, memory, context length, threads.

Estimates from the manifest alone, on the careful side; nothing is loaded or measured here. Whether
CUDA really works is known only once a session is open.
"""

from dataclasses import dataclass
from typing import Literal

from medmo_edge.errors import ArtifactError
from medmo_edge.manifest import Manifest
from medmo_edge.runtime import model_facts
from medmo_edge.runtime.device import Cuda, Device
from medmo_edge.runtime.model_facts import MIN_CELLS, Facts

Place = Literal["cuda", "cpu"]
_SMALL_BYTES = 64 << 20
_OVERHEAD_BYTES = 400 << 20  # compute buffers, tokenizer, Python
_CUDA_CONTEXT_BYTES = 1 << 30  # CUDA context, cuBLAS and cuDNN workspaces
_CUDA_MAJOR, _MIN_SM = 13, 75  # what onnxruntime-gpu 1.31 is built for, and its oldest GPU
_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacles:
    """Why an artifact cannot run on each place; None where it can."""

    cuda: str | None
    cpu: str | None

    @property
    def place(self) -> Place | None:
        """The better of the possible places."""
        return "cuda" if self.cuda is None else "cpu" if self.cpu is None else None


def graph_dtype(manifest: Manifest) -> str:
    """Number format of activations and KV cache. Errors: ArtifactError when unknown."""
    dtype = manifest.weights.get("graph_dtype")
    if dtype not in _VALUE_BYTES:
        raise ArtifactError(
            f"{manifest.folder}: manifest.json has weights graph_dtype {dtype!r}, not one of "
            f"{', '.join(_VALUE_BYTES)}: export again"
        )
    return str(dtype)


def cell_bytes(manifest: Manifest) -> int:
    """Bytes of the KV cache per token, in the graph's number format."""
    return Facts.of(manifest).cell_bytes(_VALUE_BYTES[graph_dtype(manifest)])


def weight_bytes(manifest: Manifest) -> int:
    """Size of the weights of both graphs; the embedding table stays in its mapped file."""
    return model_facts.file_bytes(manifest, "vision_data", "decoder_data")


def obstacles(manifest: Manifest, device: Device, library_has_cuda: bool) -> Obstacles:
    """Why this artifact cannot run on the GPU and on the CPU of this machine."""
    return Obstacles(
        cuda=_cuda_obstacle(manifest, device, library_has_cuda), cpu=_cpu_obstacle(manifest, device)
    )


def _cpu_obstacle(manifest: Manifest, device: Device) -> str | None:
    if graph_dtype(manifest) == "bfloat16":
        return "its bfloat16 graph runs on CUDA only: export onnx-int8 or onnx-fp32 for a CPU"
    needed = weight_bytes(manifest) + MIN_CELLS * cell_bytes(manifest) + _OVERHEAD_BYTES
    return model_facts.memory_obstacle(needed, device)


def _cuda_obstacle(manifest: Manifest, device: Device, library_has_cuda: bool) -> str | None:
    if not device.cuda:
        return "no CUDA GPU"
    gpu = device.cuda[0]
    if device.cuda_version is not None and int(device.cuda_version.split(".")[0]) < _CUDA_MAJOR:
        where = f"JetPack {device.jetson.jetpack}" if device.jetson else "the NVIDIA driver"
        return f"onnxruntime-gpu needs CUDA {_CUDA_MAJOR}, {where} has {device.cuda_version}"
    if not library_has_cuda:
        return "the installed onnxruntime is for CPUs: pip install 'medmo-edge[gpu]' instead"
    if gpu.sm < _MIN_SM:
        return f"SM {gpu.sm} is older than CUDA {_CUDA_MAJOR} supports (SM {_MIN_SM})"
    if graph_dtype(manifest) == "float32":
        return "attention with a KV cache needs 16-bit activations on CUDA: export onnx-fp16"
    return _gpu_memory_obstacle(manifest, gpu)


def _gpu_memory_obstacle(manifest: Manifest, gpu: Cuda) -> str | None:
    needed = weight_bytes(manifest) + MIN_CELLS * cell_bytes(manifest) + _CUDA_CONTEXT_BYTES
    if gpu.memory_bytes < needed:
        return f"needs about {needed / 1e9:.1f} GB, the GPU has {gpu.memory_bytes / 1e9:.1f} GB"
    return None


def default_threads(manifest: Manifest, device: Device) -> int:
    """Operations of a small model end sooner than a second thread wakes up: one is faster."""
    return 1 if weight_bytes(manifest) < _SMALL_BYTES else device.cores


def max_cells(manifest: Manifest, device: Device, place: Place, wanted: int | None) -> int:
    """Tokens of the longest conversation: as asked, else half of the memory left by the weights."""
    if wanted is not None:
        return wanted
    memory, overhead = device.ram_available_bytes, _OVERHEAD_BYTES
    if place == "cuda":
        memory, overhead = device.cuda[0].memory_bytes, _CUDA_CONTEXT_BYTES
    spare = memory - weight_bytes(manifest) - overhead
    return model_facts.longest_conversation(spare, cell_bytes(manifest))

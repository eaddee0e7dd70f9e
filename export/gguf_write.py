"""Streams the tensors of a checkpoint into one GGUF file, never holding more than a block of rows.

Knows nothing of Qwen3-VL: it gets a list of tensors with their types and a function that adds the
metadata. Rows are independent in every type we write, so splitting a tensor into blocks changes no
byte of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.checkpoint import Checkpoint
from medmo_edge.errors import ExportError
from medmo_edge.export.gguf_names import Planned
from medmo_edge.export.gguf_quantise import Quantiser, row_bytes

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Float32 bytes of a block: enough to keep all threads busy, quickly done when Ctrl-C comes.
_BLOCK_BYTES = 16 << 20
_ALIGNMENT = 32
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}

Count = Callable[[int], None]


class Float16Overflow(Exception):
    """A tensor holds finite values beyond float16's range: it must be stored as F32."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """What to write: the tensors in order, the type of each by name, and the metadata."""

    path: Path
    architecture: str
    tensors: Sequence[Planned]
    types: Mapping[str, str]
    add_keys: Callable[["GGUFWriter"], None]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(_padded(self.bytes_of(tensor)) for tensor in self.tensors)

    def bytes_of(self, tensor: Planned) -> int:
        """Bytes of one tensor as stored."""
        rows = prod(tensor.shape[:-1])
        return rows * row_bytes(self.types[tensor.name], tensor.shape[-1])


def write_gguf(file: GgufFile, checkpoint: Checkpoint, quantiser: Quantiser, count: Count) -> None:
    """Write one file; ``count`` receives the bytes of each block as it is written.

    Errors: Float16Overflow as above; ExportError for NaN or infinity in the checkpoint.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(file.path, file.architecture)
    try:
        _write_head(writer, file)
        assert writer.fout is not None
        out = writer.fout[0]
        out.write(bytes(-out.tell() % _ALIGNMENT))
        for tensor in file.tensors:
            start = out.tell()
            for block in _encoded(tensor, file.types[tensor.name], checkpoint, quantiser):
                out.write(block.data)
                count(block.nbytes)
            written = out.tell() - start
            if written != file.bytes_of(tensor):
                raise RuntimeError(f"{tensor.name}: wrote {written}, not {file.bytes_of(tensor)}")
            out.write(bytes(-written % _ALIGNMENT))
    finally:
        writer.close()


def _write_head(writer: "GGUFWriter", file: GgufFile) -> None:
    import gguf

    file.add_keys(writer)
    for tensor in file.tensors:
        kind = gguf.GGMLQuantizationType[file.types[tensor.name]]
        shape: Sequence[int] = tensor.shape
        dtype: np.dtype[Any] = _NUMPY_TYPES.get(kind.name, np.dtype(np.uint8))
        if kind.name not in _NUMPY_TYPES:  # the gguf package wants these as shapes of bytes
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, dtype, file.bytes_of(tensor), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _encoded(
    tensor: Planned, kind: str, checkpoint: Checkpoint, quantiser: Quantiser
) -> Iterator[NDArray[Any]]:
    """Contiguous arrays whose bytes are the tensor in type ``kind``."""
    for block in _float_blocks(tensor, checkpoint):
        if not np.isfinite(block).all():
            raise ExportError(
                f"{checkpoint.path}: tensor {tensor.source} holds NaN or infinity: "
                "the checkpoint is damaged or its training diverged"
            )
        if kind == "F32":
            yield block
        elif kind == "F16":
            yield _to_float16(tensor, block)
        elif kind == "BF16":
            yield _to_bfloat16(block)
        else:
            yield quantiser.quantise(tensor.name, kind, block)


def _float_blocks(tensor: Planned, checkpoint: Checkpoint) -> Iterator[NDArray[np.float32]]:
    if tensor.frame is not None:
        yield np.ascontiguousarray(checkpoint.read(tensor.source)[:, :, tensor.frame])
        return
    for block in checkpoint.row_blocks(tensor.source, _BLOCK_BYTES):
        yield np.ascontiguousarray(block)


def _to_float16(tensor: Planned, block: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = block.astype(np.float16)
    if not np.isfinite(half).all():
        raise Float16Overflow(tensor.name)
    return half


def _to_bfloat16(block: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; exact for a checkpoint that is bfloat16 already."""
    bits = block.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT

"""Safetensors files, read one tensor at a time: headers, memory maps, float32 blocks of rows.

bfloat16 is handled with numpy integers, because neither numpy nor the ``safetensors`` package can
read it without torch. Nothing here writes, and no file is ever loaded whole.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import CheckpointError

# Storage types a Qwen3-VL checkpoint may have; bfloat16 is kept as its 16 bits.
STORAGE: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One stored tensor: type name as in the header, shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order.

    Errors: CheckpointError when the file is missing, truncated or its header does not add up.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, max(0, size - 8)):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: copy it again"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: copy it from where the checkpoint is") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: copy it again")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    infos = {name: _read_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = max((info.offset + info.nbytes for info in infos.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size:,} of {end:,} bytes, copy it again")
    return infos


def _read_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
        start, end = (int(value) for value in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header at tensor {name}") from error
    item_bytes = (
        np.dtype(STORAGE[dtype]).itemsize if dtype in STORAGE else _ITEM_BYTES.get(dtype, 1)
    )
    lies = min((start, end, *shape)) < 0 or math.prod(shape) * item_bytes != end - start
    if lies and (dtype in STORAGE or dtype in _ITEM_BYTES):
        raise CheckpointError(f"{path}: tensor {name} has a size that does not fit its shape")
    return TensorInfo(
        dtype=dtype, shape=shape, nbytes=end - start, path=path, offset=data_start + start
    )


def map_tensor(info: TensorInfo, name: str) -> NDArray[Any]:
    """Read-only memory map in storage type (bfloat16 as uint16).

    Errors: CheckpointError for a type that no unquantised checkpoint has.
    """
    dtype = _storage(info, name)
    if info.nbytes == 0:
        return np.empty(info.shape, dtype)
    return np.memmap(info.path, dtype, mode="r", offset=info.offset, shape=info.shape)


def read_rows(info: TensorInfo, name: str, max_bytes: int) -> Iterator[NDArray[np.float32]]:
    """Consecutive float32 blocks along the first axis, each at most ``max_bytes`` or one row.

    Reads with plain file reads: pages of a memory map would stay in this process's resident set.
    """
    dtype = np.dtype(_storage(info, name))
    rows = info.shape[0] if info.shape else 1
    row_values = math.prod(info.shape[1:])
    step = max(1, max_bytes // max(1, 4 * row_values))
    try:
        with info.path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                values = np.fromfile(file, dtype, count * row_values)
                if values.size < count * row_values:
                    raise CheckpointError(f"{info.path} was cut off while it was read")
                yield to_float32(values, info.dtype).reshape((count, *info.shape[1:]))
    except OSError as error:
        raise CheckpointError(f"{info.path} cannot be read: {error.strerror}") from error


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Exact float32 values of an array in storage type ``dtype`` (BF16, F16, F32)."""
    if dtype != "BF16":
        return values.astype(np.float32, copy=False)
    bits = values.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _storage(info: TensorInfo, name: str) -> type[np.generic]:
    try:
        return STORAGE[info.dtype]
    except KeyError:
        raise CheckpointError(
            f"{info.path}: tensor {name} is stored as {info.dtype}, only BF16, F16 and F32 work: "
            "use the checkpoint before it was quantised"
        ) from None


def check_storage(tensors: Mapping[str, TensorInfo]) -> None:
    """Errors: CheckpointError naming the first tensor of a type that cannot be read."""
    for name, info in tensors.items():
        _storage(info, name)

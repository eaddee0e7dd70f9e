"""Importance matrices in llama.cpp's GGUF form: how much each input channel of a weight is used.

Reads and writes files; collecting the numbers is the calibration pass's work. Only dense models
(one matrix per weight) and only the GGUF form: the older .dat form keeps no token counts, so it is
refused with the command that converts it. Source: llama.cpp, tools/imatrix/imatrix.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import CalibrationError

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
# What a damaged file makes the reader raise.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """Per GGUF tensor name: mean squared activation of each input channel, and rows (tokens) seen.

    ``datasets`` names what was observed; chunks are what llama.cpp counts tokens in.
    """

    means: Mapping[str, NDArray[np.float32]]
    counts: Mapping[str, float]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 1
    chunk_size: int = 512


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the file that ``llama-quantize --imatrix`` reads, whole or not at all.

    Errors: CalibrationError for values that ``read_imatrix`` would refuse, OSError.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        _write(draft, imatrix)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _write(path: Path, imatrix: Imatrix) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    try:
        # The constructor insists on an architecture, which an importance matrix has not.
        writer.kv_data[0].clear()
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets) or ["unnamed"])
        writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name, mean in imatrix.means.items():
            count = imatrix.counts[name]
            _check_entry(path, name, mean, count)
            sums = np.asarray(mean, np.float32) * np.float32(count)
            writer.add_tensor(name + _SUMS, sums.reshape(1, -1))
            writer.add_tensor(name + _COUNTS, np.full((1, 1), count, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read llama.cpp's GGUF form.

    Errors: CalibrationError for a missing or damaged file, the old form, an entry without counts,
    experts, and values that are not finite and non-negative.
    """
    _check_magic(path)
    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        means, counts = _entries(path, reader)
        datasets = _strings(reader, "imatrix.datasets")
        chunk_count = _number(reader, "imatrix.chunk_count", 1)
        chunk_size = _number(reader, "imatrix.chunk_size", 512)
    except ImportError as error:
        raise CalibrationError(
            f"importance matrices need the gguf package ({error}): pip install 'medmo-edge[export]'"
        ) from error
    except _DAMAGE as error:
        raise CalibrationError(f"{path} is a damaged GGUF file: {error}") from error
    if not means:
        raise CalibrationError(f"{path} holds no importance matrix: give llama-imatrix's output")
    return Imatrix(
        means=means,
        counts=counts,
        datasets=datasets,
        chunk_count=chunk_count,
        chunk_size=chunk_size,
    )


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise CalibrationError(
            f"{path} is not a GGUF importance matrix; convert the old .dat form with "
            "llama-imatrix --in-file OLD.dat --output-format gguf -o NEW.gguf"
        )


def _entries(
    path: Path, reader: "GGUFReader"
) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    means: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, float] = {}
    for full_name, sums in tensors.items():
        if not full_name.endswith(_SUMS):
            continue
        name = full_name.removesuffix(_SUMS)
        count = tensors.get(name + _COUNTS)
        if count is None or count.size != 1:
            raise CalibrationError(
                f"{path}: {name} has {0 if count is None else count.size} counts, not one: "
                "importance matrices of expert models are not supported"
            )
        counts[name] = float(count.reshape(-1)[0])
        # llama.cpp divides in float32 too, so the same file gives the same quantised bytes.
        values = np.asarray(sums, np.float32).reshape(-1)
        _check_entry(path, name, values, counts[name])
        means[name] = values / np.float32(counts[name])
    return means, counts


def _check_entry(path: Path, name: str, values: NDArray[np.float32], count: float) -> None:
    if not math.isfinite(count) or count <= 0:
        raise CalibrationError(f"{path}: {name} saw {count:g} tokens: calibrate with more samples")
    if values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
        raise CalibrationError(
            f"{path}: {name} holds values that are no mean squares (negative, NaN or infinite)"
        )
    if not values.any():
        raise CalibrationError(f"{path}: {name} is zero everywhere: calibrate with more samples")


def _strings(reader: "GGUFReader", key: str) -> tuple[str, ...]:
    field = reader.get_field(key)
    if field is None:
        return ()
    values: Any = field.contents()
    return tuple(values) if isinstance(values, list) else (str(values),)


def _number(reader: "GGUFReader", key: str, default: int) -> int:
    field = reader.get_field(key)
    return default if field is None else int(field.contents())

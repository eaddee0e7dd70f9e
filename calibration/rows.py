"""Float32 matrices of many prompts in one file: hidden states that need not fit into memory.

Read and written matrix by matrix with plain file access: pages of a memory map would count as this
process's memory. No index is stored; whoever opens the file knows the shapes.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import CalibrationError


class Shapes:
    """Shapes of the matrices in one file: [rows[i], width] per item i."""

    def __init__(self, rows: Sequence[int], width: int) -> None:
        self.rows, self.width = tuple(rows), width
        self.starts = (0, *accumulate(self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of the complete file."""
        return self.starts[-1] * self.width * 4


class RowFile:
    """One float32 matrix per item, one after the other."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.path = path
        self._shapes = shapes

    def write(self, item: int, values: NDArray[np.float32]) -> None:
        """Store one matrix; the file grows as needed. Errors: OSError when the disk is full."""
        shape = (self._shapes.rows[item], self._shapes.width)
        if values.shape != shape:
            raise ValueError(f"item {item} has shape {values.shape}, not {shape}")
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(self._start(item))
            file.write(np.ascontiguousarray(values, np.float32).data)

    def read(self, item: int) -> NDArray[np.float32]:
        """One matrix, as a writable copy. Errors: CalibrationError when it is not there."""
        rows, width = self._shapes.rows[item], self._shapes.width
        try:
            with self.path.open("rb") as file:
                file.seek(self._start(item))
                values = np.fromfile(file, np.float32, rows * width)
        except OSError as error:
            raise CalibrationError(f"{self.path} cannot be read: {error.strerror}") from error
        if values.size < rows * width:
            raise CalibrationError(f"{self.path} is cut off: remove its folder and start again")
        return values.reshape(rows, width)

    def _start(self, item: int) -> int:
        return self._shapes.starts[item] * self._shapes.width * 4

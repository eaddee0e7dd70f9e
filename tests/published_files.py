"""Files in the forms that data sets are published in, for the tests of their readers."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def png(width: int = 60, height: int = 40, value: int = 90) -> bytes:
    """A grey picture."""
    buffer = BytesIO()
    Image.fromarray(np.full((height, width), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path, value: int = 90) -> Path:
    """A grey picture at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value=value))
    return path


def write_json(path: Path, value: Any) -> Path:
    """``value`` as JSON in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """``rows`` as a table of Parquet, or a skip."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path

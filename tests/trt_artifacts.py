"""Artifacts for the TensorRT backend that tests can run: the scatter graphs in a chosen dtype.

``export`` writes trt-* targets in 16 bits only; in float32 the same graphs can be compared with
other backends to the last digits.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.export.onnx_decoder import DecoderPlan, build_decoder
from medmo_edge.export.onnx_graph import save_graph
from medmo_edge.export.onnx_linear import FLOAT, Encoding, GraphDtype
from medmo_edge.export.onnx_vision import VisionPlan, build_vision
from medmo_edge.manifest import record_file


def write_scatter(
    source: Path,
    checkpoint: str | Path,
    folder: Path,
    *,
    dtype: GraphDtype = "float32",
    matrix: Encoding = FLOAT,
    build: dict[str, Any] | None = None,
) -> Path:
    """The ONNX artifact ``source`` of ``checkpoint`` with graphs for TensorRT.

    ``matrix`` is how the language model's matrices are stored, fp8 with scales that mean nothing;
    ``build`` changes the recipe of the manifest.
    """
    shutil.copytree(source, folder)
    recipe: dict[str, Any] = {
        "capacity": 512,
        "chunk": 64,
        "opt": 32,
        "max_batch": 1,
        "vision_patches": [4, 256, 4096],
        "min_tensorrt": "10.15",
        "min_sm": 80,
        "refused_sm": {"75": "trt-fp16"},
    } | (build or {})
    with open_checkpoint(checkpoint) as opened:
        plan = DecoderPlan(
            form="scatter",
            dtype=dtype,
            matrix=matrix,
            capacity=recipe["capacity"],
            activation_scales={name.removesuffix(".weight"): 0.1 for name in opened.tensors},
        )
        graphs = {
            "decoder.onnx": build_decoder(opened, plan).graph,
            "vision.onnx": build_vision(opened, VisionPlan(form="scatter", dtype=dtype)).graph,
        }
        for name, graph in graphs.items():
            save_graph(graph, folder / name, lambda size: None)
    change_manifest(
        folder,
        target="trt-bf16",
        backend="trt",
        weights={"graph_dtype": dtype, "opset": 24, "form": "scatter", "build": recipe},
    )
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest anew over whatever the files are now; dictionaries are merged."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    values["files"] = {
        name: record_file(folder / name, record["role"]) for name, record in values["files"].items()
    }
    path.write_text(json.dumps(values))

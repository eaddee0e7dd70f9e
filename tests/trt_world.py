"""What the parts of the fake TensorRT share: its state, number types, and tensors of graphs."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from cuda_fake import FakeCuda

MAGIC = b"fake plan "
DataType = IntEnum("DataType", "FLOAT HALF BF16 INT32 INT64 BOOL FP8 INT4 FP4", start=0)
TensorLocation = IntEnum("TensorLocation", "DEVICE HOST", start=0)
TensorIOMode = IntEnum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
Strategy = IntEnum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
# onnx.TensorProto.DataType -> name
_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 6: "INT32", 7: "INT64", 9: "BOOL"}
STORAGE = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}


class ILogger:
    """The base class of loggers."""

    Severity = Severity


class IProgressMonitor:
    """The base class of monitors."""


@dataclass(eq=False)
class World:
    """What the fake library and its objects share; tests change it.

    ``in_place``: whether engines report aliases; ``refuses``: operators the parser does not know;
    ``fails``: a message with which compiling fails; ``host_tensors``: read from the computer.
    """

    cuda: FakeCuda
    version: str = "10.16.1.11"
    sm: int = 89
    in_place: bool = True
    is_capturable: bool = True
    refuses: frozenset[str] = frozenset()
    fails: str | None = None
    deserialised: int = 0
    host_tensors: frozenset[str] = frozenset()
    logger: Any = None
    launches: list[tuple[str, int, bool]] = field(default_factory=list)
    sessions: dict[str, Any] = field(default_factory=dict)

    def register(self, logger: Any) -> Any:
        """The logger that is really used: TensorRT keeps to the first one it was given."""
        self.logger = self.logger or logger
        return self.logger

    def session(self, path: str) -> Any:
        """ONNX Runtime on the CPU with the graph of a plan."""
        if path not in self.sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            self.sessions[path] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[path]


@dataclass(frozen=True)
class Tensor:
    """One input or output of a network or engine, -1 where its shape is free."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]


def tensor_of(value: Any) -> Tensor:
    """An input or output of an ONNX graph."""
    kind = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
    return Tensor(value.name, DataType[_TYPES[kind.elem_type]], tuple(dims))


def tensors_of(path: str) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of an ONNX file."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return [tensor_of(each) for each in graph.input], [tensor_of(each) for each in graph.output]

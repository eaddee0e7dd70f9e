"""The targets of export: one row per format and precision, in the order a user would try them.

Only what can be exported now is listed. The table says what a target is; how it is written is the
business of the modules named after its format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from medmo_edge.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row: ``weights`` names the storage of the language model's matrices.

    ``needs_calibration`` names what an export cannot do without, ``takes_imatrix`` and
    ``takes_record`` whether an importance matrix and a calibration record change the result,
    ``min_sm`` the oldest CUDA compute capability it runs on (None: any device, CPU included).
    ``instead`` names the target for GPUs older than that, from which compute capability on.
    """

    name: str
    backend: str
    format: Literal["gguf", "onnx", "trt"]
    weights: str
    needs_calibration: str | None = None
    takes_imatrix: bool = False
    takes_record: bool = False
    min_sm: int | None = None
    instead: Mapping[int, str] = field(default_factory=dict)


def _gguf(weights: str, *, takes_imatrix: bool = False) -> Target:
    return Target(
        name=f"gguf-{weights}",
        backend="llamacpp",
        format="gguf",
        weights=weights,
        takes_imatrix=takes_imatrix,
        takes_record=takes_imatrix,
    )


def _onnx(weights: str, *, takes_record: bool = False) -> Target:
    return Target(
        name=f"onnx-{weights}",
        backend="ort",
        format="onnx",
        weights=weights,
        takes_record=takes_record,
    )


def _trt(
    weights: str,
    *,
    min_sm: int,
    needs_record: bool = False,
    takes_record: bool = True,
    instead: Mapping[int, str] | None = None,
) -> Target:
    return Target(
        name=f"trt-{weights}",
        backend="trt",
        format="trt",
        weights=weights,
        needs_calibration="record" if needs_record else None,
        takes_record=takes_record,
        min_sm=min_sm,
        instead=instead or {},
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _gguf("f16"),
        _gguf("bf16"),
        _gguf("q8_0"),
        _gguf("q6_k", takes_imatrix=True),
        _gguf("q5_k_m", takes_imatrix=True),
        _gguf("q4_k_m", takes_imatrix=True),
        _gguf("iq4_xs", takes_imatrix=True),
        _onnx("fp32"),
        _onnx("fp16"),
        _onnx("int8"),
        _onnx("int4", takes_record=True),
        _trt("bf16", min_sm=80, takes_record=False, instead={75: "trt-fp16"}),
        _trt("fp16", min_sm=75),
        _trt("fp8", min_sm=89, needs_record=True, instead={75: "trt-int4-awq"}),
        _trt("int4-awq", min_sm=75, needs_record=True),
        _trt("nvfp4", min_sm=100, instead={75: "trt-int4-awq", 89: "trt-fp8"}),
    )
}


def find_target(name: str) -> Target:
    """The row of a target name, in any case. Errors: UsageError listing what there is."""
    target = TARGETS.get(name.lower())
    if target:
        return target
    close = get_close_matches(name.lower(), TARGETS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown target {name!r}: {hint}choose one of {', '.join(TARGETS)}")

"""The target table and how a mistyped name is answered."""

import pytest

from medmo_edge.errors import UsageError
from medmo_edge.export.targets import TARGETS, find_target


def test_every_row_is_found_by_its_name_in_any_case() -> None:
    for name, target in TARGETS.items():
        assert find_target(name) is target and find_target(name.upper()) is target
        assert target.name == name == f"{target.format}-{target.weights}"


def test_the_table_offers_what_the_readme_promises() -> None:
    assert list(TARGETS) == [
        "gguf-f16",
        "gguf-bf16",
        "gguf-q8_0",
        "gguf-q6_k",
        "gguf-q5_k_m",
        "gguf-q4_k_m",
        "gguf-iq4_xs",
        "onnx-fp32",
        "onnx-fp16",
        "onnx-int8",
        "onnx-int4",
        "trt-bf16",
        "trt-fp16",
        "trt-fp8",
        "trt-int4-awq",
        "trt-nvfp4",
    ]
    backends = {(target.format, target.backend) for target in TARGETS.values()}
    assert backends == {("gguf", "llamacpp"), ("onnx", "ort"), ("trt", "trt")}


def test_what_an_older_gpu_is_told_to_take_runs_there() -> None:
    """Every alternative is a target that runs from that compute capability on, or anywhere."""
    for target in TARGETS.values():
        for sm, name in target.instead.items():
            assert (TARGETS[name].min_sm or 0) <= sm < (target.min_sm or 0)
    orin, hopper = 87, 90
    assert alternative("trt-fp8", orin) == "trt-int4-awq"
    assert alternative("trt-nvfp4", hopper) == "trt-fp8"
    assert alternative("trt-nvfp4", orin) == "trt-int4-awq"
    assert alternative("trt-bf16", 75) == "trt-fp16"


def alternative(target: str, sm: int) -> str:
    """That of the newest compute capability that is not newer than the GPU's."""
    instead = TARGETS[target].instead
    return instead[max(each for each in instead if each <= sm)]


@pytest.mark.parametrize("name", ["gguf-q4_km", "q4_k_m", "gguf_q8_0", ""])
def test_an_unknown_target_lists_all_and_suggests_the_nearest(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_target(name)
    message = str(caught.value)
    assert all(target in message for target in TARGETS) and "\n" not in message
    assert ("did you mean gguf-q" in message) == (name != "")

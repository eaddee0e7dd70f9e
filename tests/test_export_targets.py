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
    ]
    backends = {(target.format, target.backend) for target in TARGETS.values()}
    assert backends == {("gguf", "llamacpp"), ("onnx", "ort")}


@pytest.mark.parametrize("name", ["gguf-q4_km", "q4_k_m", "gguf_q8_0", ""])
def test_an_unknown_target_lists_all_and_suggests_the_nearest(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_target(name)
    message = str(caught.value)
    assert all(target in message for target in TARGETS) and "\n" not in message
    assert ("did you mean gguf-q" in message) == (name != "")

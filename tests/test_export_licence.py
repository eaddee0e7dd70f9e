"""The licence as model cards state it."""

from pathlib import Path

import pytest

from medmo_edge.export.licence import UNSTATED, stated_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\ntags:\n- medical\nlicense:   'mit'  \n---", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: health-ai\n---\n", "health-ai"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("# Model\nlicense: mit\n", UNSTATED),
        ("---\nlicense:\n---\n", UNSTATED),
        ("---\nlicense: mit\n", UNSTATED),
        ("", UNSTATED),
    ],
)
def test_front_matter(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_licence(tmp_path) == licence


def test_no_card_and_a_binary_one(tmp_path: Path) -> None:
    assert stated_licence(tmp_path) == UNSTATED
    (tmp_path / "README.md").write_bytes(bytes(range(256)))
    assert stated_licence(tmp_path) == UNSTATED

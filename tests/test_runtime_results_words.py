"""UIDs, codes and short texts of results, for any label and root."""

import re
from string import ascii_letters

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medmo_edge.runtime.results_origin import UUID_ROOT, limited, make_uid

pytest.importorskip("highdicom", reason="DICOM results need the dicom extra")
UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
ROOTS = st.sampled_from([UUID_ROOT, "1.2", "2.999", "1.2.826.0.1.3680043.10.123456789.123456789"])


@given(ROOTS, st.text())
def test_uids_are_valid_and_repeat(root: str, text: str) -> None:
    uid = make_uid(root, text)
    assert UID.fullmatch(uid) and len(uid) <= 64 and uid.startswith(f"{root}.")
    assert uid == make_uid(root, text) != make_uid(root, text + " ")


@given(st.text(), st.integers(4, 80))
@example("a\\b\n c", 64)
def test_short_texts_fit_their_element(text: str, length: int) -> None:
    short = limited(text, length)
    assert len(short) <= length and "\\" not in short
    assert all(character.isprintable() for character in short)


@given(st.text(min_size=1))
@example("pleural effusion")
@example("dir")
@example(
    "a very long label that the model has made up for something it believes to have seen there"
)
def test_every_label_has_a_code_that_fits(label: str) -> None:
    from medmo_edge.runtime.results_sr import finding_code

    code = finding_code(label)
    assert 1 <= len(code.value) <= 16 and 1 <= len(code.meaning) <= 64
    assert "\\" not in code.value + code.meaning
    if code.scheme_designator == "SCT":
        assert code.value.isdecimal()


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("nodule", "27925004"),
        ("The nodule", "27925004"),
        ("pleural effusion", "60046008"),
        ("Pneumothorax", "36118008"),
    ],
)
def test_known_findings_get_their_snomed_code(label: str, value: str) -> None:
    from medmo_edge.runtime.results_sr import finding_code

    assert (finding_code(label).value, finding_code(label).scheme_designator) == (value, "SCT")


@given(st.text(alphabet=ascii_letters, min_size=17, max_size=60))
def test_different_long_labels_have_different_codes(label: str) -> None:
    from medmo_edge.runtime.results_sr import finding_code

    assert finding_code(label).value != finding_code(f"{label}x").value

"""Golden cases: a few drawn pictures in every artifact, and what should come out for them.

The file golden.json holds two sets of expected values. "truth" comes from the checkpoint itself,
computed in float32 without this artifact; a quantised artifact may differ from it. "exported" is
what this artifact gave on the machine that exported it; the same weights on a machine of the same
kind must give nearly the same. No patient data: the pictures are phantoms. This module reads and
writes the file and says how a case is observed; judging is in ``self_test``.

Shape suffixes: M vision tokens, R values of one row of features, T tokens of an answer, V
vocabulary.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.errors import ArtifactError
from medmo_edge.images import Frame
from medmo_edge.manifest import Manifest
from medmo_edge.runtime.observe import Observed, Observer

Array = NDArray[np.float32]
SCHEMA = 1
FILE, ROLE = "golden.json", "golden"
_DIGITS = 6  # significant digits of stored numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What one side made of a case.

    ``features``: per sampled vision token the sampled values of every level, main first. ``top``:
    log-probabilities of the case's ``top_ids`` as first token; ``chosen``: of every token of the
    case's answer.
    """

    features: list[list[float]]
    top: list[float]
    chosen: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCase:
    """One picture, one question and the expected values.

    ``tokens``: the answer along which logits are compared. ``rows`` and ``columns`` index the
    features, ``patch_places`` the values of the normalised patches. ``top_ids``: the checkpoint's
    most likely first tokens. ``box_text`` must be read as ``boxes``, XYXY in pixels of the picture.
    ``answer``: the artifact's own greedy answer when it was exported, None when nothing could run
    it there.
    """

    name: str
    png: str
    question: str
    prompt_ids: list[int]
    patch_places: list[int]
    patches: list[float]
    rows: list[int]
    columns: list[int]
    top_ids: list[int]
    tokens: list[int]
    box_text: str
    boxes: list[list[float]]
    truth: Values
    exported: Values | None
    answer: str | None

    def frame(self) -> Frame:
        """The picture."""
        with Image.open(io.BytesIO(base64.b64decode(self.png))) as image:
            pixels = np.asarray(image.convert("RGB"))
        return Frame.from_pixels(pixels, path=f"golden case {self.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """All cases; ``source`` says what computed the values, ``limits`` how far off they may be."""

    source: dict[str, Any]
    tokenizer_sha256: str
    preprocessing_sha256: str
    levels: int
    limits: dict[str, dict[str, float]]
    cases: list[GoldenCase]
    schema: int = SCHEMA


def read_golden(manifest: Manifest) -> Golden:
    """The golden cases of an artifact. Errors: ArtifactError when it has none that can be read."""
    if all(record["role"] != ROLE for record in manifest.files.values()):
        raise ArtifactError(f"{manifest.folder} has no golden cases: export it again")
    path = manifest.path_of(ROLE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        cases = [_case(each) for each in values.pop("cases")]
        golden = Golden(cases=cases, **values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read: export again") from error
    if golden.schema != SCHEMA or not cases:
        raise ArtifactError(f"{path} has schema {golden.schema}, this version reads {SCHEMA}")
    return golden


def write_golden(path: Path, golden: Golden) -> None:
    """Write golden.json."""
    path.write_text(json.dumps(asdict(golden), allow_nan=False) + "\n", encoding="utf-8")


def _case(values: dict[str, Any]) -> GoldenCase:
    truth, exported = values.pop("truth"), values.pop("exported")
    return GoldenCase(truth=Values(**truth), exported=exported and Values(**exported), **values)


def to_png(pixels: NDArray[np.uint8]) -> str:
    """A grey or colour picture as base64 text of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def values_of(case: GoldenCase, observer: Observer, features_MR: Array, asked: Observed) -> Values:
    """What the loaded artifact makes of a case; it is asked again only where it said else."""
    logits = asked.logits_TV
    if list(asked.tokens) != case.tokens:
        logits = observer.follow([case.frame()], case.question, case.tokens)
    return make_values(features_MR, case.rows, case.columns, logits, case.top_ids, case.tokens)


def make_values(
    features_MR: Array,
    rows: Sequence[int],
    columns: Sequence[int],
    logits_TV: Array,
    top_ids: Sequence[int],
    tokens: Sequence[int],
) -> Values:
    """The stored form of features and of logits along ``tokens``."""
    sample = features_MR[np.ix_(np.asarray(rows), np.asarray(columns))]
    wide = logits_TV.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    logs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    chosen = logs[np.arange(len(tokens)), np.asarray(tokens)]
    return Values(
        features=[[rounded(value) for value in row] for row in sample],
        top=[rounded(value) for value in logs[0, np.asarray(top_ids)]],
        chosen=[rounded(value) for value in chosen],
    )


def rounded(value: float) -> float:
    """``value`` to the digits that are stored."""
    return float(f"{float(value):.{_DIGITS}g}")

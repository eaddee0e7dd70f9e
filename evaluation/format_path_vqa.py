"""PathVQA as the Hugging Face Parquet copy has it: image, question, answer.

The original pickle files are not read: unpickling runs what is in them.
"""

from collections.abc import Iterator
from pathlib import Path

from medmo_edge.evaluation.format_vqa_rad import read_pairs
from medmo_edge.evaluation.items import Item, OnBroken, refuse


def read_path_vqa(
    source: Path, *, split: str | None = None, broken: OnBroken = refuse
) -> Iterator[Item]:
    """One ``vqa`` item per row; ``split``: "train", "validation" or "test".

    ``meta`` has answer_type "CLOSED" for yes and no, else "OPEN". Errors: SampleError.
    """
    return read_pairs(source, "path-vqa", split=split, broken=broken)

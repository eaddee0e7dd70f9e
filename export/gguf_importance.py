"""A calibration record as the importance matrix of the GGUF language file.

Only names are translated; the numbers are the record's. The vision file is never quantised, so its
linears have no entry.
"""

from medmo_edge.calibration.imatrix import Imatrix
from medmo_edge.calibration.record import Record
from medmo_edge.calibration.scales import importance
from medmo_edge.checkpoint import Checkpoint
from medmo_edge.export.gguf_names import plan_tensors

_HEAD = "lm_head"


def importance_of(record: Record, checkpoint: Checkpoint) -> Imatrix:
    """Mean squared inputs per GGUF tensor, image tokens included.

    A tied embedding table is weighed by what it reads as the head. Errors: CalibrationError when
    the record was made from another checkpoint or saw only zeros somewhere.
    """
    record.check_belongs(checkpoint)
    language, _ = plan_tensors(checkpoint)
    names = {tensor.name: tensor.source.removesuffix(".weight") for tensor in language}
    if checkpoint.config.text.tie_word_embeddings:
        names["token_embd.weight"] = _HEAD
    return importance(record, names)

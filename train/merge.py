"""``merge``: a LoRA adapter and its base checkpoint as one checkpoint, which everything here reads.

The sum is made in float32 and rounded to bfloat16 once. Adapters of other kinds than LoRA, or ones
that learned tokens of their own, are refused by peft or by the tensors they leave.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmo_edge.checkpoint import NANO
from medmo_edge.errors import CheckpointError, UsageError
from medmo_edge.train.base_model import load_base, save_checkpoint
from medmo_edge.train.lora import ADAPTER_CONFIG, base_of, merge_into

CARD = "medmo_edge.json"


def merge_adapter(adapter: Path, output: Path, *, base: str | Path | None = None) -> None:
    """Write ``adapter`` merged into ``base`` (default: the one it names) as a checkpoint.

    Errors: CheckpointError for an adapter or base that cannot be read or do not fit; UsageError
    without peft, or when ``output`` is in use.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{adapter} is no LoRA adapter: it has no {ADAPTER_CONFIG}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} is in use: give a new folder")
    start = base or base_of(adapter)
    if str(start) != NANO and not Path(start).is_dir():
        raise UsageError(f"{adapter} is of {start}, which is no folder here: name it with --base")
    loaded = load_base(start, precision="float32")
    merge_into(loaded.model, adapter)
    card = _card(adapter)
    named = replace(loaded, name=card.get("name") or adapter.absolute().name)
    save_checkpoint(named, output, card.get("training") or {})


def _card(adapter: Path) -> Mapping[str, Any]:
    """What our own training says of an adapter; nothing of others'."""
    path = adapter / CARD
    try:
        card: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return card

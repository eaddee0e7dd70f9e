"""What every answer says about itself over HTTP, in chats and studies alike."""

from typing import Any

from medmo_edge.overlay import NOTICE
from medmo_edge.runtime.answers import Answer


def facts(answer: Answer, seed: int) -> dict[str, Any]:
    """Everything but the text: boxes, reasons, timings, provenance, and the notice.

    ``source`` has no path: it would be a name in the server's own folder.
    """
    values = answer.to_dict()
    del values["text"]
    sources = values["source"] if isinstance(values["source"], list) else [values["source"]]
    values["source"] = [without_path(source) for source in sources if source is not None]
    values["timings"]["reused_tokens"] = answer.timings.reused_tokens
    values["rejected_boxes"] = list(answer.rejected_boxes)
    values["seed"] = seed
    values["notice"] = NOTICE
    return values


def without_path(source: dict[str, Any]) -> dict[str, Any]:
    """``Source.to_dict`` without the name of the file."""
    return {name: value for name, value in source.items() if name != "path"}

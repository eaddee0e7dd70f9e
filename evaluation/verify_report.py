"""The report of a verification for people: a table on the terminal, Markdown, or one HTML file.

Made from the certificate's entry alone, so it says nothing that the certificate does not. The HTML
file needs no other file and no network.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from medmo_edge.errors import UsageError

Run = Mapping[str, Any]
_SAID = {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED"}
_COLOURS = {"pass": "#1a7f37", "fail": "#b42318", "undecided": "#9a6700"}


def check_report_path(path: Path) -> None:
    """Errors: UsageError for an ending that is no report, or a file that exists."""
    if path.suffix.lower() not in (".md", ".html"):
        raise UsageError(f"{path}: a report ends in .md or .html")
    if path.exists():
        raise UsageError(f"{path} exists already: choose another file or remove it")


def write_report(path: Path, run: Run) -> None:
    """Write Markdown or HTML, by the file's ending."""
    text = format_html(run) if path.suffix.lower() == ".html" else format_markdown(run)
    path.write_text(text, encoding="utf-8")


def format_text(run: Run) -> str:
    """For the terminal: one line per stage, then the verdict."""
    rows = [(stage["name"], _SAID[stage["verdict"]], _figures(stage)) for stage in run["stages"]]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {said:<9}  {figures}" for name, said, figures in rows]
    for stage in run["stages"]:
        if stage["verdict"] != "pass" and stage["note"]:
            lines.append(f"{stage['name']}: {stage['note']}")
    return "\n".join([*lines, f"verdict: {headline(run)}"])


def headline(run: Run) -> str:
    """The verdict in one line."""
    if run["verdict"] == "fail":
        return f"FAIL, first at stage {run['failed_stage']}"
    if run["verdict"] == "undecided":
        open_stages = [each["name"] for each in run["stages"] if each["verdict"] == "undecided"]
        return f"UNDECIDED, not certified: too little was seen for {', '.join(open_stages)}"
    return f"PASS on {run['samples']['count']} samples"


def format_markdown(run: Run) -> str:
    """The whole report as Markdown."""
    lines = ["# Verification", "", f"**{headline(run)}**", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(run)]
    lines += ["", "| stage | verdict | figures | limits | note |", "|---|---|---|---|---|"]
    for stage in run["stages"]:
        cells = (stage["name"], _SAID[stage["verdict"]], _figures(stage), _limits(stage))
        lines.append(f"| {' | '.join(cells)} | {stage['note']} |")
    return "\n".join([*lines, "", *_reading()]) + "\n"


def format_html(run: Run) -> str:
    """The whole report as one HTML file."""
    facts = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in _facts(run))
    stages = "".join(_stage_row(stage) for stage in run["stages"])
    reading = "".join(f"<p>{escape(line)}</p>" for line in _reading())
    colour = _COLOURS[run["verdict"]]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Verification</title>'
        "<style>body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;"
        "padding:0 1rem;color:#1f2328}table{border-collapse:collapse;width:100%;margin:1rem 0}"
        "th,td{border:1px solid #d0d7de;padding:.35rem .6rem;text-align:left;vertical-align:top;"
        "overflow-wrap:break-word}th{white-space:nowrap}.number{white-space:nowrap;"
        "font-variant-numeric:tabular-nums}</style></head><body>"
        f'<h1>Verification</h1><p style="font-size:1.3em;color:{colour}"><b>'
        f"{escape(headline(run))}</b></p><table>{facts}</table><table><tr><th>stage</th>"
        f"<th>verdict</th><th>figure</th><th>measured</th><th>limit</th></tr>{stages}</table>"
        f"{reading}</body></html>\n"
    )


def _stage_row(stage: Mapping[str, Any]) -> str:
    """The rows of one stage: a figure each, beside its limit; the note under its name."""
    note = f"<br><small>{escape(stage['note'])}</small>" if stage["note"] else ""
    said = f'<b style="color:{_COLOURS[stage["verdict"]]}">{_SAID[stage["verdict"]]}</b>'
    figures = _beside_limits(stage) or [("", "", "")]
    span = f' rowspan="{len(figures)}"'
    start = f"<td{span}><b>{escape(stage['name'])}</b>{note}</td><td{span}>{said}</td>"
    rows = [
        f'<td>{escape(name)}</td><td class="number">{escape(value)}</td>'
        f'<td class="number">{escape(limit)}</td>'
        for name, value, limit in figures
    ]
    return "".join(f"<tr>{start if not n else ''}{row}</tr>" for n, row in enumerate(rows))


def _beside_limits(stage: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name in words, value and limit of every figure; limits of nothing measured come last."""
    left = dict(stage["limits"])
    rows = []
    for name, value in stage["figures"].items():
        bounds = [
            f"{words} {_number(left.pop(f'{side} {name}'))}"
            for side, words in (("max", "at most"), ("min", "at least"))
            if f"{side} {name}" in left
        ]
        rows.append((name.replace("_", " "), _number(value), ", ".join(bounds)))
    return rows + [(name.replace("_", " "), "", _number(value)) for name, value in left.items()]


def _facts(run: Run) -> list[tuple[str, str]]:
    samples, reference = run["samples"], run["reference"]
    libraries = {"medmo-edge": run["medmo_edge"], **run["libraries"]}
    return [
        ("target", f"{run['target']} (gates: {run['class']})"),
        ("checkpoint", f"{run['checkpoint']['name']} {run['checkpoint']['sha256']}"),
        ("weights sha256", run["weights_sha256"]),
        ("preprocessing sha256", run["preprocessing_sha256"]),
        ("coordinates", run["coords"]),
        ("backend", f"{run['backend']} on {run['device_class']}: {run['device']}"),
        ("libraries", ", ".join(f"{name} {value}" for name, value in libraries.items())),
        (
            "reference",
            f"transformers {reference['transformers']}, {reference['precision']}, "
            f"{reference['how']}",
        ),
        ("unquantised artifact", run["unquantised"] or "the artifact itself"),
        ("samples", f"{samples['count']} ({samples['pictures']} pictures), {samples['sha256']}"),
        ("issued", f"{run['issued']}, {run['seconds']} s"),
    ]


def _figures(stage: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in stage["figures"].items())


def _limits(stage: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in stage["limits"].items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        near_one = 0.9995 < value < 1
        return f"1 - {1 - value:.2g}" if near_one else f"{value:.4g}"
    return str(value)


def _reading() -> Sequence[str]:
    return (
        "Stages are in the order of the road: the first that fails is where to look. The runtime "
        "gap (prefill, answer) is between transformers and the unquantised artifact, the "
        "quantisation gap between that and this artifact. An undecided stage saw too little to "
        "pass. This certificate counts for this backend, its library versions and this kind of "
        "device only.",
        "Research use only. Not a medical device.",
    )

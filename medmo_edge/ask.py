"""The ``ask`` command: read images, put one question, print the answer and draw its boxes."""

import json
import sys
from pathlib import Path

import click

from medmo_edge.errors import MedmoError, UsageError
from medmo_edge.images import Frame, parse_window, read_image
from medmo_edge.overlay import check_overlay_path, draw_overlay, save_overlay
from medmo_edge.runtime.constrain import check_schema
from medmo_edge.runtime.generate import GenerationOptions
from medmo_edge.runtime.results import (
    ResultOptions,
    check_result_path,
    check_sources,
    write_results,
)
from medmo_edge.runtime.session import Answer, Study, load


def run_ask(
    *,
    artifact: str,
    images: tuple[str, ...],
    question: str,
    as_json: bool,
    overlay: Path | None,
    sr: Path | None,
    gsps: Path | None,
    sc: Path | None,
    fhir: Path | None,
    plain_sr: bool,
    uid_root: str,
    certified: bool,
    overwrite: bool,
    frame: int,
    window: str | None,
    backend: str,
    threads: int | None,
    timeout: float | None,
    max_new_tokens: int,
    temperature: float,
    json_schema: Path | None,
    seed: int,
) -> None:
    """Ask ``question`` about ``images`` and print the answer as text or as one JSON object."""
    if overlay is not None:
        check_overlay_path(overlay, overwrite=overwrite)
        if len(images) > 1:
            raise UsageError("--overlay draws one image: ask about one image at a time")
    asked = {"sr": sr, "gsps": gsps, "sc": sc, "fhir": fhir}
    results = {kind: path for kind, path in asked.items() if path is not None}
    result_options = ResultOptions(uid_root=uid_root, plain_sr=plain_sr, question=question)
    _check_results(results, overlay, overwrite=overwrite)
    frames = [read_image(path, frame, parse_window(window)) for path in images]
    check_sources(frames, tuple(results))
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        json_schema=None if json_schema is None else _schema(json_schema),
        timeout_seconds=timeout,
    )
    with load(artifact, backend, threads=threads, require_certificate=certified) as session:
        study = session.study(frames)
        answer = _ask(study, question, options, stream=not as_json and sys.stdout.isatty())
    if overlay is not None:
        save_overlay(draw_overlay(frames[0], answer.boxes), overlay, overwrite=overwrite)
    write_results(results, frames, answer, result_options, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(answer.to_dict(), ensure_ascii=False, indent=2))
    else:
        click.echo(_summary(answer, frames, overlay))
        for kind, path in results.items():
            click.echo(f"{kind}: {path}")


def _check_results(results: dict[str, Path], overlay: Path | None, *, overwrite: bool) -> None:
    """Refuse what cannot be written before a model runs for a minute."""
    for path in results.values():
        check_result_path(path, overwrite=overwrite)
    places = [path.absolute() for path in (*results.values(), overlay) if path is not None]
    for path in places:
        if places.count(path) > 1:
            raise UsageError(f"{path} is named for two results: give each its own file")


def _schema(path: Path) -> str:
    """The text of a JSON Schema. Errors: UsageError when it cannot be read or followed."""
    try:
        schema = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--json-schema {path} cannot be read: {error}") from error
    check_schema(schema)
    return schema


def _ask(study: Study, question: str, options: GenerationOptions, *, stream: bool) -> Answer:
    """A person at a terminal sees the words as they come; a program gets the whole answer."""
    if not stream:
        return study.ask(question, options=options)
    running = study.stream(question, options=options)
    for piece in running:
        click.echo(piece, nl=False)
    click.echo()
    if running.answer is None:
        raise MedmoError("the answer ended before it began")
    return running.answer


def _summary(answer: Answer, frames: list[Frame], overlay: Path | None) -> str:
    lines = [] if sys.stdout.isatty() else [answer.text]
    if answer.finish_reason != "stop":
        lines.append(f"(ended by {answer.finish_reason})")
    for box in answer.boxes:
        corners = ", ".join(f"{value:.0f}" for value in box.xyxy)
        where = f" in image {box.image + 1}" if len(frames) > 1 else ""
        lines.append(f"  {box.label}: [{corners}]{where}")
    lines += [f"  rejected box: {why}" for why in answer.rejected_boxes]
    times = answer.timings
    lines.append(
        f"{times.load_seconds:.2f} s load, {times.image_seconds:.2f} s image, "
        f"{times.prefill_seconds:.2f} s prompt ({times.prompt_tokens} tokens), "
        f"{times.decode_seconds:.2f} s answer ({times.new_tokens} tokens)"
    )
    if overlay is not None:
        lines.append(f"overlay: {overlay}")
    return "\n".join(lines)

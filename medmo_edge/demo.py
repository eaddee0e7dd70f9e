"""The ``demo`` command: the whole road on a radiograph drawn on the spot, in a few seconds.

It shows that export, DICOM reading, answering and box placement work together here. MedMO-nano is
a demonstrator trained on drawn pictures and blood smears: its answers prove the road, not medicine.
"""

import shutil
import time
from pathlib import Path

import click

from medmo_edge.boxes import Box, iou
from medmo_edge.dicom_write import write_radiograph
from medmo_edge.errors import UsageError
from medmo_edge.export.export import export_checkpoint
from medmo_edge.images import Frame, read_image
from medmo_edge.overlay import draw_overlay, save_overlay
from medmo_edge.phantoms import NODULE, Phantom, draw
from medmo_edge.progress import stage_bars
from medmo_edge.runtime.session import Answer, Session, load

TARGET = "onnx-int8"
# Never seen in training, and an ordinary case: its box overlaps about as well as the mean of the
# 200 phantoms in the model card. Other seeds give anything from 0.2 to 0.8.
SEED = 20_260_011
QUESTIONS = ("Locate the nodule.", "Is there a pleural effusion?")


def run_demo(output: Path) -> None:
    """Export nano, draw and write a radiograph, ask two questions of one study, draw the boxes.

    ``output`` (a new folder) receives artifact/, radiograph.dcm and overlay.png. Errors: UsageError
    when it exists; on any error it is removed again.
    """
    if output.exists():
        raise UsageError(f"{output} exists already: remove it or choose another folder with -o")
    output.mkdir(parents=True)
    try:
        _export(output / "artifact")
        phantom, frame = _draw_radiograph(output / "radiograph.dcm")
        with load(output / "artifact") as session:
            answer = _ask_twice(session, frame, phantom)
        truth = [box for box in phantom.boxes if box.label == NODULE]
        save_overlay(draw_overlay(frame, answer.boxes, truth=truth), output / "overlay.png")
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    click.echo(f"overlay   {output / 'overlay.png'} (dashed: the nodule as drawn)")
    click.echo("MedMO-nano is a demonstrator. Research use only, not a medical device.")


def _export(folder: Path) -> None:
    start = time.perf_counter()
    with stage_bars() as progress:
        manifest = export_checkpoint("nano", TARGET, folder, progress=progress)
    size = sum(record["bytes"] for record in manifest.files.values())
    seconds = time.perf_counter() - start
    click.echo(f"export    nano -> {folder} ({TARGET}, {size / 1e6:.1f} MB, {seconds:.1f} s)")


def _draw_radiograph(path: Path) -> tuple[Phantom, Frame]:
    phantom = draw(SEED, nodule=True, effusion=False)
    write_radiograph(path, phantom.pixels)
    frame = read_image(path)
    source = frame.source
    click.echo(f"draw      {path} (DICOM, {source.width} x {source.height} pixels, one nodule)")
    return phantom, frame


def _ask_twice(session: Session, frame: Frame, phantom: Phantom) -> Answer:
    """Two questions of one study; returns the answer that has the boxes."""
    study = session.study([frame])
    located, effusion = (study.ask(question) for question in QUESTIONS)
    _show(QUESTIONS[0], located)
    for box in located.boxes:
        click.echo(f"box       {_describe(box, phantom)}")
    _show(QUESTIONS[1], effusion)
    click.echo(f"truth     effusions drawn: {phantom.facts['effusions']}")
    return located


def _describe(box: Box, phantom: Phantom) -> str:
    overlaps = [iou(box.xyxy, truth.xyxy) for truth in phantom.boxes if truth.label == box.label]
    corners = ", ".join(f"{value:.0f}" for value in box.xyxy)
    return f"{box.label} [{corners}]  IoU with the drawn one {max(overlaps, default=0.0):.2f}"


def _show(question: str, answer: Answer) -> None:
    times = answer.timings
    click.echo(f"ask       {question}")
    click.echo(f"answer    {answer.text}")
    click.echo(
        f"times     image {times.image_seconds:.2f} s, "
        f"prompt {times.prefill_seconds:.2f} s ({times.prompt_tokens} tokens, "
        f"{times.reused_tokens} kept), "
        f"answer {times.decode_seconds:.2f} s ({times.new_tokens} tokens)"
    )

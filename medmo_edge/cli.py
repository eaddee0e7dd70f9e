"""The ``medmo-edge`` command: the commands in order are the road from recipe to answer.

Every command imports what it needs when it runs, so ``--help`` stays fast. This module turns the
error tree into one line and an exit code; it holds no other logic.

Exit codes: 0 done, 1 a check that did not pass, or a bug in this package, 2 something the user can
put right, 130 Ctrl-C.
"""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from medmo_edge import __version__
from medmo_edge.build_command import build
from medmo_edge.errors import MedmoError
from medmo_edge.train.merge_command import merge

EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130
_IN_ORDER = (
    "samples train merge calibrate export build verify eval ask serve node doctor demo"
).split()


class _RoadGroup(click.Group):
    """Lists commands in the order of the work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _IN_ORDER if name in self.commands]


@click.group(cls=_RoadGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="medmo-edge")
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
def cli(debug: bool) -> None:
    """Run a medical vision-language model on your own hardware, offline.

    Research use only. Not a medical device.
    """


@cli.command()
@click.argument("format_name", metavar="FORMAT")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New file.")
@click.option("--split", help="The publisher's split to read, e.g. train, val, test.")
@click.option("--fractions", help="Split by picture and patient, e.g. train=0.9,val=0.1.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--per-image", is_flag=True, help="One question for all labels of a picture.")
@click.option("--absent", is_flag=True, help="Also ask for labels that a picture does not show.")
@click.option("--retrieval", type=int, default=0, help="Add questions among this many candidates.")
@click.option("--skip-broken", is_flag=True, help="Leave out what cannot be read, and list it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def samples(**options: Any) -> None:
    """Convert a data set SRC to labelled samples (JSONL).

    FORMAT is voc, coco, yolo, nih, deeplesion, vqa-rad, slake, path-vqa, pmc-vqa, medtrinity,
    medsg, iu-xray, folder (pictures with texts of the same name) or jsonl (samples, to check).
    """
    from medmo_edge.evaluation.samples_command import run_samples

    run_samples(**options)


@cli.command()
@click.argument("recipe")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the recipe's data sets.")
@click.option("--base", type=click.Path(path_type=Path), help="Checkpoint that it starts from.")
@click.option("--resume", is_flag=True, help="Go on from the newest complete step in the output.")
@click.option("--skip-broken", is_flag=True, help="Leave samples out that cannot be used.")
@click.option("--stage", help="Only this stage, by name or kind (pretrain, instruct, rl).")
@click.option("--dry-run", "plan_only", is_flag=True, help="Print what it needs; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(**options: Any) -> None:
    """Train a checkpoint by RECIPE.

    RECIPE is a TOML file or one of the packaged nano, smoke, medmo-4b, medmo-8b. Many GPUs:
    torchrun ... -m medmo_edge train RECIPE.
    """
    from medmo_edge.train.command import run_train

    run_train(**options)


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--samples", type=click.Path(path_type=Path), required=True, help="Labelled samples (JSONL)."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--limit", type=click.IntRange(1), help="Draw this many samples by --seed.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--text-only", is_flag=True, help="Drop the images; leave the vision tower out.")
@click.option("--device", default="auto", show_default=True, help="cpu, or cuda with a GPU.")
@click.option("--dtype", default="auto", show_default=True, help="float32 or bfloat16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(checkpoint: str, output: Path, as_json: bool, **options: Any) -> None:
    """Observe CHECKPOINT over samples, for every quantiser.

    Writes a calibration record for export --calibration. Holds one layer's weights at a time. After
    Ctrl-C, the same command goes on where it stopped.
    """
    from medmo_edge.calibration.observe import calibrate as observe
    from medmo_edge.progress import step_bar

    with step_bar() as progress:
        record = observe(checkpoint, output=output, progress=progress, **options)
    if as_json:
        _print_json({"path": str(output), **record.summary()})
        return
    seen = record.samples
    click.echo(
        f"calibration record: {output}  {len(record.linears)} linears  {seen['count']} samples  "
        f"{seen['tokens_text']} text and {seen['tokens_image']} image tokens"
    )


@cli.command()
@click.argument("checkpoint")
@click.option("--target", required=True, help="Format and precision, e.g. gguf-q8_0.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Importance matrix (llama.cpp GGUF form) for the quantiser.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Calibration record (see calibrate)."
)
@click.option("--cache-length", type=int, help="Tokens of the longest conversation, for trt-*.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def export(checkpoint: str, target: str, output: Path, as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT to an artifact.

    CHECKPOINT is a Hugging Face folder, or nano, the packaged demonstrator.
    """
    from medmo_edge.export.export import export_checkpoint
    from medmo_edge.progress import stage_bars

    with stage_bars() as progress:
        manifest = export_checkpoint(checkpoint, target, output, progress=progress, **options)
    if as_json:
        _print_json(manifest.to_dict())
        return
    total = sum(entry["bytes"] for entry in manifest.files.values())
    click.echo(f"artifact: {output}  {manifest.target}  {total / 1e6:.1f} MB")


cli.add_command(build)
cli.add_command(merge)


@cli.command(name="eval")
@click.argument("model", required=False)
@click.option("--benchmark", help="Name in the table of docs/evaluation.md, e.g. bccd.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the benchmark's data.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many samples.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder; a run goes on there."
)
@click.option("--skip-broken", is_flag=True, help="Leave out samples that cannot be read.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Instead of the benchmark's own.")
@click.option("--scorer", "scorers", multiple=True, help="Plug-in, package.module:function.")
@click.option("--probe-coords", is_flag=True, help="Which coordinate convention the model writes.")
@click.option("--compare", nargs=2, type=click.Path(path_type=Path), help="Two output folders.")
@click.option("--backend", default="auto", show_default=True, help="Or emulated, for trt.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--device", default="cpu", show_default=True, help="Of a checkpoint: cpu, cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(**options: Any) -> None:
    """Score MODEL on a benchmark.

    MODEL is an artifact, a checkpoint, nano or fake:TEXT. Nothing is downloaded: --data names the
    publisher's folder.
    """
    from medmo_edge.evaluation.eval_command import run_eval

    run_eval(**options)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", metavar="CHECKPOINT", help="What it was exported from; or nano.")
@click.option("--samples", type=click.Path(path_type=Path), help="Labelled samples (JSONL).")
@click.option("--on-device", is_flag=True, help="Replay the golden cases of the artifact instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Report, .html or .md.")
@click.option("--gates", type=click.Path(path_type=Path), help="Other limits (TOML).")
@click.option(
    "--unquantised",
    type=click.Path(path_type=Path),
    help="Unquantised artifact of the same format; default: exported for the time being.",
)
@click.option("--backend", default="auto", show_default=True, help="See medmo-edge doctor.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default by physical cores.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(**options: Any) -> int:
    """Measure ARTIFACT against its checkpoint, and certify it.

    Writes the certificate into the artifact. Exit code 0 only when it passes, else 1. After Ctrl-C,
    the same command goes on where it stopped.
    """
    from medmo_edge.verify import run_verify

    return run_verify(**options)


@cli.command()
@click.argument("artifact")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--overlay", type=click.Path(path_type=Path), help="Write a PNG with the boxes drawn."
)
@click.option("--sr", type=click.Path(path_type=Path), help="Write a DICOM Structured Report.")
@click.option(
    "--gsps", type=click.Path(path_type=Path), help="Write a DICOM presentation state (boxes)."
)
@click.option(
    "--sc", type=click.Path(path_type=Path), help="Write a DICOM capture with boxes burned in."
)
@click.option("--fhir", type=click.Path(path_type=Path), help="Write a FHIR R4 Bundle (JSON).")
@click.option("--plain-sr", is_flag=True, help="--sr as Comprehensive SR, for older archives.")
@click.option("--uid-root", default="2.25", show_default=True, help="Root of new DICOM UIDs.")
@click.option(
    "--frame", type=int, default=0, show_default=True, help="Frame of a multi-frame file."
)
@click.option(
    "--window",
    help="CT preset (lung, bone, ...), number of a stored window from 0, or CENTER,WIDTH.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    help="File; the answer is JSON that follows it.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds.")
@click.option("--backend", default="auto", show_default=True, help="See medmo-edge doctor.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default by physical cores.")
@click.option("--certified", is_flag=True, help="Refuse what is not certified for this machine.")
@click.option("--overwrite", is_flag=True, help="Replace existing overlay and result files.")
def ask(**options: Any) -> None:
    """Ask ARTIFACT a QUESTION about one or more images.

    ARTIFACT is a folder written by export, or fake:TEXT. IMAGE is a DICOM file or a picture.
    """
    from medmo_edge.ask import run_ask

    run_ask(**options)


@cli.command()
@click.argument("artifact")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--socket", type=click.Path(path_type=Path), help="A Unix socket instead of a port.")
@click.option("--no-token", is_flag=True, help="Let every program of this machine ask.")
@click.option("--backend", default="auto", show_default=True, help="See medmo-edge doctor.")
@click.option("--certified", is_flag=True, help="Refuse what is not certified for this machine.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default by physical cores.")
@click.option("--max-context", type=click.IntRange(1), help="Most tokens of one conversation.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of one answer [4096].")
@click.option("--max-waiting", type=click.IntRange(1), help="Most questions in the queue [32].")
@click.option("--parallel", type=click.IntRange(1, 64), help="Most answers at once [4].")
@click.option("--fast", is_flag=True, help="Batch them even where that changes the last bits.")
@click.option("--max-upload-mb", type=click.IntRange(1), help="Largest upload [1024].")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds [300].")
@click.option("--keep", type=click.FloatRange(min=0, min_open=True), help="Study minutes [60].")
def serve(**options: Any) -> None:
    """Serve ARTIFACT to this machine: OpenAI's chat API, studies, a viewer page.

    Listens on 127.0.0.1 or a Unix socket. The token is MEDMO_EDGE_TOKEN, else made up and printed.
    """
    from medmo_edge.runtime.serve import run_serve

    run_serve(say=click.echo, **options)


@cli.command()
@click.argument("artifact", metavar="ARTIFACT|status|requeue")
@click.option("--config", type=click.Path(path_type=Path), required=True, help="Rules, in TOML.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
@click.option("--backend", default="auto", show_default=True, help="See medmo-edge doctor.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default by physical cores.")
def node(artifact: str, config: Path, as_json: bool, backend: str, threads: int | None) -> None:
    """Answer images that arrive by DICOM and send the results on.

    status shows what a node is doing; requeue tries again what it set aside or gave up.
    """
    from medmo_edge.runtime.node import node_command

    text = node_command(artifact, config, as_json=as_json, backend=backend, threads=threads)
    if text:
        click.echo(text)


@cli.command()
@click.argument("artifact", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(artifact: str | None, as_json: bool) -> None:
    """Show devices and backends, and why each can or cannot run.

    With ARTIFACT: in the order in which they would be tried for it.
    """
    from medmo_edge.runtime.doctor import doctor as examine
    from medmo_edge.runtime.doctor import format_findings

    findings = examine(artifact)
    if as_json:
        _print_json(findings)
    else:
        click.echo(format_findings(findings))


@cli.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="New folder.",
)
def demo(output: Path) -> None:
    """Show the whole road on a radiograph drawn on the spot.

    Exports the packaged MedMO-nano to onnx-int8, asks two questions, draws the boxes.
    """
    from medmo_edge.demo import run_demo

    run_demo(output)


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"medmo-edge: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line; every error becomes one line on stderr and an exit code."""
    # A service manager's SIGTERM must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(prog_name="medmo-edge", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        hint = f" (see: {where} --help)" if where else ""
        _fail(error.format_message() + hint, EXIT_USER)
    except (KeyboardInterrupt, click.Abort) as stop:
        # click turns KeyboardInterrupt into Abort; a training run says there where it stopped.
        _fail(str(stop.__cause__ or stop) or "interrupted", EXIT_INTERRUPTED)
    except MedmoError as error:
        _fail(str(error), EXIT_USER)
    except BrokenPipeError:
        # The reader went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _fail(_describe_os_error(error), EXIT_USER)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error} "
            "(a bug: run again with `medmo-edge --debug ...` and report it)",
            EXIT_BUG,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error)
    advice = " (free some space and run again)" if error.errno == errno.ENOSPC else ""
    return f"{where}{what}{advice}"

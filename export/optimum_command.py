"""`optimum-cli export medmo-edge`: our exporter where Optimum's users look for one.

A thin door to ``export_checkpoint``; it does nothing that `medmo-edge export` does not. Only
Optimum imports this module, through ``optimum/commands/register``.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

EXIT_USER, EXIT_INTERRUPTED = 2, 130


class MedmoEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The command as Optimum wants it: parse_args declares, run does."""

    COMMAND = CommandInfo(
        name="medmo-edge", help="Export a Qwen3-VL checkpoint to a MedMO Edge artifact."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options; names follow Optimum's own export commands."""
        parser.add_argument("-m", "--model", required=True, help="Checkpoint folder, or nano.")
        parser.add_argument("--target", required=True, help="Format and precision: onnx-int4, ...")
        parser.add_argument("--calibration", type=Path, help="Folder of a calibration record.")
        parser.add_argument("output", type=Path, help="New folder of the artifact.")

    def run(self) -> None:
        """Export; an error the user can cause is one line and exit code 2."""
        from medmo_edge.errors import MedmoError
        from medmo_edge.export.export import export_checkpoint
        from medmo_edge.progress import stage_bars

        try:
            with stage_bars() as progress:
                manifest = export_checkpoint(
                    self.args.model,
                    self.args.target,
                    self.args.output,
                    calibration=self.args.calibration,
                    progress=progress,
                )
        except MedmoError as error:
            print(f"optimum-cli: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(EXIT_USER)
        except KeyboardInterrupt:
            print("optimum-cli: interrupted", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        total = sum(entry["bytes"] for entry in manifest.files.values())
        print(f"artifact: {self.args.output}  {manifest.target}  {total / 1e6:.1f} MB")

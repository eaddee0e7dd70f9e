"""Options of the ``merge`` command; the work is in ``train.merge``, loaded when it runs."""

from pathlib import Path

import click


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--base", type=click.Path(path_type=Path), help="Checkpoint, if it has moved.")
def merge(adapter: Path, output: Path, base: Path | None) -> None:
    """Merge a LoRA ADAPTER into its base checkpoint.

    The result is a whole checkpoint, as export and eval take it.
    """
    from medmo_edge.train.merge import merge_adapter

    merge_adapter(adapter, output, base=base)
    click.echo(f"checkpoint: {output}")

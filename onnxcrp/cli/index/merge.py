"""`onnxcrp index merge`: shards or datasets into one index."""

from __future__ import annotations

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import steps, write_json, wrote


@click.command(
    "merge",
    cls=options.Command,
    examples=["onnxcrp index merge part0.index part1.index -o whole.index"],
)
@click.argument("indexes", metavar="INDEX...", nargs=-1, required=True, type=click.Path(file_okay=False))
@click.option("-o", "--out", required=True, type=click.Path(), metavar="INDEX",
              help="The folder of the merged index.")  # fmt: skip
@options.as_json
@options.quiet
def command(indexes: tuple[str, ...], out: str, as_json: bool, quiet: bool) -> None:
    """One index of all samples of each INDEX: shards of one dataset (`index build --shard`), or different datasets,
    built with the same model and settings.
    """
    from onnxcrp.index import merge
    from onnxcrp.index.query import summary

    with steps(quiet=quiet) as step:
        step("merging")
        index = merge(indexes, out)
    if as_json:
        write_json(summary(index.manifest))
    wrote(out, index.describe(), quiet=quiet)

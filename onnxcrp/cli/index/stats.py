"""`onnxcrp index stats`: classes and concepts."""

from __future__ import annotations

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, write_json


@click.command(
    "stats",
    cls=options.Command,
    examples=[
        "onnxcrp index stats shapes.index",
        "onnxcrp index stats shapes.index --layer layer2.0.conv2 --channel 17",
        "onnxcrp index stats shapes.index --class hexagon --json",
        "onnxcrp index stats shapes.index --layer layer2.0.conv2 --channel 1 --retrieve",
    ],
)
@options.index
@click.option("--layer", metavar="LAYER", help="With --class: concepts of this layer alone.")
@click.option("-C", "--channel", type=click.IntRange(0), metavar="C", help="The classes that this concept serves most.")
@options.of_class
@options.class_names
@click.option("--retrieve", is_flag=True, help="The inverse search: the classes and the samples that a concept drives.")
@click.option("--by", type=click.Choice(["top", "mean"]), show_default="top, and mean for --class",
              help="Rank by the mean of the 10 highest scores, or of all.")  # fmt: skip
@click.option("--k", type=click.IntRange(1), default=10, show_default=True, help="Rows.")
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    index: str,
    layer: str | None,
    channel: int | None,
    cls: str | None,
    class_names: str | None,
    retrieve: bool,
    by: str | None,
    k: int,
    as_json: bool,
) -> None:
    """Who uses what in INDEX, by the share of relevance (RelMax, sum): the classes that a concept serves most (--layer,
    --channel), the concepts that a class uses most (--class), the class that each concept of a layer serves most
    (--layer), and without any of them what the index is of.
    """
    from onnxcrp.analysis import statistics
    from onnxcrp.analysis.reading import open_index

    if channel is not None and layer is None:
        raise click.UsageError("--channel needs --layer.")
    if retrieve and (channel is None or cls is not None):
        raise click.UsageError("--retrieve is about one concept: --layer and --channel, without --class.")
    opened = open_index(index, class_names=class_names)
    if layer is None and cls is None:
        options.refuse_idle(ctx, "by", "k", without="--layer or --class")
    number = None if cls is None else opened.class_number(cls)
    tables = statistics.tables(opened, layer, channel, number, retrieve=retrieve, by=by, k=k)
    if as_json:
        write_json(statistics.to_json(opened, tables))
        return
    for at, table in enumerate(tables):
        if at:
            click.echo()
        heading(table.title)
        columns(table.rows, titles=table.columns)

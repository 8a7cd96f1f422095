"""`onnxcrp index build`: one pass over the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import write_json, wrote

SAID = 5  # skipped samples that are named


@click.command(
    "build",
    cls=options.Command,
    examples=[
        "onnxcrp index build fixtures/shapes/net.onnx fixtures/shapes/scenes.tar -o shapes.index",
        "onnxcrp index build fixtures/ecg/net.onnx fixtures/ecg/samples.npz --layer '6*' --k 20 -o beats.index",
        "onnxcrp index build fixtures/shapes/net.onnx fixtures/shapes/scenes.tar --shard 0/2 -o part.index --json",
    ],
)
@options.model
@click.argument("data", metavar="DATA...", nargs=-1, required=True)
@click.option("-o", "--out", required=True, type=click.Path(), metavar="INDEX",
              help="The folder of the index. A build that was stopped goes on there.")  # fmt: skip
@click.option("--layer", "layers", multiple=True, metavar="GLOB",
              help="Layers, by name or glob. Repeatable."
              "  [default: every Conv, Gemm and MatMul but the output's]")  # fmt: skip
@click.option("-t", "--target", metavar="label|predicted|topK|all",
              help="The class of a sample where relevance starts."
              "  [default: label where all have one, else predicted]")  # fmt: skip
@click.option("--labels", type=click.Path(), metavar="FILE",
              help="Labels of the samples, a .csv with columns file and class_index (of arrays also a .npy)."
              "  [default: labels.csv in the folder, else its class folders in sorted order]")  # fmt: skip
@click.option("--label-offset", type=int, default=0, show_default=True, help="Added to every label.")
@options.composite
@options.plugin
@click.option("--k", type=click.IntRange(1), default=40, show_default=True, help="Reference samples per concept.")
@click.option("--criteria", default="relmax,actmax", show_default=True, metavar="NAMES",
              help="By relevance, by activation, or both.")  # fmt: skip
@click.option("--aggregate", default="sum,max", show_default=True, metavar="NAMES",
              help="Over the positions of a concept: sum, max, or both.")  # fmt: skip
@click.option("--normalize/--no-normalize", default=True, show_default=True,
              help="Scores are shares of the layer's total (CRP Eq. 35), or plain sums and maxima.")  # fmt: skip
@click.option("--bypass", type=click.Choice(["cut", "keep"]), default="cut", show_default=True,
              help="Relevance that goes round the concept, in what is drawn from the index.")  # fmt: skip
@click.option("--full-classes", type=click.IntRange(1), default=10, show_default=True,
              help="Classes per concept whose reference samples are kept in full.")  # fmt: skip
@click.option("--output", metavar="NAME", help="The model output to explain.  [default: the first one]")
@options.preprocess
@click.option("--batch-size", type=click.IntRange(1), help="Samples of one run.  [default: by the size of one]")
@click.option("--workers", type=click.IntRange(1), help="Threads that decode samples.  [default: the cores, at most 8]")
@options.provider
@click.option("--threads", type=click.IntRange(1), help="Threads of all runs together.  [default: all cores]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="This process, or Ray actors.")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", help="Of a Ray cluster.  [default: a Ray on this machine]")
@click.option("--actors", type=click.IntRange(1), help="Ray actors.  [default: one per GPU, else one per core]")
@click.option("--shard", metavar="I/N", help="Only this part of the data, 0/8 to 7/8, for `index merge`.")
@click.option("--checkpoint", type=click.FloatRange(0), default=60.0, show_default=True, metavar="SECONDS",
              help="How often what was found is written down.")  # fmt: skip
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    data: tuple[str, ...],
    out: str,
    layers: tuple[str, ...],
    providers: tuple[str, ...],
    engine: str,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Build the index of MODEL over DATA: folders of pictures or arrays (class folders, or a labels.csv), .npz and .npy
    arrays (FILE.npz:KEY, taken as already preprocessed), WebDataset tars (a-{000..012}.tar), and any of them behind a
    URL that fsspec opens. NAME=PATH names a dataset; several make one index.
    """
    from onnxcrp.index import build, store
    from onnxcrp.index.query import summary

    if engine == "local":
        options.refuse_idle(ctx, "address", "actors", without="--engine ray")
    if settings["batch_size"] is None:
        del settings["batch_size"]
    before = store.read_manifest(Path(out))
    try:
        index = build(
            model,
            list(data),
            out,
            layers=list(layers) or None,
            providers=list(providers) or None,
            engine=engine,
            progress=not quiet and sys.stderr.isatty(),
            **settings,
        )
    except KeyboardInterrupt:
        click.echo("interrupted: the same command goes on from what was written last", err=True)
        ctx.exit(130)
    if as_json:
        write_json(summary(index.manifest))
    if not quiet:
        if settings["target"] is None and 0 < index.unlabelled < len(index.samples):
            click.echo(
                f"{index.unlabelled} of {len(index.samples)} samples have no label: relevance starts at the predicted "
                "class of each; --target label leaves them out",
                err=True,
            )
        for reason in index.skipped["reason"].head(SAID):
            click.echo(f"skipped {reason}", err=True)
        if (more := len(index.skipped) - SAID) > 0:
            click.echo(f"skipped {more} more: onnxcrp index stats {out}", err=True)
    if index.manifest != before:
        wrote(out, index.describe(), quiet=quiet)
    elif not quiet:
        click.echo(f"{out} is of this data already: {index.describe()}", err=True)

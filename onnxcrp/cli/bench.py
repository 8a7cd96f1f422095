"""`onnxcrp bench`: how fast a model is explained on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, steps, write_json

if TYPE_CHECKING:
    from onnxcrp.analysis.bench import Bench


@click.command(
    "bench",
    cls=options.Command,
    examples=[
        "onnxcrp bench fixtures/shapes/net.onnx fixtures/shapes/sample.png",
        "onnxcrp bench fixtures/ecg/net.onnx --layer 3 --conditions 8 --rounds 3 --no-memory --json",
    ],
)
@options.model
@click.argument("sample", metavar="[INPUT]", required=False, type=click.Path())
@options.plugin
@options.composite
@click.option(
    "-t", "--target", default="top", show_default=True, help="The class that is explained, as explain takes it."
)
@click.option("--layer", metavar="LAYER", help="Whose channels are the conditions. Default: the last convolution.")
@click.option("--conditions", type=click.IntRange(0), default=16, show_default=True,
              help="How many of them on one sample.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each is run.")
@click.option("--nodes", "most", type=click.IntRange(1), default=10, show_default=True, help="How many of the slowest.")
@click.option("--no-memory", is_flag=True, help="Leave out memory and start-up, which start the model anew.")
@options.output
@options.preprocess
@options.runtime
@options.as_json
@options.quiet
def command(
    model: str,
    sample: str | None,
    composite: str,
    target: str,
    layer: str | None,
    conditions: int,
    rounds: int,
    most: int,
    no_memory: bool,
    output: str | None,
    keep_head: bool,
    preprocess: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    memory_limit: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time MODEL on INPUT (a picture, .npy, .npz or .csv; a random sample without one): its forward pass, one heatmap,
    conditions, memory, the slowest nodes, and what explains them. All run in turn; read the ratios, not the seconds.
    """
    from onnxcrp.analysis.bench import bench
    from onnxcrp.analysis.explanation import ClassNames, one_sample, preprocessing_of
    from onnxcrp.canonize import canonize

    with steps(quiet=quiet) as step:
        step("canonizing")
        canonical = canonize(model)
        preprocessing = preprocessing_of(canonical, preprocess, model)
        found = bench(
            model,
            one_sample(sample, preprocessing, canonical),
            composite=composite,
            target=ClassNames(preprocessing.labels, preprocessing.label_offset).target(target),
            layer=layer,
            conditions=conditions,
            rounds=rounds,
            alone=not no_memory,
            preprocessing=preprocessing,
            canonical=canonical,
            progress=step,
            output=output,
            keep_head=keep_head,
            providers=list(providers) or None,
            threads=threads,
            memory_limit=memory_limit,
        )
    if as_json:
        write_json(found.to_dict())
    else:
        _write(found, most)


def _write(found: Bench, most: int) -> None:
    """For people."""
    about = ", ".join(f"{name} {value}" for name, value in found.machine.items())
    heading(f"{found.model} under {found.composite}")
    click.echo(f"  {about}, {', '.join(name.removesuffix('ExecutionProvider') for name in found.providers)}")
    unit = found.times["forward pass"].median
    rows = [
        [
            name,
            f"{times.median * 1e3:.2f}",
            f"{found.ratio(name):.2f}",
            f"{(times.high - times.low) / 2 / unit:.2f}",
            f"{found.best(name):.2f}",
        ]
        for name, times in found.times.items()
    ]
    if found.each is not None:
        rows.append(["each further condition", "", "", "", f"{found.each:.2f}"])
    columns(rows, titles=["", "ms", "forward passes", "spread", "at best"])
    if found.layer:
        click.echo(f"  conditions: {found.conditions} channels of {found.layer}")
    if found.memory:
        start = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.start.items())
        sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found.memory.items())
        columns([["start", start], ["peak memory", sizes]])

    for what, ran in found.steps.items():
        click.echo()
        heading(f"Where {what} {'spends its' if what == 'one heatmap' else 'spend their'} time")
        click.echo("  " + ", ".join(f"{part} {share:.0%}" for part, share in found.parts(what).items()))
        columns(
            [[step.name, step.op, step.part, f"{step.seconds * 1e3:.3f}", f"{step.share:.1%}"] for step in ran[:most]],
            titles=["node", "op", "part", "ms", "share"],
        )
    click.echo()
    heading("Why")
    for reason in found.reasons or ["nothing stands out: every node runs where it should"]:
        click.echo(f"  {reason}")

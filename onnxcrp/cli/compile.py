"""`onnxcrp compile`: the relevance model as a file."""

from __future__ import annotations

from typing import Any

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import destination, steps, write_json, wrote


@click.command(
    "compile",
    cls=options.Command,
    examples=[
        "onnxcrp compile fixtures/shapes/net.onnx -o relevance.onnx --condition layer2.0.conv2 --record layer2.0.conv2",
        "onnxcrp compile fixtures/ecg/net.onnx -o relevance.onnx --composite epsilon --json",
    ],
)
@options.model
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="The relevance model, an .onnx file.")
@options.composite
@click.option(
    "--condition", "conditions", multiple=True, metavar="LAYER", help="A layer that gets a mask input. Repeatable."
)
@click.option("--record", multiple=True, metavar="LAYER", help="A layer whose relevance is an output. Repeatable.")
@click.option(
    "--activation", "activations", multiple=True, metavar="LAYER", help="A layer whose activation is. Repeatable."
)
@click.option(
    "--reduce",
    multiple=True,
    type=click.Choice(["sum", "max", "argmax"]),
    help="Recorded layers reduced to one number per concept. Repeatable.",
)
@click.option("--start", multiple=True, metavar="LAYER", help="Begin here: the layer gets a seed input. Repeatable.")
@click.option(
    "--start-from",
    type=click.Choice(["activation", "one"]),
    default="activation",
    show_default=True,
    help="Whether seeds are multiplied by the layer's activation.",
)
@click.option("--bypass", type=click.Choice(["cut", "keep"]), default="cut", show_default=True,
              help="What becomes of relevance that goes round a conditioned layer.")  # fmt: skip
@options.output
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME", help="Inputs whose relevance is an output. Default: all."
)
@click.option("--no-inputs", is_flag=True, help="No relevance of inputs: stop at the lowest recorded layer.")
@click.option("--masks", type=click.Choice(["optional", "required"]), default="optional", show_default=True,
              help="Whether mask inputs have defaults (OpenVINO drops those: use required).")  # fmt: skip
@click.option("--no-flip", is_flag=True, help="Write every transposed convolution as ConvTranspose.")
@click.option("--store-weights", is_flag=True, help="Positive parts and flipped kernels of weights in the file, for "
              "runtimes that fold no constants. Default: nodes that compute them at loading.")  # fmt: skip
@click.option("--opset", type=int, help="At least this opset.  [default: the larger of the source's and 18]")
@click.option("--ir-version", type=int, default=10, show_default=True, help="Of the file; older runtimes need less.")
@options.preprocess
@options.plugin
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    out: str,
    composite: str,
    preprocess: str | None,
    no_inputs: bool,
    inputs: tuple[str, ...],
    no_flip: bool,
    as_json: bool,
    quiet: bool,
    **options_of_compile: Any,
) -> None:
    """Write the relevance model of MODEL: one ONNX file of standard operators, whose inputs `target` and `mask.LAYER`
    ask the question and whose outputs `relevance.NAME` answer it. Any ONNX runtime runs it.
    """
    from onnxcrp.analysis.explanation import bounded, keep_inputs, warn_of_unused_lines
    from onnxcrp.backward import compile
    from onnxcrp.canonize import canonize
    from onnxcrp.facts import Facts
    from onnxcrp.session import metadata, save

    if inputs and no_inputs:
        raise click.UsageError("--input and --no-inputs exclude each other.")
    asked = options_of_compile
    if not asked["start"]:
        options.refuse_idle(ctx, "start_from", without="--start")
    if not asked["record"] and not asked["activations"]:
        options.refuse_idle(ctx, "reduce", without="--record or --activation")
    if not asked["conditions"]:
        options.refuse_idle(ctx, "masks", "bypass", without="--condition")
    if no_inputs and not asked["record"]:
        raise click.UsageError("--no-inputs without --record leaves no relevance to be written.")
    destination(out, ".onnx", "a relevance model")
    for path in (out, f"{out}.data"):  # weights above 2 GB go there
        keep_inputs(path, model)
    with steps(quiet=quiet) as step:
        step("canonizing")
        canonical = canonize(model)
        step("compiling")
        rules = bounded(composite, canonical, preprocess, model)
        if any(line.own for line in rules.lines):
            warn_of_unused_lines(Facts(canonical, output=asked["output"], keep_head=asked["keep_head"]), rules)
        written = compile(
            canonical,
            rules,
            inputs=() if no_inputs else inputs or None,
            flip_convolutions=not no_flip,
            **options_of_compile,
        )
        step("writing")
        save(written, out)
    names = {
        "inputs": [port.name for port in written.graph.input],
        "outputs": [port.name for port in written.graph.output],
    }
    if as_json:
        import json

        write_json({"file": out, **names, "map": json.loads(metadata(written)["onnxcrp.map"])})
    wrote(out, f"{', '.join(names['inputs'])} -> {', '.join(names['outputs'])}", quiet=quiet)

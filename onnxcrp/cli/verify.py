"""`onnxcrp verify`: whether what must be true holds for a model."""

from __future__ import annotations

from typing import Any

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, destination, heading, steps, write_json, wrote

SILENT = ("pass", "rearrangement")  # rules of layers that lose nothing


@click.command(
    "verify",
    cls=options.Command,
    examples=[
        "onnxcrp verify fixtures/shapes/net.onnx fixtures/shapes/sample.png",
        "onnxcrp verify fixtures/int8/net.onnx fixtures/int8/sample.png --against fixtures/shapes/net.onnx",
        "onnxcrp verify fixtures/ecg/net.onnx fixtures/ecg/sample.csv --composite epsilon --float64 --json",
    ],
)
@options.model
@click.argument("sample", metavar="[INPUT]", required=False, type=click.Path())
@options.composite
@click.option(
    "-t", "--target", default="top", show_default=True, help="The class that is explained, as explain takes it."
)
@click.option(
    "--layer",
    metavar="LAYER",
    help="Whose concepts are parted for the conditional sums. Default: the last convolution.",
)
@click.option("--parts", type=click.IntRange(2), default=4, show_default=True, help="Into how many parts.")
@click.option(
    "--against",
    metavar="FLOAT.onnx",
    type=click.Path(),
    help="Also compare relevance with that of the float model which MODEL was made of.",
)
@click.option("--float64", is_flag=True, help="Also compare with a run in double precision.")
@click.option("--spread-bias", is_flag=True, help="Also give what biases absorb back to the inputs.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the relevance with spread biases, an .npz.")
@options.output
@options.preprocess
@options.plugin
@options.provider
@click.option("--all", "every", is_flag=True, help="List layers that only pass relevance on as well.")
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    sample: str | None,
    composite: str,
    target: str,
    layer: str | None,
    parts: int,
    against: str | None,
    float64: bool,
    spread_bias: bool,
    out: str | None,
    output: str | None,
    keep_head: bool,
    preprocess: str | None,
    providers: tuple[str, ...],
    every: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check MODEL on INPUT (a picture, .npy, .npz or .csv; a random sample without one): its canonical form computes
    the same, every layer passes on the relevance it receives less itemised losses, conditional relevances of a
    layer's parts add up to the whole. Exit 1 if something does not hold.
    """
    from onnxcrp.analysis.explanation import ClassNames, keep_inputs, one_sample, preprocessing_of
    from onnxcrp.analysis.verify import verify
    from onnxcrp.canonize import canonize

    if out and not spread_bias:
        raise click.UsageError("--out writes what --spread-bias finds: give both.")
    if out:
        destination(out, ".npz", "what --spread-bias finds")
        keep_inputs(out, model, [sample] if sample is not None else [])
    with steps(quiet=quiet) as step:
        step("canonizing")
        canonical = canonize(model)
        preprocessing = preprocessing_of(canonical, preprocess, model)
        asked = ClassNames(preprocessing.labels, preprocessing.label_offset).target(target)
        compared: dict[str, Any] = {}
        if against is not None:
            step("canonizing the float model")
            float_model = canonize(against)
            theirs = preprocessing_of(float_model, None, against)
            if not theirs.known:  # nothing lies beside it: what holds for one holds for the other
                known = preprocess or (preprocessing.source if preprocessing.known else None)
                theirs = preprocessing_of(float_model, known, against)
            compared = {
                "against": float_model,
                "against_feeds": one_sample(sample, theirs, float_model),
                "against_options": {"preprocessing": theirs},
            }
        report = verify(
            model,
            one_sample(sample, preprocessing, canonical),
            composite=composite,
            target=asked,
            output=output,
            keep_head=keep_head,
            layer=layer,
            parts=parts,
            float64=float64,
            spread_bias=spread_bias,
            providers=list(providers) or None,
            progress=step,
            preprocessing=preprocessing,
            canonical=canonical,
            **compared,
        )
        if report.comparison is not None:
            report.comparison.model = str(against)
    if out:
        from onnxcrp.analysis.explanation import save_arrays

        save_arrays(out, {f"relevance/{name}": R for name, R in report.spread.items()})
        wrote(out, quiet=quiet)
    if as_json:
        write_json(report.to_dict())
    else:
        for number, table in enumerate(report.tables()):
            if number:
                click.echo()
            heading(table.title)
            rows = table.rows
            if "rule" in table.columns and not every:
                at = table.columns.index("rule")
                rows = [row for row in rows if row[at] not in SILENT or any(cell.endswith("!") for cell in row)]
            columns(rows, titles=table.columns)
            if hidden := len(table.rows) - len(rows):
                click.echo(f"  and {hidden} that pass on what they receive (--all lists them)")
    if not report.ok:
        failed = [check.name for check in report.checks if check.ok is False]
        click.echo(f"error: {', '.join(failed)} of {model} {'do' if len(failed) > 1 else 'does'} not hold", err=True)
        ctx.exit(1)

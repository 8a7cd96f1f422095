"""`onnxcrp concepts`: one prediction in concepts."""

from __future__ import annotations

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, picture, steps, write_json, wrote


@click.command(
    "concepts",
    cls=options.Command,
    examples=[
        "onnxcrp concepts fixtures/shapes/net.onnx fixtures/shapes/watermark.png --index shapes.index"
        " --layer layer2.0.conv2 -o glocal.png",
        "onnxcrp concepts fixtures/ecg/net.onnx fixtures/ecg/sample.csv --index beats.index --layer 6"
        " --k-concepts 3 -o glocal-beat.png",
    ],
)
@options.model
@click.argument("sample", metavar="INPUT", type=click.Path())
@click.option("--index", required=True, type=click.Path(file_okay=False), metavar="INDEX", help="Of this MODEL.")
@click.option("--layer", "layers", multiple=True, required=True, metavar="LAYER", help="Of the concepts. Repeatable.")
@click.option("-t", "--target", default="top", show_default=True, metavar="CLASS",
              help="What is explained, as explain takes it: 208, a class name, 207-281, top.")  # fmt: skip
@click.option("--k-concepts", type=click.IntRange(1), default=5, show_default=True, help="Concepts of each layer.")
@click.option("--by", type=click.Choice(["relevance", "abs"]), default="relevance", show_default=True,
              help="Rank concepts by R_c or by |R_c|.")  # fmt: skip
@click.option("--k", type=click.IntRange(1), default=6, show_default=True, help="Reference samples of each concept.")
@options.criterion
@click.option("--same-class", is_flag=True, help="Reference samples of the explained class only.")
@options.start
@options.styles
@options.class_names
@options.picture
@options.moved_data
@options.plugin
@options.runtime
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    sample: str,
    index: str,
    layers: tuple[str, ...],
    target: str,
    k_concepts: int,
    by: str,
    k: int,
    criterion: str,
    aggregate: str,
    same_class: bool,
    start: str | None,
    styles: tuple[str, ...],
    class_names: str | None,
    out: str | None,
    data: tuple[str, ...],
    providers: tuple[str, ...],
    threads: int | None,
    memory_limit: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Why MODEL decides so on INPUT, in concepts: the channels of a layer with the largest share of the relevance,
    where in the input each lies, and the reference samples that show what it is, side by side in one picture. The
    composite and the preprocessing are those of the index. By default reference samples are
    drawn masked, and pieces of signals over each other.
    """
    from onnxcrp.analysis import gallery, glocal
    from onnxcrp.analysis.explanation import ClassNames, keep_inputs, read_samples
    from onnxcrp.analysis.reading import open_index
    from onnxcrp.errors import InputError
    from onnxcrp.picture import save

    if out is None:
        options.refuse_idle(ctx, "start", "styles", "data", without="-o")
    else:
        picture(out)
        keep_inputs(out, model, [sample])
    with steps(quiet=quiet) as step:
        step("opening")
        opened = open_index(index, class_names=class_names, data=data)
        explainer = opened.explainer(
            model, providers=list(providers) or None, threads=threads, memory_limit=memory_limit
        )
        for layer in layers:
            opened.layer(layer)
        samples = read_samples([sample], opened.preprocessing, explainer.canonical)
        first = next(samples)
        if next(samples, None) is not None:
            raise InputError(f"{sample}: holds several samples", hint=f'name one: "{sample}[0]"')
        names = ClassNames(opened.manifest["class_names"], opened.manifest["label_offset"])
        chosen = styles or (("crop",) if first.display is None else ("masked",))
        step("explaining")
        found = glocal.glocal(
            explainer,
            first,
            opened,
            [(layer, k_concepts) for layer in layers],
            target=names.target(target),
            by=by,
            k=k,
            criterion=criterion,
            aggregate=aggregate,
            same_class=same_class,
            start=start,
            styles=chosen if out is not None else (),
        )
        if out is not None:
            step("drawing")
            drawn = glocal.figure(opened, found, chosen)
    if as_json:
        write_json(found.to_dict())
    else:
        heading(first.source)
        answer = found.answer
        columns([["explained", answer.name, "" if answer.value is None else f"{answer.value:.4g}"]])
        rows = [
            [
                used.concept.layer,
                str(used.concept.index),
                f"{used.concept.relevance:.4g}",
                f"{used.concept.share:+.1%}",
                gallery.serves(opened, used.concept.layer, used.concept.index),
            ]
            for used in found.concepts
        ]
        columns(rows, titles=["layer", "channel", "R_c", "share", "serves most"])
    if out is not None:
        wrote(save(drawn, out), quiet=quiet)

"""`onnxcrp explain`: heatmaps of samples for targets, conditions and concepts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcrp.analysis import explanation as study
from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, in_a_folder, progress, reader_may_leave, write_json, wrote
from onnxcrp.condition import parse_condition, text
from onnxcrp.data import PICTURES, places
from onnxcrp.errors import InputError, OnnxcrpError
from onnxcrp.picture import COLORMAPS, colormap, save, writable

if TYPE_CHECKING:
    from onnxcrp.analysis.explanation import Explanation


@click.command(
    "explain",
    cls=options.Command,
    examples=[
        "onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png --target top -o heatmap.png",
        "onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png -t top3 --composite epsilon -o out.npz",
        "onnxcrp explain fixtures/digits/net.onnx fixtures/digits/sample.png --condition features.4=3,7 --json",
        "onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png --top-concepts layer3.0.conv2 -o top.png",
        "onnxcrp explain fixtures/ecg/net.onnx fixtures/ecg/sample.csv --start-from one --start 3=5 --json",
    ],
)
@options.model
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path())
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    metavar="CLASS",
    help="What is explained: 208 or a class name, 1234,1 (index), 281+282 (sum), 207-281 (contrast), top, top3."
    " Repeatable.  [default: top]",
)
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="LAYER=CONCEPTS",
    help="Keep only relevance through these concepts: LAYER=3,7 (channels), LAYER=3*0.5 (weighted), LAYER@pos=y:x,"
    " LAYER@token=5, LAYER@head=3; + joins layers into one condition, y=208+... gives it a target. Repeatable.",
)
@click.option("--bypass", type=click.Choice(["cut", "keep"]), default="cut", show_default=True,
              help="Relevance that goes round a conditioned layer (skip connections) is cut or kept.")  # fmt: skip
@click.option(
    "--top-concepts",
    "top_concepts",
    multiple=True,
    metavar="LAYER[:K]",
    help="The K (5) most relevant channels of a layer, with R_c, their share R_c / sum |R_c|, and a heatmap each.",
)
@click.option("--by", type=click.Choice(["relevance", "abs"]), default="relevance", show_default=True,
              help="Rank concepts by R_c or by |R_c|.")  # fmt: skip
@click.option(
    "--start", "starts", multiple=True, metavar="LAYER=CONCEPTS", help="Begin at hidden concepts instead. Repeatable."
)
@click.option("--start-from", type=click.Choice(["activation", "relevance", "one"]), default="activation",
              show_default=True, help="With what relevance a start begins.")  # fmt: skip
@click.option("--seed", type=click.Choice(["output", "abs", "one"]),
              help="What the target's weight is multiplied by.  [default: what the composite says]")  # fmt: skip
@click.option("--record", multiple=True, metavar="LAYER", help="Also write this layer's relevance (.npz). Repeatable.")
@options.composite
@options.output
@options.preprocess
@options.plugin
@click.option("--labels", type=click.Path(), help="Class names: a line each, or .json or .csv.")
@click.option("-o", "--out", "outs", multiple=True, type=click.Path(),
              help="A picture (.png ...), arrays (.npz), or a folder for both of each sample. Repeatable.")  # fmt: skip
@click.option("--normalize", type=click.Choice(["each", "joint"]), default="each", show_default=True,
              help="Every panel has a colour scale of its own, or all share one.")  # fmt: skip
@click.option("--cmap", default="bwr", show_default=True, metavar="NAME",
              help="bwr, seismic, coldnhot, gray, hot, viridis, or one of matplotlib's.")  # fmt: skip
@click.option("--percentile", type=options.Percentile(), help="Clip colours at this percentile of |R|.")
@options.runtime
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    inputs: tuple[str, ...],
    targets: tuple[str, ...],
    conditions: tuple[str, ...],
    starts: tuple[str, ...],
    top_concepts: tuple[str, ...],
    composite: str,
    output: str | None,
    keep_head: bool,
    preprocess: str | None,
    labels: str | None,
    outs: tuple[str, ...],
    normalize: str,
    cmap: str,
    percentile: float | None,
    providers: tuple[str, ...],
    threads: int | None,
    memory_limit: int,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Explain MODEL on every INPUT: a picture, .npy or .npz arrays (FILE.npz:KEY; FILE[3] and FILE[3:8] pick samples),
    a .csv of a 1-D signal, or a folder. Arrays and signals are taken as already preprocessed.
    """
    destinations = [_destination(out) for out in outs]
    _check_colormap(cmap)
    for kind, path in destinations:
        if kind != "folder":
            study.keep_inputs(path, model, inputs)
    if not starts:
        options.refuse_idle(ctx, "start_from", without="--start")
    if not top_concepts:
        options.refuse_idle(ctx, "by", without="--top-concepts")
        if not conditions and not starts:
            options.refuse_idle(ctx, "bypass", without="--condition or --top-concepts")
    if not as_json and all(kind == "picture" for kind, _ in destinations):
        options.refuse_idle(ctx, "record", without="-o FILE.npz, -o FOLDER or --json")
    if targets and starts and asked["start_from"] != "relevance":
        raise click.UsageError(
            "--start begins at hidden concepts, so there is no --target (but for --start-from relevance)."
        )
    parsed: dict[str, Any] = {
        "conditions": [parse_condition(written) for written in conditions],
        "starts": [parse_condition(written) for written in starts],
    }
    places(inputs)  # raises for one that is not there, before the model is compiled
    explainer, preprocessing = study.open_model(
        model,
        composite,
        preprocess=preprocess,
        output=output,
        keep_head=keep_head,
        providers=list(providers) or None,
        threads=threads,
        memory_limit=memory_limit,
    )
    study.warn_of_unused_lines(explainer.facts, explainer.composite)
    tops = [study.parse_top_concepts(explainer, written) for written in top_concepts]
    names = study.ClassNames.of(preprocessing, labels, study.classes(explainer))
    parsed["targets"] = [names.target(written) for written in targets] or ["top"]
    questions = study.Questions(**parsed, top_concepts=tops, **asked)
    samples = study.read_samples(inputs, preprocessing, explainer.canonical)
    found = study.explain(explainer, samples, questions, layout=preprocessing.layout, names=names)
    drawing: dict[str, Any] = {"cmap": cmap, "normalize": normalize, "percentile": percentile}
    drawing |= {"layout": preprocessing.layout, "rate": preprocessing.rate}
    kept: list[study.Explanation] = []
    said: list[dict[str, Any]] = []
    files: list[Path] = []
    taken: set[str] = set()
    keep = any(kind != "folder" for kind, _ in destinations)
    total = len(inputs) if all(Path(path).suffix.lower() in PICTURES for path in inputs) else None
    for number, each in enumerate(progress(found, "explaining", total=total, quiet=quiet)):
        if as_json:
            said.append(each.to_dict())
        else:
            with reader_may_leave():
                _write(each, blank=number > 0)
        for kind, path in destinations:
            if kind == "folder":
                files += study.write_both(
                    each, path, taken, keep=lambda file: study.keep_inputs(file, model, inputs), **drawing
                )
        kept += [each] * keep
        if len(kept) > study.MOST_IN_A_FIGURE and any(kind == "picture" for kind, _ in destinations):
            raise InputError(
                f"more than {study.MOST_IN_A_FIGURE} samples in one picture", hint="write one each: -o FOLDER"
            )
    for kind, path in destinations:
        if kind == "picture":
            files.append(save(study.figure(kept, **drawing), path))
        elif kind == "arrays":
            study.stack(kept).save(path)
            files.append(path)
    for path in files:
        wrote(path, quiet=quiet)
    if as_json:
        write_json(
            {
                "model": model,
                "composite": explainer.composite.name,
                "samples": said,
                "files": [str(path) for path in files],
            }
        )


def _destination(out: str) -> tuple[str, Path]:
    """("picture" | "arrays" | "folder", path), checked before anything is computed."""
    path = Path(out)
    if out == "-":
        raise OnnxcrpError("pictures and arrays cannot be written to stdout", hint="name a file: -o NAME.png")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OnnxcrpError(f"cannot write {path}: it is no regular file", hint="name a .png, a .npz or a folder")
    if path.is_file() and not path.suffix:
        raise OnnxcrpError(f"cannot write {path}: it is no folder", hint="name a .png, a .npz or a folder")
    if path.is_dir() or out.endswith(("/", "\\")) or not path.suffix:
        return "folder", path
    in_a_folder(path)
    return ("arrays", path) if path.suffix.lower() == ".npz" else ("picture", writable(path))


def _check_colormap(name: str) -> None:
    """As `picture.colormap`, and without matplotlib the hint says that its names are not known."""
    try:
        colormap(name)
    except InputError as error:
        if importlib.util.find_spec("matplotlib") is not None:
            raise
        hint = f"one of {', '.join(COLORMAPS)}; matplotlib, which has others, is not installed"
        raise InputError(error.message, hint=hint) from None


def _write(explanation: Explanation, *, blank: bool) -> None:
    """For people."""
    if blank:
        click.echo()
    heading(explanation.sample.source)
    columns(
        [["predicted" if not at else "", name, f"class {c}", f"{value:.4g}"]
         for at, (c, name, value) in enumerate(explanation.predictions)]
    )  # fmt: skip
    rows = []
    for answer in explanation.answers:
        concept = f"{answer.concept.share:+.1%}" if answer.concept else ""
        start = f" from {text(answer.start)}" if answer.start and answer.condition else ""
        rows.append(
            [
                answer.name or "start",
                "" if answer.value is None else f"{answer.value:.4g}",
                answer.label + start if answer.condition or answer.start else "",
                f"{answer.relevance:.4g}",
                f"{answer.concept.relevance:.4g}" if answer.concept else "",
                concept,
            ]
        )
    titles = ["target", "output", "condition", "relevance", "R_c", "share"]
    used = [at for at in range(len(titles)) if at in (0, 3) or any(row[at] for row in rows)]
    columns([[row[at] for at in used] for row in rows], titles=[titles[at] for at in used])

"""`onnxcrp index compare`: how far the criteria agree."""

from __future__ import annotations

from pathlib import Path

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, in_a_folder, write_json, wrote


@click.command(
    "compare",
    cls=options.Command,
    examples=[
        "onnxcrp index compare shapes.index -o agreement.png",
        "onnxcrp index compare shapes.index --layer layer3.0.conv2 --k 5 --json",
    ],
)
@options.index
@click.option("--layer", "layers", multiple=True, metavar="LAYER", help="Only this one. Repeatable.  [default: all]")
@click.option("--k", type=click.IntRange(1), help="Of the best K reference samples only.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Plot it: .png, .pdf or .svg (needs matplotlib).")
@options.as_json
@options.quiet
def command(index: str, layers: tuple[str, ...], k: int | None, out: str | None, as_json: bool, quiet: bool) -> None:
    """How many reference samples the criteria of INDEX share: sum and max, RelMax and ActMax, the mean over the
    concepts of each layer (CRP Fig. 12). overlap is |A & B| / max(|A|, |B|), jaccard |A & B| / |A | B|; samples without
    a positive score do not count. Choose --k well below the number of samples that use a concept.
    """
    from onnxcrp.errors import QuestionError
    from onnxcrp.index import Index

    if out is not None:
        from onnxcrp.picture import plot

        plot.check(in_a_folder(Path(out)))
    opened = Index.open(index)
    for layer in layers:
        opened.layer(layer)
    frame = opened.compare(list(layers) or None, k)
    if not len(frame):
        raise QuestionError(f"{index} has one criterion", hint="build with both of --criteria or of --aggregate")
    if as_json:
        write_json(frame.astype(object).where(frame.notna(), None).to_dict("records"))
    else:
        heading("Same reference samples")
        rows = [
            [row.layer, row.one, row.other, f"{row.overlap:.3f}", f"{row.overlap_std:.3f}", f"{row.jaccard:.3f}"]
            for row in frame.itertuples()
        ]
        columns(rows, titles=["layer", "one", "other", "overlap", "+-", "jaccard"])
    if out is not None:
        wrote(plot.agreement(frame, out), quiet=quiet)

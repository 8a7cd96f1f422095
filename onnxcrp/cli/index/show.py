"""`onnxcrp index show`: reference samples of concepts, as a table and as a picture."""

from __future__ import annotations

from typing import Any

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, picture, progress, write_json, wrote


@click.command(
    "show",
    cls=options.Command,
    examples=[
        "onnxcrp index show shapes.index --layer layer2.0.conv2 --channel 17 -o channel.png",
        "onnxcrp index show shapes.index --layer layer2.0.conv2 --channel 1,8 --class ball --style masked -o two.png",
        "onnxcrp index show beats.index --layer 6 --channel 22 --criterion actmax -o signal.png",
        "onnxcrp index show shapes.index --layer layer3.0.conv1 --channel 5 --k 3 --json",
    ],
)
@options.index
@options.layer
@options.channels
@options.criterion
@options.of_class
@options.class_names
@click.option("--k", type=click.IntRange(1), default=8, show_default=True, help="Reference samples, the best first.")
@options.start
@options.styles
@options.picture
@options.moved
@options.plugin
@options.runtime
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    index: str,
    layer: str,
    channels: list[int],
    criterion: str,
    aggregate: str,
    cls: str | None,
    class_names: str | None,
    k: int,
    start: str | None,
    styles: tuple[str, ...],
    out: str | None,
    model: str | None,
    data: tuple[str, ...],
    providers: tuple[str, ...],
    threads: int | None,
    memory_limit: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Reference samples of concepts of INDEX: those that use (RelMax) or excite (ActMax) a channel most, drawn with -o.

    Signals are drawn as curves; what the strongest neurons see of them is laid over each other, aligned there.
    """
    from onnxcrp.analysis import gallery
    from onnxcrp.analysis.reading import open_index
    from onnxcrp.picture import save

    opened = open_index(index, class_names=class_names, data=data)
    opened.layer(layer)
    asked: dict[str, Any] = {"criterion": criterion, "aggregate": aggregate, "k": k}
    asked["cls"] = None if cls is None else opened.class_number(cls)
    if out is None:
        options.refuse_idle(
            ctx, "start", "styles", "model", "data", "providers", "threads", "memory_limit", without="-o"
        )
    else:
        picture(out)
        gallery.check_count(len(channels))
    tables = {channel: opened.top(layer, channel, **asked) for channel in channels}
    if as_json:
        write_json([{"layer": layer, "channel": c, "samples": f.to_dict("records")} for c, f in tables.items()])
    else:
        for number, (channel, frame) in enumerate(tables.items()):
            if number:
                click.echo()
            heading(f"{layer} channel {channel}")
            columns(gallery.table(opened, frame))
    if out is None:
        return
    chosen = styles or tuple(gallery.STYLES)
    explainer = opened.explainer(model, providers=list(providers) or None, threads=threads, memory_limit=memory_limit)
    found = [
        opened.reference_samples(
            layer, channel, start=start, parts=gallery.parts_for(chosen), explainer=explainer, **asked
        )
        for channel in progress(channels, "drawing", total=len(channels), quiet=quiet)
    ]
    wrote(save(gallery.figure(opened, found, chosen), out), quiet=quiet)

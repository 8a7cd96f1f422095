"""`onnxcrp index`: what concepts are, over a dataset. One file per command."""

from __future__ import annotations

from onnxcrp.cli import options

COMMANDS = {
    "build": "Find the reference samples and statistics of every concept of a model over data.",
    "merge": "One index of several: shards of one dataset, or different datasets.",
    "show": "Draw the reference samples of concepts.",
    "stats": "Which classes a concept serves, which concepts a class uses.",
    "compare": "How far sums and maxima, RelMax and ActMax agree, layer by layer.",
}

command = options.Group(
    name="index",
    package="onnxcrp.cli.index",
    table=COMMANDS,
    no_args_is_help=True,
    help="The samples that show what the concepts of a model are: those where the model uses a concept most (RelMax)"
    " and those that excite it most (ActMax), for all layers in one pass over the data.",
    examples=["onnxcrp index build fixtures/shapes/net.onnx fixtures/shapes/scenes.tar -o shapes.index"],
)

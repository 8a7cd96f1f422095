"""`onnxcrp inspect`: what a model is and how it would be explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

from onnxcrp.cli import options
from onnxcrp.cli.output import columns, heading, write_json

QUIET_FAMILIES = ("rearrangement", "activation", "scale")  # rarely asked about, listed with --all
SHORT = 4  # lines of one canonizer
MANY = 6  # names in a list
WIDE = 160  # characters of a reason


@click.command(
    "inspect",
    cls=options.Command,
    examples=[
        "onnxcrp inspect fixtures/shapes/net.onnx",
        "onnxcrp inspect fixtures/int8/net.onnx --composite epsilon_gamma_box --json",
    ],
)
@options.model
@options.composite
@options.output
@options.preprocess
@options.plugin
@click.option("--all", "every", is_flag=True, help="List all that was rewritten, and activations and rearrangements.")
@options.as_json
def command(
    model: str, composite: str, output: str | None, keep_head: bool, preprocess: str | None, every: bool, as_json: bool
) -> None:
    """What MODEL is: inputs and outputs, what was rewritten and what was left alone and why, the layers that can be
    named with their concepts (channels; neurons, features, tokens and heads of transformers) and the rule each gets,
    operators that are not supported, and whether conditions share the forward pass.
    """
    from onnxcrp.analysis.explanation import open_model, unused_lines

    explainer, preprocessing = open_model(model, composite, preprocess=preprocess, output=output, keep_head=keep_head)
    found = explainer.inspect()
    found["composite"]["unused"] = unused_lines(explainer.facts, explainer.composite)
    found["model"] = model
    found["layout"] = preprocessing.layout or None
    found["preprocessing"] = preprocessing.source if preprocessing.known else None
    if as_json:
        write_json(found)
    else:
        _write(found, every)


def _write(found: dict[str, Any], every: bool) -> None:
    """For people."""
    heading(found["model"])
    batch = {"dynamic": "any size", "freed": "was fixed, freed and checked", "fixed": "fixed: samples run one by one"}
    about = [["input", name, _port(port)] for name, port in found["inputs"].items()]
    about += [["output", name, _port(port)] for name, port in found["outputs"].items()]
    explained = found["explained"]
    head = f", before {', '.join(found['head'])}" if found["head"] else ""
    about += [
        ["explained", found["output"], f"{explained['tensor']} {_shape(explained['shape'])}{head}"],
        ["batch", found["batch"], batch[found["batch"]]],
        ["file", f"opset {found['opset']}", f"IR version {found['ir_version']}, SHA-256 {found['sha256'][:16]}..."],
    ]
    if found["layout"] in ("NCHW", "NHWC"):
        how = f"as {found['preprocessing']} says" if found["preprocessing"] else "--preprocess has to say how"
        about.append(["pictures", found["layout"], how])
    columns(about)

    click.echo()
    heading("Canonical form")
    lines = []
    for report in found["canonizers"]:
        done = report["done"] if every or len(report["done"]) <= SHORT + 1 else report["done"][:SHORT]
        lines += [[report["name"], "done", line if every else _brief(line)] for line in done]
        if rest := len(report["done"]) - len(done):
            lines.append(["", "", f"and {rest} more (--all lists them)"])
        lines += [[report["name"], "left", line if every else _brief(line)] for line in report["declined"]]
    columns(lines or [["nothing to rewrite"]])

    composite = found["composite"]
    click.echo()
    heading(f"Layers under {composite['name']}")
    shown = [layer for layer in found["layers"] if every or layer["family"] not in QUIET_FAMILIES]
    columns(
        [
            [
                layer["name"],
                layer["op"],
                _shape(layer["shape"]),
                _concepts(layer["concepts"]),
                str(layer["depth"]),
                _rule(layer),
            ]
            for layer in shown
        ],
        titles=["layer", "op", "shape", "concepts", "depth", "rule"],
    )
    if hidden := len(found["layers"]) - len(shown):
        click.echo(f"  and {hidden} activations, scalings and rearrangements (--all lists them)")
    if composite["missing"]:
        missing = ", ".join(composite["missing"])
        click.echo(f"  {composite['name']} still needs {missing}: {composite['name']}({missing}=...) or --preprocess")

    if composite["unused"]:
        click.echo(f"  lines that fit nothing: {'; '.join(composite['unused'])}")

    click.echo()
    heading("Questions")
    if found["unsupported"]:
        click.echo("  no relevance passes these operators:")
        rows = [[layer["name"], layer["op"]] for layer in found["unsupported"]]
        columns(rows if every else rows[:MANY], indent=4)
        if not every and len(rows) > MANY:
            click.echo(f"    and {len(rows) - MANY} more (--all lists them)")
    else:
        click.echo("  every operator is supported")
    if found["shares_forward"]:
        click.echo("  conditions on one sample share its forward pass")
    else:
        broken = _some(found["batch_breaks"], len(found["batch_breaks"]) if every else MANY)
        click.echo(f"  the sample is repeated for every condition: axis 0 is not the batch at {broken}")
    if found["quantized"]:
        click.echo("  it runs without onnxruntime's graph optimisation, whose fusions move quantized values")


def _some(names: Sequence[str], most: int = MANY) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _brief(line: str) -> str:
    """One short line: long lists of names are cut, and what a runtime says at length."""
    line = re.sub(
        rf"[^\s,]+(?:, [^\s,]+){{{MANY},}}", lambda found: _some(found[0].split(", ")), " ".join(line.split())
    )
    return line if len(line) <= WIDE else line[: WIDE - 4].rsplit(" ", 1)[0] + " ..."


def _port(port: dict[str, Any]) -> str:
    return f"{port['dtype']} {_shape(port['shape'])}"


def _shape(shape: list[Any] | None) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape or []) + "]"


def _concepts(kinds: dict[str, list[int | None]]) -> str:
    """`64 channels`, `32 features, 9 tokens`, `8 features, 4 heads`; positions are seen in the shape."""
    parts = [(kind, "x".join("?" if n is None else str(n) for n in sizes)) for kind, sizes in kinds.items()]
    return ", ".join(f"{count} {kind}" for kind, count in parts if kind != "positions")


def _rule(layer: dict[str, Any]) -> str:
    """`gamma(gamma=0.25)`: the rule with what is its own, `-` for rearrangements."""
    if layer["rule"] is None:
        return "-" if layer["family"] == "rearrangement" else "none fits"
    own = {name: value for name, value in layer["parameters"].items() if name not in ("stabilizer", "bias")}
    if layer["parameters"].get("bias") == "drop":
        own["bias"] = "drop"
    inside = ", ".join(f"{name}={_value(value)}" for name, value in own.items())
    return f"{layer['rule']}({inside})" if inside else layer["rule"]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)

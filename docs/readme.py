"""Fills in what the README shows of the program's own: output of its commands, the table of operators.

`python -m docs.readme` runs the commands and writes README.md and the pictures; with `--check` it exits 1 if anything
but a figure would change.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"```console\n\$ (?P<command>[^\n]*)\n(?P<output>.*?)```", re.DOTALL)


def run(command: str, folder: Path) -> str:
    """What a command of the README prints, stdout and stderr; files it names with -o go to `folder`.

    What an earlier command left there is found under the name that it was given.
    """
    words = shlex.split(command)
    if words[0] != "onnxcrp":
        raise ValueError(f"only onnxcrp is run, not {words[0]}")
    if "-o" in words:
        at = words.index("-o") + 1
        words[at] = str(folder / words[at])
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "onnxcrp.cli", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).replace(f"{folder}/", "")


def operators() -> str:
    """Operators by family, from the registry, and those that canonizers write as others."""
    from onnxcrp.canonize.contrib import EXPANDED
    from onnxcrp.canonize.recurrent import GATES
    from onnxcrp.ops import CARRIES_NONE, FAMILIES, OPS

    rows = ["| family | operators | what it is |", "|---|---|---|"]
    for family, meaning in FAMILIES.items():
        names = sorted(op.name for op in OPS.values() if op.family == family)
        rows.append(f"| {family} | {', '.join(names)} | {meaning} |")
    depends = sorted(op.name for op in OPS.values() if callable(op.family))
    rows.append(f"| as the node is | {', '.join(depends)} | a Mul of two tensors is a product, by a constant a scale |")
    rows.append(f"| carries none | {', '.join(sorted(CARRIES_NONE))} | shapes, positions, truth values |")
    rewritten = {"Gemm", "If", "Loop", "Scan", "Swish", "RMSNormalization", *EXPANDED, *GATES}
    rewritten |= {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "Upsample"}
    rows.append(
        f"| written as others first | {', '.join(sorted(rewritten))} | `onnxcrp inspect` tells what became of them |"
    )
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    found = len(standard & {*OPS, *CARRIES_NONE})
    return f"{found} operators of the ONNX standard have a transpose or carry no relevance:\n\n" + "\n".join(rows)


def coverage() -> str:
    """What became of other people's architectures, by group, from docs/coverage.json."""
    rows = json.loads((ROOT / "docs" / "coverage.json").read_text(encoding="utf-8"))
    lines = [
        "| architectures | rows | export | explained | conserve | relative L2 to the oracle, median and worst |",
        "|" + "---|" * 6,
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        names = list(dict.fromkeys(row["name"].removeprefix("hf ").removeprefix("Keras ") for row in mine))
        exported = [row for row in mine if row.get("exports")]
        explained = [row for row in exported if row.get("explains")]
        kept = sum(row.get("conserves") is True for row in explained)
        found = sorted(min(row["parity"], row.get("parity64", 1.0)) for row in explained if row.get("parity"))
        parity = f"{found[len(found) // 2]:.1g}, {found[-1]:.1g} ({len(found)} rows)" if found else ""
        title = f"{group}: {', '.join(names)}"
        lines.append(f"| {title} | {len(mine)} | {len(exported)} | {len(explained)} | {kept} | {parity} |")
    return "\n".join(lines)


SUPPORTED = """\
`python -m benchmarks.coverage` exports architectures with random weights (torch by both of its exporters, Keras 3 by
tf2onnx and its own export), explains them, and holds the relevance against zennit, or against dense formulas in float64
on every function that torch calls. [All rows](docs/coverage.md) tell how each layer is treated; in short:

{coverage}

What exports is explained; what does not export fails in the exporter. Conservation is layer by layer; what biases,
stabilizers and the softmax inside attention keep is itemised.

{operators}

{presets}"""


def supported() -> str:
    """The section "What is supported"."""
    return SUPPORTED.format(coverage=coverage(), operators=operators(), presets=presets())


def presets() -> str:
    """Composites and what they say of themselves."""
    from onnxcrp.composite import load
    from onnxcrp.composite import presets as names

    rows = ["| composite | |", "|---|---|"]
    rows += [f"| `{name}` | {load(name).description} |" for name in names()]
    return "\n".join(rows)


def filled(text: str, name: str, content: str) -> str:
    """The section between <!-- name --> and <!-- /name --> with new content."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )


def fresh(folder: Path) -> str:
    """README.md as it should be; pictures that its commands draw are left in `folder`."""
    text = README.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{run(m['command'], folder).strip()}\n```", text)
    return filled(text, "supported", supported())


def masked(text: str) -> str:
    """Text without its figures, which differ from machine to machine."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?%?", "#", text))


def main() -> None:
    """Write, or check."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = fresh(folder)
        if "--check" in sys.argv:
            if masked(text) != masked(README.read_text(encoding="utf-8")):
                sys.exit("README.md is out of date: python -m docs.readme")
            return
        run("onnxcrp explain fixtures/shapes/net.onnx fixtures/shapes/sample.png --target top -o heatmap.png", folder)
        for picture in folder.glob("*.png"):
            (ROOT / "docs" / "images" / picture.name).write_bytes(picture.read_bytes())
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The README. Oracle: its own commands, run; figures may differ from machine to machine, words may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs import readme
from onnxcrp import Explainer
from onnxcrp.composite import load
from onnxcrp.data import for_model, load_inputs
from onnxcrp.ops import OPS

TEXT = readme.README.read_text(encoding="utf-8")
COMMANDS = [match["command"] for match in readme.BLOCK.finditer(TEXT)]


def writes(command: str) -> str:
    """What a command is told to write; empty if nothing."""
    return next(iter(re.findall(r"-o (\S+)", command)), "")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_commands_print_what_the_readme_shows(command: str, tmp_path: Path) -> None:
    for earlier in COMMANDS[: COMMANDS.index(command)]:
        if writes(earlier) and f" {writes(earlier)} " in command:  # such as the index that it reads
            readme.run(earlier, tmp_path)
    shown = next(m["output"] for m in readme.BLOCK.finditer(TEXT) if m["command"] == command)
    assert readme.masked(readme.run(command, tmp_path)).strip() == readme.masked(shown).strip()
    if writes(command):
        assert (tmp_path / writes(command)).stat().st_size


def test_lists_of_operators_and_composites_are_generated() -> None:
    written = readme.filled(TEXT, "supported", readme.supported())
    assert written == TEXT, "python -m docs.readme"
    assert all(name in TEXT for name in OPS)


def test_links_lead_somewhere() -> None:
    for page in (readme.README, *readme.ROOT.glob("docs/*.md"), *readme.ROOT.glob("*/README.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_relevance_model_runs_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the Explainer, which asks other relevance models."""
    (command,) = [each for each in COMMANDS if each.startswith("onnxcrp compile")]
    readme.run(command, tmp_path)
    (tmp_path / "fixtures").symlink_to(readme.ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(import numpy as np\nimport onnxruntime.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    explainer = Explainer("fixtures/shapes/net.onnx")
    dtype, shape = explainer.inputs["input"]
    path = "fixtures/shapes/watermark.png"
    (sample,) = load_inputs([path], for_model(None, shape, dtype, "fixtures/shapes/net.onnx"), shape, dtype)
    conditions = [{"layer3.0.conv2": [6]}, {"layer3.0.conv2": [56]}]
    asked = explainer.explain(sample.x, 5, conditions=conditions, seed="output")
    expected = asked.relevance["input"][0]
    np.testing.assert_allclose(scope["R"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    told = [float(figure) for figure in re.findall(r"0\.\d+", example.splitlines()[-1])]
    np.testing.assert_allclose(expected.sum((1, 2, 3)), told, atol=5e-4)


def test_the_composite_of_the_readme_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example)
    assert len(load(path).lines) > 3

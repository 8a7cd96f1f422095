"""Quantized and rounded models against their float originals. Oracle: the two Explainers asked one by one, numpy's norms;
what the quantizer of onnxruntime and half precision may move relevance by, measured on the shapes net."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxcrp
from onnxcrp.analysis.against import compare
from onnxcrp.analysis.verify import verify
from onnxcrp.cli import main
from tests.support.quantized import BFLOAT, HALF, dynamic, folded, half_weights, narrowed, pictures, static

ROOT = Path(__file__).resolve().parents[1]

FORMS: dict[str, tuple[Callable[[Path, Path], None], float, set[str]]] = {  # how it is made, cosine, operators in the file
    **{
        f"{form} {activations} {weights}{' per channel' if per_channel else ''}": (
            lambda source, target, form=form, activations=activations, weights=weights, per_channel=per_channel: static(
                source, target, form=form, activations=activations, weights=weights, per_channel=per_channel
            ),
            0.99,
            {"QuantizeLinear", "DequantizeLinear"} if form == "QDQ" else {"QLinearConv", "QGemm"},
        )
        for form, activations, weights, per_channel in [
            ("QDQ", "uint8", "uint8", False),
            ("QDQ", "uint8", "int8", True),
            ("QDQ", "int8", "int8", False),
            ("QOperator", "uint8", "uint8", False),
            ("QOperator", "int8", "int8", True),
        ]
    },
    "dynamic": (dynamic, 0.99, {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}),
    "float16": (lambda source, target: narrowed(source, target, HALF), 0.9995, {"Cast", "Conv"}),
    "float16 ends": (lambda source, target: narrowed(source, target, HALF, ends=True), 0.9995, {"Conv"}),
    "bfloat16": (lambda source, target: narrowed(source, target, BFLOAT), 0.998, {"Cast", "Conv"}),
    "bfloat16 ends": (lambda source, target: narrowed(source, target, BFLOAT, ends=True), 0.998, {"Conv"}),
    "weights as float16": (half_weights, 0.9995, {"Cast", "Conv"}),
    "weights as bfloat16": (lambda source, target: half_weights(source, target, BFLOAT), 0.998, {"Cast", "Conv"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folded(tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, source: Path, tmp_path: Path) -> None:
    """Every form is explained in float32, layers keep their names, and relevance stays near that of the float model."""
    make, cosine, expected = FORMS[form]
    path = tmp_path / "narrow.onnx"
    make(source, path)
    assert expected <= {node.op_type for node in onnx.load(path).graph.node}
    there, here = onnxcrp.Explainer(source), onnxcrp.Explainer(path)
    weights = np.eye(6, dtype=np.float32)[[4]]  # its class
    x = pictures(1)
    found = compare(here, {"input": x.astype(here.inputs["input"][0])}, weights, there, {"input": x})
    assert found.input.cosine > cosine
    names = {each.layer for each in found.differences}
    assert {"conv1", "layer1.0.conv2", "layer2.0.downsample.0", "layer3.0"} <= names
    R = here.explain(x.astype(here.inputs["input"][0]), target=4).relevance["input"]
    assert R.dtype == np.float32


def test_figures_are_those_of_the_two_models(source: Path, tmp_path: Path) -> None:
    """By the norms of what each Explainer gives."""
    path = tmp_path / "int8.onnx"
    static(source, path, form="QDQ", activations="uint8", weights="int8", per_channel=False)
    x, target = pictures(1), 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        here, there = (
            onnxcrp.Explainer(p, "epsilon").explain(x, target=target, record=["layer2.0.conv1"]) for p in (path, source)
        )
    report = verify(path, x, composite="epsilon", target=target, against=str(source))
    assert report.ok
    assert report.comparison is not None
    found = {each.layer: each for each in report.comparison.differences}
    for layer, a, b in [
        ("input", here.relevance["input"], there.relevance["input"]),
        ("layer2.0.conv1", here.relevance["layer2.0.conv1"], there.relevance["layer2.0.conv1"]),
    ]:
        assert found[layer].relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-4)
        cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        assert found[layer].cosine == pytest.approx(cosine, abs=1e-5)
        assert found[layer].total == pytest.approx(float(a.sum()), rel=1e-4)
    assert found["layer2.0.conv1"].relative_l2 > 1e-3  # they are not the same model


def test_a_model_against_itself(source: Path) -> None:
    report = verify(source, pictures(1), against=source)
    assert report.comparison is not None
    assert all(each.relative_l2 == 0 and each.cosine == pytest.approx(1) for each in report.comparison.differences)
    assert not report.comparison.only_here


def test_the_command_preprocesses_the_picture_for_each() -> None:
    """A uint8 NHWC model against a float NCHW one: heatmaps are compared."""
    words = ["verify", "fixtures/int8/net.onnx", "fixtures/int8/sample.png", "--against", "fixtures/shapes/net.onnx"]
    done = CliRunner().invoke(main, [*(str(ROOT / w) if "/" in w else w for w in words), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    first, second, *layers = said["against"]["differences"]
    assert (first["op"], second["op"], second["layer"]) == ("explained", "input", "image")
    assert second["cosine"] > 0.99
    assert {"conv1", "layer3.0.conv2"} <= {each["layer"] for each in layers}
    (check,) = [check for check in said["checks"] if check["name"] == "against float"]
    assert "heatmap (image is laid out otherwise)" in check["detail"]
    shown = CliRunner().invoke(main, [str(ROOT / w) if "/" in w else w for w in words]).stdout
    assert "Relevance against" in shown
    assert "cosine" in shown


@pytest.mark.parametrize(
    ("against", "said"),
    [("fixtures/digits/net.onnx", "explains an output of shape"), ("fixtures/none.onnx", "there is no file")],
)
def test_models_that_do_not_go_together(against: str, said: str) -> None:
    words = ["verify", str(ROOT / "fixtures/shapes/net.onnx"), "--against", str(ROOT / against)]
    sample = [str(ROOT / "fixtures/shapes/sample.png")]
    done = CliRunner().invoke(main, [*words[:2], *sample, *words[2:]])
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_a_random_sample_must_fit_both() -> None:
    words = ["verify", "fixtures/int8/net.onnx", "--against", "fixtures/shapes/net.onnx"]
    done = CliRunner().invoke(main, [str(ROOT / w) if "/" in w else w for w in words])
    assert done.exit_code == 1
    assert "give a picture" in done.stderr


def test_bfloat16_is_widened_exactly(source: Path, tmp_path: Path) -> None:
    """What the weights are, and Casts of bfloat16 in the middle are gone; the file itself cannot be run here."""
    path = tmp_path / "b.onnx"
    narrowed(source, path, BFLOAT)
    canonical = onnxcrp.Explainer(path).canonical
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    wide = {t.name: t.values for node in canonical.graph.nodes for t in node.inputs if hasattr(t, "values")}
    (weight,) = [name for name in wide if name in stored and name.startswith("conv1.weight")]
    np.testing.assert_array_equal(wide[weight], stored[weight].astype(np.float32))
    report = verify(path, pictures(1), target=1)
    assert report.ok
    (outputs,) = [check for check in report.checks if check.name == "canonical outputs"]
    assert outputs.ok is None
    assert "cannot load" in outputs.detail

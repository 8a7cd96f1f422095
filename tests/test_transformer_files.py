"""Transformers as files. Oracle: dense formulas on torch's functions in float64 (tests/support/functional.py)."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcrp import Explainer
from tests.support import peers

peers.need()

import torch  # noqa: E402
import torchvision.models  # noqa: E402

from onnxcrp.cli import main  # noqa: E402
from tests.support import functional, transformers  # noqa: E402
from tests.support.oracle import Oracle  # noqa: E402


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def vit() -> torch.nn.Module:
    """torchvision's ViT: a convolution makes the patches, attention is nn.MultiheadAttention."""
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "num_classes": 4}
    return torchvision.models.VisionTransformer(image_size=16, patch_size=4, **options)


def swin() -> torch.nn.Module:
    """Windows of 4 x 4 patches, shifted in every other block, so that the batch axis holds windows."""
    options = {"depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4], "num_classes": 4}
    return torchvision.models.SwinTransformer(patch_size=[4, 4], embed_dim=8, **options)


def settled(net: torch.nn.Module) -> torch.nn.Module:
    """Norms away from 1 and 0, a head that starts as zeros drawn, weights of unit gain."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(net, path, samples) by name and exporter, made once."""
    made: dict[tuple[str, str], Any] = {}

    def get(name: str, exporter: str) -> tuple[torch.nn.Module, Path, np.ndarray]:
        if (name, exporter) not in made:
            size = {"vit": 16, "swin": 32}[name]
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore")  # exporters warn about themselves
                torch.manual_seed(0)
                net = settled({"vit": vit, "swin": swin}[name]())
                x = torch.randn(2, 3, size, size)
                path = tmp_path_factory.mktemp(name) / f"{exporter}.onnx"
                options: dict[str, Any] = {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
                if exporter == "dynamo":
                    options = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
                torch.onnx.export(net, (x,), str(path), input_names=["x"], output_names=["y"], **options)
            made[name, exporter] = net, path, x.numpy()
        return made[name, exporter]

    return get


@pytest.mark.parametrize("composite", ["attnlrp", "attnlrp(gamma=0.25)"])
@pytest.mark.parametrize(
    ("name", "exporter"),
    [("vit", "torchscript"), ("vit", "dynamo"), ("swin", "torchscript"), ("swin", "dynamo")],
    ids=str,
)
def test_torchvision_transformers(files: Any, name: str, exporter: str, composite: str) -> None:
    net, path, x = files(name, exporter)
    result = Explainer(path, composite).explain(x, 1, seed="abs")
    theirs = functional.relevance(net, {"x": x}, composite, (1,))
    sign = np.sign(result.explained[:, 1])[:, None, None, None]
    tolerance = 5e-4 if (name, composite) == ("swin", "attnlrp") else 1e-4  # float32: epsilon divides by small sums
    assert distance(result.relevance["x"] * sign, theirs) < tolerance


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_conditions_on_attention_share_the_forward_pass(files: Any, name: str, exporter: str) -> None:
    """Heads and windows beside the batch, rows [T N, C]: conditions on them, of two samples, are those of one at a time."""
    _, path, x = files(name, exporter)
    explainer = Explainer(path, "attnlrp")
    assert explainer.facts.shares_forward
    inner = [info for info in explainer.layers if info.op == "Linear" and len(info.shape) > 2]
    for layer in inner[-5:]:  # projections of attention and dense layers of the last block
        conditions = [{layer.name: [c]} for c in range(3)]
        together = explainer.explain(x, 1, conditions=conditions, record=[layer.name], bypass="keep", seed="abs")
        for i in range(len(x)):
            for j, condition in enumerate(conditions):
                alone = explainer.explain(x[i : i + 1], 1, conditions=condition, bypass="keep", seed="abs")
                assert distance(together.relevance["x"][i, j], alone.relevance["x"][0]) < 1e-4
            alone = explainer.explain(x[i : i + 1], 1, record=[layer.name], seed="abs").relevance[layer.name]
            assert distance(together.relevance[layer.name][i, 0], alone[0]) < 1e-4


def test_conditions_on_windows_add_up(files: Any) -> None:
    _, path, x = files("swin", "torchscript")
    shown = CliRunner().invoke(main, ["inspect", str(path), "--composite", "attnlrp"])
    assert "the sample is repeated for every condition" not in shown.output
    explainer = Explainer(path, "attnlrp")
    layer = next(
        info for info in reversed(explainer.layers) if "mlp" in info.name and info.concepts.get("neurons") == [64]
    )
    parts = [{layer.name: range(k, 64, 4)} for k in range(4)]
    result = explainer.explain(x[:1], 1, conditions=[*parts, {layer.name: []}], bypass="keep", seed="abs")
    whole = explainer.explain(x[:1], 1, seed="abs").relevance["x"][0]
    *kept, empty = result.relevance["x"][0]
    assert distance(sum(kept) - 3 * empty, whole) < 1e-4


def test_heads_tokens_and_neurons_can_be_named(files: Any) -> None:
    """A head's relevance is what a mask on axis 1 lets through; all heads together are everything."""
    path = files("vit", "torchscript")[1]
    shown = CliRunner().invoke(main, ["inspect", str(path), "--composite", "attnlrp"]).output
    assert "2 heads" in shown
    assert "24 neurons, 17 tokens" in shown
    explainer = Explainer(path, "attnlrp")
    x = files("vit", "torchscript")[2][:1]
    attended = next(info for info in explainer.layers if "heads" in info.concepts and info.op == "MatMul")
    folder = path.parent
    np.save(folder / "x.npy", x)
    rows = {}
    for text in (f"{attended.name}@head=0", f"{attended.name}@head=1", f"{attended.name}@head=0,1"):
        out = folder / "out.npz"
        arguments = ["explain", str(path), str(folder / "x.npy"), "--composite", "attnlrp", "--target", "1"]
        ran = CliRunner().invoke(
            main, [*arguments, "--seed", "abs", "--condition", text, "--bypass", "cut", "-o", str(out)]
        )
        assert ran.exit_code == 0, ran.output
        with np.load(out) as stored:
            rows[text[-3:]] = stored["relevance/x"].reshape(-1, 3 * 16 * 16)[-1]  # after the unconditional one
    both = rows["0,1"]
    first, second = (rows[key] for key in rows if key != "0,1")
    np.testing.assert_allclose(first + second, both, rtol=1e-3, atol=1e-5 * np.abs(both).max())
    assert distance(first, both) > 0.1


@pytest.mark.parametrize(("name", "kind", "heads"), [("bert", "bert", 2), ("gpt", "gpt2", 4)])
def test_files_that_onnxruntime_optimized(name: str, kind: str, heads: int, tmp_path: Path) -> None:
    """com.microsoft's Attention, SkipLayerNormalization, BiasGelu, FastGelu: the same relevance as without."""
    from onnxruntime.transformers import optimizer

    net = transformers.build(name)
    path = transformers.export(net, "torchscript", tmp_path)
    logging.disable(logging.WARNING)
    try:
        fused = optimizer.optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=16, opt_level=0).model
    finally:
        logging.disable(logging.NOTSET)
    kinds = {node.op_type for node in fused.graph.node if node.domain == "com.microsoft"}
    assert kinds >= {"SkipLayerNormalization"} | ({"Attention", "BiasGelu"} if name == "bert" else {"FastGelu"})
    feeds = {key: value.numpy() for key, value in net.example(2).items()}
    plain, other = (Explainer(model, "attnlrp").explain(feeds, "top") for model in (path, fused))
    for key, R in plain.relevance.items():
        assert distance(other.relevance[key], R) < 1e-5


def test_attention_as_one_operator_of_the_standard(tmp_path: Path) -> None:
    """Opset 23 has Attention; the relevance is that of the decomposed form, which test_attention.py holds to formulas."""
    net = transformers.build("vit")
    whole, apart = (tmp_path / name for name in ("whole", "apart"))
    for folder in (whole, apart):
        folder.mkdir()
    paths = transformers.export(net, "dynamo", whole, opset=23), transformers.export(net, "torchscript", apart)
    assert "Attention" in {node.op_type for node in onnx.load(paths[0]).graph.node}
    feeds = {key: value.numpy() for key, value in net.example(2).items()}
    one, other = (Explainer(path, "attnlrp").explain(feeds, "top").relevance["pixels"] for path in paths)
    assert distance(one, other) < 1e-5


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon"])
def test_the_oracle_is_zennit_where_zennit_sees_everything(composite: str) -> None:
    """The functional oracle on a net that zennit can be asked about."""
    from tests.support import nets

    net, x = nets.build("ecg")
    one = x.numpy()[:2]
    theirs = Oracle(net, x)
    seed = np.zeros_like(theirs.logits(one))
    seed[:, 3] = 1
    expected = theirs.relevance(composite, one, seed)["input"]
    np.testing.assert_allclose(functional.relevance(net, {"x": one}, composite, (3,)), expected, rtol=1e-9, atol=1e-12)


def test_the_oracle_takes_no_gradient_for_a_rule() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumprod(x, 1)

    with pytest.raises(NotImplementedError, match="cumprod"):
        functional.relevance(Odd(), {"x": np.ones((1, 3))}, "epsilon", (0,))

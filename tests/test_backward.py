"""Relevance models. Oracle: dense formulas in numpy float64 on a small net with a skip, and the interface as documented."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcrp.backward import compile as compile_model
from onnxcrp.canonize import canonize
from onnxcrp.composite import load
from onnxcrp.errors import CompositeError, InputError, QuestionError, UnsupportedError
from onnxcrp.session import Session

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

RNG = np.random.default_rng(2)
N_IN, N_MID, N_OUT = 5, 4, 3
W = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in (
    ("first", (N_MID, N_IN)), ("a", (N_MID, N_MID)), ("b", (N_MID, N_MID)), ("last", (N_OUT, N_MID))
)}  # fmt: skip


def residual(extra: str = "") -> onnx.ModelProto:
    """x -> first -> relu -> h;  h + b(relu(a(h))) -> relu -> last: dense layers, one skip."""
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, {N_IN}] x) => (float[batch, {N_OUT}] logits)
        <float[{N_MID}, {N_IN}] first.weight, float[{N_MID}, {N_MID}] a.weight, float[{N_MID}, {N_MID}] b.weight,
         float[{N_OUT}, {N_MID}] last.weight>
        {{
            f = Gemm <transB = 1> (x, first.weight)
            h = Relu (f)
            ah = Gemm <transB = 1> (h, a.weight)
            ra = Relu (ah)
            bh = Gemm <transB = 1> (ra, b.weight)
            sum = Add (bh, h)
            r = Relu (sum)
            logits = Gemm <transB = 1> (r, last.weight)
            {extra}
        }}""".replace("first.weight", "first_w")
        .replace("a.weight", "a_w")
        .replace("b.weight", "b_w")
        .replace("last.weight", "last_w")
    )
    for node in model.graph.node:
        node.name = node.output[0]
        node.input[:] = [name.replace("_w", ".weight") if name.endswith("_w") else name for name in node.input]
    del model.graph.value_info[:]
    del model.graph.initializer[:]
    for name, array in W.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}.weight"))
    return model


@pytest.fixture(autouse=True)
def _numbers_do_not_depend_on_other_tests() -> None:
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


def stab(z: np.ndarray) -> np.ndarray:
    return z + 1e-6 * np.where(z >= 0, 1, -1)


def eps(M: np.ndarray, a: np.ndarray, R: np.ndarray) -> np.ndarray:
    return a * (M.T @ (R / stab(M @ a)))


def by_hand(x: np.ndarray, target: np.ndarray, masks: dict[str, np.ndarray], *, cut: bool) -> dict[str, np.ndarray]:
    """Relevance of every layer for one sample under rule epsilon, in float64."""
    w = {name: array.astype(float) for name, array in W.items()}
    f = w["first"] @ x
    h = np.maximum(f, 0)
    ah = w["a"] @ h
    ra = np.maximum(ah, 0)
    bh = w["b"] @ ra
    total = bh + h
    r = np.maximum(total, 0)
    logits = w["last"] @ r
    found = {"logits": logits, "last": target * logits}
    found["sum"] = eps(w["last"], r, found["last"] * masks.get("last", 1))
    R = found["sum"] * masks.get("sum", 1)
    found["b"], skip = bh / stab(total) * R, h / stab(total) * R
    found["a"] = eps(w["b"], ra, found["b"] * masks.get("b", 1))
    through = eps(w["a"], h, found["a"] * masks.get("a", 1))
    goes_round = cut and ("a" in masks or "b" in masks)
    found["first"] = through + (0 if goes_round else skip)
    found["x"] = eps(w["first"], x, found["first"] * masks.get("first", 1))
    return found


def ask(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    return Session(model).run(feeds)


def names(model: onnx.ModelProto) -> dict[str, Any]:
    return json.loads({entry.key: entry.value for entry in model.metadata_props}["onnxcrp.map"])


X = RNG.standard_normal((1, N_IN)).astype(np.float32)
TARGET = np.array([[0, 1, 0.5]], np.float32)
LAYERS = {"first": N_MID, "a": N_MID, "b": N_MID, "sum": N_MID, "last": N_OUT}


def near(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.linalg.norm(ours - theirs) < 1e-5 * (np.linalg.norm(theirs) + 1e-3), (ours, theirs)


def test_every_layer_without_conditions() -> None:
    model = compile_model(residual(), "epsilon", record=list(LAYERS), activations=list(LAYERS))
    found = ask(model, {"x": X, "target": TARGET})
    expected = by_hand(X[0].astype(float), TARGET[0], {}, cut=True)
    near(found["explained"][0], expected["logits"])
    near(found["logits"][0], expected["logits"])
    near(found["relevance.x"][0], expected["x"])
    for layer in LAYERS:
        near(found[names(model)["relevance"][layer]][0], expected[layer])
    near(found["activation.first"][0], W["first"].astype(float) @ X[0])


@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize(
    "conditioned", [["a"], ["b"], ["a", "b"], ["first", "b"], ["sum", "a"], ["first", "a", "b", "sum"], ["last"]]
)
def test_conditions(conditioned: list[str], bypass: str) -> None:
    """Three conditions on one forward pass; recorded relevance is that before the mask."""
    masks = {layer: RNG.integers(0, 2, (3, LAYERS[layer])).astype(np.float32) for layer in conditioned}
    parallel = bypass == "cut" and {"a", "b"} & set(conditioned)
    recorded = [layer for layer in LAYERS if layer != "x"]
    model = compile_model(residual(), "epsilon", conditions=conditioned, record=recorded, bypass=bypass)
    feeds = {names(model)["masks"][layer]: mask for layer, mask in masks.items()}
    found = ask(model, {"x": X, "target": TARGET, **feeds})
    for n in range(3):
        mine = {layer: mask[n].astype(float) for layer, mask in masks.items()}
        expected = by_hand(X[0].astype(float), TARGET[0], mine, cut=bool(parallel))
        near(found["relevance.x"][n], expected["x"])
        for layer in recorded:
            ours = found[names(model)["relevance"][layer]]
            near(ours[n if len(ours) > 1 else 0], expected[layer])


def test_masks_are_ones_unless_fed_or_required() -> None:
    free = compile_model(residual(), "epsilon", conditions=["b"], bypass="keep")
    plain = compile_model(residual(), "epsilon")
    near(ask(free, {"x": X, "target": TARGET})["relevance.x"], ask(plain, {"x": X, "target": TARGET})["relevance.x"])
    required = compile_model(residual(), "epsilon", conditions=["b"], masks="required")
    assert "mask.b" not in {tensor.name for tensor in required.graph.initializer}
    assert "mask.b" in {tensor.name for tensor in required.graph.input}


def test_a_partition_of_concepts_adds_up() -> None:
    """cut: the parts sum to what passes; keep: sum of parts - (K - 1) * rest is the whole."""
    parts = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    for bypass in ("cut", "keep"):
        model = compile_model(residual(), "epsilon_plus", conditions=["b"], bypass=bypass)
        R = ask(model, {"x": X, "target": TARGET, "mask.b": parts})["relevance.x"]
        if bypass == "cut":
            near(R[:3].sum(0), R[4])
            assert not R[3].any()
        else:
            near(R[:3].sum(0) - 2 * R[3], R[4])


def test_samples_targets_and_masks_pair_up() -> None:
    x = RNG.standard_normal((3, N_IN)).astype(np.float32)
    target = np.eye(N_OUT, dtype=np.float32)
    mask = RNG.integers(0, 2, (3, N_MID)).astype(np.float32)
    model = compile_model(residual(), "epsilon", conditions=["a"])
    together = ask(model, {"x": x, "target": target, "mask.a": mask})["relevance.x"]
    for n in range(3):
        one = ask(model, {"x": x[n : n + 1], "target": target[n : n + 1], "mask.a": mask[n : n + 1]})["relevance.x"]
        near(together[n : n + 1], one)


def test_start_at_a_hidden_layer() -> None:
    concept = np.eye(N_MID, dtype=np.float32)
    w = {name: array.astype(float) for name, array in W.items()}
    h = np.maximum(w["first"] @ X[0], 0)
    ah = w["a"] @ h
    for start_from in ("activation", "one"):
        model = compile_model(residual(), "epsilon", start=["a"], start_from=start_from)
        assert names(model)["target"] is None
        R = ask(model, {"x": X, "seed.a": concept})["relevance.x"]
        for n in range(N_MID):
            seed = concept[n] * (np.maximum(ah, 0) if start_from == "activation" else 1)
            near(R[n], eps(w["first"], X[0].astype(float), eps(w["a"], h, seed)))
        assert not ask(model, {"x": X})["relevance.x"].any()  # seeds are zeros unless fed


def test_reduced_records() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 2, 6, 6] x) => (float[batch, 3, 4, 4] y) <float[3, 2, 3, 3] w>
        { y = Conv <kernel_shape = [3, 3]> (x, w) }""")
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(RNG.standard_normal((3, 2, 3, 3)).astype(np.float32), "w")
    )
    (layer,) = [node.output[0] for node in model.graph.node]
    full = compile_model(model, "epsilon", record=[layer], activations=[layer], inputs=())
    short = compile_model(
        model, "epsilon", record=[layer], activations=[layer], inputs=(), reduce=["sum", "max", "argmax"]
    )
    x = RNG.standard_normal((2, 2, 6, 6)).astype(np.float32)
    feeds = {"x": x, "target": RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)}
    whole, reduced = ask(full, feeds), ask(short, feeds)
    for kind in ("relevance", "activation"):
        (name,) = names(full)[kind].values()
        flat = whole[name].reshape(2, 3, -1)
        outputs = next(iter(names(short)["reduced"].values()))
        near(reduced[outputs[f"{kind}.sum"]], flat.sum(2))
        near(reduced[outputs[f"{kind}.max"]], flat.max(2))
        assert (reduced[outputs[f"{kind}.argmax"]] == flat.argmax(2)).all()
    assert not any(name.startswith("relevance.x") for name in reduced)


def test_only_what_is_asked_for_is_written() -> None:
    whole = compile_model(residual(), "epsilon")
    top = compile_model(residual(), "epsilon", record=["sum"], inputs=())
    cut = compile_model(residual(), "epsilon", conditions=["b"], bypass="cut")
    keep = compile_model(residual(), "epsilon", conditions=["b"], bypass="keep")
    assert len(top.graph.node) < len(whole.graph.node) - 8
    assert len(cut.graph.node) < len(keep.graph.node)
    assert not any("first" in node.name for node in top.graph.node if node.name.startswith("R/"))


@pytest.mark.parametrize("composite", ["alpha2_beta1", "epsilon_gamma_box(low=-3, high=3)", "wsquare"])
def test_derived_weights_are_nodes_unless_stored(composite: str) -> None:
    """The file holds each weight once; a runtime that folds constants computes the same bits."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((64, 3, 5, 5), (32, 32, 3, 3), (40, 800))]
    graph = onnx.parser.parse_graph("""
        net (float[batch, 3, 5, 5] x, float[64, 3, 5, 5] w0, float[32, 32, 3, 3] w1, float[40, 800] w2)
            => (float[batch, 40] logits)
        { a = Conv <pads = [2, 2, 2, 2]> (x, w0)
          r = Relu (a)
          b = Conv <pads = [1, 1, 1, 1], group = 2> (r, w1)
          f = Flatten (b)
          logits = Gemm <transB = 1> (f, w2) }""")
    del graph.input[1:]
    for name, array in zip(("w0", "w1", "w2"), weights, strict=True):
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    source = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    derived = compile_model(source, composite)
    stored = compile_model(source, composite, store_weights=True)
    bytes_of = [sum(len(t.raw_data) for t in proto.graph.initializer) for proto in (source, derived, stored)]
    assert bytes_of[1] < 1.1 * bytes_of[0] < 1.8 * bytes_of[0] < bytes_of[2]
    x = rng.standard_normal((2, 3, 5, 5)).astype(np.float32)
    feeds = {"x": x, "target": np.eye(40, dtype=np.float32)[[3, 4]]}
    got, expected = (Session(proto).run(feeds)["relevance.x"] for proto in (derived, stored))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_rolling_by_nothing_cuts_off_nothing(shift: int) -> None:
    """[x[k:], x[:k]] as shifted windows are written: relevance rolls back, also where one of the slices is empty."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 4] x) => (float[batch, 4] y)
        <int64[1] zero = {{0}}, int64[1] k = {{{shift}}}, int64[1] end = {{9}}, int64[1] one = {{1}}>
        {{ a = Slice (x, k, end, one)
           b = Slice (x, zero, k, one)
           y = Concat <axis = 1> (a, b) }}""")
    x, target = (np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32) for _ in range(2))
    found = ask(compile_model(model, "epsilon"), {"x": x, "target": target})
    np.testing.assert_array_equal(found["relevance.x"], np.roll(target, shift, axis=1) * x)


def test_nodes_are_named_after_layer_and_rule() -> None:
    written = [node.name for node in compile_model(residual(), "epsilon_plus").graph.node]
    assert any(name.startswith("R/last/epsilon/") for name in written)


def test_metadata() -> None:
    model = compile_model(residual(), "epsilon_plus_flat(epsilon=0.01)", conditions=["b"])
    meta = {entry.key: entry.value for entry in model.metadata_props}
    assert meta["onnxcrp.composite_name"] == "epsilon_plus_flat(epsilon=0.01)"
    assert "0.01" in meta["onnxcrp.composite"]
    assert len(meta["onnxcrp.sha256"]) == 64
    assert names(model)["masks"] == {"b": "mask.b"}
    assert names(model)["inputs"] == {"x": "relevance.x"}
    facts = json.loads(meta["onnxcrp.facts"])
    assert facts["shares_forward"] is True
    assert facts["cut"] == ["b"]
    assert {domain.domain for domain in model.opset_import} == {""}
    assert model.ir_version == 10


def test_symbols_of_masks_targets_and_relevance_are_unique() -> None:
    model = compile_model(residual(), "epsilon", conditions=["a", "b"], record=["sum"])
    own = {"x", "logits"}
    symbols = [
        dim.dim_param
        for port in [*model.graph.input, *model.graph.output]
        if port.name not in own
        for dim in port.type.tensor_type.shape.dim
        if not dim.HasField("dim_value")
    ]
    assert len(symbols) == len(set(symbols)) > 0


def test_a_class_number_is_no_target() -> None:
    """[[1]] would broadcast to a sum over all classes; runtimes refuse it."""
    session = Session(compile_model(residual(), "epsilon"))
    x = np.ones((1, *session.inputs["x"].shape[1:]), np.float32)
    with pytest.raises(InputError, match="target"):
        session.run({"x": x, "target": np.array([[1]], np.float32)})


def test_names_stay_legal_and_never_clash() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 3] target) => (float[batch, 3] explained)
        { h = Relu (target)
          explained = Relu (h) }""")
    relevance = compile_model(model, "epsilon", record=["h"])
    onnx.checker.check_model(relevance, full_check=True)
    assert names(relevance)["target"] == "onnxcrp.target"
    assert names(relevance)["explained"] == "onnxcrp.explained"
    x = np.array([[1, -2, 3]], np.float32)
    found = Session(relevance).run({"target": x, "onnxcrp.target": np.ones((1, 3), np.float32)})
    near(found[names(relevance)["inputs"]["target"]], np.maximum(x, 0))


def test_parallel_layers_keep_nothing_together() -> None:
    model = residual().SerializeToString()
    with pytest.raises(QuestionError, match="no path"):
        compile_model(two_branches(), "epsilon", conditions=["left", "right"])
    with pytest.raises(QuestionError, match="lies on no path"):
        compile_model(two_branches(), "epsilon", conditions=["left"], record=["right"])
    compile_model(two_branches(), "epsilon", conditions=["left", "right"], bypass="keep")
    assert model == residual().SerializeToString()


def two_branches() -> onnx.ModelProto:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 4] x) => (float[batch, 4] y) <float[4, 4] u, float[4, 4] v>
        { left = Gemm <transB = 1> (x, u)
          right = Gemm <transB = 1> (x, v)
          y = Add (left, right) }""")
    for node in model.graph.node:
        node.name = node.output[0]
    for name in ("u", "v"):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(RNG.standard_normal((4, 4)).astype(np.float32), name)
        )
    return model


def test_all_unsupported_operators_are_named_at_once() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 4, 2, 2, 2, 2] x) => (float[batch, 4] y)
        { a = Det (x)
          b = Det (a)
          y = Relu (b) }""")
    with pytest.raises(UnsupportedError, match=r"2 nodes have no transpose: Det \(Det_0, Det_1\)"):
        compile_model(model, "epsilon")


def test_a_composite_must_know_every_operator(tmp_path: Any) -> None:
    path = tmp_path / "narrow.toml"
    path.write_text('[[layer]]\nop = "dense"\nrule = "epsilon"\n')
    with pytest.raises(CompositeError, match=r"has no rule for .*Relu"):
        compile_model(residual(), path)


def test_unknown_layers_and_options_are_named() -> None:
    with pytest.raises(QuestionError, match="lats"):
        compile_model(residual(), "epsilon", record=["lats"])
    with pytest.raises(QuestionError, match="bypass"):
        compile_model(residual(), "epsilon", bypass="around")
    with pytest.raises(QuestionError, match="no output 'probabilities'"):
        compile_model(residual(), "epsilon", output="probabilities")
    with pytest.raises(QuestionError, match="no input 'image'"):
        compile_model(residual(), "epsilon", inputs=["image"])


def test_a_terminal_softmax_is_not_explained_unless_asked() -> None:
    model = residual()
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], name="head", axis=-1))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("probabilities", 1, ["batch", N_OUT]))
    found = ask(compile_model(model, "epsilon"), {"x": X, "target": TARGET})
    expected = by_hand(X[0].astype(float), TARGET[0], {}, cut=True)
    near(found["explained"][0], expected["logits"])
    near(found["relevance.x"][0], expected["x"])
    near(found["probabilities"].sum(), np.array(1.0))
    kept = ask(compile_model(model, "epsilon", keep_head=True), {"x": X, "target": TARGET})
    near(kept["explained"], found["probabilities"])


def clipped(model: onnx.ModelProto, low: float, high: float) -> onnx.ModelProto:
    """Every Relu as a Clip."""
    for name, bound in (("low", low), ("high", high)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(bound), name))
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.extend(["low", "high"])
    return model


@pytest.mark.parametrize("source", [residual(), clipped(residual(), 0, 1000)], ids=["relu", "clip"])
def test_gamma_needs_one_branch_only_where_that_is_exact(source: onnx.ModelProto) -> None:
    """Below a ReLU whose relevance vanishes with it, gamma's second half is not written; a seed of ones needs both."""
    from onnxcrp.composite import load

    gammas = load("epsilon_gamma_box(low=-3, high=3)")
    written = {}
    for seed in ("output", "one"):
        lines = [
            dataclasses.replace(line, rule="gamma", parameters={"gamma": 0.3})
            if line.rule in ("epsilon", "zbox")
            else line
            for line in gammas.lines
        ]
        composite = dataclasses.replace(gammas, lines=tuple(lines), seed=seed)
        model = compile_model(source, composite)
        written[seed] = model
        rng = np.random.default_rng(3)
        for _ in range(3):
            x = rng.standard_normal((1, N_IN)).astype(np.float32)
            R = ask(model, {"x": x, "target": TARGET})["relevance.x"]
            near(R[0], all_gamma(x[0].astype(float), TARGET[0], seed))
    for layer, seed, forward_passes in (("a", "output", 1), ("last", "output", 2), ("last", "one", 2)):
        again = [n for n in written[seed].graph.node if n.name.startswith(f"R/{layer}/gamma/") and n.op_type == "Gemm"]
        assert len(again) == forward_passes, (layer, seed)


def gamma(M: np.ndarray, a: np.ndarray, R: np.ndarray) -> np.ndarray:
    z, share, out = M @ a, M * a, np.zeros(len(a))
    for j in range(len(z)):
        push = np.maximum if z[j] > 0 else np.minimum
        each = share[j] + 0.3 * push(share[j], 0)
        out += each / stab(np.array(each.sum())) * R[j]
    return out


def all_gamma(x: np.ndarray, target: np.ndarray, seed: str) -> np.ndarray:
    w = {name: array.astype(float) for name, array in W.items()}
    h = np.maximum(w["first"] @ x, 0)
    ra = np.maximum(w["a"] @ h, 0)
    bh = w["b"] @ ra
    total = bh + h
    r = np.maximum(total, 0)
    logits = w["last"] @ r
    R = gamma(w["last"], r, target * (logits if seed == "output" else 1))
    through = gamma(w["a"], h, gamma(w["b"], ra, bh / stab(total) * R))
    return gamma(w["first"], x, through + h / stab(total) * R)


@pytest.mark.parametrize("high", [None, 6], ids=["relu", "relu6"])
def test_a_start_below_a_rectifier_has_no_negative_part(high: int | None) -> None:
    """The start is max(z, 0) below ReLU and ReLU6 alike, so that gamma's second half, left out there, is zero."""
    source = residual() if high is None else clipped(residual(), 0, high)
    gammas = load("epsilon_gamma_box(low=-3, high=3)")
    lines = [
        dataclasses.replace(line, rule="gamma", parameters={"gamma": 0.3}) if line.rule in ("epsilon", "zbox") else line
        for line in gammas.lines
    ]
    model = compile_model(source, dataclasses.replace(gammas, lines=tuple(lines)), start=["a"], start_from="activation")
    w = {name: array.astype(float) for name, array in W.items()}
    h = np.clip(w["first"] @ X[0], 0, high)
    z = w["a"] @ h
    assert (z < 0).any()
    assert (z > 0).any()
    R = ask(model, {"x": X, "seed.a": np.ones((1, N_MID), np.float32)})["relevance.x"]
    near(R[0], gamma(w["first"], X[0].astype(float), gamma(w["a"], h, np.maximum(z, 0))))


def test_dynamic_sizes_answer_for_every_size() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        net (float[batch, 2, height, width] x) => (float[batch, 3] y) <float[3, 2, 3, 3] w>
        { c = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)
          r = Relu (c)
          p = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (r)
          g = GlobalAveragePool (p)
          y = Flatten (g) }""")
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(RNG.standard_normal((3, 2, 3, 3)).astype(np.float32), "w")
    )
    dynamic = compile_model(model, "epsilon_plus")
    session = Session(dynamic)
    for height, width in ((9, 9), (12, 17), (10, 31)):
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        for axis, size in ((2, height), (3, width)):
            fixed.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
        x = RNG.standard_normal((1, 2, height, width)).astype(np.float32)
        feeds = {"x": x, "target": np.ones((2, 3), np.float32) * [[1], [2]]}
        feeds["target"] = feeds["target"].astype(np.float32)
        mine = session.run(feeds)["relevance.x"]
        near(mine, ask(compile_model(fixed, "epsilon_plus"), feeds)["relevance.x"])
        near(mine[0] * 2, mine[1])
        near(mine[0].sum(), feeds["target"][0] @ session.run(feeds)["explained"][0])


def test_the_model_given_is_left_as_it_is() -> None:
    model = residual()
    before = model.SerializeToString()
    canonical = canonize(model)
    first = compile_model(canonical, "epsilon", conditions=["b"])
    second = compile_model(canonical, "epsilon", conditions=["b"])
    assert model.SerializeToString() == before
    assert first.SerializeToString() == second.SerializeToString()


# ---- what a review once found wrong -----------------------------------------------------------------------------------


def parsed(text: str, **arrays: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    for node in model.graph.node:
        node.name = node.output[0]
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("start", "end"), [([0, 1], [9999, 4]), ([0, 1], [2**31 - 1, 4])])
def test_a_slice_without_axes_keeps_questions_apart(start: list[int], end: list[int]) -> None:
    from onnxcrp import Explainer

    model = parsed(
        "net (float[batch, 6] x) => (float[batch, 2] y) { h = Gemm <transB = 1> (x, u)  r = Relu (h)"
        " s = Slice (r, start, end)  y = Gemm <transB = 1> (s, v) }",
        u=normal(5, 6), v=normal(2, 3), start=np.array(start), end=np.array(end),
    )  # fmt: skip
    explainer = Explainer(model, "epsilon")
    assert explainer.facts.shares_forward == (end[0] > 9999)
    conditions = [{"h": [c]} for c in range(5)]
    x = normal(1, 6)
    together = explainer.explain(x, target=1, conditions=conditions, seed="abs").relevance["x"][0]
    for n, condition in enumerate(conditions):
        near(together[n], explainer.explain(x, target=1, conditions=condition, seed="abs").relevance["x"][0])


def test_gamma_without_bias_is_two_sided(tmp_path: Any) -> None:
    u, b, v = normal(4, 3), normal(4), normal(2, 4)
    model = parsed(
        "net (float[batch, 3] x) => (float[batch, 2] y) { h = Gemm <transB = 1> (x, u, b)  r = Relu (h)"
        " y = Gemm <transB = 1> (r, v) }",
        u=u, b=b, v=v,
    )  # fmt: skip
    path = tmp_path / "drop.toml"
    path.write_text('extends = "base"\nbias = "drop"\n[[layer]]\nop = "dense"\nrule = "gamma"\ngamma = 0.25\n')
    relevance = compile_model(model, path)
    for _ in range(5):
        x = normal(1, 3)
        r = np.maximum(u @ x[0] + b, 0)
        R = one_gamma(v.astype(float), r, (v @ r) * [1, 0])
        near(
            ask(relevance, {"x": x, "target": np.array([[1, 0]], np.float32)})["relevance.x"][0],
            one_gamma(u.astype(float), x[0], R),
        )


def one_gamma(M: np.ndarray, a: np.ndarray, R: np.ndarray) -> np.ndarray:
    z, share, out = M @ a, M * a, np.zeros(len(a))
    for j in range(len(z)):
        push = np.maximum if z[j] > 0 else np.minimum
        each = share[j] + 0.25 * push(share[j], 0)
        out += each / stab(np.array(each.sum())) * R[j]
    return out


def test_asking_for_one_input_does_not_change_the_question() -> None:
    from onnxcrp import Explainer

    model = parsed(
        "net (float[batch, 3] a, float[batch, 3] b) => (float[batch, 2] y) { fa = Gemm <transB = 1> (a, w)"
        " fb = Gemm <transB = 1> (b, w)  p = Mul (fa, fb)  y = Gemm <transB = 1> (p, v) }",
        w=normal(4, 3), v=normal(2, 4),
    )  # fmt: skip
    explainer = Explainer(model, "attnlrp")
    x = {"a": normal(1, 3), "b": normal(1, 3)}
    both = explainer.explain(x, target=0, seed="abs").relevance
    for name in ("a", "b"):
        near(explainer.explain(x, target=0, seed="abs", inputs=[name]).relevance[name], both[name])


def test_integers_that_are_data_may_be_negative() -> None:
    from onnxcrp.facts import Facts

    model = parsed(
        "net (int64[batch, 4] x) => (float[batch, 2] y) { u = Unsqueeze (x, axes)  s = Squeeze (u, axes)"
        " f = Cast <to = 1> (s)  y = Gemm <transB = 1> (f, w) }",
        w=normal(2, 4), axes=np.array([1]),
    )  # fmt: skip
    assert not Facts(canonize(model)).nonnegative


def test_nothing_that_starts_below_a_condition_passes_through_it() -> None:
    with pytest.raises(QuestionError, match="first lies below the conditioned layer a"):
        compile_model(residual(), "epsilon", start=["b", "first"], conditions=["a"])


POOLED = (
    "net (float[batch, 2, 8, 8] x) => (float[batch, 3] y) <float[3, 2, 3, 3] w, float[3, 27] v> {"
    " c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)  r = Relu (c)"
    " p = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (r)  f = Flatten (p)  y = Gemm <transB = 1> (f, v) }"
)


@pytest.mark.parametrize(
    "composite", ["deconvnet", "gradient", "guided_backprop", "flat", "wsquare", "epsilon_plus_flat"]
)
def test_several_samples_one_target(composite: str) -> None:
    """A seed of ones does not depend on the sample; the winners of an overlapping pool do."""
    model = parsed(POOLED, w=normal(3, 2, 3, 3), v=normal(3, 27))
    relevance, x, target = compile_model(model, composite), normal(3, 2, 8, 8), np.array([[0, 1, 0]], np.float32)
    together = ask(relevance, {"x": x, "target": target})["relevance.x"]
    for n in range(3):
        near(
            together[n if len(together) > 1 else 0],
            ask(relevance, {"x": x[n : n + 1], "target": target})["relevance.x"][0],
        )


@pytest.mark.parametrize("layer", ["c", "p", "f"])
def test_a_start_of_ones_fills_its_layer(layer: str) -> None:
    model = parsed(POOLED, w=normal(3, 2, 3, 3), v=normal(3, 27))
    relevance = compile_model(model, "epsilon", start=[layer], start_from="one", record=["c"])
    channels = 27 if layer == "f" else 3
    seed = np.eye(channels, dtype=np.float32)[:2].reshape(2, channels, *[1] * (0 if layer == "f" else 2))
    found = ask(relevance, {"x": normal(1, 2, 8, 8), f"seed.{layer}": seed})
    assert found["relevance.x"].shape == (2, 2, 8, 8)
    assert found["relevance.c"].shape == (2, 3, 8, 8)
    if layer == "c":
        assert (found["relevance.c"] == seed * np.ones((1, 1, 8, 8))).all()


def test_flat_goes_through_interpolation_and_elementwise_maxima() -> None:
    model = parsed(
        "net (float[batch, 2, 4, 4] x) => (float[batch, 2, 8, 8] y) {"
        ' u = Resize <mode = "linear"> (x, roi, scales)  t = Tanh (u)  y = Max (t, u) }',
        roi=np.zeros(0, np.float32), scales=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    R = np.abs(normal(1, 2, 8, 8))
    found = ask(compile_model(model, "flat"), {"x": normal(1, 2, 4, 4), "target": R})["relevance.x"]
    near(found.sum((2, 3)), R.sum((2, 3)))
    assert (found > 0).all()


def test_matrix_products_with_stacks_of_matrices_and_shared_heads() -> None:
    """A stack of constant matrices is shared out as a mean is; heads that share one matrix get the sum of their parts."""
    stack = normal(2, 6, 5)
    model = parsed("net (float[batch, 2, 7, 6] x) => (float[batch, 2, 7, 5] y) { y = MatMul (x, m) }", m=stack)
    x, R = normal(3, 2, 7, 6), normal(3, 2, 7, 5)
    s = R.astype(float) / stab(x.astype(float) @ stack)
    model = compile_model(model, dataclasses.replace(load("epsilon"), seed="one"))
    near(ask(model, {"x": x, "target": R})["relevance.x"], x * (s @ stack.swapaxes(-1, -2)))

    text = "net (float[batch, 4, 3, 6] q, float[batch, 1, 6, 5] k) => (float[batch, 4, 3, 5] y) { y = MatMul (q, k) }"
    model = compile_model(parsed(text), dataclasses.replace(load("attnlrp"), seed="one"))
    q, k, R = normal(2, 4, 3, 6), normal(2, 1, 6, 5), normal(2, 4, 3, 5)
    a, b = q.astype(float), k.astype(float)
    z = 2 * (a @ b)
    n = R / (z + 1e-8 * np.sign(z))
    found = ask(model, {"q": q, "k": k, "target": R})
    near(found["relevance.q"], a * (n @ b.swapaxes(-1, -2)))
    near(found["relevance.k"], (b * (a.swapaxes(-1, -2) @ n)).sum(1, keepdims=True))


def test_versions_are_converted_or_refused() -> None:
    newer = compile_model(residual(), "epsilon", opset=20)
    assert newer.opset_import[0].version == 20
    near(
        ask(newer, {"x": X, "target": TARGET})["relevance.x"],
        ask(compile_model(residual(), "epsilon"), {"x": X, "target": TARGET})["relevance.x"],
    )
    for wrong in ({"opset": 99}, {"opset": 3}, {"ir_version": 99}, {"ir_version": 3}):
        with pytest.raises(QuestionError, match="cannot be written"):
            compile_model(residual(), "epsilon", **wrong)


def test_required_seeds_are_no_initializers() -> None:
    model = compile_model(residual(), "epsilon", start=["b"], masks="required")
    assert not {"seed.b"} & {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "m = ReduceMean <keepdims = 1> (x, first) y = Sub (x, m)",
            r"ReduceMean \(m\): it joins the samples of a batch",
        ),
        ("m = ReduceMean <keepdims = 1> (x, places) k = Reshape (m, square) y = Conv (x, k)", "joins the samples"),
        ("s = Sigmoid (x) y = Pow (s, x)", r"y \(Pow\): 2 of its inputs carry relevance"),
        ("s = Sigmoid (x) y = PRelu (x, s)", r"y \(PRelu\): 2 of its inputs carry relevance"),
    ],
)
def test_what_no_message_can_go_through(body: str, why: str) -> None:
    model = parsed(
        f"net (float[batch, 2, 4, 4] x) => (float[batch, 2, 4, 4] y) {{ {body} }}",
        first=np.array([0]), places=np.array([0, 2, 3]), square=np.array([2, 1, 1, 1]),
    )  # fmt: skip
    for node in model.graph.node:
        node.name = node.output[0]
    with pytest.raises(UnsupportedError, match=why):
        compile_model(model, "epsilon")


def test_weights_that_are_computed_are_named() -> None:
    text = "net (float[batch, 2, 4, 4] x, float[3, 2, 1, 1] k) => (float[batch, 3, 4, 4] y) { y = Conv (x, k) }"
    with pytest.raises(UnsupportedError, match="weights are computed while running"):
        compile_model(parsed(text), "epsilon")


def test_a_varying_exponent_carries_relevance_and_positions_do_not() -> None:
    """2^x is an activation of x; the Indices of a MaxPool are positions, whatever is made of them."""
    text = "net (float[batch, 2, 4, 4] x) => (float[batch, 2, 4, 4] y) { p = Pow (two, x) y = Add (p, x) }"
    x, R = normal(1, 2, 4, 4), normal(1, 2, 4, 4)
    one = dataclasses.replace(load("epsilon"), seed="one")
    found = ask(compile_model(parsed(text, two=np.float32(2)), one), {"x": x, "target": R})["relevance.x"]
    z = 2 ** x.astype(float) + x
    near(found, R * z / stab(z))  # both summands' shares come back to x
    gradient = ask(compile_model(parsed(text, two=np.float32(2)), "gradient"), {"x": x, "target": R})["relevance.x"]
    near(gradient, R * (1 + np.log(2) * 2 ** x.astype(float)))

    text = """net (float[batch, 2, 4, 4] x) => (float[batch, 2, 2, 2] y) {
        v, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)  c = Cast <to = 1> (i)  y = Add (v, c) }"""
    found = ask(compile_model(parsed(text), one), {"x": np.abs(x), "target": np.abs(R[:, :, :2, :2])})
    best = np.abs(x).reshape(1, 2, 2, 2, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(1, 2, 2, 2, 4).max(-1)
    share = np.abs(R[:, :, :2, :2]) * best / found["y"]
    near(found["relevance.x"].sum((2, 3)), share.sum((2, 3)))


def test_a_mean_over_an_axis_0_that_is_no_batch() -> None:
    """Time first, as recurrent nets have it: every step gets its share, and the gradient is there in full."""
    text = """net (float[batch, 3, 4] x) => (float[batch, 4] y) {
        t = Transpose <perm = [1, 0, 2]> (x)  s = Sigmoid (t)  y = ReduceMean <keepdims = 0> (s, first) }"""
    x, R = normal(2, 3, 4), normal(2, 4)
    sigmoid = 1 / (1 + np.exp(-x.astype(float)))
    model = parsed(text, first=np.array([0]))
    found = ask(compile_model(model, "gradient"), {"x": x, "target": R})["relevance.x"]
    near(found, R[:, None] / 3 * sigmoid * (1 - sigmoid))
    found = ask(compile_model(model, dataclasses.replace(load("epsilon"), seed="one")), {"x": x, "target": R})
    near(found["relevance.x"], R[:, None] * sigmoid / sigmoid.sum(1, keepdims=True))


def test_a_long_chain_of_sums_does_not_overflow() -> None:
    """Forty summands around 1e3: all forty factors of the last one's share together would be 1e120."""
    count, weights = 40, np.abs(normal(40, 4, 4))
    sums = [f"s{i} = Add ({f's{i - 1}' if i > 1 else 'm0'}, m{i})" for i in range(1, count)]
    nodes = "\n".join([*(f"m{i} = MatMul (x, w{i})" for i in range(count)), *sums, f"y = Identity (s{count - 1})"])
    text = f"net (float[batch, 4] x) => (float[batch, 4] y) {{ {nodes} }}"
    x, target = 1000 * np.abs(normal(2, 4)), np.array([[0, 1, 0, 0]], np.float32)
    model = compile_model(parsed(text, **{f"w{i}": weights[i] for i in range(count)}), "epsilon")
    found = ask(model, {"x": x, "target": target})["relevance.x"]
    exact = x * weights.astype(float).sum(0)[:, 1]  # shares of sums and of linear layers cancel all between x and y
    near(found, exact)
    assert len(model.graph.node) < 20 * count  # shares of one sum are not written again for all below it


def test_the_largest_output_of_a_model_that_joins_its_samples() -> None:
    """Three samples, one row of scores: what is wrong is told, whatever was asked."""
    from onnxcrp import Explainer

    model = parsed(
        "net (float[batch, 2] x) => (float[1, 2] y) { r = Relu (x) y = ReduceMean <keepdims = 1> (r, first) }",
        first=np.array([0]),
    )
    for target in (1, "top"):
        with pytest.raises(UnsupportedError, match="joins the samples"):
            Explainer(model, "epsilon").explain(np.ones((3, 2), np.float32), target, seed="one")


@pytest.mark.parametrize("path", ["shapes/net", "digits/net", "ecg/net", "keras/image.keras", "keras/image.tf2onnx"])
def test_what_a_gpu_refuses_is_not_written(path) -> None:
    """onnxruntime's CUDA provider leaves ConvTranspose with unequal padding to the CPU, at ten times the whole cost."""
    model = compile_model(canonize(FIXTURES / f"{path}.onnx"), load("epsilon_plus_flat"))
    found = [node for node in model.graph.node if node.op_type == "ConvTranspose"]
    assert found or "ecg" in path
    for node in found:
        pads = next(attribute.ints for attribute in node.attribute if attribute.name == "pads")
        assert pads[: len(pads) // 2] == pads[len(pads) // 2 :]


def test_what_is_recorded_is_divided_as_a_sum():
    """(a x + b y) / z is (a / z) x + (b / z) y where there are conditions, but not beside a x + b y."""
    text = """<ir_version: 8, opset_import: ["" : 18]> net (float[N, 3, 6, 6] x) => (float[N, 2] y) {
        a = Conv (x, A)  b = Conv (a, B)  c = Conv (b, C)  d = GlobalAveragePool(c)  y = Flatten(d) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {"A": (4, 3, 3, 3), "B": (4, 4, 1, 1), "C": (2, 4, 1, 1)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))

    def products(**asked) -> int:
        written = compile_model(model, "alpha1_beta0", **asked)
        return sum(node.op_type == "Mul" and node.name.startswith("R/") for node in written.graph.node)

    assert products(conditions=["c"], record=["a", "b"]) == products(conditions=["c"])

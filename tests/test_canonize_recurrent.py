"""Oracle: the original model on onnxruntime, for layout 1 the same layer with layout 0; nets of torch, exported."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import onnx
import onnx.reference
import pytest

from onnxcrp.canonize import canonize
from onnxcrp.explainer import Explainer
from tests.support.canonical import check, feeds, ops, parse, random, said, session
from tests.support.recurrent import Lstm, epsilon

T, N, IN, H = 4, 2, 3, 5
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
KINDS = list(GATES)


def weights(kind: str, directions: int = 1, *, bias: bool = True, peepholes: bool = False) -> dict[str, np.ndarray]:
    k = GATES[kind]
    made = {"w": random(directions, k * H, IN), "r": random(directions, k * H, H)}
    if bias:
        made["b"] = random(directions, 2 * k * H)
    if peepholes:
        made["p"] = random(directions, 3 * H)
    return made


def net(
    kind: str,
    attributes: str = "",
    *,
    directions: int = 1,
    x: str = f"float[{T},N,{IN}] x",
    inputs: str = "",
    operands: str = "x, w, r, b",
    bias: bool = True,
    peepholes: bool = False,
    tail: str = "",
    outputs: str | None = None,
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """A layer and what reads it; without a tail all of its outputs are the model's."""
    made = ["y", "y_h"] + ["y_c"] * (kind == "LSTM")
    ends = outputs or ", ".join(f"float[] {name}" for name in made)
    attributes = f"<hidden_size={H}{', ' if attributes else ''}{attributes}>"
    return parse(
        f"net ({x}{inputs}) => ({ends}) {{ {', '.join(made)} = {kind}{attributes}({operands})\n{tail} }}",
        **weights(kind, directions, bias=bias, peepholes=peepholes),
        **constants,
    )


def without_recurrent(canonical) -> None:
    assert not set(ops(canonical)) & set(GATES)
    assert not said(canonical, "unroll recurrent layers")


# ------------------------------------------------------------------------------------------------------ the layer alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions(kind, direction):
    model = net(kind, f'direction="{direction}"', directions=1 + (direction == "bidirectional"))
    canonical = check(model)
    without_recurrent(canonical)
    assert "4 steps" in said(canonical, "unroll recurrent layers", "done")


@pytest.mark.parametrize("kind", KINDS)
def test_without_bias(kind):
    operands = "x, w, r"
    without_recurrent(check(net(kind, bias=False, operands=operands)))


@pytest.mark.parametrize("reset", [0, 1])
@pytest.mark.parametrize("state", [False, True])
def test_gru_resets_before_or_after(reset, state):
    model = net(
        "GRU",
        f"linear_before_reset={reset}",
        operands="x, w, r, b" + ", , h0" * state,
        inputs=f", float[1,N,{H}] h0" * state,
    )
    without_recurrent(check(model))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm_with_peepholes_and_states(direction):
    d = 1 + (direction == "bidirectional")
    model = net(
        "LSTM",
        f'direction="{direction}"',
        directions=d,
        peepholes=True,
        operands="x, w, r, b, , h0, c0, p",
        inputs=f", float[{d},N,{H}] h0, float[{d},N,{H}] c0",
    )
    without_recurrent(check(model))


def test_lstm_that_couples_input_and_forgetting():
    without_recurrent(check(net("LSTM", "input_forget=1")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["zeros", "constant", "expanded", "filled"])
def test_constant_states_free_the_batch(kind, state):
    """A state that was exported for one sample must not fix the batch; a constant one is a bias."""
    constants = {"h0": np.zeros([1, 1, H], np.float32), "c0": np.zeros([1, 1, H], np.float32)}
    tail, h0, c0 = "", "h0", "c0"
    if state == "constant":
        constants = {"h0": random(1, 1, H), "c0": random(1, 1, H, seed=1)}
    if state in ("expanded", "filled"):
        tail, h0, c0 = "s = Shape(x)  n = Gather(s, one)  size = Concat<axis=0>(one, n, hidden)\n", "h", "c"
        if state == "expanded":
            constants = {"h0": random(1, 1, H), "c0": random(1, 1, H, seed=1)}
            tail += "h = Expand(h0, size)  c = Expand(c0, size)\n"
        else:
            constants = {}
            tail += "h = ConstantOfShape(size)  c = ConstantOfShape(size)\n"
        constants |= {"one": np.array([1]), "hidden": np.array([H])}
    operands = f"x, w, r, b, , {h0}" + f", {c0}" * (kind == "LSTM")
    outputs = "y, y_h" + ", y_c" * (kind == "LSTM")
    model = parse(
        f"""net (float[1,{T},{IN}] input) => (float[] y_h0) {{
            x = Transpose<perm=[1, 0, 2]>(input)
            {tail}
            {outputs} = {kind}<hidden_size={H}>({operands})
            y_h0 = Transpose<perm=[1, 0, 2]>(y_h) }}""",
        **weights(kind),
        **constants,
    )
    canonical = check(model, size=1)
    assert canonical.batch == "freed"
    without_recurrent(canonical)
    assert not set(ops(canonical)) & {"Expand", "Transpose", "ConstantOfShape", "Shape"}


def test_a_constant_state_for_each_sample():
    model = net(
        "LSTM", x=f"float[{T},2,{IN}] x", operands="x, w, r, b, , h0, c0", h0=random(1, 2, H), c0=random(1, 2, H)
    )
    without_recurrent(check(model))


@pytest.mark.parametrize(
    ("kind", "functions"),
    [
        ("RNN", '"Relu"'),
        ("RNN", '"HardSigmoid"'),
        ("RNN", '"LeakyRelu"'),
        ("RNN", '"Elu"'),
        ("RNN", '"Softsign"'),
        ("RNN", '"Softplus"'),
        ("GRU", '"HardSigmoid", "Relu"'),
        ("GRU", '"Tanh", "Sigmoid"'),
        ("LSTM", '"HardSigmoid", "Tanh", "Relu"'),
        ("LSTM", '"Relu", "Sigmoid", "Softsign"'),
    ],
)
def test_activations(kind, functions):
    without_recurrent(check(net(kind, f"activations=[{functions}]")))


def test_activations_take_their_parameters_in_order():
    model = net(
        "LSTM",
        'direction="bidirectional", activations=["HardSigmoid", "LeakyRelu", "Tanh", "Tanh", "HardSigmoid", "Elu"],'
        "activation_alpha=[0.3, 0.1, 0.25], activation_beta=[0.4, 0.6]",
        directions=2,
    )
    canonical = check(model)
    without_recurrent(canonical)
    found = {
        (node.name.split("/")[1], node.op): {k: round(v, 3) for k, v in node.attrs.items()}
        for node in canonical.graph.nodes
        if node.op in ("HardSigmoid", "LeakyRelu", "Elu")
    }
    assert found == {
        ("forward", "HardSigmoid"): {"alpha": 0.3, "beta": 0.4},
        ("forward", "LeakyRelu"): {"alpha": 0.1},
        ("reverse", "HardSigmoid"): {"alpha": 0.25, "beta": 0.6},
        ("reverse", "Elu"): {"alpha": 1.0},
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_equal_lengths(kind, direction):
    model = net(
        kind,
        f'direction="{direction}"',
        directions=1 + (direction == "bidirectional"),
        operands="x, w, r, b, lengths",
        x=f"float[{T},2,{IN}] x",
        lengths=np.array([3, 3], np.int32),
    )
    without_recurrent(check(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_batch_first_is_the_same_layer_transposed(kind, direction):
    d = 1 + (direction == "bidirectional")
    states = ", , h0, c0" if kind == "LSTM" else ", , h0"
    inputs = f", float[N,{d},{H}] h0" + f", float[N,{d},{H}] c0" * (kind == "LSTM")
    ours = canonize(
        net(
            kind,
            f'direction="{direction}", layout=1',
            directions=d,
            x=f"float[N,{T},{IN}] x",
            operands=f"x, w, r, b{states}",
            inputs=inputs,
        )
    )
    without_recurrent(ours)
    theirs = session(
        net(
            kind,
            f'direction="{direction}"',
            directions=d,
            operands=f"x, w, r, b{states}",
            inputs=inputs.replace(f"[N,{d}", f"[{d},N"),
        )
    )
    run = session(ours.to_onnx())
    x = feeds(run, N)
    expected = theirs.run(None, {name: array.swapaxes(0, 1) for name, array in x.items()})
    expected = [expected[0].transpose(2, 0, 1, 3), *(array.swapaxes(0, 1) for array in expected[1:])]
    for a, b in zip(expected, run.run(None, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_double_precision():
    made = {name: array.astype(np.float64) for name, array in weights("LSTM").items()}
    model = parse(
        f"net (double[{T},N,{IN}] x) => (double[] y) {{ y = LSTM<hidden_size={H}>(x, w, r, b) }}", opset=18, **made
    )
    canonical = canonize(model)
    without_recurrent(canonical)
    x = np.random.default_rng(0).normal(size=[T, N, IN])
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})  # onnxruntime has no such LSTM
    (got,) = session(canonical.to_onnx()).run(None, {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_one_step():
    without_recurrent(check(net("LSTM", x=f"float[1,N,{IN}] x")))


def test_weights_that_are_dequantized():
    w = weights("GRU")
    quantized = {name: np.round(array * 100).astype(np.int8) for name, array in w.items() if name != "b"}
    model = parse(
        f"""net (float[{T},N,{IN}] x) => (float[] y) {{
            wf = DequantizeLinear(w, scale)
            rf = DequantizeLinear(r, scale)
            y = GRU<hidden_size={H}>(x, wf, rf, b) }}""",
        opset=18,
        b=w["b"],
        scale=np.array(0.01, np.float32),
        **quantized,
    )
    without_recurrent(check(model))


# --------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    ("reason", "model"),
    [
        ("number of its steps", lambda: net("LSTM", x=f"float[T,N,{IN}] x")),
        ("clips", lambda: net("LSTM", "clip=0.5")),
        (
            "sequence_lens differ",
            lambda: net("GRU", x=f"float[{T},2,{IN}] x", operands="x, w, r, b, lens", lens=np.array([4, 2], np.int32)),
        ),
        (
            "sequence_lens is computed",
            lambda: net("GRU", operands="x, w, r, b, lens", inputs=", int32[N] lens"),
        ),
        ("Affine is not written", lambda: net("RNN", 'activations=["Affine"]')),
        ("1001 steps would", lambda: net("LSTM", x=f"float[1001,N,{IN}] x")),
    ],
)
def test_declined(reason, model):
    proto = model()
    canonical = canonize(proto, free_batch=False)
    assert reason in said(canonical, "unroll recurrent layers")
    assert set(ops(canonical)) & set(GATES)
    assert canonical.to_onnx().graph.node


def test_computed_weights_are_declined():
    made = weights("RNN")
    model = parse(
        f"net (float[{T},N,{IN}] x, float[1,{H},{IN}] w) => (float[] y) {{ y = RNN<hidden_size={H}>(x, w, r) }}",
        r=made["r"],
    )
    assert "weights are computed" in said(canonize(model), "unroll recurrent layers")


# ------------------------------------------------------------------------------------------------- form, names, sharing


def test_the_steps_share_their_weights():
    canonical = canonize(net("LSTM"))
    layers = [node for node in canonical.graph.nodes if node.op == "Linear" and "/t0/" not in node.name]
    assert len(layers) == 4 * (T - 1)
    assert len({id(node.inputs[1]) for node in layers}) == 4
    made = weights("LSTM")
    i = next(node for node in layers if "/i/" in node.name)
    np.testing.assert_array_equal(i.inputs[1].values, np.concatenate([made["w"][0, :H], made["r"][0, :H]], axis=1))
    np.testing.assert_allclose(i.inputs[2].values, made["b"][0, :H] + made["b"][0, 4 * H : 5 * H])


def test_names_and_scopes_tell_the_story():
    model = net("LSTM")
    model.graph.node[0].name = "/encoder/rnn/LSTM"
    canonical = canonize(model)
    names = {node.name: node for node in canonical.graph.nodes}
    assert names["/encoder/rnn/LSTM/t3/i/Linear"].op == "Linear"
    assert names["/encoder/rnn/LSTM/t3/c/Add"].op == "Add"
    assert canonical.scopes["/encoder/rnn/LSTM/t3/i/Linear"] == "encoder.rnn.t3.i"
    assert canonical.scopes["/encoder/rnn/LSTM/t3/h/Mul"] == "encoder.rnn.t3.h"
    again = canonize(canonical.to_onnx())
    assert again.scopes == canonical.scopes


def test_layers_of_one_module_are_numbered():
    model = parse(
        f"""net (float[{T},N,{IN}] x) => (float[] b) {{
            a = RNN<hidden_size={H}>(x, w, r)
            s = Squeeze(a, one)
            b = RNN<hidden_size={H}>(s, r, r) }}""",
        one=np.array([1]),
        **weights("RNN", bias=False),
    )
    model.graph.node[0].name, model.graph.node[2].name = "/rnn/RNN", "/rnn/RNN_1"
    canonical = check(model)
    assert canonical.scopes["/rnn/RNN/t1/h/Linear"] == "rnn.l0.t1.h"
    assert canonical.scopes["/rnn/RNN_1/t1/h/Linear"] == "rnn.l1.t1.h"


# -------------------------------------------------------------------------------------------- what stands around a layer


def test_a_sequence_of_features_is_read_where_it_lies():
    """[N, C, T] -> [T, N, C], as behind convolutions."""
    model = net(
        "LSTM",
        x=f"float[N,{IN},{T}] z",
        outputs="float[] last",
        tail="last = Squeeze(y_h, zero)",
        zero=np.array([0]),
    )
    node = onnx.helper.make_node("Transpose", ["z"], ["x"], perm=[2, 0, 1])
    model.graph.node.insert(0, node)
    canonical = check(model)
    assert not set(ops(canonical)) & {"Transpose", "Unsqueeze"}


TAILS = {
    "y": "y",
    "batch first": "s = Squeeze(y, one)  y0 = Transpose<perm=[1, 0, 2]>(s)",
    "last step": "s = Squeeze(y, one)  v = Transpose<perm=[1, 0, 2]>(s)  y0 = Gather<axis=1>(v, minus)",
    "a mean": "s = Squeeze(y, one)  v = Transpose<perm=[1, 0, 2]>(s)  y0 = ReduceMean<keepdims=0>(v, one)",
    "slice": "s = Squeeze(y, one)  v = Transpose<perm=[1, 0, 2]>(s)  y0 = Slice(v, from, to, axes)",
    "gather several": "s = Squeeze(y, one)  y0 = Gather<axis=0>(s, several)",
    "unsqueeze": "s = Squeeze(y, one)  y0 = Unsqueeze(s, axes)",
    "split": "y0, z = Split<axis=0, num_outputs=2>(y)",
    "uneven split": "z, y0 = Split<axis=0>(y, sizes)",
    "states side by side": "c = Concat<axis=0>(y_h, y_c)  v = Gather<axis=0>(c, minus)  y0 = Relu(v)",
    "features first": "s = Squeeze(y, one)  y0 = Transpose<perm=[2, 1, 0]>(s)",
    "features": "s = Squeeze(y, one)  y0 = Slice(s, from, to, two)",
    "read twice": "s = Squeeze(y, one)  v = Transpose<perm=[1, 0, 2]>(s)  g = Gather<axis=1>(v, minus)  f = Flatten(v)"
    "  y0 = Concat<axis=1>(f, g)",
}


@pytest.mark.parametrize("tail", list(TAILS))
@pytest.mark.parametrize("also", ["", ", float[] y", ", float[] y_h, float[] y_c"])
def test_what_reads_a_layer(tail, also):
    text = TAILS[tail] if TAILS[tail] != "y" else "y0 = Identity(y)"
    model = net(
        "LSTM",
        outputs=f"float[] y0{also}",
        tail=text,
        one=np.array([1]),
        two=np.array([2]),
        minus=np.array(-1),
        several=np.array([2, 0]),
        axes=np.array([1]),
        sizes=np.array([1, 3]),
        **{"from": np.array([1]), "to": np.array([3])},
    )
    without_recurrent(check(model))


@pytest.mark.parametrize("shape", [[0, 0, -1], [T, -1, 2 * H], [0, 0, 2 * H], [T, 2, -1]])
def test_both_directions_side_by_side(shape):
    model = net(
        "GRU",
        'direction="bidirectional"',
        directions=2,
        x=f"float[{T},{2 if 2 in shape else 'N'},{IN}] x",
        outputs="float[] last, float[] all",
        tail="""t = Transpose<perm=[0, 2, 1, 3]>(y)  f = Reshape(t, shape)  all = Transpose<perm=[1, 0, 2]>(f)
                last = Gather<axis=1>(all, minus)""",
        shape=np.array(shape),
        minus=np.array(-1),
    )
    canonical = check(model)
    without_recurrent(canonical)
    assert not set(ops(canonical)) & {"Transpose", "Reshape"}


def test_squeeze_of_whatever_is_1():
    model = net("LSTM", x=f"float[{T},2,{IN}] x", outputs="float[] z", tail="z = Squeeze(y)")
    without_recurrent(check(model))


def test_another_reshape_reads_what_is_written():
    model = net("GRU", outputs="float[] z", tail="z = Reshape(y, shape)", shape=np.array([-1, H]))
    canonical = check(model)
    assert "Reshape" in ops(canonical)


# -------------------------------------------------------------------------------------------------- nets of torch, exported


def exported(kind: str, exporter: str, tmp_path, *, batch: int | None, **options):
    """A classifier on the last step, batch first; a fixed batch of `batch`, or a dynamic one."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(torch.nn, kind)(IN, H, batch_first=True, **options)
            self.fc = torch.nn.Linear(H * (2 if options.get("bidirectional") else 1), 3)

        def forward(self, x):
            y, states = self.rnn(x)
            h = states[0] if kind == "LSTM" else states
            return self.fc(y[:, -1]) + self.fc(y).mean(1), h[-1]

    net, x = Net().eval(), torch.randn(batch or 2, T, IN)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = None if batch else {"x": {0: torch.export.Dim("batch")}}
            torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = None if batch else {"input": {0: "batch"}}
            torch.onnx.export(net, (x,), path, dynamo=False, dynamic_axes=axes, input_names=["input"])
    return net, path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("GRU", {"num_layers": 2}),
        ("GRU", {"bidirectional": True}),
        ("RNN", {"nonlinearity": "relu"}),  # which dynamo writes out by itself
    ],
)
@pytest.mark.parametrize(("exporter", "batch"), list(itertools.product(["script", "dynamo"], [None, 1])))
def test_torch(kind, options, exporter, batch, tmp_path):
    torch = pytest.importorskip("torch")
    net, path = exported(kind, exporter, tmp_path, batch=batch, **options)
    canonical = check(path, size=batch or 2)
    without_recurrent(canonical)
    assert canonical.batch == ("freed" if batch else "dynamic")
    if (kind, exporter) == ("RNN", "dynamo"):
        return
    assert not set(ops(canonical)) & {"Transpose", "Reshape", "Expand"}  # axis 0 stays the batch
    run = session(canonical.to_onnx())
    x = torch.randn(3, T, IN)
    with torch.no_grad():
        expected = net(x)
    got = run.run(None, {run.get_inputs()[0].name: x.numpy()})
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-5)
    layer = "rnn" + ".l1" * ("num_layers" in options) + ".reverse" * ("bidirectional" in options)
    assert f"{layer}.t2.h" in canonical.scopes.values()


# ------------------------------------------------------------------- relevance, as in Arras et al. 2017, numpy and float64


def arras_lstm(x: np.ndarray, w: dict, fc: np.ndarray, target: int) -> tuple[float, np.ndarray]:
    """The logit and the relevance of one sample [T, in], read at the last step."""
    lstm = Lstm(w["w"][0].reshape(4, H, -1), w["r"][0].reshape(4, H, H), w["b"][0].reshape(2, 4, H).sum(0))
    h = lstm.run(x)
    logits = fc @ h[-1]
    Rh = np.zeros_like(h)
    Rh[-1] = epsilon(h[-1], fc[[target]], logits[[target]], logits[[target]])
    return logits[target], lstm.relevance(Rh)


@pytest.mark.filterwarnings("ignore::onnxcrp.result.NegativeLogitWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_relevance_of_an_lstm(bias):
    w = weights("LSTM")
    w["b"] *= bias
    fc = random(3, H)
    model = parse(
        f"""net (float[N,{T},{IN}] input) => (float[N,3] logits) {{
            x = Transpose<perm=[1, 0, 2]>(input)
            y = LSTM<hidden_size={H}>(x, w, r, b)
            s = Squeeze(y, one)
            z = Transpose<perm=[1, 0, 2]>(s)
            last = Gather<axis=1>(z, minus)
            logits = Gemm<transB=1>(last, fc) }}""",
        one=np.array([1]),
        minus=np.array(-1),
        fc=fc,
        **w,
    )
    x = np.random.default_rng(3).normal(size=[2, T, IN])
    expected = [arras_lstm(sample, w, fc.astype(np.float64), 1) for sample in x]
    explainer = Explainer(model, composite="epsilon")
    result = explainer.explain(x.astype(np.float32), target=1)
    for (logit, R), got, output in zip(expected, result.relevance["input"], result.explained[:, 1], strict=True):
        assert np.isclose(output, logit, rtol=1e-5)
        assert np.linalg.norm(got - R) < 1e-4 * np.linalg.norm(R)
        if not bias:
            assert np.isclose(got.sum(), logit, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::onnxcrp.result.NegativeLogitWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reset", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_relevance_is_conserved(kind, reset, direction):
    """Without biases the relevance of the input, and of the first states, is the logit."""
    d = 1 + (direction == "bidirectional")
    model = net(
        kind,
        f'direction="{direction}"' + f", linear_before_reset={reset}" * (kind == "GRU"),
        directions=d,
        x=f"float[N,{T},{IN}] input",
        inputs=f", float[N,{d},{H}] h0",
        operands="xt, w, r, , , h0t",
        bias=False,
        tail="p = Transpose<perm=[2, 0, 1, 3]>(y)  v = Flatten(p)  logits = Gemm<transB=1>(v, fc)",
        outputs="float[N,3] logits",
        fc=random(3, T * d * H),
    )
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["input"], ["xt"], perm=[1, 0, 2]))
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["h0"], ["h0t"], perm=[1, 0, 2]))
    rng = np.random.default_rng(2)
    x = {"input": rng.normal(size=[2, T, IN]), "h0": rng.normal(size=[2, d, H])}
    explainer = Explainer(model, composite="epsilon")
    result = explainer.explain({k: v.astype(np.float32) for k, v in x.items()}, target=2)
    total = sum(R.sum((1, 2)) for R in result.relevance.values())
    np.testing.assert_allclose(total, result.explained[:, 2], rtol=1e-3)


@pytest.mark.filterwarnings("ignore::onnxcrp.result.NegativeLogitWarning")
def test_a_constant_state_takes_its_share_as_a_bias():
    """Its relevance is lost as that of a bias is: h0 as an input has exactly what is missing."""
    fc, h0, c0 = random(3, H), random(1, 1, H), random(1, 1, H, seed=5)
    text = """({}) => (float[N,3] logits) {{
        xt = Transpose<perm=[1, 0, 2]>(x)
        y, y_h = LSTM<hidden_size=5>(xt, w, r, b, , h0, c0)
        h = Squeeze(y_h, zero)
        logits = Gemm<transB=1>(h, fc) }}"""
    constants = {"zero": np.array([0]), "fc": fc, **weights("LSTM")}
    inputs = f"float[N,{T},{IN}] x"
    fixed = parse(f"net {text.format(inputs)}", h0=h0, c0=c0, **constants)
    free = parse(f"net {text.format(inputs + f', float[1,N,{H}] h0, float[1,N,{H}] c0')}", **constants)
    x = np.random.default_rng(4).normal(size=[1, T, IN]).astype(np.float32)
    one = Explainer(fixed, composite="epsilon").explain(x, target=0)
    all_of_it = Explainer(free, composite="epsilon").explain({"x": x, "h0": h0, "c0": c0}, target=0)
    np.testing.assert_allclose(one.relevance["x"], all_of_it.relevance["x"], atol=1e-6)
    assert set(one.relevance) == {"x"}

"""Samples on axis 0. Oracle: onnxruntime on the file as it is, and the axes as the random nets' maker keeps book of them."""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from onnxcrp import Explainer
from onnxcrp.canonize import canonize
from onnxcrp.canonize.samples import FIRST, Layout, Place, places, two_batches
from onnxcrp.canonize.samples_first import samples_first
from onnxcrp.canonize.shapes import infer_shapes
from onnxcrp.canonize.write import write
from onnxcrp.cli import main
from onnxcrp.errors import InputError, QuestionError
from onnxcrp.facts import Facts
from tests.support.canonical import check, ops, parse, random, said, session

N = "N"
Axes = list[list[Any]]  # each axis: the sizes it was merged of, N among them


def sizes(axes: Axes, batch: int) -> list[int]:
    return [prod(batch if part == N else part for part in axis) for axis in axes]


class RandomNet:
    """Moves, merges and parts the axes of x [N, 2, 3, 4], computes on what is there, and ends with [N, ...].

    With `mixing`, a Reshape may put entries of one sample where those of another were; only sizes are booked then.
    """

    def __init__(self, seed: int, mixing: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.axes: dict[str, Axes] = {"x": [[N], [2], [3], [4]]}
        self.at = "x"
        for _ in range(int(self.rng.integers(4, 12))):
            steps = ["transpose", "merge", "part", "elementwise", "matmul", "along", "sum", "pick", "self"]
            getattr(self, str(self.rng.choice(steps + ["mix"] * 3 * mixing)))()
        self.finish()

    @property
    def here(self) -> Axes:
        return self.axes[self.at]

    def sample_axis(self) -> int:
        return next(i for i, axis in enumerate(self.here) if N in axis)

    def other_axis(self) -> int | None:
        found = [i for i in range(len(self.here)) if i != self.sample_axis()]
        return int(self.rng.choice(found)) if found else None

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def write(self, op: str, inputs: list[str], axes: Axes, **attributes: Any) -> None:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=out, **attributes))
        self.axes[out], self.at = axes, out

    def reshape(self, axes: Axes) -> None:
        shape = [-1 if N in axis else prod(axis) for axis in axes]
        self.write("Reshape", [self.at, self.constant(np.array(shape, np.int64))], axes)

    def transpose(self) -> None:
        perm = [int(i) for i in self.rng.permutation(len(self.here))]
        self.write("Transpose", [self.at], [self.here[i] for i in perm], perm=perm)

    def merge(self) -> None:
        if len(self.here) > 1:
            i = int(self.rng.integers(len(self.here) - 1))
            self.reshape([*self.here[:i], self.here[i] + self.here[i + 1], *self.here[i + 2 :]])

    def part(self) -> None:
        if merged := [i for i, axis in enumerate(self.here) if len(axis) > 1]:
            i = int(self.rng.choice(merged))
            k = int(self.rng.integers(1, len(self.here[i])))
            self.reshape([*self.here[:i], self.here[i][:k], self.here[i][k:], *self.here[i + 1 :]])

    def mix(self) -> None:
        rest, factors = prod(sizes(self.here, 1)), []
        for _ in range(int(self.rng.integers(0, 3))):
            factors.append(int(self.rng.choice([n for n in range(1, rest + 1) if rest % n == 0])))
            rest //= factors[-1]
        axes: Axes = [[factor] for factor in factors]
        axes.insert(int(self.rng.integers(len(axes) + 1)), [N, rest] if rest > 1 else [N])
        self.reshape(axes)

    def elementwise(self) -> None:
        shape = [1 if N in axis else prod(axis) for axis in self.here]
        shape = shape[int(self.rng.integers(len(shape) + 1)) :]
        name = self.constant(self.rng.normal(size=shape).astype(np.float32))
        self.write(str(self.rng.choice(["Add", "Mul", "Sub"])), [self.at, name], self.here)

    def self(self) -> None:
        source, axes = self.at, self.here
        self.write("Sigmoid", [source], axes)
        self.write("Mul", [source, self.at], axes)

    def matmul(self) -> None:
        if N not in self.here[-1] and len(self.here) > 1:
            width = prod(self.here[-1])
            W = self.constant(self.rng.normal(size=(width, 3)).astype(np.float32))
            self.write("MatMul", [self.at, W], [*self.here[:-1], [3]])

    def along(self) -> None:
        if (axis := self.other_axis()) is not None:
            self.write("Softmax", [self.at], self.here, axis=axis - len(self.here) * int(self.rng.integers(2)))

    def sum(self) -> None:
        if (axis := self.other_axis()) is not None:
            keep = int(self.rng.integers(2))
            axes = [[1] if i == axis else each for i, each in enumerate(self.here) if keep or i != axis]
            self.write("ReduceSum", [self.at, self.constant(np.array([axis]))], axes, keepdims=keep)

    def pick(self) -> None:
        if (axis := self.other_axis()) is None:
            return
        size = prod(self.here[axis])
        rest = [*self.here[:axis], [2], *self.here[axis + 1 :]]
        how = self.rng.choice(["Gather", "Slice", "Concat", "one"])
        if how == "Gather":
            self.write("Gather", [self.at, self.constant(self.rng.integers(0, size, 2))], rest, axis=axis)
        elif how == "one":
            self.write("Gather", [self.at, self.constant(np.array(0))], [*rest[:axis], *rest[axis + 1 :]], axis=axis)
        elif how == "Concat":
            self.write("Concat", [self.at, self.at], [*rest[:axis], [2 * size], *rest[axis + 1 :]], axis=axis)
        elif size > 1:
            bounds = [self.constant(np.array([i])) for i in (0, size - 1, axis)]
            self.write("Slice", [self.at, *bounds], [*rest[:axis], [size - 1], *rest[axis + 1 :]])

    def finish(self) -> None:
        self.reshape([[part] for axis in self.here for part in axis])
        at = self.sample_axis()
        perm = [at, *(i for i in range(len(self.here)) if i != at)]
        self.write("Transpose", [self.at], [self.here[i] for i in perm], perm=perm)
        self.reshape([[N], [1, *(part for axis in self.here[1:] for part in axis)]])

    def model(self) -> onnx.ModelProto:
        ports = [("x", ["N", 2, 3, 4]), (self.at, ["N", None])]
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports)
        weights = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "net", [x], [y], weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def layout(self, name: str) -> Layout:
        axes = self.axes[name]
        axis = next(i for i, each in enumerate(axes) if N in each)
        at = axes[axis].index(N)
        place = Place(axis, prod(axes[axis][:at]), prod(axes[axis][at + 1 :]))
        return Layout(place, tuple(sizes(axes, 1)))

    def moved(self, name: str, array: np.ndarray) -> np.ndarray:
        """The tensor with samples first."""
        place, one = self.layout(name)
        before, after = one[: place.axis], one[place.axis + 1 :]
        parted = array.reshape(*before, place.outer, -1, place.inner, *after)
        middle = [size for size in (place.outer, place.inner) if size > 1]
        return np.moveaxis(parted, place.axis + 1, 0).reshape(-1, *before, *middle, *after)


def values(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """All tensors of a model."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output)
    ran = session(model)
    names = [port.name for port in ran.get_outputs()]
    return dict(zip(names, ran.run(names, {"x": x}), strict=True))


@pytest.mark.parametrize("seed", range(150))
def test_random_nets(seed: int) -> None:
    """Where samples are is found as the net was made, every tensor holds the same numbers, and no axis 0 is another."""
    net = RandomNet(seed)
    graph = gs.import_onnx(net.model())
    infer_shapes(graph)
    found = places(graph, two_batches(graph))
    assert found == {name: net.layout(name) for name in net.axes}
    report = samples_first(graph)
    assert not report.declined
    elsewhere = [name for name, layout in found.items() if layout.place != FIRST]
    assert bool(report.done) == bool(elsewhere)
    infer_shapes(graph)
    assert all(layout.place == FIRST for layout in places(graph, two_batches(graph)).values())
    for batch in (1, 3):
        x = np.random.default_rng(1).normal(size=(batch, 2, 3, 4)).astype(np.float32)
        before, after = values(net.model(), x), values(write(graph), x)
        for name, array in before.items():
            np.testing.assert_allclose(after[name], net.moved(name, array), rtol=1e-5, atol=1e-6)
    canonical = check(net.model())
    assert Facts(canonical).shares_forward


@pytest.mark.parametrize("seed", range(150))
def test_nets_that_mix_samples(seed: int) -> None:
    """Whatever a Reshape does to samples, it does as well afterwards."""
    check(RandomNet(seed, mixing=True).model(), size=3)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_the_last_states_viewed_as_rows(kind: str, dynamo: bool, tmp_path: Path) -> None:
    """h_n [2, N, H] viewed as [N, 2 H] mixes samples, which happens: the explained model does so, too."""
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(torch.nn, kind)(3, 5, bidirectional=True, batch_first=True)
            self.head = torch.nn.Linear(10, 2)

        def forward(self, x: Any) -> Any:
            last = self.cell(x)[1]
            return self.head((last[0] if kind == "LSTM" else last).reshape(-1, 10))

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        options: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
        if dynamo:
            options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(
            Net().eval(), (torch.randn(3, 4, 3),), tmp_path / "net.onnx", dynamo=dynamo, **names, **options
        )
    check(tmp_path / "net.onnx", size=3)
    assert not Facts(canonize(tmp_path / "net.onnx")).shares_forward


def named(model: onnx.ModelProto) -> None:
    """Call nodes after what they write, so that layers are found by it."""
    for node in model.graph.node:
        node.name = node.output[0]


# ---- attention as it is written --------------------------------------------------------------------------------------
ATTENTION = """net (float[N,5,6] x) => (float[N,3] y) {
    t = Transpose<perm=[1,0,2]>(x)  q = MatMul(t, wq)  k = MatMul(t, wk)  v = MatMul(t, wv)
    q1 = Reshape(q, heads)  k1 = Reshape(k, heads)  v1 = Reshape(v, heads)
    q2 = Transpose<perm=[1,0,2]>(q1)  k2 = Transpose<perm=[1,2,0]>(k1)  v2 = Transpose<perm=[1,0,2]>(v1)
    s = MatMul(q2, k2)  a = Softmax<axis=-1>(s)  o = MatMul(a, v2)
    o1 = Transpose<perm=[1,0,2]>(o)  rows = Reshape(o1, merged)  out = Gemm(rows, wo)
    back = Reshape(out, parted)  b = Transpose<perm=[1,0,2]>(back)  z = Add(b, x)
    m = ReduceMean<keepdims=0>(z, one)  y = Gemm(m, head) }"""
SHAPES = {
    "heads": np.array([5, -1, 2]),
    "merged": np.array([-1, 6]),
    "parted": np.array([5, -1, 6]),
    "one": np.array([1]),
}


def attention() -> onnx.ModelProto:
    weights = {name: random(6, 6, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    model = parse(ATTENTION, **weights, head=random(6, 3), **SHAPES)
    named(model)
    return model


def test_attention_with_time_first() -> None:
    """Heads merged into the batch, rows [T N, C]: afterwards [N, T, heads, d] and [N, T, C], and no transpose is left over."""
    canonical = check(attention())
    facts = Facts(canonical)
    assert facts.shares_forward
    assert "17 tensors from Transpose 't' to Transpose 'b'" in said(canonical, "samples first", "done")
    assert ops(canonical).count("Transpose") == 4  # q, k, v and o between [T, heads] and [heads, T]
    shape = {t.name: t.shape[1:] for node in canonical.graph.nodes for t in node.outputs}
    assert shape["q1"] == [5, 3, 2]
    assert shape["s"] == [3, 5, 5]
    assert shape["rows"] == shape["out"] == [5, 6]


def alone_and_together(explainer: Explainer, x: np.ndarray, layer: str, concepts: int) -> None:
    """Records and conditions of several samples at once are those of one sample and one condition at a time."""
    masks = [{layer: [c]} for c in range(concepts)]
    together = explainer.explain(x, 1, record=[layer], seed="abs")
    split = explainer.explain(x, 1, conditions=masks, seed="abs").relevance["x"]
    for i, row in enumerate(x[:, None]):
        one = explainer.explain(row, 1, record=[layer], seed="abs")
        for many, single in ((together.relevance, one.relevance), (together.activation, one.activation)):
            np.testing.assert_allclose(many[layer][i], single[layer][0], rtol=1e-4, atol=1e-6)
        for j, mask in enumerate(masks):
            single = explainer.explain(row, 1, conditions=mask, seed="abs").relevance["x"]
            np.testing.assert_allclose(split[i, j], single[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["q", "out", "z"])
def test_conditions_on_attention(layer: str) -> None:
    x = np.random.default_rng(3).normal(size=(3, 5, 6)).astype(np.float32)
    alone_and_together(Explainer(attention(), "attnlrp"), x, layer, 4)


def test_attention_over_any_number_of_tokens() -> None:
    """[N, L, C] of a length that only the run knows: records of [L, N, C] are [N, L, C], and the net is moved."""
    model = parse(
        """net (float[N,L,6] x) => (float[N,3] y) { t = Transpose<perm=[1,0,2]>(x)  q = MatMul(t, w)  r = Relu(q)
            m = ReduceMean<keepdims=0>(r, zeroth)  y = MatMul(m, v) }""",
        w=random(6, 4), v=random(4, 3), zeroth=np.array([0]),
    )  # fmt: skip
    named(model)
    assert Facts(check(model, size=3)).shares_forward
    x = np.random.default_rng(3).normal(size=(3, 5, 6)).astype(np.float32)
    alone_and_together(Explainer(model, "epsilon"), x, "q", 4)


def test_a_mask_that_is_an_input() -> None:
    """[T, T] for all samples, added to scores [N heads, T, T] as [1, T, T]."""
    model = parse(
        """net (float[N,3,4,6] x, float[4,4] mask) => (float[N,3,4,6] y) { h = Reshape(x, heads)
            k = Transpose<perm=[0,2,1]>(h)  s = MatMul(h, k)  one = Unsqueeze(mask, zeroth)  z = Add(s, one)
            a = Softmax<axis=-1>(z)  o = MatMul(a, h)  y = Reshape(o, back) }""",
        heads=np.array([-1, 4, 6]), zeroth=np.array([0]), back=np.array([-1, 3, 4, 6]),
    )  # fmt: skip
    canonical = check(model)
    assert "6 tensors from Reshape" in said(canonical, "samples first", "done")
    assert not said(canonical, "samples first")


def test_operands_for_all_samples_get_the_axes_that_are_left() -> None:
    """[3, 1, 6] beside [3, N, 6], [1, 6] beside [2 N, 6] and beside [2 N 3, 6]; computed, so they are rearranged."""
    model = parse(
        """net (float[N,2,3,6] x, float[2,1,6] a, float[1,6] b) => (float[N,2,3,6] y) { two = Relu(a)  one = Relu(b)
            t = ReduceMean<keepdims=0>(x, last)  p = Transpose<perm=[1,0,2]>(t)  q = Add(p, two)
            f = Transpose<perm=[1,0,2]>(q)  r = Reshape(x, rows)  s = Mul(r, one)  u = Reshape(s, whole)
            d = Transpose<perm=[1,0,2,3]>(u)  v = Reshape(d, rows)  g = Mul(v, one)  h = Reshape(g, turned)
            w = Transpose<perm=[1,0,2,3]>(h)  e = Unsqueeze(f, last)  y = Add(w, e) }""",
        last=np.array([2]), rows=np.array([-1, 6]), whole=np.array([-1, 2, 3, 6]), turned=np.array([2, -1, 3, 6]),
    )  # fmt: skip
    canonical = check(model, size=3)
    assert not said(canonical, "samples first")
    assert {"Squeeze", "Unsqueeze"} <= set(ops(canonical))


def test_tokens_with_time_first() -> None:
    """Embeddings of ids [T, N]."""
    model = parse(
        """net (int64[N,5] ids) => (float[N,4] y) { t = Transpose<perm=[1,0]>(ids)  e = Gather(table, t)
            r = Relu(e)  m = ReduceMean<keepdims=0>(r, zeroth)  y = Identity(m) }""",
        table=random(7, 4), zeroth=np.array([0]),
    )  # fmt: skip
    canonical = check(model, size=3)
    assert Facts(canonical).shares_forward
    assert "Transpose" not in ops(canonical)


TIME_FIRST = {
    "a token for every sample": """s = Shape<start=1,end=2>(t)  size = Concat<axis=0>(one, s, six)
        e = Expand(token, size)  c = Concat<axis=0>(e, t)""",
    "a state that starts as zeros": """s = Shape<start=1,end=2>(t)  size = Concat<axis=0>(one, s, six)
        h = ConstantOfShape(size)  first = Gather<axis=0>(t, zero)  r = Add(h, first)  c = Concat<axis=0>(r, t)""",
    "zeros as rows beside the batch": """s = Shape<start=1,end=2>(t)  ten = Mul(s, five)
        size = Concat<axis=0>(ten, six)  h = ConstantOfShape(size)  rows = Reshape(x, flat)  r = Add(h, rows)
        p = Reshape(r, parted)  c = Transpose<perm=[1,0,2]>(p)""",
    "operands of lower rank": "m = ReduceMean<keepdims=0>(x, one)  c = Sub(t, m)",
}


@pytest.mark.parametrize("case", TIME_FIRST)
def test_time_first(case: str) -> None:
    model = parse(
        f"""net (float[N,5,6] x) => (float[N,4] y) {{ t = Transpose<perm=[1,0,2]>(x)  {TIME_FIRST[case]}
            l = MatMul(c, w)  n = Relu(l)  k = ReduceMean<keepdims=0>(n, nil)  y = Identity(k) }}""",
        one=np.array([1]), six=np.array([6]), five=np.array([5]), zero=np.array(0), nil=np.array([0]), w=random(6, 4),
        token=random(1, 1, 6), flat=np.array([-1, 6]), parted=np.array([-1, 5, 6]),
    )  # fmt: skip
    named(model)
    canonical = check(model, size=3)
    assert not said(canonical, "samples first")
    assert Facts(canonical).shares_forward
    x = np.random.default_rng(3).normal(size=(3, 5, 6)).astype(np.float32)
    alone_and_together(Explainer(model, "epsilon"), x, "l", 4)


def test_one_scale_for_all() -> None:
    model = parse(
        """net (float[N,5,6] x) => (float[N,5,6] y) { t = Transpose<perm=[1,0,2]>(x)  q = QuantizeLinear(t, scale, zero)
            d = DequantizeLinear(q, scale, zero)  y = Transpose<perm=[1,0,2]>(d) }""",
        scale=np.array(0.02, np.float32), zero=np.array(3, np.int8),
    )  # fmt: skip
    assert "Transpose" not in ops(check(model))


def test_an_output_with_time_first_is_explained_for_one_sample() -> None:
    model = parse(
        "net (float[N,5,6] x) => (float[5,N,3] y) { t = Transpose<perm=[1,0,2]>(x)  y = MatMul(t, w) }", w=random(6, 3)
    )
    explainer = Explainer(model, "epsilon")
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    assert explainer.explain(x[:1], (0, 0), seed="abs").relevance["x"].any()
    with pytest.raises(InputError, match="has samples on axis 1, not on axis 0"):
        explainer.explain(x, (0, 0), seed="abs")


# ---- what cannot be moved --------------------------------------------------------------------------------------------
CLIP = """net (float[N,4,3,6,6] x) => (float[N,2] y) {{ {} flat = Reshape(frames, merged)
    h = Conv<pads=[1,1,1,1]>(flat, w, b)  r = Relu(h)  p = ReduceMean<keepdims=0>(r, spatial) {} y = Gemm(m, v) }}"""
FRAMES = {  # frames of a clip beside the batch, as TimeDistributed layers have them
    "after samples": ("frames = Identity(x)", "c = Reshape(p, back)  m = ReduceMean<keepdims=0>(c, first)"),
    "before samples": (
        "frames = Transpose<perm=[1,0,2,3,4]>(x)",
        "c = Reshape(p, forth)  m = ReduceMean<keepdims=0>(c, zeroth)",
    ),
}


def clip(order: str) -> onnx.ModelProto:
    model = parse(
        CLIP.format(*FRAMES[order]),
        merged=np.array([-1, 3, 6, 6]), spatial=np.array([2, 3]), back=np.array([-1, 4, 5]), forth=np.array([4, -1, 5]),
        first=np.array([1]), zeroth=np.array([0]), w=random(5, 3, 3, 3), b=random(5), v=random(5, 2),
    )  # fmt: skip
    named(model)
    return model


@pytest.mark.parametrize("order", FRAMES)
def test_a_convolution_over_frames_stays(order: str, tmp_path: Path) -> None:
    """Windows need [N, C, H, W]: the model is left as it was; frames are seen in their place, whatever their order."""
    canonical = check(clip(order))
    assert "Conv 'h' cannot be renumbered" in said(canonical, "samples first")
    assert not Facts(canonical).shares_forward
    onnx.save(clip(order), tmp_path / "clip.onnx")
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "clip.onnx"), "--composite", "epsilon_plus_flat"])
    assert "the sample is repeated for every condition: axis 0 is not the batch at" in shown.output
    explainer = Explainer(clip(order), "epsilon_plus_flat")
    shape = {layer.name: layer.shape for layer in explainer.layers}
    assert shape["h"][1:] == (4, 5, 6, 6)
    x = np.random.default_rng(3).normal(size=(3, 4, 3, 6, 6)).astype(np.float32)
    mask = np.zeros((1, 4, 1, 1, 1), np.float32)
    mask[0, 2] = 1  # one frame
    kept = explainer.explain(x, 1, conditions={"h": mask}, seed="abs")
    assert kept.relevance["x"].reshape(3, 4, -1).any(2).sum(1).tolist() == [1, 1, 1]
    assert kept.relevance["x"].reshape(3, 4, -1)[:, 2].any()
    together = explainer.explain(x, 1, record=["h"], seed="abs")
    for i in range(3):  # one sample alone has its frames in order, whichever way
        alone = values(clip(order), x[i : i + 1])["h"].reshape(4, 5, 6, 6)
        np.testing.assert_allclose(together.activation["h"][i], alone, rtol=1e-4, atol=1e-6)
        single = explainer.explain(x[i : i + 1], 1, record=["h"], seed="abs").relevance["h"][0]
        np.testing.assert_allclose(together.relevance["h"][i], single, rtol=1e-4, atol=1e-6)


def test_a_layer_whose_samples_cannot_be_found() -> None:
    """Rows picked among those of all samples: as many as before, and nobody knows whose each is."""
    model = parse(
        """net (float[N,2,3] x, int64[N,6] i) => (float[N,4] y) { rows = Reshape(x, flat)  at = Reshape(i, flat)
            d = GatherElements<axis=0>(rows, at)  z = MatMul(d, w)  y = Reshape(z, parted) }""",
        flat=np.array([-1, 3]), parted=np.array([-1, 4]), w=random(3, 2),
    )  # fmt: skip
    named(model)
    explainer = Explainer(model, "epsilon")
    x = {"x": random(1, 2, 3), "i": np.array([[0, 1, 0, 1, 1, 0]])}
    assert explainer.explain(x, 1, seed="abs").relevance["x"].any()
    with pytest.raises(QuestionError, match="in what order z holds its samples is not known"):
        explainer.explain(x, 1, record=["z"])
    with pytest.raises(QuestionError, match="in what order z holds its samples is not known"):
        explainer.explain(x, 1, conditions={"z": [0]})


DECLINED = {
    "a scale for each sample": (
        """t = Transpose<perm=[1,0,2]>(x)  m = ReduceMean<keepdims=0>(x, one)  l = LayerNormalization<axis=-1>(t, m)
        y = Transpose<perm=[1,0,2]>(l)""",
        "differs from sample to sample",
    ),
    "a shape of nothing": (
        "t = Transpose<perm=[1,0,2]>(x)  n = Shape<start=1,end=1>(t)  y = Transpose<perm=[1,0,2]>(t)  z = Identity(n)",
        "asks for no size",
    ),
    "sizes that an input tells": ("t = Transpose<perm=[1,0,2]>(x)  y = Reshape(t, sizes)", "is not known"),
    "an output with rows": ("rows = Reshape(x, flat)  y = Relu(rows)", "is an input or output"),
    "softmax over all rows": (
        "rows = Reshape(x, flat)  s = Softmax<axis=0>(rows)  y = Reshape(s, whole)",
        "along the axis",
    ),
    "samples as entries of a matrix": (
        "t = Transpose<perm=[2,1,0]>(x)  g = MatMul(u, t)  y = Transpose<perm=[2,1,0]>(g)",
        "entries of its matrices",
    ),
}


def test_regions_are_moved_one_by_one() -> None:
    """A convolution over frames keeps its region where it is, attention elsewhere in the net is moved all the same."""
    model = parse(
        """net (float[N,4,6] x, float[N,2,3,5] clip) => (float[N,4,6] y, float[N,2,4] z) {
            t = Transpose<perm=[1,0,2]>(x)  q = MatMul(t, w)  r = Relu(q)  y = Transpose<perm=[1,0,2]>(r)
            flat = Reshape(clip, merged)  h = Conv(flat, kernel)  z = Reshape(h, parted) }""",
        w=random(6, 6), merged=np.array([-1, 3, 5]), kernel=random(4, 3, 5), parted=np.array([-1, 2, 4]),
    )  # fmt: skip
    canonical = check(model)
    assert "3 tensors" in said(canonical, "samples first", "done")
    assert "Conv" in said(canonical, "samples first")
    assert ops(canonical) == ["Linear", "Relu", "Reshape", "Conv", "Reshape"]


def test_regions_that_meet_later_are_one() -> None:
    """Two transposed inputs, added in the end, the second a sum of two itself."""
    model = parse(
        """net (float[N,4,6] a, float[N,4,6] b, float[N,4,6] c) => (float[N,4,6] y) {
            t = Transpose<perm=[1,0,2]>(a)  u = Transpose<perm=[1,0,2]>(b)  v = Transpose<perm=[1,0,2]>(c)
            p = Relu(t)  q = Sigmoid(v)  r = Add(u, v)  s = Mul(p, r)  k = Sub(s, q)  y = Transpose<perm=[1,0,2]>(k) }"""
    )
    canonical = check(model)
    assert "8 tensors" in said(canonical, "samples first", "done")
    assert "Transpose" not in ops(canonical)


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case: str) -> None:
    text, reason = DECLINED[case]
    model = parse(
        f"net (float[N,2,3] x, int64[2] sizes) => (float[] y) {{ {text} }}",
        flat=np.array([-1, 3]), whole=np.array([-1, 2, 3]), u=random(4, 2), one=np.array([1]),
    )  # fmt: skip
    graph = gs.import_onnx(model)
    infer_shapes(graph)
    before = write(graph).SerializeToString()
    report = samples_first(graph)
    assert not report.done
    assert reason in report.declined[0]
    assert write(graph).SerializeToString() == before


def test_the_shape_of_a_moved_tensor_is_what_it_was() -> None:
    """Shape of [2 N, 3] and of [3, N]: read by something that needs its numbers."""
    model = parse(
        """net (float[N,2,3] x) => (float[N,6] y, int64[] s, int64[] t, int64[] u) { rows = Reshape(x, flat)
            r = Relu(rows)  s = Shape(r)  u = Shape<start=1>(r)  w = Reshape(r, whole)  p = Transpose<perm=[2,0,1]>(w)
            q = Neg(p)  t = Shape(q)  v = Transpose<perm=[1,2,0]>(q)  y = Flatten(v) }""",
        flat=np.array([-1, 3]), whole=np.array([-1, 2, 3]),
    )  # fmt: skip
    graph = gs.import_onnx(model)
    infer_shapes(graph)
    assert samples_first(graph).done
    x = np.zeros((5, 2, 3), np.float32)
    found = session(write(graph)).run(["s", "t", "u"], {"x": x})
    assert [each.tolist() for each in found] == [[10, 3], [3, 5, 2], [3]]


# ---- torch's as_strided ------------------------------------------------------------------------------------------------
STRIDED = """net (float[N,2,3] x) => (float[] y) { all = Reshape(x, flat)  count = Shape<start=0,end=1>(x)
    n = Squeeze(count)  range = Range(zero, n, one)  steps = Mul(range, stride)  lifted = Unsqueeze(steps, axes)
    i = Add(lifted, offsets)  y = Gather<axis=0>(all, i) }"""


def strided(offsets: Any, stride: Any = 6, axes: tuple[int, ...] = (1, 2)) -> onnx.ModelProto:
    return parse(
        STRIDED, flat=np.array([-1]), zero=np.array(0), one=np.array(1), stride=np.array(stride), axes=np.array(axes),
        offsets=np.array(offsets),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("offsets", "kind"),
    [
        ([[0, 1], [2, 3], [4, 5]], "Reshape"),
        ([[0, 1, 2, 3, 4, 5]], "Reshape"),
        ([[0, 3], [1, 4]], "Gather"),
        ([[5]], "Gather"),
    ],
)
def test_views_by_stride(offsets: list[list[int]], kind: str) -> None:
    canonical = check(strided([offsets]), size=3)
    assert ops(canonical)[-1] == kind
    assert "Range" not in ops(canonical)
    assert Facts(canonical).shares_forward


@pytest.mark.parametrize(
    ("range", "steps"),
    [
        ("Range(zero, n, one)", "few = Cast<to=2>(range)  steps = Cast<to=7>(few)"),  # uint8 holds 255 at most
        ("Range(zero, m, half)", "steps = Cast<to=7>(range)"),  # 0, 1.5, 3
    ],
)
def test_counts_that_are_not_the_samples_stay(range: str, steps: str) -> None:
    model = parse(
        f"""net (float[N,2,3] x) => (float[] y) {{ all = Reshape(x, flat)  count = Shape<start=0,end=1>(x)
            n = Squeeze(count)  m = Cast<to=1>(n)  range = {range}  {steps}  times = Mul(steps, stride)
            lifted = Unsqueeze(times, axes)  i = Add(lifted, offsets)  y = Gather<axis=0>(all, i) }}""",
        flat=np.array([-1]), one=np.array(1), stride=np.array(6), axes=np.array([1]), offsets=np.array([[0, 1]]),
        zero=np.array(0) if "n" in range else np.array(0, np.float32), half=np.array(1.5, np.float32),
    )  # fmt: skip
    assert "Range" in ops(canonize(model))


def test_views_by_stride_with_axes_counted_from_the_end() -> None:
    assert ops(check(strided([[0, 1, 2], [3, 4, 5]], axes=(-1, -2)), size=3))[-1] == "Reshape"


@pytest.mark.parametrize(
    ("offsets", "stride", "axes"),
    [
        ([[[0, 6]]], 6, (1, 2)),  # an entry of the next sample
        ([[[-1]]], 6, (1, 2)),  # of the one before
        ([[[0, 1]]], 5, (1, 2)),  # samples have 6 entries
        ([0], 6, (0,)),  # samples along axis 1
        ([0], 6, (-2,)),
        ([[0]], [[6]], (1,)),  # the same by the factor's shape
        ([[[0]], [[1]]], 6, (1, 2)),  # sample by sample something else
    ],
)
def test_other_picks_stay(offsets: Any, stride: Any, axes: tuple[int, ...]) -> None:
    assert "Range" in ops(canonize(strided(offsets, stride, axes)))

"""Kernel machines. Oracle: the formulas of Bach et al. 2015 in numpy and float64, one support vector after the other;
derivatives by central differences; a machine that is computed by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
import onnx.parser
import pytest

import onnxcrp
from onnxcrp.analysis.verify import verify
from tests.test_canonize_kernels import single

D, S = 4, 6
GAMMA, COEF0, DEGREE = 0.4, 0.3, 3.0
RNG = np.random.default_rng(0)
V, X = RNG.normal(size=[S, D]), RNG.normal(size=[3, D])
RHO = 0.7


def rbf(x, v):
    return np.exp(-GAMMA * ((x - v) ** 2).sum())


def polynomial(x, v):
    return (GAMMA * x @ v + COEF0) ** DEGREE


def sigmoid(x, v):
    return np.tanh(GAMMA * x @ v + COEF0)


KERNELS: dict[str, Callable] = {"RBF": rbf, "POLY": polynomial, "SIGMOID": sigmoid}
ALPHA = RNG.normal(size=S)


def function(kernel: Callable, alpha: np.ndarray = ALPHA, rho: float = RHO) -> Callable[[np.ndarray], float]:
    return lambda x: sum(a * kernel(x, v) for a, v in zip(alpha, V, strict=True)) + rho


def derivative(f: Callable, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    return np.array([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(D)])


def regressor(kernel: str) -> onnx.ModelProto:
    return single(
        "SVMRegressor", kernel_type=kernel, kernel_params=[GAMMA, COEF0, DEGREE], n_supports=S, rho=[RHO],
        support_vectors=V.ravel().tolist(), coefficients=ALPHA.tolist(), shape=("N", D),
    )  # fmt: skip


def relevance(model: onnx.ModelProto, composite: str, x: np.ndarray = X, target=0, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        result = onnxcrp.Explainer(model, composite).explain(x.astype(np.float32), target=target, **options)
    (R,) = result.relevance.values()
    return R


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("at", ["sample", "reference"])
@pytest.mark.parametrize("reference", [0.0, -0.5, (0.1, -0.2, 0.3, 1.0)])
def test_taylor(kernel: str, at: str, reference) -> None:
    """(x - x0) df/dx + f(x0) / D, the derivative at the sample or at x0."""
    f = function(KERNELS[kernel])
    x0 = np.broadcast_to(np.asarray(reference, np.float64), D)
    expected = [(x - x0) * derivative(f, x if at == "sample" else x0) + f(x0) / D for x in X]
    found = relevance(regressor(kernel), f"epsilon(reference={reference}, at='{at}', stabilizer=1e-12)")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_taylor_at_the_boundary_conserves(kernel: str) -> None:
    """x0 = x - f g / |g|^2 is where the tangent at the sample vanishes: (x - x0) g."""
    f = function(KERNELS[kernel])
    gradients = [derivative(f, x) for x in X]
    expected = [f(x) * g * g / (g @ g) for x, g in zip(X, gradients, strict=True)]
    found = relevance(regressor(kernel), "epsilon(reference='boundary')")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), [f(x) for x in X], rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_transpose_is_the_derivative(kernel: str) -> None:
    f = function(KERNELS[kernel])
    np.testing.assert_allclose(
        relevance(regressor(kernel), "gradient"), [derivative(f, x) for x in X], rtol=1e-4, atol=1e-5
    )


def test_by_hand() -> None:
    """One vector v = (1, 2), K = (x.v + 1)^2, f = 2 K - 8 at x = (1, 0): K = 4, f = 0 + ... = 0; at x = (2, 0): 2 * 9 - 8 = 10.

    df/dx = 2 * 2 (x.v + 1) v = 12 v = (12, 24); with x0 = 0: f(0) = 2 - 8 = -6: R = (2 * 12 - 3, 0 - 3).
    """
    model = single("SVMRegressor", kernel_type="POLY", kernel_params=[1.0, 1.0, 2.0], n_supports=1, rho=[-8.0],
                   support_vectors=[1.0, 2.0], coefficients=[2.0], shape=("N", 2))  # fmt: skip
    np.testing.assert_allclose(relevance(model, "epsilon", np.array([[2.0, 0.0]])), [[21, -3]], rtol=1e-5)
    np.testing.assert_allclose(
        relevance(model, "epsilon(reference=(1, 0))", np.array([[2.0, 0.0]])), [[12, 0]], rtol=1e-5, atol=1e-5
    )  # f(1, 0) = 0: a root


# ------------------------------------------------------------------------------------------------------------- by share

INTERSECTION = """
    <ir_version: 10, opset_import: ["" : 18]>
    machine (float[N, 4] x) => (float[N, 2] y)
    {
        one = Constant <value = int64[1] {1}> ()
        two = Constant <value = int64[1] {2}> ()
        apart = Unsqueeze (x, one)
        smaller = Min (ORDER)
        K = ReduceSum <keepdims = 0> (smaller, two)
        y = Gemm <transB = 1> (K, alpha, b)
    }
"""
H, HX = np.abs(V), np.abs(X)
WEIGHTS, BIAS = RNG.normal(size=[2, S]), np.array([0.5, -1.5])


def intersection(order: str = "apart, V", bias: np.ndarray = BIAS) -> onnx.ModelProto:
    model = onnx.parser.parse_model(INTERSECTION.replace("ORDER", order))
    for name, array in {"V": H[None], "alpha": WEIGHTS, "b": bias}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return model


@pytest.mark.parametrize("order", ["apart, V", "V, apart"])
def test_histogram_intersection_by_share(order: str) -> None:
    """R_d = sum_s alpha_s min(x_d, v_sd) + b / D, for one output and for the difference of two."""
    explainer = onnxcrp.Explainer(intersection(order), "epsilon")
    assert [node.op for node in explainer.canonical.graph.nodes] == ["SumKernel"]
    shares = np.stack([[sum(w[s] * np.minimum(x, H[s]) for s in range(S)) + b / D for w, b in zip(WEIGHTS, BIAS, strict=True)]
                       for x in HX])  # [N, P, D]  # fmt: skip
    np.testing.assert_allclose(relevance(intersection(order), "epsilon", HX), shares[:, 0], rtol=1e-4, atol=1e-5)
    both = relevance(intersection(order), "epsilon", HX, target={0: 1, 1: -1})
    np.testing.assert_allclose(both, shares[:, 0] - shares[:, 1], rtol=1e-4, atol=1e-5)
    dropped = relevance(intersection(order), "epsilon(bias='drop')", HX)
    f = shares[:, 0].sum(1)
    without = shares[:, 0] - BIAS[0] / D
    np.testing.assert_allclose(dropped, without * (f / (f - BIAS[0]))[:, None], rtol=1e-4, atol=1e-5)
    steps = [derivative(lambda y: WEIGHTS[0] @ np.minimum(y, H).sum(1), x) for x in HX]
    np.testing.assert_allclose(relevance(intersection(order), "gradient", HX), steps, rtol=1e-4, atol=1e-5)


def test_linear_machines_by_share(tmp_path) -> None:
    """R_d = sum_s alpha_s x_d v_sd + b / D, of an SVM and of a LinearClassifier, where a composite asks for it."""
    path = tmp_path / "share.toml"
    path.write_text('extends = "base"\n[[layer]]\nop = "dense"\nrule = "share"\n')
    np.testing.assert_allclose(
        relevance(regressor("LINEAR"), str(path)), X * (ALPHA @ V) + RHO / D, rtol=1e-4, atol=1e-5
    )
    classifier = single("LinearClassifier", outputs=2, shape=("N", D), classlabels_ints=[0, 1],
                        coefficients=WEIGHTS[:, :D].ravel().tolist(), intercepts=BIAS.tolist())  # fmt: skip
    np.testing.assert_allclose(
        relevance(classifier, str(path), target=1), X * WEIGHTS[1, :D] + BIAS[1] / D, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("spelling", ["Mul", "Pow", "Neg"])
def test_a_machine_spelled_in_standard_operators_is_one_node(spelling: str) -> None:
    """exp(-gamma |x - v|^2) as exporters write it; its relevance is that of the same SVMRegressor."""
    square = {"Mul": "Mul (d, d)", "Pow": "Pow (d, p)", "Neg": "Pow (d, p)"}[spelling]
    scale = {"Mul": "e = Mul (q, g)", "Pow": "e = Mul (g, q)", "Neg": "n = Neg (q) e = Mul (n, h)"}[spelling]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        machine (float[N, 4] x) => (float[N, 1] y) <float g = {{{-GAMMA}}}, float h = {{{GAMMA}}}, float p = {{2.0}}>
        {{
            one = Constant <value = int64[1] {{1}}> ()
            last = Constant <value = int64[1] {{-1}}> ()
            apart = Unsqueeze (x, one)
            d = Sub (apart, V)
            s = {square}
            q = ReduceSum <keepdims = 0> (s, last)
            {scale}
            K = Exp (e)
            y = Gemm <transB = 1> (K, alpha, b)
        }}
    """)
    for name, array in {"V": V, "alpha": ALPHA[None], "b": np.array([RHO])}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    assert [node.op for node in onnxcrp.Explainer(model).canonical.graph.nodes] == ["Kernel"]
    np.testing.assert_allclose(
        relevance(model, "epsilon"), relevance(regressor("RBF"), "epsilon"), rtol=1e-4, atol=1e-6
    )


def test_machines_that_share_their_vectors_and_go_on() -> None:
    """Two machines of one V, which a third branch reads in its own shape, and their sum: nothing gets lost or mixed."""
    machine = """d{0} = Sub (apart, V) s{0} = Mul (d{0}, d{0}) q{0} = ReduceSum <keepdims = 0> (s{0}, last)
        e{0} = Mul (q{0}, g) K{0} = Exp (e{0}) f{0} = MatMul (K{0}, alpha{0})"""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        machines (float[N, 4] x) => (float[N, 1] y, float[N, {S}, 4] z) <float g = {{{-GAMMA}}}>
        {{
            one = Constant <value = int64[1] {{1}}> ()
            last = Constant <value = int64[1] {{-1}}> ()
            apart = Unsqueeze (x, one)
            z = Add (apart, V)
            {machine.format(1)} {machine.format(2)}
            y = Add (f1, f2)
        }}
    """)
    alphas = {"alpha1": ALPHA, "alpha2": np.abs(ALPHA[::-1])}
    for name, array in {"V": V[None], **{name: alpha[:, None] for name, alpha in alphas.items()}}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    explainer = onnxcrp.Explainer(model, "epsilon(reference='boundary', stabilizer=1e-12)", output="y")
    assert [node.op for node in explainer.canonical.graph.nodes].count("Kernel") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        result = explainer.explain(X.astype(np.float32), target=0)
    machines = [function(rbf, alpha, 0.0) for alpha in alphas.values()]
    np.testing.assert_allclose(result.output[:, 0], [sum(f(x) for f in machines) for x in X], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.outputs["z"], X[:, None] + V, rtol=1e-5, atol=1e-6)
    expected = [sum(f(x) * (g := derivative(f, x)) * g / (g @ g) for f in machines) for x in X]  # each its own share
    np.testing.assert_allclose(result.relevance["x"], expected, rtol=1e-3, atol=1e-5)


def test_a_kernel_that_something_else_reads_stays_in_parts() -> None:
    model = intersection()
    model.graph.output.append(oh.make_tensor_value_info("K", onnx.TensorProto.FLOAT, ["N", S]))
    ops = [node.op for node in onnxcrp.Explainer(model, "epsilon", output="y").canonical.graph.nodes]
    assert ops == ["Unsqueeze", "Min", "ReduceSum", "Linear"]


# ------------------------------------------------------------------------------------------------------- scikit-learn


def fitted(name: str, classes: int):
    """A fitted pipeline, its model, and fresh samples."""
    sklearn_svm, skl2onnx = pytest.importorskip("sklearn.svm"), pytest.importorskip("skl2onnx")
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    rng = np.random.default_rng(1)
    x = (rng.normal(size=[90, 5]) * [1, 2, 3, 1, 1] + 1).astype(np.float32)
    labels = (x[:, 0] > 1).astype(int) + (x[:, 1] > 2) * (classes - 2)
    before = {"PCA": lambda: (StandardScaler(), PCA(3)), "Normalizer": lambda: (StandardScaler(), Normalizer())}[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # skl2onnx asks for what scikit-learn is about to drop
        pipeline = make_pipeline(*before, sklearn_svm.SVC(kernel="rbf", gamma=0.3)).fit(x, labels)
        model = skl2onnx.to_onnx(pipeline, x[:1], target_opset={"": 18, "ai.onnx.ml": 3}, options={"zipmap": False})
    return pipeline, model, (rng.normal(size=[4, 5]) + 1).astype(np.float32)


def test_standard_scaler_pca_and_svc() -> None:
    """Two classes, f in column 0: p df/dp + f(0) / 3 at the components, epsilon through the projection, the scaler passes."""
    pipeline, model, x = fitted("PCA", 2)
    scaler, pca, svc = (step for _, step in pipeline.steps)
    z = scaler.transform(x.astype(np.float64))
    p = (z - pca.mean_) @ pca.components_.T

    def f(v: np.ndarray) -> float:
        return float(svc.decision_function(v[None])[0])

    h = 1e-5
    R = np.array([[v[d] * (f(v + h * e) - f(v - h * e)) / (2 * h) + f(np.zeros(3)) / 3 for d, e in enumerate(np.eye(3))]
                  for v in p])  # fmt: skip
    terms = (z - pca.mean_)[:, None] * pca.components_  # [N, 3, 5]
    expected = (terms * (R / p)[:, :, None]).sum(1)
    np.testing.assert_allclose(relevance(model, "epsilon(epsilon=1e-9)", x, target=0), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["PCA", "Normalizer"])
@pytest.mark.parametrize("classes", [2, 3])
def test_pipelines_conserve_at_the_boundary(name: str, classes: int) -> None:
    _, model, x = fitted(name, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        for target in range(classes):
            result = onnxcrp.Explainer(model, "epsilon(reference='boundary')").explain(x, target=target)
            (R,) = result.relevance.values()
            rest = result.explained[:, target] - R.sum(1)
            votes = np.round(rest) if classes > 2 else 0  # of one against one, which are added and carry nothing
            assert np.abs(rest - votes).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "composite", ["epsilon", "epsilon(reference=0.3, at='reference')", "epsilon(reference='boundary')"]
)
def test_verify_itemises_what_the_expansion_leaves_out(kernel: str, composite: str) -> None:
    report = verify(regressor(kernel), X[:1].astype(np.float32), composite=composite, target=0, float64=True)
    assert report.ok, [check.detail for check in report.checks]
    f = function(KERNELS[kernel])
    R = relevance(regressor(kernel), composite, X[:1])
    assert report.losses["remainder"] == pytest.approx(f(X[0]) - R.sum(), rel=1e-3, abs=1e-4)


def test_verify_of_an_intersection() -> None:
    for composite in ("epsilon", "epsilon(bias='drop')"):
        report = verify(intersection(), HX[:1].astype(np.float32), composite=composite, target=0, float64=True)
        assert report.ok, [check.detail for check in report.checks]
        assert report.losses["not itemised"] == 0
        assert report.losses["stabilizer"] < 1e-5


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('op = "Kernel"\nrule = "share"', "rule share is for kernels that are sums over features"),
        (
            'op = "Kernel"\nrule = "taylor"\nreference = "boundary"\nat = "reference"',
            "boundary is found from the sample",
        ),
        ('op = "Kernel"\nrule = "taylor"\nreference = "root"', "reference must be a number"),
        ('op = "Kernel"\nrule = "taylor"\nat = "root"', 'at must be "sample" or "reference"'),
        ('op = "Kernel"\nrule = "taylor"\nreference = [1.0, 2.0]', "2 reference values for 4 features"),
    ],
)
def test_composite_errors(tmp_path, line: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'extends = "base"\n[[layer]]\n{line}\n')
    with pytest.raises(onnxcrp.CompositeError, match=said):
        onnxcrp.compile(regressor("RBF"), path)

"""Oracle: the original model on onnxruntime, written by hand or converted from scikit-learn by skl2onnx."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from onnxcrp.canonize import Canonical, canonize
from tests.support.canonical import distance, ops, random, said, session, spelling

C = 3
X = np.random.default_rng(0).normal(size=[5, C]).astype(np.float32)


def single(op: str, *, outputs: int = 1, kind: int = onnx.TensorProto.FLOAT, shape=("N", C), **attributes):
    """A model of one node of ai.onnx.ml."""
    names = ["y", "z"][:outputs]
    node = oh.make_node(op, ["x"], names, name=op, domain="ai.onnx.ml", **attributes)
    graph = oh.make_graph(
        [node],
        "net",
        [oh.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name=name) for name in names],
    )
    domains = [oh.make_opsetid("", 18), oh.make_opsetid("ai.onnx.ml", 3)]
    return oh.make_model(graph, opset_imports=domains, ir_version=8)


def check(model: onnx.ModelProto, *samples: np.ndarray, tolerance: float = 1e-5) -> Canonical:
    """Canonize; the same outputs, standard operators alone, and nothing left to do after that."""
    before = model.SerializeToString()
    canonical = canonize(model)
    assert model.SerializeToString() == before
    written = canonical.to_onnx()
    assert {node.domain for node in written.graph.node} <= {""}
    assert {entry.domain for entry in written.opset_import} == {""}
    onnx.checker.check_model(written)
    original, ours = session(model), session(written)
    assert [t.name for t in ours.get_outputs()] == [t.name for t in original.get_outputs()]
    for x in samples:
        feed = {original.get_inputs()[0].name: x}
        for tensor, a, b in zip(original.get_outputs(), original.run(None, feed), ours.run(None, feed), strict=True):
            if isinstance(a, list):  # a ZipMap's dictionaries, by class
                a = np.array([list(row.values()) for row in a], np.float32)
            if a.dtype.kind in "OU":
                np.testing.assert_array_equal(a, b)
            else:
                assert distance(a, b) <= tolerance, f"{tensor.name}: {a} {b}"
    kinds = {node.attrs.get("kind") for node in canonical.graph.nodes}
    if not kinds & {"polynomial", "sigmoid"}:  # which are networks with a hidden layer once they are written
        assert spelled(canonize(written)) == spelled(canonical), "canonizing twice is not canonizing once"
    assert not said(canonical, "ai.onnx.ml")
    return canonical


def spelled(canonical: Canonical) -> list[tuple]:
    """Strings by what they say, not by where they lie."""
    for tensor in (tensor for node in canonical.graph.nodes for tensor in node.inputs):
        if getattr(tensor, "values", np.zeros(0)).dtype == object:
            tensor.values = tensor.values.astype(str)
    return spelling(canonical)


# ---------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    ("offset", "scale"), [([0.5], [2.0]), ([1.0, 2.0, 3.0], [0.5, 1.0, -2.0]), ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])]
)
def test_scaler(offset, scale):
    canonical = check(single("Scaler", offset=offset, scale=scale), X)
    assert set(ops(canonical)) <= {"Sub", "Mul"}


def test_scaler_of_integers():
    model = single("Scaler", kind=onnx.TensorProto.INT64, offset=[1.0], scale=[0.5])
    assert ops(check(model, (X * 10).astype(np.int64))) == ["Cast", "Sub", "Mul"]


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_normalizer(norm):
    rows = np.array([[1, -3, 2], [0, 0, 0], [-1, -2, -4]], np.float32)
    check(single("Normalizer", norm=norm), X, rows)


@pytest.mark.parametrize("replaced", [0.0, float("nan")])
@pytest.mark.parametrize("imputed", [[7.0], [7.0, 8.0, 9.0]])
def test_imputer(replaced, imputed):
    x = X.copy()
    x[0, 1] = x[2, 2] = replaced
    check(single("Imputer", imputed_value_floats=imputed, replaced_value_float=replaced), x)


def test_imputer_of_integers():
    model = single("Imputer", kind=onnx.TensorProto.INT64, imputed_value_int64s=[7], replaced_value_int64=-1)
    check(model, np.array([[1, -1, 2]]))


@pytest.mark.parametrize("at", [[0, 2], [1], [2, 2, 0]])
def test_array_feature_extractor(at):
    model = single("ArrayFeatureExtractor")
    model.graph.node[0].input.append("at")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([at]), "at"))
    assert ops(check(model, X)) == ["Gather"]


def test_feature_vectorizer():
    model = single("FeatureVectorizer", inputdimensions=[C, C])
    model.graph.node[0].input.append("x")
    assert ops(check(model, X)) == ["Concat"]


# ---------------------------------------------------------------------------------------------------- linear models

W = random(4, C)
LINEAR = {"coefficients": W.ravel().tolist(), "intercepts": random(4).tolist()}


@pytest.mark.parametrize("post", ["NONE", "LOGISTIC", "SOFTMAX"])
def test_linear_regressor(post):
    canonical = check(single("LinearRegressor", targets=4, post_transform=post, **LINEAR), X)
    np.testing.assert_array_equal(canonical.graph.nodes[0].inputs[1].values, W)


@pytest.mark.parametrize("post", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("labels", [{"classlabels_ints": [3, 1, 7, 5]}, {"classlabels_strings": ["a", "b", "c", "d"]}])
def test_linear_classifier(post, labels):
    canonical = check(single("LinearClassifier", outputs=2, post_transform=post, **labels, **LINEAR), X)
    assert ops(canonical)[0] == "Linear"


# --------------------------------------------------------------------------------------------------- kernel machines

KERNELS = ["LINEAR", "POLY", "RBF", "SIGMOID"]


def machine(op: str, kernel: str, sizes: list[int], **attributes) -> onnx.ModelProto:
    count, classes = sum(sizes), len(sizes)
    return single(
        op,
        outputs=1 if op == "SVMRegressor" else 2,
        kernel_type=kernel,
        kernel_params=[0.5, 0.1, 3.0],
        support_vectors=random(count, C).ravel().tolist(),
        coefficients=random(max(classes - 1, 1), count, seed=1).ravel().tolist(),
        rho=random(max(classes * (classes - 1) // 2, 1), seed=2).tolist(),
        **attributes,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("one_class", [0, 1])
def test_svm_regressor(kernel, one_class):
    check(machine("SVMRegressor", kernel, [6], n_supports=6, one_class=one_class), X)


def test_svm_regressor_without_support_vectors():
    model = single("SVMRegressor", kernel_type="LINEAR", kernel_params=[0.5, 0.1, 3.0], n_supports=0,
                   coefficients=[1.0, -2.0, 3.0], rho=[0.5])  # fmt: skip
    assert ops(check(model, X)) == ["Linear"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", [[2, 3], [3, 2, 2], [2, 1, 3, 2]])
@pytest.mark.parametrize("post", ["NONE", "LOGISTIC"])
def test_svm_classifier(kernel, sizes, post):
    labels = list(range(10, 10 + len(sizes)))
    model = machine(
        "SVMClassifier", kernel, sizes, classlabels_ints=labels, vectors_per_class=sizes, post_transform=post
    )
    check(model, X, 3 * X)


# --------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    ("reason", "model"),
    [
        ("no form in standard operators", lambda: single("Binarizer", threshold=0.5)),
        ("post_transform PROBIT", lambda: single("LinearRegressor", targets=4, post_transform="PROBIT", **LINEAR)),
        ("1 score(s) for 2 classes", lambda: single("LinearClassifier", outputs=2, coefficients=[1.0, 2.0, 3.0],
                                                    intercepts=[0.5], classlabels_ints=[0, 1])),
        ("rank is 3", lambda: single("LinearRegressor", shape=("N", 2, C), targets=4, **LINEAR)),
        ("probabilities", lambda: machine("SVMClassifier", "RBF", [2, 3], classlabels_ints=[0, 1],
                                          vectors_per_class=[2, 3], prob_a=[1.0], prob_b=[0.1])),
        ("post_transform SOFTMAX", lambda: machine("SVMClassifier", "RBF", [2, 3], classlabels_ints=[0, 1],
                                                   vectors_per_class=[2, 3], post_transform="SOFTMAX")),
    ],
)  # fmt: skip
def test_declined(reason, model):
    canonical = canonize(model(), free_batch=False)
    assert reason in said(canonical, "ai.onnx.ml")
    (node,) = canonical.graph.nodes
    assert node.domain == "ai.onnx.ml"
    assert all(tensor.outputs == [node] for tensor in node.inputs)  # nothing of what was begun is left


# ----------------------------------------------------------------------------------------------------- scikit-learn


def scikit() -> dict[str, Callable]:
    """Pipelines by name; the targets are 3 classes, 2 classes, or numbers."""
    from sklearn import decomposition, feature_selection, impute, linear_model, preprocessing, svm
    from sklearn.pipeline import make_pipeline as pipe

    scaler, normalizer = preprocessing.StandardScaler, preprocessing.Normalizer
    return {
        "logistic regression": lambda: (linear_model.LogisticRegression(), "classes"),
        "logistic regression, two classes": lambda: (linear_model.LogisticRegression(), "two"),
        "logistic regression, names": lambda: (pipe(scaler(), linear_model.LogisticRegression()), "names"),
        "linear SVM": lambda: (svm.LinearSVC(), "classes"),
        "linear SVM, two classes": lambda: (svm.LinearSVC(), "two"),
        "PCA and SVC": lambda: (pipe(scaler(), decomposition.PCA(2), svm.SVC()), "classes"),
        "SVC": lambda: (svm.SVC(kernel="poly"), "two"),
        "SVC with a sigmoid": lambda: (svm.SVC(kernel="sigmoid"), "classes"),
        "SVC, linear, names": lambda: (svm.SVC(kernel="linear"), "names"),
        "SVR": lambda: (pipe(normalizer("l2"), svm.SVR()), "numbers"),
        "nu-SVR": lambda: (svm.NuSVR(kernel="linear"), "numbers"),
        "one class": lambda: (svm.OneClassSVM(), "numbers"),
        "ridge": lambda: (
            pipe(impute.SimpleImputer(), normalizer("l1"), feature_selection.SelectKBest(k=2), linear_model.Ridge()),
            "numbers",
        ),
        "min max": lambda: (pipe(preprocessing.MinMaxScaler(), normalizer("max"), linear_model.Lasso(0.01)), "numbers"),
        "several targets": lambda: (linear_model.LinearRegression(), "several"),
    }


NAMES = [
    "logistic regression", "logistic regression, two classes", "logistic regression, names", "linear SVM",
    "linear SVM, two classes", "PCA and SVC", "SVC", "SVC with a sigmoid", "SVC, linear, names", "SVR", "nu-SVR",
    "one class", "ridge", "min max", "several targets",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("opset", [15, 18])
def test_scikit_learn(name, opset):
    pytest.importorskip("sklearn")
    skl2onnx = pytest.importorskip("skl2onnx")
    rng = np.random.default_rng(1)
    x = rng.normal(size=[80, 4]).astype(np.float32)
    classes = (x[:, 0] > 0).astype(int) + (x[:, 1] + x[:, 2] > 0.5)
    targets = {
        "classes": classes,
        "two": (classes > 0).astype(int),
        "names": np.array(["low", "middle", "high"])[classes],
        "numbers": x[:, 0] * 2 - x[:, 1],
        "several": x[:, :2] @ rng.normal(size=[2, 3]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, target = scikit()[name]()
        model.fit(x, targets[target])
        proto = skl2onnx.to_onnx(model, x[:1], target_opset={"": opset, "ai.onnx.ml": 3})
    check(proto, rng.normal(size=[20, 4]).astype(np.float32), tolerance=2e-5)

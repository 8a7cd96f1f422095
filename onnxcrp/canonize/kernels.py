"""Operators of ai.onnx.ml, as scikit-learn's converters write them, in standard operators.

x [N, C], one row per sample; v_s [C] the support vectors, a_s their coefficients, K the kernel:

    Scaler               (x - offset) scale
    Normalizer           x / max(x), x / sum |x|, x / sqrt(sum x^2); rows of zeros stay
    Imputer              the imputed value where x is the replaced one (which may be NaN)
    LinearRegressor      x W^T + b, then sigmoid or softmax
    LinearClassifier     the same for the scores; the label is that of the largest score
    SVMRegressor         sum_s a_s K(x, v_s) + rho, for one class its sign
    SVMClassifier        f_ij = sum_{s of i} a_{j-1,s} K(x, v_s) + sum_{s of j} a_{i,s} K(x, v_s) + rho_ij, i < j
                         scores: all f_ij, or [-f, f] for two classes; label: the class with most votes, f_ij > 0 is
                         one for i, else for j

    K linear      x v^T                       K rbf         exp(-gamma sum_c (x_c - v_c)^2)
    K poly        (gamma x v^T + coef0)^degree    K sigmoid     tanh(gamma x v^T + coef0)

A machine is one node Kernel, onnxcrp's own, so that its rule can be about the whole of it; a linear one is a Linear.
The class labels are a constant that ArgMax looks up. A ZipMap, which makes a list of dictionaries out of the scores, is
dropped: the tensor of scores takes its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import DOMAIN, Names, describe, detach, prune, rank
from onnxcrp.canonize.report import PassReport
from onnxcrp.canonize.shapes import infer_shapes

ML = "ai.onnx.ml"
LARGEST = 1 << 22  # numbers for one sample in sum_c (x_c - v_c)^2
KINDS = {"RBF": "rbf", "POLY": "polynomial", "SIGMOID": "sigmoid"}  # as onnxcrp/ops/kernels.py names them
PARAMETERS = {"RBF": ("gamma",), "POLY": ("gamma", "coef0", "degree"), "SIGMOID": ("gamma", "coef0")}
FLOAT = np.dtype(np.float32)  # what all of these operators give, whatever they read


def rewrite_kernels(graph: gs.Graph) -> PassReport:
    """Rewrite the operators of ai.onnx.ml above; others, and forms that cannot be written, stay with the reason."""
    report = PassReport("ai.onnx.ml")
    while any(node.domain == ML for node in graph.nodes):
        done, report.declined = _rewrite(graph)
        report.done += done
        if not done:
            break
        infer_shapes(graph)  # which knows little of ai.onnx.ml: what comes after has a rank only now
    if report.done and not report.declined:
        graph.import_domains = [entry for entry in graph.import_domains or [] if entry.domain != ML]
    return report


def _rewrite(graph: gs.Graph) -> tuple[list[str], list[str]]:
    """One walk; what was rewritten and what was not."""
    done: list[str] = []
    declined: list[str] = []
    write = _Write(graph)
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        if node.domain != ML:
            nodes.append(node)
            continue
        old = describe(node)
        write.begin(node)
        try:
            if node.op not in REWRITES:
                raise _DeclinedError("it has no form in standard operators here")
            results = REWRITES[node.op](write, node)
        except _DeclinedError as reason:
            for written in write.nodes:
                detach(written)
            declined.append(f"{old}: {reason}")
            nodes.append(node)
            continue
        outputs = list(node.outputs)
        detach(node)
        for output, result in zip(outputs, results, strict=False):
            if result is not None and not output.is_empty():
                write.name_result(output, result)
        nodes += write.nodes
        done.append(f"{old}: {', '.join(written.op for written in write.nodes)}")
    graph.nodes = nodes
    prune(graph)
    return done, declined


class _DeclinedError(Exception):
    """Why a node is left alone."""


class _Write:
    """Appends standard nodes in the place of one of ai.onnx.ml."""

    def __init__(self, graph: gs.Graph) -> None:
        self.names = Names(graph)
        self.nodes: list[gs.Node] = []
        self.name = ""

    def begin(self, node: gs.Node) -> None:
        """What is written from here on replaces `node`."""
        self.nodes, self.name = [], node.name

    def __call__(
        self, op: str, *inputs: gs.Tensor, dtype: np.dtype = FLOAT, domain: str = "", **attrs: object
    ) -> gs.Tensor:
        """Append a node; its output."""
        base = f"{self.name}/{op}"
        name, number = base, 0
        while name in self.names.taken:
            number += 1
            name = f"{base}_{number}"
        self.names.fresh(name)
        output = gs.Variable(self.names.fresh(f"{name}_output"), dtype)
        self.nodes.append(gs.Node(op, name, attrs, list(inputs), [output], domain=domain or None))
        return output

    def constant(self, name: str, values: np.ndarray | list[int] | float) -> gs.Constant:
        """Lists are int64, numbers float32."""
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        if isinstance(values, float):
            array = np.array(values, FLOAT)
        return gs.Constant(self.names.fresh(f"{self.name}/{name}"), np.ascontiguousarray(array).reshape(array.shape))

    def float(self, tensor: gs.Tensor) -> gs.Tensor:
        """A Cast where the operator would have made one."""
        if tensor.dtype is None or tensor.dtype == FLOAT:
            return tensor
        return self("Cast", tensor, to=onnx.TensorProto.FLOAT)

    def linear(self, x: gs.Tensor, weight: np.ndarray, bias: np.ndarray | None, name: str = "W") -> gs.Tensor:
        """x W^T + b."""
        inputs = [x, self.constant(name, weight.astype(FLOAT))]
        if bias is not None and bias.any():
            inputs.append(self.constant("b", bias.astype(FLOAT)))
        return self("Linear", *inputs, domain=DOMAIN)

    def name_result(self, output: gs.Tensor, result: gs.Tensor) -> None:
        """Let the old output be what the new nodes end with."""
        last = result.inputs[0] if result.inputs else None
        if last is None or not any(last is node for node in self.nodes) or result.outputs:
            self.nodes.append(gs.Node("Identity", self.names.fresh(f"{self.name}/Identity"), {}, [result], [output]))
        else:
            last.outputs.clear()
            last.outputs.append(output)
        output.dtype = result.dtype
        if result.shape is not None:
            output.shape = result.shape


Results = list[gs.Tensor | None]


# -------------------------------------------------------------------------------------------------------- attributes


def _text(node: gs.Node, name: str, default: str) -> str:
    given = node.attrs.get(name, default)
    return given.decode() if isinstance(given, bytes) else str(given)


def _numbers(node: gs.Node, name: str) -> np.ndarray:
    return np.array(node.attrs.get(name) or [], FLOAT)


def _rows(node: gs.Node) -> gs.Tensor:
    """The input [N, C]."""
    x = node.inputs[0]
    if rank(x) != 2:
        known = "not known" if rank(x) is None else rank(x)
        raise _DeclinedError(f"its input should be [N, C], its rank is {known}")
    return x


def _per_feature(values: np.ndarray, x: gs.Tensor) -> np.ndarray:
    """[C], or [] for one number for all."""
    if values.size == 1:
        return values.reshape(())
    if rank(x) is None or (isinstance(x.shape[-1], int) and x.shape[-1] != values.size):
        raise _DeclinedError(f"it has {values.size} numbers for an input of shape {x.shape}")
    return values


def _post(write: _Write, node: gs.Node, scores: gs.Tensor) -> gs.Tensor:
    """The activation after the scores."""
    match kind := _text(node, "post_transform", "NONE"):
        case "NONE":
            return scores
        case "LOGISTIC":
            return write("Sigmoid", scores)
        case "SOFTMAX":
            return write("Softmax", scores, axis=1)
    raise _DeclinedError(f"post_transform {kind} is not written out")


def _labels(node: gs.Node) -> np.ndarray:
    """The class labels, numbers or strings."""
    for name in ("classlabels_ints", "classlabels_int64s"):
        if node.attrs.get(name):
            return np.array(node.attrs[name], np.int64)
    strings = node.attrs.get("classlabels_strings") or []
    if not strings:
        raise _DeclinedError("it names no classes")
    return np.array([s.decode() if isinstance(s, bytes) else s for s in strings], object)


def _label(write: _Write, labels: np.ndarray, scores: gs.Tensor) -> gs.Tensor:
    """The label of the largest score, the first on ties: [N, classes] -> [N]."""
    index = write("ArgMax", scores, dtype=np.dtype(np.int64), axis=1, keepdims=0)
    return write("Gather", write.constant("labels", labels), index, dtype=labels.dtype, axis=0)


# ---------------------------------------------------------------------------------------------------- preprocessing


def _scaler(write: _Write, node: gs.Node) -> Results:
    """(x - offset) scale."""
    x = write.float(node.inputs[0])
    offset, scale = _numbers(node, "offset"), _numbers(node, "scale")
    if offset.size == 0 or scale.size == 0:
        raise _DeclinedError("it names no offset or no scale")
    moved = write("Sub", x, write.constant("offset", _per_feature(offset, node.inputs[0]))) if offset.any() else x
    return [write("Mul", moved, write.constant("scale", _per_feature(scale, node.inputs[0])))]


def _is_softmax(node: gs.Node) -> bool:
    """Also where it is a part of a classifier that is yet to be rewritten."""
    return node.op == "Softmax" or (node.domain == ML and _text(node, "post_transform", "") == "SOFTMAX")


def _normalizer(write: _Write, node: gs.Node) -> Results:
    """x over the norm of its row; after a softmax the sum is 1 already."""
    kind, source = _text(node, "norm", "MAX"), node.inputs[0]
    x = write.float(_rows(node))
    if kind == "L1" and source.inputs and _is_softmax(source.inputs[0]):
        return [x]
    axes = write.constant("axes", [1])
    match kind:
        case "MAX":
            size = write("ReduceMax", x, axes, keepdims=1)
        case "L1":
            size = write("ReduceSum", write("Abs", x), axes, keepdims=1)
        case "L2":
            size = write("Sqrt", write("ReduceSum", write("Mul", x, x), axes, keepdims=1))
        case _:
            raise _DeclinedError(f"norm {kind} is not written out")
    empty = write("Equal", size, write.constant("zero", 0.0), dtype=np.dtype(bool))
    return [write("Div", x, write("Where", empty, write.constant("one", 1.0), size))]


def _imputer(write: _Write, node: gs.Node) -> Results:
    """Where(x is the replaced value, the imputed one, x)."""
    x = node.inputs[0]
    kind = np.dtype(np.int64 if node.attrs.get("imputed_value_int64s") else np.float32)
    if x.dtype is not None and x.dtype != kind:
        raise _DeclinedError(f"it imputes {kind} into {x.dtype}")
    if kind == np.int64:
        imputed = np.array(node.attrs["imputed_value_int64s"], np.int64)
        replaced = np.array(node.attrs.get("replaced_value_int64", 0), np.int64)
    else:
        imputed = _numbers(node, "imputed_value_floats")
        replaced = np.array(node.attrs.get("replaced_value_float", 0.0), np.float32)
    if imputed.size == 0:
        raise _DeclinedError("it names no imputed value")
    truth = np.dtype(bool)
    if np.isnan(replaced):
        missing = write("IsNaN", x, dtype=truth)
    else:
        missing = write("Equal", x, write.constant("replaced", replaced), dtype=truth)
    return [write("Where", missing, write.constant("imputed", _per_feature(imputed, x)), x, dtype=kind)]


def _extractor(write: _Write, node: gs.Node) -> Results:
    """x [..., C] at constant positions of its last axis; or a constant [C] at computed ones, [1, number of them]."""
    x, at = node.inputs
    if isinstance(at, gs.Constant) and rank(x) is not None and rank(x) != 1:
        indices = write.constant("indices", at.values.reshape(-1).astype(np.int64))
        return [write("Gather", x, indices, dtype=x.dtype, axis=-1)]
    if isinstance(x, gs.Constant) and x.values.ndim == 1:
        flat = write("Reshape", at, write.constant("flat", [-1]), dtype=np.dtype(np.int64))
        picked = write("Gather", x, flat, dtype=x.dtype, axis=0)
        return [write("Unsqueeze", picked, write.constant("axes", [0]), dtype=x.dtype)]
    raise _DeclinedError("its positions are computed")


def _vectorizer(write: _Write, node: gs.Node) -> Results:
    """The inputs [N, C_i] side by side."""
    widths = list(node.attrs.get("inputdimensions") or [])
    if len(widths) != len(node.inputs) or any(rank(x) != 2 for x in node.inputs):
        raise _DeclinedError("its inputs should be [N, C_i], with C_i among its attributes")
    if any(isinstance(x.shape[1], int) and x.shape[1] != n for x, n in zip(node.inputs, widths, strict=True)):
        raise _DeclinedError(f"its inputs are not of widths {widths}")
    return [write("Concat", *(write.float(x) for x in node.inputs), axis=1)]


def _zip_map(write: _Write, node: gs.Node) -> Results:
    """The scores as they are."""
    return [node.inputs[0]]


# ----------------------------------------------------------------------------------------------------- linear models


def _matrix(node: gs.Node, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """W [outputs, C], b [outputs]."""
    coefficients, intercepts = _numbers(node, "coefficients"), _numbers(node, "intercepts")
    if outputs == 0 or coefficients.size % outputs or intercepts.size not in (0, outputs):
        raise _DeclinedError(f"{coefficients.size} coefficients and {intercepts.size} intercepts for {outputs} outputs")
    return coefficients.reshape(outputs, -1), intercepts if intercepts.size else np.zeros(outputs, FLOAT)


def _linear_regressor(write: _Write, node: gs.Node) -> Results:
    """x W^T + b."""
    weight, bias = _matrix(node, int(node.attrs.get("targets", 1)))
    return [_post(write, node, write.linear(write.float(_rows(node)), weight, bias))]


def _linear_classifier(write: _Write, node: gs.Node) -> Results:
    """x W^T + b, and the label of the largest score."""
    labels = _labels(node)
    weight, bias = _matrix(node, max(len(_numbers(node, "intercepts")), 1))
    if len(weight) != len(labels) or len(weight) < 2:
        raise _DeclinedError(f"it has {len(weight)} score(s) for {len(labels)} classes")
    scores = write.linear(write.float(_rows(node)), weight, bias)
    return [_label(write, labels, scores), _post(write, node, scores)]


# --------------------------------------------------------------------------------------------------- kernel machines


def _machine(write: _Write, node: gs.Node, vectors: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> gs.Tensor:
    """sum_s a_ps K(x, v_s) + b_p for support vectors [S, C] and coefficients [P, S]: [N, C] -> [N, P]."""
    x, kind = write.float(_rows(node)), _text(node, "kernel_type", "LINEAR")
    if isinstance(x.shape[1] if x.shape else None, int) and x.shape[1] != vectors.shape[1]:
        raise _DeclinedError(f"its support vectors are {list(vectors.shape)}, its input is {x.shape}")
    if kind == "LINEAR":
        return write.linear(x, weight.astype(np.float64) @ vectors.astype(np.float64), bias)
    if kind not in KINDS:
        raise _DeclinedError(f"kernel {kind} is not written out")
    if kind == "RBF" and vectors.size > LARGEST:
        raise _DeclinedError(f"{vectors.size} numbers for each sample are too many")
    numbers = dict(zip(("gamma", "coef0", "degree"), [*_numbers(node, "kernel_params"), 0, 0, 0], strict=False))
    attrs: dict[str, Any] = {name: float(numbers[name]) for name in PARAMETERS[kind]}
    inputs = [x, write.constant("support_vectors", vectors), write.constant("coefficients", weight.astype(FLOAT))]
    if bias.any():
        inputs.append(write.constant("rho", bias.astype(FLOAT)))
    return write("Kernel", *inputs, domain=DOMAIN, kind=KINDS[kind], **attrs)


def _svm_regressor(write: _Write, node: gs.Node) -> Results:
    """sum_s a_s K(x, v_s) + rho."""
    count, coefficients, rho = (
        int(node.attrs.get("n_supports", 0)),
        _numbers(node, "coefficients"),
        _numbers(node, "rho"),
    )
    if rho.size != 1:
        raise _DeclinedError(f"it has {rho.size} numbers rho, 1 is expected")
    if _text(node, "post_transform", "NONE") != "NONE":
        raise _DeclinedError("its post_transform is not written out")
    if count == 0:  # linear, written as one vector
        sums = write.linear(write.float(_rows(node)), coefficients.reshape(1, -1), rho)
    else:
        vectors = _numbers(node, "support_vectors").reshape(count, -1)
        sums = _machine(write, node, vectors, coefficients.reshape(1, -1), rho)
    if not node.attrs.get("one_class", 0):
        return [sums]
    inside = write("Greater", sums, write.constant("zero", 0.0), dtype=np.dtype(bool))
    return [write("Where", inside, write.constant("one", 1.0), write.constant("minus_one", -1.0))]


def _svm_classifier(write: _Write, node: gs.Node) -> Results:
    """The decision functions f_ij of all pairs of classes, and the label by votes."""
    labels, sizes = _labels(node), [int(n) for n in node.attrs.get("vectors_per_class") or []]
    if not sizes:
        raise _DeclinedError("it has no support vectors")
    if node.attrs.get("prob_a"):
        raise _DeclinedError("its probabilities come out of an iteration over pairs of classes: train without them")
    post = _text(node, "post_transform", "NONE")
    if post not in ("NONE", "LOGISTIC"):
        raise _DeclinedError(f"post_transform {post} is not written out")
    count, classes = sum(sizes), len(sizes)
    vectors = _numbers(node, "support_vectors").reshape(count, -1)
    coefficients = _numbers(node, "coefficients").reshape(-1, count)
    rho, starts = _numbers(node, "rho"), np.cumsum([0, *sizes])
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    if len(labels) != classes or len(coefficients) != classes - 1 or rho.size != len(pairs):
        raise _DeclinedError(f"{classes} classes, {len(labels)} labels, {rho.size} numbers rho do not fit")
    weight = np.zeros([len(pairs), count], FLOAT)
    wins, losses = np.zeros([2, len(pairs), classes], FLOAT)
    for row, (i, j) in enumerate(pairs):
        for own, other in ((i, j - 1), (j, i)):
            at = slice(starts[own], starts[own + 1])
            weight[row, at] = coefficients[other, at]
        wins[row, i] = losses[row, j] = 1
    if classes == 2:  # [-f, f]
        scores = _machine(write, node, vectors, np.concatenate([-weight, weight]), np.concatenate([-rho, rho]))
        f = write("Gather", scores, write.constant("second", [1]), axis=1)
    else:
        scores = f = _machine(write, node, vectors, weight, rho)
    won = write("Greater", f, write.constant("zero", 0.0), dtype=np.dtype(bool))
    # votes = losses summed + (wins - losses) where won
    decided = write("Cast", won, to=onnx.TensorProto.FLOAT)
    votes = write("MatMul", decided, write.constant("votes", wins - losses))
    label = _label(write, labels, write("Add", votes, write.constant("lost", losses.sum(0))))
    return [label, _post(write, node, scores)]


REWRITES: dict[str, Callable[[_Write, gs.Node], Results]] = {
    "Scaler": _scaler,
    "Normalizer": _normalizer,
    "Imputer": _imputer,
    "ArrayFeatureExtractor": _extractor,
    "FeatureVectorizer": _vectorizer,
    "ZipMap": _zip_map,
    "LinearRegressor": _linear_regressor,
    "LinearClassifier": _linear_classifier,
    "SVMRegressor": _svm_regressor,
    "SVMClassifier": _svm_classifier,
}

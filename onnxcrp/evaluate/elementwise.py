"""Elementwise arithmetic, comparisons, activations and casts."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate.registry import Attributes, Kernel, kernel

_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function at full double precision, in the type of `x`."""
    return np.asarray(_erf(np.asarray(x, np.float64)), np.float64).astype(x.dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, np.zeros((), x.dtype))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers are divided as in C: towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    quotient, rest = np.divmod(a, b)
    return quotient + ((rest != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


_ELEMENTWISE: dict[str, Kernel] = {
    "Abs": np.abs,
    "Neg": np.negative,
    "Sign": np.sign,
    "Reciprocal": lambda x: 1 / x,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Log": np.log,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.rint,
    "Sin": np.sin,
    "Cos": np.cos,
    "Tan": np.tan,
    "Asin": np.arcsin,
    "Acos": np.arccos,
    "Atan": np.arctan,
    "Sinh": np.sinh,
    "Cosh": np.cosh,
    "Tanh": np.tanh,
    "Asinh": np.arcsinh,
    "Acosh": np.arccosh,
    "Atanh": np.arctanh,
    "Erf": erf,
    "IsNaN": np.isnan,
    "Not": np.logical_not,
    "BitwiseNot": np.bitwise_not,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Where": np.where,
    "Max": lambda *x: functools.reduce(np.maximum, x),
    "Min": lambda *x: functools.reduce(np.minimum, x),
    "Sum": lambda *x: functools.reduce(np.add, x),
    "Mean": lambda *x: functools.reduce(np.add, x) / len(x),
    "Relu": lambda x: np.maximum(x, np.zeros((), x.dtype)),
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "PRelu": lambda x, slope: np.where(x < 0, x * slope, x),
    "Silu": lambda x: x * _sigmoid(x),
}

for _name, _function in _ELEMENTWISE.items():
    kernel(_name)(lambda attrs, *inputs, function=_function: function(*inputs))


@kernel("Pow")
def _pow(attrs: Attributes, x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    return np.power(x, exponent).astype(x.dtype)


@kernel("Mod")
def _mod(attrs: Attributes, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, b) if attrs.get("fmod", 0) else np.mod(a, b)


@kernel("IsInf")
def _isinf(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    positive, negative = attrs.get("detect_positive", 1), attrs.get("detect_negative", 1)
    return (np.isposinf(x) & bool(positive)) | (np.isneginf(x) & bool(negative))


@kernel("LeakyRelu")
def _leaky_relu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, x * attrs.float("alpha", 0.01), x)


@kernel("Elu")
def _elu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, attrs.float("alpha", 1) * np.expm1(x), x)


@kernel("Celu")
def _celu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    alpha = attrs.float("alpha", 1)
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(x / alpha), 0)


@kernel("Selu")
def _selu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    alpha, gamma = attrs.float("alpha", 1.67326319217681884765625), attrs.float("gamma", 1.05070102214813232421875)
    return gamma * np.where(x < 0, alpha * np.expm1(x), x)


@kernel("ThresholdedRelu")
def _thresholded_relu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.where(x > attrs.float("alpha", 1), x, np.zeros((), x.dtype))


@kernel("HardSigmoid")
def _hard_sigmoid(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.clip(attrs.float("alpha", 0.2) * x + attrs.float("beta", 0.5), 0, 1)


@kernel("Shrink")
def _shrink(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    bias, lambd = attrs.float("bias", 0), attrs.float("lambd", 0.5)
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, np.zeros((), x.dtype)))


@kernel("Swish")
def _swish(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(attrs.float("alpha", 1) * x)


@kernel("Gelu")
def _gelu(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + erf(x / sqrt 2)), or with approximate="tanh" 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    if attrs.get("approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


@kernel("Clip")
def _clip(attrs: Attributes, x: np.ndarray, low: Any = None, high: Any = None) -> np.ndarray:
    low, high = attrs.get("min", low), attrs.get("max", high)
    if low is not None:
        x = np.maximum(x, np.asarray(low, x.dtype))
    return x if high is None else np.minimum(x, np.asarray(high, x.dtype))


@kernel("Dropout")
def _dropout(attrs: Attributes, x: np.ndarray, ratio: Any = None, training: Any = None) -> Any:
    if training is not None and np.any(training) and (ratio is None or np.any(ratio)):
        raise UnsupportedError("Dropout in training mode draws random numbers", hint="export the model in eval mode")
    return (x, np.ones(x.shape, bool))


@kernel("Identity")
def _identity(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x


@kernel("Cast")
def _cast(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    if attrs["to"] == onnx.TensorProto.STRING or x.dtype.kind in "OUS":
        raise UnsupportedError("Cast from or to strings is not evaluated")
    return x.astype(attrs.floating(attrs["to"]))


@kernel("CastLike")
def _cast_like(attrs: Attributes, x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.astype(like.dtype)

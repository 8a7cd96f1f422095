"""Evaluate an ONNX graph in float64: every operator the project writes, in numpy (or torch's kernels, where installed).

Nothing else does: onnxruntime's CPU provider has no float64 Conv, ConvTranspose or Erf, and onnx's ReferenceEvaluator
fails on grouped ConvTranspose and takes minutes for a VGG. A kernel is the operator's definition and no more; what has
none falls through to onnx.reference if that computes in the same precision, and is named in an UnsupportedError if not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcrp.errors import InputError, ModelError, RuntimeMissingError, UnsupportedError

Kernel = Callable[..., Any]

KERNELS: dict[str, Kernel] = {}
"""Operator -> kernel(attributes, *inputs) -> array or tuple of arrays; missing optional inputs are None."""

TORCH_KERNELS: dict[str, Kernel] = {}
"""The same for operators whose time matters; a kernel returns NotImplemented where torch has no such configuration."""

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


class Attributes(dict[str, Any]):
    """A node's attributes, and what else its meaning depends on.

    `opset`: version of the operator set; `outputs`: how many outputs are read (None: all); `floats`: the type that
    every floating tensor has in this run, whatever Cast or Constant say (None: as they say).
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        opset: int = 18,
        outputs: int | None = None,
        floats: np.dtype | None = None,
    ) -> None:
        super().__init__(values)
        self.opset = opset
        self.outputs = outputs
        self.floats = floats

    def float(self, name: str, default: float) -> float:
        """A float attribute; the default is rounded to float32, as a file would hold it."""
        return float(self.get(name, np.float32(default)))

    def floating(self, elem_type: int) -> np.dtype:
        """The numpy type of an ONNX element type, floating ones replaced by `floats`."""
        if self.floats is not None and elem_type in FLOATS:
            return self.floats
        return onnx.helper.tensor_dtype_to_np_dtype(elem_type)


def _register(registry: dict[str, Kernel], names: Iterable[str], function: Kernel) -> None:
    for name in names:
        if name in registry:
            raise ValueError(f"a kernel for {name} is registered already")
        registry[name] = function


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a numpy kernel for one or more operators; refuses to overwrite."""

    def register(function: Kernel) -> Kernel:
        _register(KERNELS, names, function)
        return function

    return register


def torch_kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a torch kernel, called as `kernel(torch, attributes, *inputs)`; refuses to overwrite."""

    def register(function: Kernel) -> Kernel:
        _register(TORCH_KERNELS, names, function)
        return function

    return register


# ---------------------------------------------------------------------------------------------------- elementwise


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


# ------------------------------------------------------------------------------------------------- quantization


def _per_axis(parameter: np.ndarray, x: np.ndarray, axis: int, block: int) -> np.ndarray:
    """A scale or zero point (scalar, per axis, or per block of an axis) made to broadcast against `x`."""
    if parameter.size == 1 and not block:
        return parameter.reshape(())
    axis %= x.ndim
    if block:
        return np.take(np.repeat(parameter, block, axis), range(x.shape[axis]), axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


@kernel("QuantizeLinear")
def _quantize(attrs: Attributes, x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> Any:
    """saturate(round_half_even(x / scale) + zero point)."""
    dtype = np.dtype(np.uint8)
    if zero is not None:
        dtype = zero.dtype
    elif attrs.get("output_dtype", 0):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(attrs["output_dtype"])
    if dtype.kind not in "iu":  # the 4- and 8-bit types of ml_dtypes: onnx.reference knows them
        return NotImplemented
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    q = np.rint(x / _per_axis(scale, x, axis, block))
    if zero is not None:
        q = q + _per_axis(zero, x, axis, block).astype(q.dtype)
    limits = np.iinfo(dtype)
    return np.clip(q, limits.min, limits.max).astype(dtype)


@kernel("DequantizeLinear")
def _dequantize(attrs: Attributes, x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> np.ndarray:
    """(x - zero point) * scale."""
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    value = x.astype(scale.dtype)
    if zero is not None:
        value = value - _per_axis(zero, x, axis, block).astype(scale.dtype)
    value = value * _per_axis(scale, x, axis, block)
    return value.astype(attrs.floating(attrs["output_dtype"])) if attrs.get("output_dtype", 0) else value


# --------------------------------------------------------------------------------------- convolution and pooling


def _sequence(attrs: Attributes, name: str, default: Sequence[int]) -> list[int]:
    value = attrs.get(name)
    return [int(v) for v in (default if value is None or len(value) == 0 else value)]


def _geometry(
    attrs: Attributes, spatial: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and (begin, end) pads per spatial axis, auto_pad resolved."""
    rank = len(spatial)
    strides, dilations = _sequence(attrs, "strides", [1] * rank), _sequence(attrs, "dilations", [1] * rank)
    mode = attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        flat = _sequence(attrs, "pads", [0] * (2 * rank))
        return strides, dilations, list(zip(flat[:rank], flat[rank:], strict=True))
    pads = []
    for size, k, s, d in zip(spatial, kernel_shape, strides, dilations, strict=True):
        total = 0 if mode == "VALID" else max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small = total // 2
        pads.append((total - small, small) if mode == "SAME_LOWER" else (small, total - small))
    return strides, dilations, pads


def _out_size(size: int, k: int, s: int, d: int, pads: tuple[int, int], *, ceil: bool = False) -> int:
    """Number of windows along one axis; with ceil_mode a window that would start in the end padding is left out."""
    span = size + sum(pads) - (d * (k - 1) + 1)
    n = (-(-span // s) if ceil else span // s) + 1
    return n - 1 if ceil and (n - 1) * s >= size + pads[0] else n


def _last(index: Iterable[Any]) -> Any:
    """An index into the last axes."""
    return (Ellipsis, *index)


def _windows(
    kernel_shape: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """For every position in the kernel: the slice of the padded input that it reads, one entry per window."""
    for k in np.ndindex(*kernel_shape):
        slices = (
            slice(i * d, i * d + (n - 1) * s + 1, s) for i, s, d, n in zip(k, strides, dilations, out, strict=True)
        )
        yield k, _last(slices)


def _pad_spatial(x: np.ndarray, pads: Sequence[tuple[int, int]], value: Any = 0) -> np.ndarray:
    if not any(map(any, pads)):
        return x
    return np.pad(x, [(0, 0), (0, 0), *pads], constant_values=value)


@kernel("Conv")
def _conv(attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Of x [N, C, *spatial], W [M, C/group, *kernel], b [M]: [N, M, *out], a matrix product per kernel position."""
    group, kernel_shape = attrs.get("group", 1), W.shape[2:]
    strides, dilations, pads = _geometry(attrs, x.shape[2:], kernel_shape)
    out = [_out_size(*axis) for axis in zip(x.shape[2:], kernel_shape, strides, dilations, pads, strict=True)]
    x = _pad_spatial(x, pads)
    N, C, M = x.shape[0], x.shape[1], W.shape[0]
    x = x.reshape(N, group, C // group, *x.shape[2:])
    W = W.reshape(group, M // group, C // group, *kernel_shape)
    z = np.zeros((N, group, M // group, math.prod(out)), x.dtype)
    for k, window in _windows(kernel_shape, strides, dilations, out):
        patch = x[window].reshape(N, group, C // group, -1)
        w = W[_last(k)]
        z += w * patch if group == C else w @ patch  # depthwise: no sum over channels
    z = z.reshape(N, M, *out)
    return z if b is None else z + b.reshape(-1, *[1] * len(out))


def _transpose_geometry(
    attrs: Attributes, spatial: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, begin pads and output size of a ConvTranspose, auto_pad and output_shape resolved."""
    rank = len(spatial)
    strides, dilations = _sequence(attrs, "strides", [1] * rank), _sequence(attrs, "dilations", [1] * rank)
    extra, mode = _sequence(attrs, "output_padding", [0] * rank), attrs.get("auto_pad", "NOTSET")
    full = [
        s * (n - 1) + e + d * (k - 1) + 1
        for n, k, s, d, e in zip(spatial, kernel_shape, strides, dilations, extra, strict=True)
    ]
    wanted = _sequence(attrs, "output_shape", [])[-rank:]
    if not wanted and mode.startswith("SAME"):
        wanted = [n * s for n, s in zip(spatial, strides, strict=True)]
    if not wanted:
        pads = [0] * (2 * rank) if mode == "VALID" else _sequence(attrs, "pads", [0] * (2 * rank))
        return strides, dilations, pads[:rank], [f - p - q for f, p, q in zip(full, pads, pads[rank:], strict=False)]
    total = [f - w for f, w in zip(full, wanted, strict=True)]
    begin = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
    return strides, dilations, begin, wanted


def _crop(full: np.ndarray, begin: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """[N, C, *full] -> [N, C, *size], starting at `begin`; what lies outside (output_padding) is zero."""
    fill = [(max(-p, 0), max(p + n - f, 0)) for p, n, f in zip(begin, size, full.shape[2:], strict=True)]
    full = _pad_spatial(full, fill)
    return full[_last(slice(max(p, 0), max(p, 0) + n) for p, n in zip(begin, size, strict=True))]


@kernel("ConvTranspose")
def _conv_transpose(attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Of x [N, C, *spatial], W [C, M/group, *kernel]: [N, M, *out], kernel positions add to strided slices."""
    group, kernel_shape, spatial = attrs.get("group", 1), W.shape[2:], x.shape[2:]
    strides, dilations, begin, size = _transpose_geometry(attrs, spatial, kernel_shape)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(spatial, strides, dilations, kernel_shape, strict=True)]
    N, C, M = x.shape[0], x.shape[1], W.shape[1]
    x = x.reshape(N, group, C // group, -1)
    W = np.swapaxes(W.reshape(group, C // group, M, *kernel_shape), 1, 2)
    z = np.zeros((N, group, M, *full), x.dtype)
    for k, window in _windows(kernel_shape, strides, dilations, spatial):
        w = W[_last(k)]
        z[window] += (w * x if group == C else w @ x).reshape(N, group, M, *spatial)
    z = _crop(z.reshape(N, group * M, *full), begin, size)
    return z if b is None else z + b.reshape(-1, *[1] * len(size))


def _pool_geometry(attrs: Attributes, x: np.ndarray) -> tuple[Any, ...]:
    """Kernel, strides, dilations, pads, output size, and the end pads that the last window needs under ceil_mode."""
    kernel_shape, ceil = _sequence(attrs, "kernel_shape", []), bool(attrs.get("ceil_mode", 0))
    strides, dilations, pads = _geometry(attrs, x.shape[2:], kernel_shape)
    out, reach = [], []
    for size, k, s, d, p in zip(x.shape[2:], kernel_shape, strides, dilations, pads, strict=True):
        n = _out_size(size, k, s, d, p, ceil=ceil)
        out.append(n)
        reach.append((p[0], max(p[1], (n - 1) * s + d * (k - 1) + 1 - size - p[0])))
    return kernel_shape, strides, dilations, pads, out, reach


@kernel("MaxPool")
def _max_pool(attrs: Attributes, x: np.ndarray) -> Any:
    """[N, C, *spatial] -> maxima and, flat through the whole tensor, the index of the first maximum of each window."""
    kernel_shape, strides, dilations, pads, out, reach = _pool_geometry(attrs, x)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    padded = _pad_spatial(x, reach, lowest)
    best = np.full((*x.shape[:2], *out), lowest, x.dtype)
    if attrs.outputs == 1:
        for _, window in _windows(kernel_shape, strides, dilations, out):
            np.maximum(best, padded[window], out=best)
        return best
    rank, shape = len(out), x.shape[2:]
    step = np.cumprod([1, *shape[:0:-1]])[::-1] if not attrs.get("storage_order", 0) else np.cumprod([1, *shape[:-1]])
    index = np.full(best.shape, -1, np.int64)
    for k, window in _windows(kernel_shape, strides, dilations, out):
        where = np.zeros((), np.int64)
        inside = np.ones((), bool)
        for axis in range(rank):
            position = np.arange(out[axis]) * strides[axis] + k[axis] * dilations[axis] - pads[axis][0]
            position = position.reshape([-1 if i == axis else 1 for i in range(rank)])
            inside = inside & (position >= 0) & (position < shape[axis])
            where = where + position * step[axis]
        better = ((padded[window] > best) | (index < 0)) & inside  # < 0: a window of nothing but -inf has an index too
        np.copyto(best, padded[window], where=better)
        np.copyto(index, np.broadcast_to(where, index.shape), where=better)
    planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * rank)
    return best, index + planes * math.prod(shape)


@kernel("AveragePool")
def _average_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    """[N, C, *spatial] -> means; divided by the window inside the input, or with count_include_pad inside its pads."""
    kernel_shape, strides, dilations, pads, out, reach = _pool_geometry(attrs, x)
    padded = _pad_spatial(x, reach)
    total = np.zeros((*x.shape[:2], *out), x.dtype)
    for _, window in _windows(kernel_shape, strides, dilations, out):
        total += padded[window]
    count = np.ones([1] * len(out))
    for axis, (size, k, s, d, p, n) in enumerate(
        zip(x.shape[2:], kernel_shape, strides, dilations, pads, out, strict=True)
    ):
        begin, end = (p[0], size + p[1]) if attrs.get("count_include_pad", 0) else (0, size)
        position = (np.arange(n) * s - p[0])[:, None] + np.arange(k) * d
        low = -begin
        inside = ((position >= low) & (position < end)).sum(1)
        count = count * inside.reshape([-1 if i == axis else 1 for i in range(len(out))])
    return total / count.astype(x.dtype)


@kernel("GlobalAveragePool")
def _global_average_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.mean(tuple(range(2, x.ndim)), keepdims=True)


@kernel("GlobalMaxPool")
def _global_max_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


# ------------------------------------------------------------------------------------------- dense, normalization


@kernel("Gemm")
def _gemm(attrs: Attributes, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    y = (a.T if attrs.get("transA", 0) else a) @ (b.T if attrs.get("transB", 0) else b)
    if (alpha := attrs.get("alpha", 1.0)) != 1:
        y = alpha * y
    if c is None or (beta := attrs.get("beta", 1.0)) == 0:
        return y
    return y + (c if beta == 1 else beta * c)


@kernel("MatMul")
def _matmul(attrs: Attributes, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(a, b)


@kernel("Linear")
def _linear(attrs: Attributes, a: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """The project's own a [..., in] @ W.T + b, W [out, in]."""
    z = a @ W.T
    return z if b is None else z + b


@kernel("Einsum")
def _einsum(attrs: Attributes, *inputs: np.ndarray) -> np.ndarray:
    return np.einsum(attrs["equation"], *inputs, optimize=True)


def _channels(v: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[C] -> [C, 1, ...], to broadcast against x [N, C, ...]."""
    return v.reshape(-1, *[1] * (x.ndim - 2))


@kernel("BatchNormalization")
def _batch_normalization(
    attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> np.ndarray:
    if attrs.get("training_mode", 0):
        raise UnsupportedError("BatchNormalization in training mode is not evaluated", hint="export in eval mode")
    factor = scale / np.sqrt(var + attrs.float("epsilon", 1e-5))
    return (x - _channels(mean, x)) * _channels(factor, x) + _channels(b, x)


def _normalize(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = x.mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axes, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


@kernel("InstanceNormalization")
def _instance_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray) -> np.ndarray:
    y, _, _ = _normalize(x, tuple(range(2, x.ndim)), attrs.float("epsilon", 1e-5))
    return y * _channels(scale, x) + _channels(b, x)


@kernel("GroupNormalization")
def _group_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray) -> np.ndarray:
    groups = attrs["num_groups"]
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _normalize(grouped, (2,), attrs.float("epsilon", 1e-5))[0].reshape(x.shape)
    if scale.shape[0] != x.shape[1]:  # until opset 20 scale and bias were per group
        scale, b = (np.repeat(v, x.shape[1] // groups) for v in (scale, b))
    return y * _channels(scale, x) + _channels(b, x)


@kernel("LayerNormalization")
def _layer_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray | None = None) -> Any:
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    y, mean, inverse = _normalize(x, axes, attrs.float("epsilon", 1e-5))
    y = y * scale
    return (y if b is None else y + b), mean, inverse


@kernel("RMSNormalization", "RmsNorm")
def _rms_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + attrs.float("epsilon", 1e-5)) * scale


@kernel("LRN")
def _lrn(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    """Divide x by (bias + alpha / size * S)^beta, S the sum of x^2 over `size` neighbouring channels."""
    size = attrs["size"]
    before, after = (size - 1) // 2, size // 2
    square = np.pad(np.square(x), [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    S = sum(square[:, i : i + x.shape[1]] for i in range(size))
    return x / (attrs.float("bias", 1) + attrs.float("alpha", 0.0001) / size * S) ** attrs.float("beta", 0.75)


def _softmax_axes(attrs: Attributes, x: np.ndarray) -> tuple[int, ...]:
    """One axis; before opset 13 the axis and all after it, taken together."""
    if attrs.opset < 13:
        return tuple(range(attrs.get("axis", 1) % x.ndim, x.ndim))
    return (attrs.get("axis", -1) % x.ndim,)


@kernel("Softmax")
def _softmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    e = np.exp(x - x.max(axes, keepdims=True))
    return e / e.sum(axes, keepdims=True)


@kernel("LogSoftmax")
def _log_softmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    shifted = x - x.max(axes, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axes, keepdims=True))


@kernel("AffineGrid")
def _affine_grid(attrs: Attributes, theta: np.ndarray, size: np.ndarray) -> np.ndarray:
    """theta [N, n, n + 1] applied to the positions of [N, C, h...] in -1..1, x before y: [N, h..., n]."""
    if attrs.get("align_corners", 0):
        axes = [np.linspace(-1, 1, int(d)) for d in size[2:]]
    else:
        axes = [(2 * np.arange(int(d)) + 1) / d - 1 for d in size[2:]]
    places = np.meshgrid(*axes, indexing="ij")
    whole = np.stack([*places[::-1], np.ones_like(places[0])], -1)
    return np.einsum("...i,bji->b...j", whole, theta).astype(theta.dtype)


@kernel("Hardmax")
def _hardmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    shape = (*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
    y = np.zeros_like(x).reshape(shape)
    first = np.expand_dims(x.reshape(shape).argmax(axes[0]), axes[0])
    np.put_along_axis(y, first, 1, axes[0])
    return y.reshape(x.shape)


# ----------------------------------------------------------------------------------------------------- reductions


def _log_sum_exp(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return total if keepdims else total.squeeze(axis)


_REDUCTIONS: dict[str, Kernel] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceL1": lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims),
    "ReduceL2": lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims)),
    "ReduceSumSquare": lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims),
    "ReduceLogSum": lambda x, axis, keepdims: np.log(x.sum(axis, keepdims=keepdims)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduce(attrs: Attributes, x: np.ndarray, axes: Any = None, *, function: Kernel) -> np.ndarray:
    axes = attrs.get("axes", axes)
    if axes is None or len(axes) == 0:
        if attrs.get("noop_with_empty_axes", 0):
            return x
        axes = range(x.ndim)
    axis = tuple(int(a) % x.ndim for a in axes)
    return np.asarray(function(x, axis=axis, keepdims=bool(attrs.get("keepdims", 1)))).astype(x.dtype)


for _name, _function in _REDUCTIONS.items():
    kernel(_name)(functools.partial(_reduce, function=_function))


def _arg_reduce(attrs: Attributes, x: np.ndarray, *, function: Kernel) -> np.ndarray:
    axis = attrs.get("axis", 0) % x.ndim
    if attrs.get("select_last_index", 0):
        index = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
    else:
        index = function(x, axis=axis)
    return (np.expand_dims(index, axis) if attrs.get("keepdims", 1) else np.asarray(index)).astype(np.int64)


kernel("ArgMax")(functools.partial(_arg_reduce, function=np.argmax))
kernel("ArgMin")(functools.partial(_arg_reduce, function=np.argmin))


@kernel("TopK")
def _top_k(attrs: Attributes, x: np.ndarray, k: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k largest (smallest) along an axis in order, the lower index first on ties."""
    axis, count = attrs.get("axis", -1) % x.ndim, int(attrs["k"] if k is None else k.reshape(-1)[0])
    if attrs.get("largest", 1):  # a stable descending sort is an ascending one of the reversed array, reversed
        index = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        index = np.argsort(x, axis, kind="stable")
    index = np.take(index, range(count), axis)
    return np.take_along_axis(x, index, axis), index.astype(np.int64)


@kernel("CumSum")
def _cum_sum(attrs: Attributes, x: np.ndarray, axis: np.ndarray) -> np.ndarray:
    axis_ = int(axis.reshape(-1)[0])
    y = np.flip(x, axis_) if attrs.get("reverse", 0) else x
    total = np.cumsum(y, axis_).astype(x.dtype)
    if attrs.get("exclusive", 0):
        total = total - y
    return np.flip(total, axis_) if attrs.get("reverse", 0) else total


# -------------------------------------------------------------------------------------------------- rearrangement


def _axes(attrs: Attributes, axes: Any, rank: int) -> list[int]:
    """Axes given as input (opset 13 on) or attribute, made non-negative."""
    axes = attrs.get("axes", axes)
    return [int(a) % rank for a in axes]


@kernel("Reshape")
def _reshape(attrs: Attributes, x: np.ndarray, shape: Any = None) -> np.ndarray:
    sizes = [int(n) for n in attrs.get("shape", shape)]
    if not attrs.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@kernel("Flatten")
def _flatten(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axis = attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.size else x.reshape(math.prod(x.shape[:axis]), 0)


@kernel("Transpose")
def _transpose(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.transpose(attrs.get("perm"))


@kernel("Squeeze")
def _squeeze(attrs: Attributes, x: np.ndarray, axes: Any = None) -> np.ndarray:
    if attrs.get("axes", axes) is None:
        return x.squeeze()
    return x.squeeze(tuple(_axes(attrs, axes, x.ndim)))


@kernel("Unsqueeze")
def _unsqueeze(attrs: Attributes, x: np.ndarray, axes: Any = None) -> np.ndarray:
    given = attrs.get("axes", axes)
    return np.expand_dims(x, tuple(_axes(attrs, axes, x.ndim + len(given))))


@kernel("Concat")
def _concat(attrs: Attributes, *inputs: np.ndarray) -> np.ndarray:
    return np.concatenate(inputs, attrs.get("axis", 1))


@kernel("Split")
def _split(attrs: Attributes, x: np.ndarray, split: Any = None) -> tuple[np.ndarray, ...]:
    """Sizes as input (opset 13) or attribute; else `num_outputs` (opset 18) equal parts, the last one smaller."""
    axis, sizes = attrs.get("axis", 0), attrs.get("split", split)
    if sizes is None:
        parts = attrs.get("num_outputs", attrs.outputs)
        if parts is None:
            raise UnsupportedError("Split without sizes needs to know how many outputs it has")
        size = -(-x.shape[axis] // parts)
        sizes = [min(size, x.shape[axis] - i * size) for i in range(parts)]
    bounds = np.cumsum([0, *(int(n) for n in sizes)])
    return tuple(np.take(x, range(start, stop), axis) for start, stop in pairwise(bounds))


@kernel("Slice")
def _slice(
    attrs: Attributes, x: np.ndarray, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> np.ndarray:
    """As Python's slices, which clamp the same way; an `end` that reaches before index 0 of a backward step is None."""
    starts, ends = attrs.get("starts", starts), attrs.get("ends", ends)
    axes = attrs.get("axes", axes)
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        size, stop = x.shape[int(axis)], int(stop)
        index[int(axis)] = slice(int(start), None if step < 0 and stop < -size else stop, int(step))
    return x[tuple(index)]


@kernel("Expand")
def _expand(attrs: Attributes, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape)))


@kernel("Tile")
def _tile(attrs: Attributes, x: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return np.tile(x, repeats)


@kernel("Pad")
def _pad(attrs: Attributes, x: np.ndarray, pads: Any = None, value: Any = None, axes: Any = None) -> np.ndarray:
    """Modes constant, reflect, edge, wrap; negative pads crop."""
    flat = [int(p) for p in attrs.get("pads", pads)]
    axes_ = list(range(x.ndim)) if axes is None else [int(a) % x.ndim for a in axes]
    widths = [(0, 0)] * x.ndim
    for axis, begin, end in zip(axes_, flat[: len(axes_)], flat[len(axes_) :], strict=True):
        widths[axis] = (begin, end)
    index = tuple(slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(widths, x.shape, strict=True))
    widths = [(max(b, 0), max(e, 0)) for b, e in widths]
    mode = attrs.get("mode", "constant")
    if mode == "constant":
        fill = attrs.get("value", 0) if value is None or value.size == 0 else value.reshape(())
        return np.pad(x[index], widths, constant_values=fill)
    return np.pad(x[index], widths, mode=mode)


@kernel("DepthToSpace")
def _depth_to_space(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    N, C, H, W = x.shape
    b = attrs["blocksize"]
    if attrs.get("mode", "DCR") == "DCR":
        y = x.reshape(N, b, b, C // b**2, H, W).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(N, C // b**2, b, b, H, W).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(N, C // b**2, H * b, W * b)


@kernel("SpaceToDepth")
def _space_to_depth(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    N, C, H, W = x.shape
    b = attrs["blocksize"]
    return x.reshape(N, C, H // b, b, W // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(N, C * b**2, H // b, W // b)


@kernel("Trilu")
def _trilu(attrs: Attributes, x: np.ndarray, k: np.ndarray | None = None) -> np.ndarray:
    return (np.triu if attrs.get("upper", 1) else np.tril)(x, 0 if k is None else int(k.reshape(-1)[0]))


_CUBIC = (  # weights of the four neighbours at distance r behind the second, Keys 1981
    lambda r, A: ((A * (r + 1) - 5 * A) * (r + 1) + 8 * A) * (r + 1) - 4 * A,
    lambda r, A: ((A + 2) * r - (A + 3)) * r**2 + 1,
    lambda r, A: ((A + 2) * (1 - r) - (A + 3)) * (1 - r) ** 2 + 1,
    lambda r, A: ((A * (2 - r) - 5 * A) * (2 - r) + 8 * A) * (2 - r) - 4 * A,
)
_NEAREST: dict[str, Kernel] = {
    "round_prefer_floor": lambda c: np.ceil(c - 0.5),
    "round_prefer_ceil": lambda c: np.floor(c + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _source_coordinates(mode: str, size: int, out: int, scale: float, dtype: type = np.float64) -> np.ndarray:
    """Where each of `out` samples lies on an axis of `size`: the specification's coordinate transformations."""
    c: np.ndarray = np.arange(out, dtype=dtype)
    scale = dtype(scale)
    if mode == "align_corners":
        return c * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    if mode == "asymmetric":
        return c / scale
    if mode == "pytorch_half_pixel" and out == 1:
        return np.zeros(1)
    start = size / 2 * (1 - out / (scale * size)) if mode == "half_pixel_symmetric" else 0
    return start + (c + 0.5) / scale - 0.5


def resize_matrix(
    attrs: Attributes, size: int, out: int, scale: float, window: tuple[float, float] = (0, 1)
) -> np.ndarray:
    """[out, size]: the interpolation along one axis, the edge repeated outside; `window`: what a crop takes of it.

    Which entry is nearest is decided in float32, as runtimes do: (3 + 0.5) / 0.7 - 0.5 is a tie there. Of a crop
    nothing is known outside (zeros; `extrapolation_value` is not part of the map).
    """
    mode, how = attrs.get("mode", "nearest"), attrs.get("coordinate_transformation_mode", "half_pixel")
    if how == "tf_crop_and_resize":
        ends = np.linspace(*window, out) if out > 1 else np.array([sum(window) / 2])
        coordinates = ends * (size - 1)
    else:
        rounded = mode == "nearest" and how != "half_pixel_symmetric"
        coordinates = _source_coordinates(how, size, out, scale, np.float32 if rounded else np.float64)
    floor = np.floor(coordinates)
    r = coordinates - floor
    if mode == "nearest":
        first = _NEAREST[attrs.get("nearest_mode", "round_prefer_floor")](coordinates)
        weights = [np.ones(out)]
    elif mode == "linear":
        first, weights = floor, [1 - r, r]
    else:
        first, weights = floor - 1, [w(r, attrs.float("cubic_coeff_a", -0.75)) for w in _CUBIC]
    matrix = np.zeros((out, size))
    for k, weight in enumerate(weights):
        position = first.astype(np.int64) + k
        if attrs.get("exclude_outside", 0):
            weight = weight * ((position >= 0) & (position < size))
        np.add.at(matrix, (np.arange(out), np.clip(position, 0, size - 1)), weight)
    if how == "tf_crop_and_resize":
        matrix[(coordinates < 0) | (coordinates > size - 1)] = 0
    return matrix / matrix.sum(1, keepdims=True) if attrs.get("exclude_outside", 0) else matrix


@kernel("Resize")
def _resize(attrs: Attributes, x: np.ndarray, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """One matrix per axis; sizes follow from scales in float32, as runtimes compute them."""
    if attrs.opset < 11:
        attrs = Attributes({**attrs, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})
        roi, scales = None, roi
    scales, sizes = (None if v is None or v.size == 0 else v for v in (scales, sizes))
    given = (scales is not None) != (sizes is not None)
    crops = attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if not given or crops or attrs.get("antialias", 0):
        inputs = [x, *(None if v is None else v.astype(np.float32) for v in (roi, scales)), sizes]
        return _by_reference("Resize", attrs, inputs, max(attrs.opset, 18))
    y = x
    axes = attrs.get("axes") or range(x.ndim)
    policy = attrs.get("keep_aspect_ratio_policy", "stretch") if scales is None else "stretch"
    if policy != "stretch":  # one factor for all axes
        factors = [value / x.shape[axis] for axis, value in zip(axes, sizes, strict=True)]
        common = min(factors) if policy == "not_larger" else max(factors)
    for axis, value in zip(axes, scales if sizes is None else sizes, strict=True):
        size = x.shape[axis]
        out = int(value) if scales is None else int(np.float32(size) * np.float32(value))
        scale = out / size if scales is None else float(value)
        if policy != "stretch":
            out, scale = int(np.floor(common * size + 0.5)), common
        if out != size or scale != 1:
            matrix = resize_matrix(attrs, size, out, scale)
            y = np.moveaxis(np.tensordot(matrix, y.astype(np.float64), (1, axis)), 0, axis)
    return x if y.shape == x.shape else y.astype(x.dtype)  # runtimes copy where no size changes


@kernel("Upsample")
def _upsample(attrs: Attributes, x: np.ndarray, scales: Any = None) -> Any:
    factors = np.asarray(attrs.get("scales", scales), np.float32)
    mode = {"bilinear": "linear"}.get(attrs.get("mode", "nearest"), attrs.get("mode", "nearest"))
    return _resize(Attributes({"mode": mode}, opset=10), x, factors)


# ---------------------------------------------------------------------------------------------- gather and scatter


@kernel("Gather")
def _gather(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.take(x, indices, attrs.get("axis", 0))


@kernel("GatherElements")
def _gather_elements(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return x[_along_axis(x, indices, attrs.get("axis", 0))]


@kernel("GatherND")
def _gather_nd(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    batch = attrs.get("batch_dims", 0)
    lead = indices.shape[:batch]
    x = x.reshape(-1, *x.shape[batch:])
    flat = indices.reshape(x.shape[0], -1, indices.shape[-1])
    rows = np.arange(x.shape[0])[:, None]
    picked = x[(rows, *np.moveaxis(flat, -1, 0))]
    return picked.reshape(*lead, *indices.shape[batch:-1], *picked.shape[2:])


def _along_axis(x: np.ndarray, indices: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """Indices [..., m, ...] -> an index tuple into x; the other axes may be shorter than those of x."""
    axis %= x.ndim
    index = [np.arange(n).reshape([-1 if i == j else 1 for j in range(x.ndim)]) for i, n in enumerate(indices.shape)]
    index[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return tuple(index)


def _scatter(y: np.ndarray, index: tuple[np.ndarray, ...], updates: np.ndarray, reduction: str) -> np.ndarray:
    y = y.copy()
    if reduction == "none":
        y[index] = updates
    else:
        {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction].at(y, index, updates)
    return y


@kernel("ScatterElements", "Scatter")
def _scatter_elements(attrs: Attributes, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    index = _along_axis(x, indices, attrs.get("axis", 0))
    return _scatter(x, index, updates, attrs.get("reduction", "none"))


@kernel("ScatterND")
def _scatter_nd(attrs: Attributes, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    return _scatter(x, tuple(np.moveaxis(indices, -1, 0)), updates, attrs.get("reduction", "none"))


@kernel("OneHot")
def _one_hot(attrs: Attributes, indices: np.ndarray, depth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An index outside [-depth, depth) gives a row of the off value."""
    n = int(depth.reshape(-1)[0])
    axis = attrs.get("axis", -1) % (indices.ndim + 1)
    position = np.expand_dims(np.where(indices < 0, indices + n, indices), axis)
    columns = np.arange(n).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return np.where(position == columns, values[1], values[0])


@kernel("NonZero")
def _non_zero(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.stack(np.nonzero(x)).astype(np.int64)


# --------------------------------------------------------------------------------------------- shapes, constants


@kernel("Shape")
def _shape(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.asarray(x.shape[attrs.get("start", 0) : attrs.get("end")], np.int64)


@kernel("Size")
def _size(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.asarray(x.size, np.int64)


def _array(value: Any) -> np.ndarray:
    """A tensor attribute as onnx, numpy or graphsurgeon hold it."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(getattr(value, "values", value))


def _in_floats(x: np.ndarray, floats: np.dtype | None) -> np.ndarray:
    if floats is not None and (x.dtype.kind == "f" or x.dtype.name == "bfloat16"):
        return x.astype(floats)
    return x


@kernel("Constant")
def _constant(attrs: Attributes) -> np.ndarray:
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in attrs:
            return _in_floats(np.asarray(attrs[name], dtype), attrs.floats)
    if "value_ints" in attrs:
        return np.asarray(attrs["value_ints"], np.int64)
    if "value" not in attrs:
        raise UnsupportedError("Constant of strings or of a sparse tensor is not evaluated")
    return _in_floats(_array(attrs["value"]), attrs.floats)


@kernel("ConstantOfShape")
def _constant_of_shape(attrs: Attributes, shape: np.ndarray) -> np.ndarray:
    value = _array(attrs["value"]).reshape(-1)[:1] if "value" in attrs else np.zeros(1, np.float32)
    value = _in_floats(value, attrs.floats)
    return np.full([int(n) for n in shape], value[0], value.dtype)


@kernel("Range")
def _range(attrs: Attributes, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return (start + np.arange(count) * delta).astype(start.dtype)


@kernel("EyeLike")
def _eye_like(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    dtype = attrs.floating(attrs["dtype"]) if "dtype" in attrs else x.dtype
    return np.eye(x.shape[0], x.shape[1], k=attrs.get("k", 0), dtype=dtype)


# ------------------------------------------------------------------------------------------------ torch's kernels


def _to_torch(torch: Any, x: np.ndarray) -> Any:
    """Without a copy where torch can do without (it wants writable memory and no negative strides)."""
    return torch.from_numpy(x if x.flags.writeable and x.flags.c_contiguous else np.array(x, order="C"))


def _torch_pads(pads: Sequence[tuple[int, int]]) -> list[int]:
    return [p for pair in reversed(pads) for p in pair]


@torch_kernel("Conv")
def _torch_conv(torch: Any, attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    rank, group = x.ndim - 2, attrs.get("group", 1)
    if not 1 <= rank <= 3 or group == x.shape[1] > 1:  # torch's depthwise convolution is slow in float64
        return NotImplemented
    functional = torch.nn.functional
    strides, dilations, pads = _geometry(attrs, x.shape[2:], W.shape[2:])
    t, padding = _to_torch(torch, x), [p for p, _ in pads]
    if any(p != q for p, q in pads):
        t, padding = functional.pad(t, _torch_pads(pads)), [0] * rank
    bias = None if b is None else _to_torch(torch, b)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return conv(t, _to_torch(torch, W), bias, strides, padding, dilations, group).numpy()


@torch_kernel("ConvTranspose")
def _torch_conv_transpose(
    torch: Any, attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None
) -> Any:
    rank, group = x.ndim - 2, attrs.get("group", 1)
    if not 1 <= rank <= 3 or group == x.shape[1] > 1:
        return NotImplemented
    strides, dilations, begin, size = _transpose_geometry(attrs, x.shape[2:], W.shape[2:])
    functional = torch.nn.functional
    conv = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    t = conv(_to_torch(torch, x), _to_torch(torch, W), None, strides, 0, 0, group, dilations)
    z = _crop(t.numpy(), begin, size)
    return z if b is None else z + b.reshape(-1, *[1] * rank)


def _torch_pool(attrs: Attributes, x: np.ndarray) -> tuple[Any, ...] | None:
    """Kernel, strides, dilations and pads where torch pools as ONNX does: pads symmetric, at most half a window."""
    kernel_shape = _sequence(attrs, "kernel_shape", [])
    strides, dilations, pads = _geometry(attrs, x.shape[2:], kernel_shape)
    fits = 3 <= x.ndim <= 5 and all(p == q and 2 * p <= k for (p, q), k in zip(pads, kernel_shape, strict=True))
    return (kernel_shape, strides, dilations, [p for p, _ in pads]) if fits else None


@torch_kernel("MaxPool")
def _torch_max_pool(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    geometry = _torch_pool(attrs, x)
    if geometry is None or attrs.get("storage_order", 0):
        return NotImplemented
    kernel_shape, strides, dilations, pads = geometry
    functional = torch.nn.functional
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.ndim - 3]
    y, index = pool(_to_torch(torch, x), kernel_shape, strides, pads, dilations, bool(attrs.get("ceil_mode", 0)), True)
    planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return y.numpy(), index.numpy() + planes * math.prod(x.shape[2:])


@torch_kernel("AveragePool")
def _torch_average_pool(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    geometry = _torch_pool(attrs, x)
    if geometry is None or any(d != 1 for d in geometry[2]):
        return NotImplemented
    kernel_shape, strides, _, pads = geometry
    functional = torch.nn.functional
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]
    ceil, include = bool(attrs.get("ceil_mode", 0)), bool(attrs.get("count_include_pad", 0))
    return pool(_to_torch(torch, x), kernel_shape, strides, pads, ceil, include).numpy()


@torch_kernel("Gemm")
def _torch_gemm(torch: Any, attrs: Attributes, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> Any:
    left, right = _to_torch(torch, a), _to_torch(torch, b)
    y = ((left.T if attrs.get("transA", 0) else left) @ (right.T if attrs.get("transB", 0) else right)).numpy()
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    return alpha * y if c is None else alpha * y + beta * c


@torch_kernel("MatMul")
def _torch_matmul(torch: Any, attrs: Attributes, a: np.ndarray, b: np.ndarray) -> Any:
    return torch.matmul(_to_torch(torch, a), _to_torch(torch, b)).numpy()


@torch_kernel("Erf")
def _torch_erf(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    return torch.special.erf(_to_torch(torch, x)).numpy()


def _torch_module(backend: str) -> Any:
    """The torch module for "torch" and, where it is installed, "auto"; None for numpy."""
    if backend not in ("auto", "numpy", "torch"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'torch', not {backend!r}")
    if backend == "numpy" or (backend == "auto" and importlib.util.find_spec("torch") is None):
        return None
    try:
        import torch
    except ImportError as error:
        if backend == "auto":
            return None
        raise RuntimeMissingError("torch is not installed", hint="pip install 'onnxcrp[torch]'") from error
    return torch


# ------------------------------------------------------------------------------------------------------ evaluation


def _by_reference(op: str, attrs: Attributes, inputs: Sequence[Any], opset: int, outputs: int | None = None) -> Any:
    """The operator by onnx.reference; raises UnsupportedError where that fails or computes in another precision."""
    from onnx.reference import ReferenceEvaluator

    try:
        count = outputs or onnx.defs.get_schema(op, opset, "").min_output
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
        results = [f"y{i}" for i in range(count)]
        given = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, inputs, strict=True)
            if n
        ]
        node = onnx.helper.make_node(op, names, results, **attrs)
        graph = onnx.helper.make_graph([node], op, given, [onnx.ValueInfoProto(name=n) for n in results])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        values = ReferenceEvaluator(model).run(None, {n: x for n, x in zip(names, inputs, strict=True) if n})
    except Exception as error:  # whatever goes wrong in there means that the operator is missing here
        raise UnsupportedError(f"there is no kernel for it, and onnx.reference fails: {_first_line(error)}") from error
    if any(getattr(x, "dtype", None) == np.float64 for x in inputs):
        for value in values:
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype != np.float64:
                raise UnsupportedError(f"there is no kernel for it, and onnx.reference computes in {value.dtype}")
    return tuple(values)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def evaluate_node(
    op: str,
    attrs: Mapping[str, Any],
    inputs: Sequence[np.ndarray | None],
    *,
    domain: str = "",
    opset: int = 18,
    outputs: int | None = None,
    floats: Any = None,
    backend: str = "numpy",
    name: str = "",
) -> list[np.ndarray]:
    """The outputs of one node, in the type of its inputs.

    `attrs` as plain Python values; a missing optional input is None; `outputs`: how many are wanted (None: all that
    the operator has); `floats`: the type of every float that Cast, Constant and the like make. Raises UnsupportedError,
    which names the operator and the node, where it cannot be evaluated.
    """
    torch = _torch_module(backend)
    given = Attributes(attrs, opset=opset, outputs=outputs, floats=None if floats is None else np.dtype(floats))
    values = _call(op, given, list(inputs), domain, torch, name)
    return values if outputs is None else values[:outputs]


def _call(op: str, attrs: Attributes, inputs: list[np.ndarray | None], domain: str, torch: Any, name: str) -> list[Any]:
    where = f"{op}" + (f" (node {name!r})" if name else "")
    if domain not in ("", "ai.onnx", "onnxcrp"):
        raise UnsupportedError(f"cannot evaluate {where}: operators of the domain {domain!r} are not known")
    if op in RANDOM:
        raise UnsupportedError(f"cannot evaluate {where}: it draws random numbers")
    while inputs and inputs[-1] is None:
        inputs.pop()
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are results like others
            result: Any = NotImplemented
            if torch is not None and op in TORCH_KERNELS and all(x is None or x.dtype.kind == "f" for x in inputs):
                result = TORCH_KERNELS[op](torch, attrs, *inputs)
            if result is NotImplemented and op in KERNELS:
                result = KERNELS[op](attrs, *inputs)
            if result is NotImplemented:
                result = _by_reference(op, attrs, inputs, attrs.opset, attrs.outputs)
    except UnsupportedError as error:
        raise UnsupportedError(f"cannot evaluate {where}: {error.message}", hint=error.hint) from error
    except (ValueError, IndexError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        shapes = [None if x is None else list(x.shape) for x in inputs]
        raise ModelError(f"{where} fails on inputs of shape {shapes}: {_first_line(error)}") from error
    values = result if isinstance(result, tuple) else (result,)
    return [y if isinstance(y, list) else np.asarray(y) for y in values]  # a list: an ONNX sequence


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values; tensors as arrays, subgraphs as they are."""
    values = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        values[attribute.name] = value
    return values


def evaluate(
    model: onnx.ModelProto,
    feeds: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    *,
    dtype: Any = np.float64,
    backend: str = "auto",
) -> dict[str, np.ndarray]:
    """Run a whole model with every floating tensor in `dtype`, integers as they are: {output name: array}.

    `feeds` may also give inner tensors, which are then not computed. `outputs` may name any tensor (None: the model's
    outputs); only what they need is computed, and what has no more readers is dropped. `backend`: "numpy", "torch", or
    "auto": torch's kernels where it is installed.
    Raises UnsupportedError, which names operator and node, for what cannot be evaluated, InputError for wrong feeds.
    """
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    floats, torch = np.dtype(dtype), _torch_module(backend)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 18))
    wanted = list(outputs) if outputs is not None else [o.name for o in model.graph.output]
    values: dict[str, np.ndarray] = _inputs(model.graph, feeds, floats)
    _run(model.graph, values, {}, wanted, floats=floats, opset=opset, torch=torch)
    return {name: values[name] for name in wanted}


def _inputs(graph: onnx.GraphProto, feeds: Mapping[str, Any], floats: np.dtype) -> dict[str, np.ndarray]:
    """The feeds, checked by name and brought to the declared type."""
    declared = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    initialized = {i.name for i in graph.initializer}
    inner = {name for node in graph.node for name in node.output}
    if unknown := set(feeds) - set(declared) - inner:
        raise InputError(
            f"the model has no input {sorted(unknown)[0]!r}", hint=f"its inputs are {', '.join(map(repr, declared))}"
        )
    if missing := [n for n in declared if n not in feeds and n not in initialized]:
        raise InputError(f"the model's input {missing[0]!r} is missing")
    values = {}
    for name, value in feeds.items():
        array = np.asarray(value)
        if name not in declared:
            values[name] = _in_floats(array, floats)
            continue
        target = floats if declared[name] in FLOATS else onnx.helper.tensor_dtype_to_np_dtype(declared[name])
        if array.dtype.kind == "f" and target.kind != "f":
            raise InputError(f"the model's input {name!r} holds {target}, not {array.dtype}")
        values[name] = array.astype(target)
    return values


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, the outer tensors of its subgraphs included."""
    names = {n for n in node.input if n}
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
            for inner in graph.node:
                names |= _reads(inner) - own
                own |= set(inner.output)
            names |= {o.name for o in graph.output} - own
    return names


def _run(
    graph: onnx.GraphProto,
    values: dict[str, np.ndarray],
    outer: Mapping[str, np.ndarray],
    wanted: Sequence[str],
    *,
    floats: np.dtype,
    opset: int,
    torch: Any,
) -> None:
    """Compute `wanted` into `values`; `outer`: the tensors around a subgraph."""
    needed, nodes, fixed = set(wanted), [], set(values)
    for node in reversed(graph.node):
        if needed.intersection(node.output) - fixed:
            nodes.append(node)
            needed |= _reads(node)
    readers = Counter(name for node in nodes for name in _reads(node))
    readers.update(wanted)  # never dropped
    initializers = {i.name: i for i in graph.initializer if i.name in needed}

    def value(name: str) -> np.ndarray:
        if name in values:
            return values[name]
        if name in initializers:  # converted when first read: the whole net in double need not lie in memory at once
            values[name] = _in_floats(numpy_helper.to_array(initializers[name]), floats)
            return values[name]
        if name in outer:
            return outer[name]
        raise ModelError(f"no node, input or initializer makes the tensor {name!r}")

    for node in reversed(nodes):
        attrs = Attributes(attributes(node), opset=opset, outputs=len(node.output), floats=floats)
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            branch = attrs["then_branch" if np.any(value(node.input[0])) else "else_branch"]
            scope: dict[str, np.ndarray] = {}
            names = [o.name for o in branch.output]
            around = {n: value(n) for n in _reads(node) if n}
            _run(branch, scope, around, names, floats=floats, opset=opset, torch=torch)
            results = [scope[n] for n in names]
        else:
            given = [value(n) if n else None for n in node.input]
            results = _call(node.op_type, attrs, given, node.domain, torch, node.name or node.output[0])
            given.clear()
        for name, result in zip(node.output, results, strict=False):
            if name and readers[name] and name not in fixed:
                values[name] = _in_floats(result, floats) if isinstance(result, np.ndarray) else result
        for name in _reads(node):
            readers[name] -= 1
            if not readers[name]:
                values.pop(name, None)
    for name in wanted:  # an output may be an input or an initializer
        values.setdefault(name, value(name))

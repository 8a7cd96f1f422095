"""LRP in float64 on any torch net: every torch function that is called gets the dense formula of its rule.

zennit hooks modules and so sees neither functional adds nor products, attention or gates. Here a TorchFunctionMode
watches the forward pass and puts an autograd function with the rule's backward formula in the place of each call, while
autograd adds up what arrives at a tensor and undoes rearrangements. A function that is neither known nor a
rearrangement is an error, so that no gradient slips in. Nothing of the package is used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .transformers import EPSILON, HalfRule, LayerNormRule, MatmulRule, PassRule, SoftmaxRule, stab

Tensor = torch.Tensor

# Entries moved, copied, dropped or chosen: autograd's own way back is right. Max pooling gives all to the winner.
REARRANGE = set(
    """reshape view flatten unflatten permute transpose swapaxes movedim moveaxis contiguous clone cat concat stack
    chunk split unbind tensor_split __getitem__ index_select gather roll expand expand_as repeat unsqueeze squeeze
    narrow pad _pad zero_pad2d dropout dropout2d feature_dropout channel_shuffle pixel_shuffle pixel_unshuffle to
    type_as float double masked_fill masked_fill_ where detach t mT __get__ view_as reshape_as repeat_interleave
    max_pool1d max_pool2d max_pool3d boolean_dispatch amax max unfold tile flip select size dim numel
    new_zeros new_ones new_full zeros_like ones_like affine_grid topk""".split()  # noqa: SIM905
)
PASS = set(
    """relu relu_ relu6 hardtanh hardtanh_ gelu silu silu_ hardswish hardswish_ hardsigmoid sigmoid tanh leaky_relu elu
    mish softplus clamp clamp_min exp pow rsqrt sqrt normalize neg __neg__ log abs batch_norm""".split()  # noqa: SIM905
)
GATES = {"sigmoid", "hardsigmoid", "softmax"}
SUMS = {"add": 1, "__add__": 1, "__radd__": 1, "__iadd__": 1, "add_": 1, "sub": -1, "__sub__": -1, "__isub__": -1}
PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
QUOTIENTS = {"div", "__truediv__", "true_divide", "__itruediv__", "div_"}
AVERAGES = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean", "sum"}
AVERAGES |= {"adaptive_avg_pool3d", "interpolate", "norm", "linalg_vector_norm"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
MATMULS = {"matmul", "__matmul__", "bmm", "einsum"}
WHOLE = re.compile(r"(RMSNorm|^T5LayerNorm)$")  # modules that pass, besides those of transformers.activations


class Share(Function):
    """x_i J_i^T [R / stab(f(x))] for every input x_i of a function that is linear in them: epsilon and norm."""

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], *x: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(*x)
        return f(*x)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Any, ...]:
        x = [each.detach().requires_grad_(True) for each in ctx.saved_tensors]
        with torch.enable_grad():
            z = ctx.f(*x)
        back = torch.autograd.grad(z, x, R / stab(z.detach()))
        return None, *(each.detach() * g for each, g in zip(x, back, strict=True))


class Weighted(Function):
    """A layer L(a, W, b) under flat, zplus or gamma; `L` keeps stride, pads and the like."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, W: Tensor, b: Tensor | None, L: Any, rule: str, gamma: float) -> Tensor:
        ctx.save_for_backward(a, W, b)
        ctx.L, ctx.rule, ctx.gamma = L, rule, gamma
        return L(a, W, b)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Any, ...]:
        (a, W, b), L = ctx.saved_tensors, ctx.L

        def T(s: Tensor, weights: Tensor) -> Tensor:
            x = torch.zeros_like(a).requires_grad_(True)
            with torch.enable_grad():
                z = L(x, weights, None)
            return torch.autograd.grad(z, x, s)[0]

        def up(x: Any) -> Any:
            return None if x is None else x.clamp(min=0)

        def down(x: Any) -> Any:
            return None if x is None else x.clamp(max=0)

        if ctx.rule == "flat":
            ones = torch.ones_like(W)
            R_in = T(R / stab(L(torch.ones_like(a[:1]), ones, None)), ones)
        elif ctx.rule == "zplus":
            s = R / stab(L(up(a), up(W), up(b)) + L(down(a), down(W), None))
            R_in = up(a) * T(s, up(W)) + down(a) * T(s, down(W))
        else:
            z, g = L(a, W, b), ctx.gamma
            more, less = W + g * up(W), W + g * down(W)
            more_b, less_b = (None, None) if b is None else (b + g * up(b), b + g * down(b))
            p = torch.where(z > 0, R / stab(L(up(a), more, more_b) + L(down(a), less, None)), 0.0)
            q = torch.where(z < 0, R / stab(L(up(a), less, less_b) + L(down(a), more, None)), 0.0)
            R_in = up(a) * (T(p, more) + T(q, less)) + down(a) * (T(p, less) + T(q, more))
        return R_in, None, None, None, None, None


class Normed(Function):
    """Group and instance norm: u = R gamma / (stab(y) sigma), x (u - mean u) over the positions of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, gain: Any, bias: Any, epsilon: float) -> Tensor:
        rows = x.reshape(x.shape[0], groups, -1)
        sigma = (rows.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        gain = torch.ones(x.shape[1]).to(x) if gain is None else gain
        y = ((rows - rows.mean(-1, keepdim=True)) / sigma).reshape(x.shape) * gain.reshape(shape)
        y = y if bias is None else y + bias.reshape(shape)
        factor = (torch.ones_like(rows) / sigma).reshape(x.shape) * gain.reshape(shape)
        ctx.groups = groups
        ctx.save_for_backward(x, factor, y)
        return y

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Any, ...]:
        x, factor, y = ctx.saved_tensors
        u = (R / stab(y) * factor).reshape(x.shape[0], ctx.groups, -1)
        return x * (u - u.mean(-1, keepdim=True)).reshape(x.shape), None, None, None, None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class Watch(TorchFunctionMode):
    """Puts rules in the place of torch's functions. `depth`: layers with weights between the input and a tensor."""

    def __init__(self, rules: Mapping[str, Any], ids: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rules, self.ids = rules, ids
        self.leaves: list[tuple[str, Tensor]] = []  # what the ids of an input looked up

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "embedding":
            return self.embedding(func, *args, **kwargs)
        given = [t for t in _tensors([args, kwargs]) if t.requires_grad]
        if not given or (name == "__get__" and not _carries(result := func(*args, **kwargs))):
            return func(*args, **kwargs) if not given else result
        depth = max(getattr(t, "depth", 0) for t in given)
        out = self.apply(name, func, args, kwargs, depth)
        deeper = name in CONVOLUTIONS or name in ("linear", "addmm") or (name in MATMULS and len(given) == 1)
        scores = name in MATMULS and len(given) == 2
        kept = name in REARRANGE or name in PRODUCTS | QUOTIENTS or name in SUMS
        for t in _tensors(out):
            t.depth = depth + deeper
            t.scores = scores or (kept and any(getattr(g, "scores", False) for g in given))
            t.gate = name in GATES or (name in REARRANGE and all(getattr(g, "gate", False) for g in given))
        return out

    def embedding(self, func: Any, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = func(ids, weight, *args, **kwargs)
        name = next((n for n, mine in self.ids.items() if ids.shape == mine.shape and torch.equal(ids, mine)), None)
        if name is None:
            return found  # positions and token types
        leaf = found.detach().requires_grad_(True)
        self.leaves.append((name, leaf))
        return leaf * 1.0

    def apply(self, name: str, func: Any, args: Any, kwargs: Any, depth: int) -> Any:
        if name in ("float", "double", "to", "type", "type_as"):
            kinds = [a for a in [*args[1:], *kwargs.values()] if isinstance(a, torch.dtype)]
            return args[0] if name != "to" or kinds else func(*args, **kwargs)
        if name == "interpolate" and kwargs.get("mode", args[3] if len(args) > 3 else "nearest") == "nearest":
            return func(*args, **kwargs)
        if name in REARRANGE or name.startswith("max_pool") or "max_pool" in name:
            return func(*args, **kwargs)
        if name in PASS:
            args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "inplace"} | {"": args[0]}
            x = kwargs.pop("")
            return PassRule.apply(x, lambda x: func(x.clone(), *args, **kwargs))
        if name in SUMS:
            return self.sum(args[0], args[1], SUMS[name])
        if name in PRODUCTS:
            return self.product(args[0], args[1])
        if name in QUOTIENTS:
            x, y = args[0], args[1]
            y = y.detach() if isinstance(y, Tensor) else y  # a divisor gets none
            if not _carries(x):
                raise NotImplementedError("a constant divided by a data path")
            return PassRule.apply(x.expand(torch.broadcast_shapes(x.shape, getattr(y, "shape", ()))), lambda x: x / y)
        if name in ("grid_sample", "grid_sampler", "cumsum"):
            rest = [a.detach() if isinstance(a, Tensor) else a for a in args[1:]]  # a position gets none
            return Share.apply(lambda x: func(x, *rest, **kwargs), args[0])
        if name in AVERAGES:
            return Share.apply(lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in CONVOLUTIONS or name == "linear":
            return self.layer(name, func, args, kwargs, depth)
        if name == "addmm":
            bias, x, W = args
            return self.layer("linear", nn.functional.linear, (x, W.mT, bias), {}, depth)
        if name in MATMULS:
            return self.matmul(name, func, args, depth)
        if name in ("softmax", "_softmax"):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return SoftmaxRule.apply(args[0].movedim(dim, -1)).movedim(-1, dim)
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name == "layer_norm":
            return self.layer_norm(*args, **kwargs)
        if name in ("group_norm", "instance_norm"):
            return self.group_norm(name, *args, **kwargs)
        raise NotImplementedError(f"no rule is written for torch's {name}")

    def sum(self, a: Any, b: Any, sign: int) -> Tensor:
        if _carries(a) and _carries(b):
            return Share.apply(lambda a, b: a + sign * b, a, b)
        x, other = (a, b) if _carries(a) else (b, a)
        if getattr(x, "scores", False):  # a mask, or relative positions
            shape = torch.broadcast_shapes(x.shape, getattr(other, "shape", ()))
            return PassRule.apply(x.expand(shape), lambda x: x + sign * other)
        return Share.apply((lambda x: x + sign * b) if x is a else (lambda x: a + sign * x), x)

    def product(self, a: Any, b: Any) -> Tensor:
        if _carries(a) and _carries(b):
            gates = [getattr(t, "gate", False) for t in (a, b)]
            if self.rules["product"] == "signal" and sum(gates) == 1:
                signal, gate = (b, a.detach()) if gates[0] else (a, b.detach())
                shape = torch.broadcast_shapes(a.shape, b.shape)
                return PassRule.apply(signal.expand(shape), lambda x: x * gate)
            return HalfRule.apply(a, b)
        x, other = (a, b) if _carries(a) else (b, a)
        shape = torch.broadcast_shapes(x.shape, getattr(other, "shape", ()))
        return PassRule.apply(x.expand(shape), lambda x: x * other)

    def matmul(self, name: str, func: Any, args: Any, depth: int) -> Tensor:
        operands = list(_tensors(args))
        if len(operands) != 2:
            raise NotImplementedError(f"{name} of {len(operands)} tensors")
        a, b = operands
        f = functools.partial(func, args[0]) if name == "einsum" else func
        if _carries(a) and _carries(b):
            gates = [getattr(t, "gate", False) for t in (a, b)]
            if self.rules["product"] == "signal" and sum(gates) == 1:
                return (
                    Share.apply(lambda x: f(a.detach(), x), b)
                    if gates[0]
                    else Share.apply(lambda x: f(x, b.detach()), a)
                )
            return Bilinear.apply(f, a, b) if name == "einsum" else MatmulRule.apply(a, b)
        if _carries(a) and b.ndim == 2 and name != "einsum":
            return self.layer("linear", nn.functional.linear, (a, b.mT, None), {}, depth)
        raise NotImplementedError(f"{name} with a constant")

    def layer(self, name: str, func: Any, args: Any, kwargs: Any, depth: int) -> Tensor:
        names = ["input", "weight", "bias"]
        given = dict(zip(names, args[:3], strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        more = {k: v for k, v in kwargs.items() if k not in names}
        a, W, b = given["input"], given["weight"], given.get("bias")
        if _carries(W):
            raise NotImplementedError(f"{name} with weights that carry relevance")

        def L(a: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
            return func(a, W, b, *args[3:], **more)

        kind = "first" if depth == 0 else "dense" if name == "linear" else "convolution"
        rule, gamma = self.rules[kind]
        if rule == "epsilon" or (rule == "gamma" and not gamma):
            return Share.apply(lambda x: L(x, W, b), a)
        return Weighted.apply(a, W, b, L, rule, gamma)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
        causal = kwargs.get("is_causal", rest[1] if len(rest) > 1 else False)
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        scores = PassRule.apply(MatmulRule.apply(q, k.mT), lambda x: x * scale)
        if causal:
            attn_mask = torch.ones(scores.shape[-2:]).tril().bool()
        if attn_mask is not None:
            bool_mask = attn_mask.dtype == torch.bool
            closed = torch.where(attn_mask, 0.0, -torch.inf).to(scores) if bool_mask else attn_mask
            scores = PassRule.apply(scores, lambda x: x + closed)
        return MatmulRule.apply(SoftmaxRule.apply(scores), v)

    def layer_norm(self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        n, size = len(shape), int(np.prod(shape))
        weight = torch.ones(size).to(x) if weight is None else weight.reshape(-1)
        bias = torch.zeros(size).to(x) if bias is None else bias.reshape(-1)
        return LayerNormRule.apply(x.flatten(-n), weight, bias, eps).reshape(x.shape)

    def group_norm(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name == "group_norm":
            names = ("num_groups", "weight", "bias", "eps")
        else:
            names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        groups = given.get("num_groups", x.shape[1])
        return Normed.apply(x, groups, given.get("weight"), given.get("bias"), given.get("eps", 1e-5))


class Bilinear(Function):
    """Z = f(A, B): N = R / (2 Z + 1e-8 sign); R_A = A . dZ/dA^T N, R_B = B . dZ/dB^T N."""

    @staticmethod
    def forward(ctx: Any, f: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(A, B)
        return f(A, B)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[None, Tensor, Tensor]:
        A, B = (each.detach().requires_grad_(True) for each in ctx.saved_tensors)
        with torch.enable_grad():
            Z = ctx.f(A, B)
        back = torch.autograd.grad(Z, (A, B), R / stab(2 * Z.detach(), 1e-8))
        return None, A.detach() * back[0], B.detach() * back[1]


def _multihead(self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """[B, T, C]: what the module computes, written out, so that every step is seen."""
    if query is not key or key is not value or not self.batch_first:
        raise NotImplementedError("attention of several sources")
    B, T, C = query.shape
    F = nn.functional
    q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    q, k, v = (t.reshape(B, T, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return self.out_proj(y.transpose(1, 2).reshape(B, T, C)), None


class _Whole(nn.Module):
    """A module whose relevance passes unchanged: activations written as arithmetic, RMS norms."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        def f(x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return self.module(x)

        depth = getattr(x, "depth", 0)
        out = PassRule.apply(x, f) if x.requires_grad else f(x)
        out.depth = depth
        return out


COMPOSITES: dict[str, dict[str, Any]] = {
    "epsilon_plus_flat": {
        "first": ("flat", 0.0), "convolution": ("zplus", 0.0), "dense": ("epsilon", 0.0), "product": "signal",
    },
    "epsilon": {"first": ("epsilon", 0.0), "convolution": ("epsilon", 0.0), "dense": ("epsilon", 0.0), "product": "signal"},
    **{
        name: {"first": ("gamma", g), "convolution": ("gamma", g), "dense": ("gamma", g), "product": "half"}
        for name, g in (("attnlrp", 0.0), ("attnlrp(gamma=0.25)", 0.25))
    },
}  # fmt: skip


def prepared(net: nn.Module) -> nn.Module:
    """A float64 copy in which attention is written out and what passes as a whole is one module."""
    net = copy.deepcopy(net).double().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = functools.partial(_multihead, module)
        if hasattr(module, "inplace"):
            module.inplace = False
    for module in list(net.modules()):
        for name, child in module.named_children():
            kind = type(child)
            if WHOLE.search(kind.__name__) or kind.__module__ == "transformers.activations":
                setattr(module, name, _Whole(child))
    return net


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """torch's fused attention in eval mode is no function that could be watched."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def merge(net: nn.Module, *args: Tensor) -> None:
    """BatchNorm that is all that reads a layer is folded into it, else into the unpadded layer that is all that reads it."""
    after, readers, count, merged = {}, {}, {}, set()

    def hook(module: nn.Module, inputs: Any, out: Any) -> None:
        count[module] = count.get(module, 0) + 1
        for x in _tensors(list(inputs)):
            maker = after.get(id(x), (None, None))[0]
            if maker is not None:
                readers.setdefault(maker, []).append(module)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._BatchNorm):
            after[id(out)] = module, out  # the tensor is kept, so that its id stays its own

    handles = [m.register_forward_hook(hook) for m in net.modules() if not list(m.children())]
    with torch.no_grad():
        before = net(*args)
    for handle in handles:
        handle.remove()
    norms = nn.modules.batchnorm._BatchNorm
    for layer, found in readers.items():
        norm = found[0]
        if len(found) > 1 or count[layer] > 1 or not isinstance(norm, norms) or isinstance(layer, norms):
            continue
        merged.add(norm)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        transposed = getattr(layer, "transposed", False)
        shape = [1, -1] if transposed else [-1, 1]
        layer.weight.data *= scale.reshape([*shape, *[1] * (layer.weight.ndim - 2)])
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        layer.bias = nn.Parameter(bias * scale + norm.bias, requires_grad=False)
        norm.forward = lambda x: x
    for norm, found in readers.items():
        layer = found[0]
        plain = isinstance(layer, nn.Conv1d | nn.Conv2d) and not any(layer.padding) and layer.groups == 1
        if not isinstance(norm, norms) or norm in merged or len(found) > 1 or not plain or count[norm] > 1:
            continue
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        sizes = [1, -1, *[1] * (layer.weight.ndim - 2)]
        lost = (layer.weight * shift.reshape(sizes)).flatten(1).sum(1)
        layer.bias = nn.Parameter(lost if layer.bias is None else layer.bias + lost, requires_grad=False)
        layer.weight.data *= scale.reshape(sizes)
        norm.forward = lambda x: x
    with torch.no_grad():
        for one, other in zip(_tensors(before), _tensors(net(*args)), strict=True):
            torch.testing.assert_close(other, one)


def relevances(
    net: nn.Module,
    feeds: Mapping[str, np.ndarray],
    composite: str,
    target: tuple[int, ...] | np.ndarray,
    output: int = 0,
) -> dict[str, np.ndarray]:
    """Relevance of every input (token ids: [B, T]) for a target of one output, the same for all samples.

    `target`: an index, or weights of the output's entries [*output[1:]]; the seed is the weights times the output.
    """
    net = prepared(net)
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in feeds.items()}
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    merge(net, *tensors.values())
    real = {name: t.requires_grad_(True) for name, t in tensors.items() if t.is_floating_point()}
    watch = Watch(COMPOSITES[composite], {name: t for name, t in tensors.items() if name not in real})
    with _eager(), watch:
        out = net(*tensors.values())
    out = out[output] if isinstance(out, tuple | list) else out
    seed = torch.zeros_like(out)
    if isinstance(target, tuple):
        seed[(slice(None), *target)] = out.detach()[(slice(None), *target)]
    else:
        seed = out.detach() * torch.from_numpy(target).to(out)
    leaves = [*real.values(), *(leaf for _, leaf in watch.leaves)]
    found = torch.autograd.grad(out, leaves, seed, allow_unused=True)
    R = {name: back.numpy() for name, back in zip(real, found, strict=False) if back is not None}
    for (name, _), back in zip(watch.leaves, found[len(real) :], strict=True):
        if back is not None:
            R[name] = R.get(name, 0) + back.sum(-1).numpy()
    return R


def relevance(net: nn.Module, feeds: Mapping[str, np.ndarray], composite: str, target: tuple[int, ...]) -> np.ndarray:
    """That of the first input which gets any, for the first output."""
    R = relevances(net, feeds, composite, target)
    return next(R[name] for name in feeds if name in R)


__all__ = ["EPSILON", "Watch", "relevance", "relevances"]

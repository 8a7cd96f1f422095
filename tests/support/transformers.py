"""Small transformers in torch, their export, and their relevance in float64 without any code of the package.

Each net is written once, over a set of primitives: `Plain` are torch's own functions, which get exported; `Lrp` computes
the same values and has the dense formula of the LRP rule as its backward pass, so that torch's autograd only adds up
what arrives at a tensor and undoes rearrangements. Formulas: Achtibat et al. 2024 (AttnLRP), as the design states them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

EPSILON = 1e-6
Tensor = torch.Tensor


def stab(z: Tensor, epsilon: float = EPSILON) -> Tensor:
    return z + epsilon * torch.where(z >= 0, 1.0, -1.0).to(z)


# ---- the rules: forward as usual, backward by formula ----------------------------------------------------------------
class LinearRule(Function):
    """R_i = a_i sum_j w_ji R_j / stab(z_j), or with gamma the generalized gamma rule, term by term."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, W: Tensor, b: Tensor, gamma: float) -> Tensor:
        z = F.linear(a, W, b)
        ctx.save_for_backward(a, W, b, z)
        ctx.gamma = gamma
        return z

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None, None, None]:
        a, W, b, z = ctx.saved_tensors
        if not ctx.gamma:
            return a * ((R / stab(z)) @ W), None, None, None
        terms = a.unsqueeze(-2) * W  # [..., out, in]
        up = (z > 0).unsqueeze(-1)
        share = terms + ctx.gamma * torch.where(up, terms.clamp(min=0), terms.clamp(max=0))
        bias = b + ctx.gamma * torch.where(z > 0, b.clamp(min=0), b.clamp(max=0))
        s = torch.where(z == 0, 0.0, R / stab(share.sum(-1) + bias))
        return (share * s.unsqueeze(-1)).sum(-2), None, None, None


class SumRule(Function):
    """u R / stab(u + v), v R / stab(u + v), broadcast axes summed back."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        return u + v

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, Tensor]:
        u, v = ctx.saved_tensors
        s = R / stab(u + v)
        return (u * s).sum_to_size(u.shape), (v * s).sum_to_size(v.shape)


class MatmulRule(Function):
    """N = R / (2 A B + 1e-8 sign); R_A = A . (N B^T), R_B = B . (A^T N)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(A, B)
        return A @ B

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, Tensor]:
        A, B = ctx.saved_tensors
        N = R / stab(2 * (A @ B), 1e-8)
        return A * (N @ B.mT), B * (A.mT @ N)


class SoftmaxRule(Function):
    """x (R - s sum R), s = softmax(x), over the last axis; x is 0 where it is infinite or s = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = F.softmax(x, -1)
        ctx.save_for_backward(torch.where((s == 0) | torch.isinf(x), 0.0, x), s)
        return s

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return x * (R - s * R.sum(-1, keepdim=True))


class LayerNormRule(Function):
    """s = R / stab(y), u = s gamma / sigma, x (u - mean u): sigma is held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        sigma = (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        y = (x - x.mean(-1, keepdim=True)) / sigma * gain + bias
        ctx.save_for_backward(x, gain / sigma, y)
        return y

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None, None, None]:
        x, factor, y = ctx.saved_tensors
        u = R / stab(y) * factor
        return x * (u - u.mean(-1, keepdim=True)), None, None, None


class HalfRule(Function):
    """Both factors of a product get R / 2."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.shapes = u.shape, v.shape
        return u * v

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, Tensor]:
        return (R / 2).sum_to_size(ctx.shapes[0]), (R / 2).sum_to_size(ctx.shapes[1])


class PassRule(Function):
    """R unchanged through an elementwise function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Any) -> Tensor:
        return f(x)

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:
        return R, None


# ---- two sets of primitives ------------------------------------------------------------------------------------------
class Plain:
    """What is exported; `merged`: dense layers see [B T, C], as GPT-2 in Hugging Face's library writes them."""

    def __init__(self, merged: bool = False) -> None:
        self.merged = merged

    def linear(self, a: Tensor, layer: nn.Linear) -> Tensor:
        if not self.merged:
            return layer(a)
        return layer(a.reshape(-1, a.shape[-1])).reshape(*a.shape[:-1], layer.out_features)

    def add(self, u: Tensor, v: Tensor) -> Tensor:
        return u + v

    def mul(self, u: Tensor, v: Tensor) -> Tensor:
        return u * v

    def layer_norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return layer(x)

    def activation(self, f: Any, x: Tensor) -> Tensor:
        return f(x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, name: str) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def lookup(self, table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
        return table(ids)

    def mark(self, name: str, x: Tensor) -> Tensor:
        return x


class Lrp:
    """Relevance; `leaves` are what a token looked up, `z` the marked tensors, `R` their relevance before the mask."""

    def __init__(self, masks: Mapping[str, np.ndarray] | None = None, gamma: float = 0.0) -> None:
        self.masks = {
            name: torch.as_tensor(np.asarray(mask), dtype=torch.float64) for name, mask in (masks or {}).items()
        }
        self.gamma = gamma
        self.leaves: dict[str, Tensor] = {}
        self.z: dict[str, Tensor] = {}
        self.R: dict[str, Tensor] = {}

    def linear(self, a: Tensor, layer: nn.Linear) -> Tensor:
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return LinearRule.apply(a, layer.weight, bias, self.gamma)

    def add(self, u: Tensor, v: Tensor) -> Tensor:
        return SumRule.apply(u, v)

    def mul(self, u: Tensor, v: Tensor) -> Tensor:
        return HalfRule.apply(u, v)

    def layer_norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return LayerNormRule.apply(x, layer.weight, layer.bias, layer.eps)

    def activation(self, f: Any, x: Tensor) -> Tensor:
        return PassRule.apply(x, f)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, name: str) -> Tensor:
        scale = q.shape[-1] ** -0.5
        scores = PassRule.apply(MatmulRule.apply(q, k.mT), lambda x: x * scale)
        if mask is not None:
            closed = torch.where(mask, 0.0, -torch.inf).to(scores) if mask.dtype == torch.bool else mask
            scores = PassRule.apply(scores, lambda x: x + closed)
        return self.mark(name, MatmulRule.apply(SoftmaxRule.apply(scores), v))

    def lookup(self, table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
        self.leaves[name] = F.embedding(ids, table.weight).detach().requires_grad_(True)
        return self.leaves[name] * 1.0

    def mark(self, name: str, x: Tensor) -> Tensor:
        def arrive(R: Tensor) -> Tensor | None:
            self.R[name] = R.detach()
            return R * self.masks[name] if name in self.masks else None

        self.z[name] = x
        x.register_hook(arrive)
        return x


# ---- the nets --------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention [B, T, C] -> [B, T, C]; one Linear for q, k, v or three."""

    def __init__(self, width: int, heads: int, *, joint: bool) -> None:
        super().__init__()
        self.heads = heads
        if joint:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, do: Any, mask: Tensor | None, name: str) -> Tensor:
        size, width = x.shape[1:]
        if hasattr(self, "qkv"):
            parts = do.linear(x, self.qkv).reshape(-1, size, 3, self.heads, width // self.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                do.linear(x, layer).reshape(-1, size, self.heads, width // self.heads).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
        heads = do.attention(q, k, v, mask, f"{name}.heads")
        return do.linear(heads.transpose(1, 2).reshape(-1, size, width), self.proj)


class Block(nn.Module):
    """Pre-norm x + f(norm x) or post-norm norm(x + f x), f attention, then a MLP, perhaps gated."""

    def __init__(
        self, width: int, heads: int, *, pre: bool, joint: bool, tanh: bool = False, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, joint=joint)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gate = nn.Linear(width, 3 * width) if gated else None
        self.pre = pre
        self.tanh = tanh

    def forward(self, x: Tensor, do: Any, mask: Tensor | None, name: str) -> Tensor:
        def mlp(h: Tensor) -> Tensor:
            u = do.mark(f"{name}.up", do.linear(h, self.up))
            u = do.activation(lambda v: F.gelu(v, approximate="tanh" if self.tanh else "none"), u)
            if self.gate is not None:
                u = do.mul(u, do.linear(h, self.gate))
            return do.linear(u, self.down)

        if self.pre:
            x = do.add(x, self.attention(do.layer_norm(x, self.norm1), do, mask, name))
            return do.mark(name, do.add(x, mlp(do.layer_norm(x, self.norm2))))
        x = do.layer_norm(do.add(x, self.attention(x, do, mask, name)), self.norm1)
        return do.layer_norm(do.mark(name, do.add(x, mlp(x))), self.norm2)


class Net(nn.Module):
    """A transformer with its primitives in `do`; `example` gives inputs by name."""

    do: Any

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.merged = merged
        self.do = Plain(merged)

    def run_blocks(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, self.do, mask, f"blocks.{i}")
        return x


class Vit(Net):
    """[B, 3, 16, 16] -> [B, 5]: patches of 4 pixels, a class token, constant positions; GELU MLPs."""

    def __init__(self, width: int = 16, gated: bool = False) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, 2, pre=True, joint=True, gated=gated) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        do = self.do
        x = pixels.reshape(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 48)
        x = torch.cat([self.token.expand(pixels.shape[0], -1, -1), do.linear(x, self.patches)], 1)
        x = self.run_blocks(do.add(x, self.positions))
        return do.linear(do.layer_norm(x, self.norm)[:, 0], self.head)

    @staticmethod
    def example(batch: int, seed: int = 0) -> dict[str, Tensor]:
        return {"pixels": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


class Bert(Net):
    """ids, token types, attention mask [B, T] -> [B, 3]: post-norm, the mask added to the scores, a tanh pooler."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(30, width), nn.Embedding(2, width)
        self.positions = nn.Parameter(torch.randn(1, 7, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 2, pre=False, joint=False) for _ in range(2))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor, types: Tensor, attention_mask: Tensor) -> Tensor:
        do = self.do
        x = do.add(do.lookup(self.words, ids, "ids"), do.lookup(self.types, types, "types"))
        x = do.layer_norm(do.add(x, self.positions), self.norm)
        closed = (1 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        x = self.run_blocks(x, closed)
        return do.linear(do.activation(torch.tanh, do.linear(x[:, 0], self.pooler)), self.head)

    @staticmethod
    def example(batch: int, seed: int = 0) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 30, (batch, 7), generator=draw)
        mask = torch.ones(batch, 7, dtype=torch.int64)
        mask[0, 5:] = 0
        return {"ids": ids, "types": torch.randint(0, 2, (batch, 7), generator=draw), "attention_mask": mask}


class Gpt(Net):
    """ids [B, T] -> logits [B, T, 20]: pre-norm, causal mask, tanh GELU, the embedding tied to the output."""

    def __init__(self, width: int = 16, merged: bool = False) -> None:
        super().__init__(merged)
        self.words = nn.Embedding(20, width)
        self.positions = nn.Parameter(torch.randn(1, 6, width))
        self.blocks = nn.ModuleList(Block(width, 4, pre=True, joint=True, tanh=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("causal", torch.ones(6, 6).tril().bool())

    def forward(self, ids: Tensor) -> Tensor:
        do = self.do
        x = self.run_blocks(do.add(do.lookup(self.words, ids, "ids"), self.positions), self.causal)
        return do.linear(do.layer_norm(x, self.norm), self.head)

    @staticmethod
    def example(batch: int, seed: int = 0) -> dict[str, Tensor]:
        return {"ids": torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(seed))}


NETS = {
    "vit": Vit,
    "bert": Bert,
    "gpt": Gpt,
    "vit_gated": lambda: Vit(gated=True),
    "gpt_merged": lambda: Gpt(merged=True),
}


def build(name: str, seed: int = 0) -> Net:
    """A net with random weights, biases and norms, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name]()
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.2 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
    return net.eval().requires_grad_(False)


def export(net: Net, exporter: str, folder: Path, opset: int = 18) -> Path:
    """Write the net, batch symbolic, by the TorchScript-based ("torchscript") or the dynamo-based exporter."""
    example = net.example(2, seed=9)
    path = folder / f"{exporter}.onnx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # both exporters warn about themselves and about parts of torch they use
        if exporter == "torchscript":
            axes = {name: {0: "batch"} for name in (*example, "logits")}
            options: dict[str, Any] = {"dynamo": False, "dynamic_axes": axes, "opset_version": opset}
        else:
            shapes = {name: {0: torch.export.Dim("batch")} for name in example}
            options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "opset_version": opset}
        names = {"input_names": list(example), "output_names": ["logits"]}
        torch.onnx.export(net, tuple(example.values()), str(path), **names, **options)
    return path


def relevance(
    net: Net,
    feeds: Mapping[str, np.ndarray],
    target: np.ndarray,
    *,
    masks: Mapping[str, np.ndarray] | None = None,
    bypass: str = "keep",
    gamma: float = 0.0,
    inputs: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Relevance of the inputs ([B, T] for token ids) and of all marked tensors, float64; seed = target * logits.

    `bypass="cut"` starts again at the one masked tensor with what arrived there, so that nothing goes round it.
    """
    net = net.double()
    do = net.do = Lrp(masks, gamma)
    data = {name: torch.from_numpy(array) for name, array in feeds.items()}
    data = {name: v.double().requires_grad_(True) if v.is_floating_point() else v for name, v in data.items()}
    try:
        logits = net(**data)
        ends = {name: do.leaves.get(name, data[name]) for name in data if name in do.leaves or data[name].requires_grad}
        seed = torch.from_numpy(target).double() * logits.detach()
        found = torch.autograd.grad(logits, list(ends.values()), seed, retain_graph=True)
        if bypass == "cut" and masks:
            ((name, mask),) = do.masks.items()
            start = do.R[name] * mask
            do.masks = {}
            found = torch.autograd.grad(do.z[name], list(ends.values()), start)
    finally:
        net.do = Plain(net.merged)
        net.float()
    result = {f"R {name}": R.numpy() for name, R in do.R.items()}
    for name, R in zip(ends, found, strict=True):
        result[name] = (R.sum(-1) if name in do.leaves else R).numpy()
    result["logits"] = logits.detach().numpy()
    return result

"""zennit in float64 as the oracle of relevance, on the definitions of this project.

`Oracle` prepares one net once (float64, a module per operation, BatchNorm merged where it really follows a linear
layer) and answers batches of questions. What it settles, so that both sides mean the same thing:

- first layer: every linear layer that reads the input gets the composite's first rule;
- a merged BatchNorm divides by nothing: zennit's canonizer leaves its eps in place, so that each merged
  BatchNorm still scales by 1/sqrt(1 + eps), 5e-6 per layer and 3e-4 over a ResNet-50;
- BatchNorm that does not follow a linear layer (densenet) passes relevance on; zennit's sequential canonizer takes
  neighbours in definition order and would merge a convolution with the BatchNorm of another block;
- masks: `cut` is zennit-crp's exclude_parallel=True; `keep` is written here as hooks on the layers' outputs, because
  zennit-crp multiplies masks into gradients in place, where skips may share the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from . import nets, peers
from .cases import HIGH, LOW

peers.load()

import torch  # noqa: E402
from crp.attribution import CondAttribution  # noqa: E402
from torch import nn  # noqa: E402
from zennit.canonizers import MergeBatchNorm  # noqa: E402
from zennit.composites import layer_map_base  # noqa: E402
from zennit.core import Composite, Hook  # noqa: E402
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZPlus  # noqa: E402
from zennit.types import Convolution, Linear  # noqa: E402

RULES: dict[str, tuple[Hook, Hook, Hook]] = {  # composite: rules of the first layer, convolutions, dense layers
    "epsilon_plus_flat": (Flat(), ZPlus(), Epsilon()),
    "epsilon_alpha2_beta1_flat": (Flat(), AlphaBeta(2.0, 1.0), Epsilon()),
    "epsilon_gamma_box": (ZBox(LOW, HIGH), Gamma(0.25), Epsilon()),
    "epsilon": (Epsilon(), Epsilon(), Epsilon()),
}


NOTHING = 1e-300  # as an eps: 1 + NOTHING is 1, and torch 2.11 refuses 0


class Merge(MergeBatchNorm):
    """zennit's merge for given (linear, BatchNorm) pairs, with the BatchNorm an exact identity afterwards."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]] = ()):
        super().__init__()
        self.pairs = list(pairs)

    def apply(self, root_module: nn.Module) -> list[MergeBatchNorm]:
        instances: list[MergeBatchNorm] = []
        for linear, batchnorm in self.pairs:
            instance = Merge()
            instance.register((linear,), batchnorm)
            instance.eps, batchnorm.eps = batchnorm.eps, NOTHING
            instances.append(instance)
        return instances

    def remove(self) -> None:
        super().remove()
        self.batch_norm.eps = self.eps


class Oracle:
    """Relevance of one net by zennit, all in float64."""

    def __init__(self, net: nn.Module, x: torch.Tensor):
        self.net = nets.modular(net)
        self.pairs = nets.neighbours(self.net, x.double())
        self.first = set(nets.first_layers(self.net, x.double()))

    def composite(self, name: str) -> Composite:
        """The zennit composite that means what our preset `name` means."""
        first, convolution, dense = RULES[name]
        kinds = [*layer_map_base(1e-6), (Convolution, convolution), (Linear, dense)]

        def rule(_, layer: str, module: nn.Module) -> Hook | None:
            if layer in self.first:
                return first
            return next((hook for types, hook in kinds if isinstance(module, types)), None)

        return Composite(module_map=rule, canonizers=[Merge(self.pairs)])

    def logits(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.net(torch.from_numpy(x).double()).numpy()

    def relevance(
        self,
        composite: str,
        x: np.ndarray,
        targets: np.ndarray,
        *,
        masks: Mapping[str, np.ndarray] | None = None,
        record: Sequence[str] = (),
    ) -> dict[str, np.ndarray]:
        """x [B, ...], targets [B, classes] (seed = targets * logits), masks {layer: [B, C]} under `keep`.

        Returns {"input": [B, ...], layer: [B, C, ...]}; a recorded layer's relevance is that before its own mask.
        """
        masks, recorded = masks or {}, {}

        def watch(name: str) -> object:
            def backward(R: torch.Tensor) -> torch.Tensor | None:
                if name in record:
                    recorded[name] = R.detach().numpy().copy()
                return R * _like(masks[name], R) if name in masks else None

            def forward(module: nn.Module, args: object, z: torch.Tensor) -> None:
                z.register_hook(backward)

            return forward

        data = torch.from_numpy(x).double().requires_grad_(True)
        # hooks first: they then see the layer's own output, before zennit's hooks wrap it
        with _hooked(self.net, {name: watch(name) for name in {*masks, *record}}):
            with self.composite(composite).context(self.net) as net:
                z = net(data)
                (R,) = torch.autograd.grad(z, data, torch.from_numpy(targets).to(z) * z.detach())
        return {"input": R.numpy(), **recorded}

    def cut(
        self, composite: str, x: np.ndarray, targets: np.ndarray, kept: Mapping[str, Sequence[Sequence[int]]]
    ) -> np.ndarray:
        """Input relevance [B, ...] by zennit-crp with exclude_parallel=True; kept: {layer: channels per row}, later first."""
        data = torch.from_numpy(x).double().requires_grad_(True)
        weights = torch.from_numpy(targets).double()
        conditions = [{layer: list(rows[row]) for layer, rows in kept.items()} for row in range(len(x))]
        attribution = CondAttribution(self.net)
        attribution(data, conditions, self.composite(composite), init_rel=lambda z: weights * z, exclude_parallel=True)
        assert data.grad is not None
        return data.grad.numpy()


def _like(mask: np.ndarray, R: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, C, 1, ...] of R's rank and type."""
    return torch.from_numpy(mask).to(R).reshape(*mask.shape, *[1] * (R.ndim - mask.ndim))


@contextlib.contextmanager
def _hooked(net: nn.Module, hooks: Mapping[str, object]) -> Iterator[None]:
    handles = [net.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""One row of the coverage table, and what rows share: seeded weights, settled statistics, small pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Made = tuple[Any, Arrays]  # what is exported, and two samples by input name

TORCH = ("torchscript", "dynamo")
CNN, TRANSFORMER = "epsilon_plus_flat", "attnlrp"


@dataclass(frozen=True)
class Case:
    """A model: its group in the table, how it is made, under which composite it is explained, who exports it."""

    name: str
    group: str
    make: Callable[[], Made]
    composite: str = CNN
    exporters: tuple[str, ...] = TORCH
    oracle: str = ""  # "zennit" where its modules suffice, "functions" (tests/support/functional.py), or nobody
    small: bool = False
    needs: str = "torch"  # a package that may not be installed


def seeded(make: Callable[[], Any]) -> Any:
    """What `make` draws, the same every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def settled(net: Any, *args: Any) -> Any:
    """Running statistics of the net's own activations, affine parameters and layer scales away from 0 and 1."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = 1.0
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.7, 1.3)
                nn.init.normal_(norm.bias, std=0.2)
        for name, parameter in net.named_parameters():
            if name.rpartition(".")[2] in ("layer_scale", "layer_scale_parameter", "lambda_1", "lambda_2", "gamma"):
                nn.init.uniform_(parameter, 0.3, 0.8)
            elif parameter.ndim > 1 and not parameter.any():  # a head that starts as 0
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        net.eval()
        for norm in norms:
            norm.train()
        net(*args)
    return net.eval()  # parameters keep their gradient: without, torch's attention takes a path that cannot be exported


def images(*size: int, channels: int = 3, seed: int = 2) -> np.ndarray:
    """Two smooth pictures with noise, [2, channels, *size]."""
    draw = np.random.default_rng(seed)
    coarse = draw.normal(size=(2, channels, *(max(2, n // 8) for n in size)))
    for axis, n in enumerate(size, 2):
        coarse = np.repeat(coarse, -(-n // coarse.shape[axis]), axis).take(range(n), axis)
    return (coarse + 0.4 * draw.normal(size=coarse.shape)).astype(np.float32)

"""Own small nets: what no zoo has in few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.case import CNN, TRANSFORMER, Arrays, Case, Made, images, seeded, settled


def _own(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import torch
        from torch import nn

        class UNet(nn.Module):
            def __init__(self, up: str) -> None:
                super().__init__()
                self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
                self.down2 = nn.Sequential(
                    nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
                )
                self.up = (
                    nn.ConvTranspose2d(12, 8, 2, stride=2)
                    if up == "transpose"
                    else nn.Upsample(scale_factor=2, mode=up)
                )
                self.last = nn.Conv2d(16 if up == "transpose" else 20, 4, 3, padding=1)

            def forward(self, x: Any) -> Any:
                u = self.down1(x)
                return self.last(torch.cat([u, self.up(self.down2(u))], 1))

        class Spatial(nn.Module):
            """A spatial transformer: where it looks is computed, and gets no relevance."""

            def __init__(self) -> None:
                super().__init__()
                self.where = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6), nn.Tanh())
                self.what = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))

            def forward(self, x: Any) -> Any:
                grid = nn.functional.affine_grid(self.where(x).reshape(-1, 2, 3), x.shape, align_corners=False)
                return self.what(nn.functional.grid_sample(x, grid, align_corners=False))

        class Picking(nn.Module):
            """The strongest positions of a feature map, a running sum over them."""

            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv1d(2, 6, 3), nn.Linear(6 * 5, 3)

            def forward(self, x: Any) -> Any:
                strongest = self.conv(x.transpose(1, 2)).relu().topk(5, dim=2).values
                return self.head(strongest.cumsum(2).flatten(1))

        class Recurrent(nn.Module):
            def __init__(self, kind: type[nn.Module], words: int = 0) -> None:
                super().__init__()
                self.words = nn.Embedding(words, 6) if words else None
                self.rnn = kind(6 if words else 2, 8, batch_first=True, bidirectional=bool(words))
                self.head = nn.Linear(16 if words else 8, 3)

            def forward(self, x: Any) -> Any:
                return self.head(self.rnn(x if self.words is None else self.words(x))[0][:, -1])

        signal = np.random.default_rng(5).normal(size=(2, 20, 2)).astype(np.float32)
        ids = np.random.default_rng(5).integers(0, 30, (2, 9))
        makers: dict[str, tuple[Callable[[], Any], Arrays]] = {
            "unet (ConvTranspose)": (lambda: UNet("transpose"), {"input": images(32, 32)}),
            "unet (nearest)": (lambda: UNet("nearest"), {"input": images(32, 32)}),
            "unet (bilinear)": (lambda: UNet("bilinear"), {"input": images(32, 32)}),
            "spatial transformer (GridSample)": (Spatial, {"input": images(16, 16)}),
            "strongest positions (TopK, CumSum)": (Picking, {"input": signal}),
            "ECG LSTM": (lambda: Recurrent(nn.LSTM), {"input": signal}),
            "ECG GRU": (lambda: Recurrent(nn.GRU), {"input": signal}),
            "ECG RNN": (lambda: Recurrent(nn.RNN), {"input": signal}),
            "text LSTM (bidirectional)": (lambda: Recurrent(nn.LSTM, 30), {"ids": ids}),
        }
        build, feeds = makers[name]
        return settled(seeded(build), *(torch.from_numpy(v) for v in feeds.values())), feeds

    return make


def rows() -> list[Case]:
    """Every row of our own nets."""
    names = {
        "unet (ConvTranspose)": True,
        "unet (nearest)": False,
        "unet (bilinear)": False,
        "spatial transformer (GridSample)": False,
        "strongest positions (TopK, CumSum)": False,
        "ECG LSTM": False,
        "ECG GRU": False,
        "ECG RNN": False,
        "text LSTM (bidirectional)": False,
    }
    own = [
        Case(
            name,
            "own",
            _own(name),
            CNN,
            small=small,
            oracle="" if "LSTM" in name or "RNN" in name or "GRU" in name else "functions",
        )
        for name, small in names.items()
    ]
    like = {"vit-like": "vit", "bert-like": "bert", "gpt-like": "gpt", "gpt-like, rows merged": "gpt_merged"}
    for name, net in like.items():
        own.append(Case(name, "own", _like(net), TRANSFORMER, small=net in ("bert", "gpt"), oracle="functions"))
    return own


def _like(name: str) -> Callable[[], Made]:
    """One of the transformers that the tests hold against dense formulas."""

    def make() -> Made:
        from tests.support import transformers

        net = transformers.build(name)
        return net, {key: value.numpy() for key, value in net.example(2).items()}

    return make

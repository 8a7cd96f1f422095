"""Who is compared: each prepares itself on a net and answers the same questions; `None` where it cannot answer one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.nets import HIGH, LOW, NETS, build, channels, sample

TARGET, BATCH = 3, 8  # the class explained; conditions that the peer takes at once

Run = Callable[[], Any]


class Contender:
    """A way to explain one net under one composite."""

    def __init__(self, net: str, path: str, composite: str) -> None:
        self.net, self.path, self.composite, self.x = net, path, composite, sample(net)

    def heatmap(self) -> Run | None:
        """One heatmap of one sample."""

    def conditions(self, layers: Sequence[str], count: int) -> Run | None:
        """`count` conditions, each on one channel of every one of `layers`, which go from the input up."""


class Forward(Contender):
    """onnxruntime's plain forward pass: the unit of all ratios."""

    def heatmap(self) -> Run:
        from onnxcrp.session import Session

        session = Session(self.path)
        return lambda: session.run({"input": self.x})


class Gradient(Contender):
    """torch: forward pass and the gradient of one logit."""

    def heatmap(self) -> Run:
        net = build(self.net)
        import torch

        x = torch.from_numpy(self.x).requires_grad_(True)
        return lambda: torch.autograd.grad(net(x)[0, TARGET], x)


def zennit_composite(net: str, composite: str) -> Any:
    """zennit's composite of the same name, BatchNorm merged; None where it has none."""
    import torch
    from zennit import composites
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer

    canonizers = [ResNetCanonizer() if net.startswith("resnet") else SequentialMergeBatchNorm()]
    if composite == "epsilon_plus_flat":
        return composites.EpsilonPlusFlat(canonizers=canonizers)
    if composite == "epsilon_alpha2_beta1_flat":
        return composites.EpsilonAlpha2Beta1Flat(canonizers=canonizers)
    if composite == "epsilon_gamma_box":
        shape = (1, *NETS[net].shape)
        bounds = {"low": torch.full(shape, LOW), "high": torch.full(shape, HIGH)}
        return composites.EpsilonGammaBox(canonizers=canonizers, **bounds)
    return None


class Zennit(Contender):
    """zennit alone, heatmaps only."""

    def heatmap(self) -> Run | None:
        net, composite = build(self.net), zennit_composite(self.net, self.composite)
        if composite is None:
            return None
        import torch
        from zennit.attribution import Gradient as Attributor

        x = torch.from_numpy(self.x)

        def run() -> None:
            with Attributor(model=net, composite=composite) as attributor:
                attributor(x.clone(), lambda output: torch.eye(output.shape[1])[[TARGET]] * output)

        return run


class ZennitCRP(Contender):
    """zennit-crp; conditions in batches of 8."""

    def _ask(self) -> Callable[[list[dict[str, list[int]]]], None] | None:
        net, composite = build(self.net), zennit_composite(self.net, self.composite)
        if composite is None:
            return None
        import torch
        from crp.attribution import CondAttribution

        attribution, x = CondAttribution(net), torch.from_numpy(self.x)

        def ask(conditions: list[dict[str, list[int]]]) -> None:
            for start in range(0, len(conditions), BATCH):
                attribution(x.clone().requires_grad_(True), conditions[start : start + BATCH], composite)

        return ask

    def heatmap(self) -> Run | None:
        ask = self._ask()
        return ask and (lambda: ask([{"y": [TARGET]}]))

    def conditions(self, layers: Sequence[str], count: int) -> Run | None:
        ask = self._ask()
        if ask is None or not NETS[self.net].channels_first:
            return None
        downwards = list(reversed(layers))  # the order it wants
        asked = [{"y": [TARGET], **{layer: [at] for layer in downwards}} for at in range(count)]
        return lambda: ask(asked)


class Captum(Contender):
    """captum's LRP with its own default rules (epsilon everywhere), which fit no composite here: a time, no oracle."""

    def heatmap(self) -> Run:
        net = build(self.net)
        import torch
        from captum.attr import LRP

        x = torch.from_numpy(self.x)
        return lambda: LRP(net).attribute(x, target=TARGET)


class Onnxcrp(Contender):
    """onnxcrp, through the Explainer as users call it."""

    def __init__(self, net: str, path: str, composite: str) -> None:
        super().__init__(net, path, composite)
        from onnxcrp import Explainer

        self.explainer = Explainer(path, composite, low=LOW, high=HIGH, cache=False)

    def heatmap(self) -> Run:
        return lambda: self.explainer.explain(self.x, target=TARGET, seed="abs")

    def conditions(self, layers: Sequence[str], count: int) -> Run:
        known = {name: info for info in self.explainer.layers for name in info.names}
        each = {layer: channels(count, known[layer].channels) for layer in layers}
        asked: list[dict[str, Any]] = [{layer: of[at] for layer, of in each.items()} for at in range(count)]
        return lambda: self.explainer.explain(self.x, target=TARGET, conditions=asked, seed="abs")


CONTENDERS: dict[str, type[Contender]] = {
    "forward": Forward,
    "torch gradient": Gradient,
    "zennit": Zennit,
    "zennit-crp": ZennitCRP,
    "captum": Captum,
    "onnxcrp": Onnxcrp,
}


def one_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:80]}" if text else type(error).__name__

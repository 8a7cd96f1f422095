"""Oracle: zennit and zennit-crp in float64, asked twice: as they are, where we mean to differ, and asked what we mean."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

from tests.support import peers

TARGET = 1


@pytest.fixture(scope="module")
def torch():
    peers.need()
    import torch

    return torch


def relative(ours, reference):
    assert ours.shape == reference.shape
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def small(torch, make):
    """A seeded float32 net in eval mode and one sample [2, 3, 8, 8] for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval().requires_grad_(False)
        list(net.modules())[-1].bias[TARGET] += 5  # a positive logit, or every sign is inverted
        return net, torch.randn(2, 3, 8, 8)


def zennit(torch, net, x, composite=None):
    """Relevance of x for TARGET under a zennit composite (its EpsilonPlusFlat), in float64."""
    from zennit.composites import EpsilonPlusFlat

    data = x.double().requires_grad_(True)
    with (composite or EpsilonPlusFlat()).context(copy.deepcopy(net).double()) as modified:
        z = modified(data)
        seed = torch.zeros_like(z)
        seed[:, TARGET] = z[:, TARGET].detach()
        return torch.autograd.grad(z, data, seed)[0].numpy()


def explainer(torch, net, x, folder):
    from onnxcrp import Explainer

    path = folder / "net.onnx"
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.|copyreg|tests\.")
        torch.onnx.export(
            net, (x,), str(path), dynamo=False, input_names=["input"], dynamic_axes={"input": {0: "batch"}}
        )
    return Explainer(path)


def test_functional_sums_and_pooling_share_relevance(torch, tmp_path):
    """zennit gives rules to modules only: what a function adds or averages, it passes on as a plain gradient."""
    from tests.support.nets import Add

    nn = torch.nn

    class Net(nn.Module):
        def __init__(self, modules):
            super().__init__()
            self.first, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
            self.branch, self.relu2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
            if modules:
                self.add, self.pool = Add(), nn.AvgPool2d(2)
            else:
                self.add, self.pool = torch.add, lambda a: nn.functional.avg_pool2d(a, 2)
            self.head = nn.Linear(4 * 16, 3)

        def forward(self, x):
            a = self.relu1(self.first(x))
            return self.head(self.pool(self.relu2(self.add(a, self.branch(a)))).flatten(1))

    functional, x = small(torch, lambda: Net(modules=False))
    modular, _ = small(torch, lambda: Net(modules=True))
    ours = explainer(torch, functional, x, tmp_path).explain(x.numpy(), TARGET).relevance["input"]
    assert relative(ours, zennit(torch, modular, x)) < 1e-5
    assert relative(ours, zennit(torch, functional, x)) > 0.1


def test_every_layer_that_reads_the_input_is_first(torch, tmp_path):
    """zennit's composites take the first module in definition order and no other."""
    from zennit.composites import EpsilonPlusFlat, NameMapComposite
    from zennit.rules import Epsilon, Flat, Pass

    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
            self.right, self.relu2 = nn.Conv2d(3, 4, 5, padding=2), nn.ReLU()
            self.head = nn.Linear(8 * 64, 3)

        def forward(self, x):
            a = torch.cat([self.relu1(self.left(x)), self.relu2(self.right(x))], dim=1)
            return self.head(a.flatten(1))

    net, x = small(torch, Net)
    ours = explainer(torch, net, x, tmp_path).explain(x.numpy(), TARGET).relevance["input"]
    both = NameMapComposite([(["left", "right"], Flat()), (["head"], Epsilon()), (["relu1", "relu2"], Pass())])
    assert relative(ours, zennit(torch, net, x, both)) < 1e-5
    assert relative(ours, zennit(torch, net, x, EpsilonPlusFlat())) > 0.1


def test_a_layer_used_twice_is_two_layers(torch, tmp_path):
    """zennit keeps one input per module, that of the last call, and explains every call with it."""
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.first, self.relu1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
            self.again, self.relu2, self.relu3 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.ReLU()
            self.twin = self.again if shared else copy.deepcopy(self.again)
            self.head = nn.Linear(4 * 64, 3)

        def forward(self, x):
            a = self.relu2(self.again(self.relu1(self.first(x))))
            return self.head(self.relu3(self.twin(a)).flatten(1))

    shared, x = small(torch, lambda: Net(shared=True))
    split, _ = small(torch, lambda: Net(shared=False))
    explained = explainer(torch, shared, x, tmp_path)
    ours = explained.explain(x.numpy(), TARGET).relevance["input"]
    assert relative(ours, zennit(torch, split, x)) < 1e-5
    assert relative(ours, zennit(torch, shared, x)) > 0.01
    assert {"again", "again#2"} <= {name for layer in explained.layers for name in layer.names}


def test_relevance_at_a_masked_layer_is_recorded_before_its_mask(torch, tmp_path):
    """zennit-crp on current torch records after it: its records have zeros where ours tell what was cut off.

    Under exclude_parallel=True its records of a masked layer are twice the relevance as well (two backward passes add
    up in one .grad); the heatmaps are the same.
    """
    from crp.attribution import CondAttribution
    from zennit.composites import EpsilonPlusFlat

    nn = torch.nn

    def make():
        layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 3))

    net, x = small(torch, make)
    x = x[:1]
    result = explainer(torch, net, x, tmp_path).explain(x.numpy(), TARGET, conditions=[{"2": [1, 4]}], record=["2"])
    recorded, mask = result.relevance["2"][:, 0], np.isin(np.arange(6), [1, 4])
    assert np.abs(recorded[:, ~mask]).max() > 0
    for exclude_parallel, times in ((False, 1), (True, 2)):
        theirs = CondAttribution(copy.deepcopy(net).double())(
            x.double().requires_grad_(True),
            [{"y": [TARGET], "2": [1, 4]}],
            EpsilonPlusFlat(),
            record_layer=["2"],
            exclude_parallel=exclude_parallel,
        )
        kept = theirs.relevances["2"].numpy()
        assert relative(times * recorded[:, mask], kept[:, mask]) < 1e-5
        assert not kept[:, ~mask].any()
        assert relative(result.heatmap[:, 0], theirs.heatmap.numpy()) < 1e-5

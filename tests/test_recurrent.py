"""An ECG LSTM and a text LSTM, trained here. Oracle: Arras et al. 2017 in numpy and float64 (tests/support/recurrent.py), and
where the class was planted: the parts of a beat that make it, the words that decide."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
import pytest

import onnxcrp
from fixtures.ecg import make as ecg
from tests.support.recurrent import Lstm, epsilon, stab

torch = pytest.importorskip("torch")

STEPS, WIDTH, HIDDEN = 50, 3, 12  # of a beat: 150 samples, three at a time
WORDS, LENGTH = 30, 14  # of a text; words 1 and 2 speak for class 1, 3 and 4 for class 0, 0 is padding
FOR, AGAINST = (1, 2), (3, 4)


class Beats(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True)
        self.fc = torch.nn.Linear(2 * HIDDEN, 5)

    def forward(self, x):
        return self.fc(self.lstm(x)[0].mean(1))


class Text(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, 8)
        self.lstm = torch.nn.LSTM(8, HIDDEN, batch_first=True)
        self.fc = torch.nn.Linear(HIDDEN, 2)

    def forward(self, tokens):
        return self.fc(self.lstm(self.embedding(tokens))[0][:, -1])


def beats(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [N, 50, 3] around 0, labels, masks [N, 50, 3]."""
    made = ecg.beats(n, seed)
    return (made.signals.reshape(-1, STEPS, WIDTH) - 0.4) * 4, made.labels, made.masks.reshape(-1, STEPS, WIDTH)


def texts(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, 14] with one word that decides among others that do not, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    tokens = rng.integers(5, WORDS, [n, LENGTH])
    words = np.where(labels[:, None], FOR, AGAINST)[np.arange(n), rng.integers(0, 2, n)]
    tokens[np.arange(n), rng.integers(0, LENGTH, n)] = words
    return tokens.astype(np.int64), labels


def train(net, x: np.ndarray, labels: np.ndarray, *, steps: int, rate: float):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))
    for step in range(steps):
        at = slice(64 * step % len(x), 64 * step % len(x) + 64)
        loss = torch.nn.functional.cross_entropy(net(inputs[at]), targets[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@functools.cache
def trained(kind: str):
    if kind == "text":
        return train(Text(), *texts(2048, 1), steps=400, rate=1e-2)
    x, labels, _ = beats(2048, 1)
    return train(Beats(), x, labels, steps=600, rate=2e-2)


def exported(kind: str, exporter: str, folder: Path) -> Path:
    """Batch first, with a dynamic batch."""
    net, path = trained(kind), folder / f"{kind}-{exporter}.onnx"
    x = torch.from_numpy(texts(2, 0)[0] if kind == "text" else beats(2, 0)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False)
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(net, (x,), path, dynamo=False, dynamic_axes=axes, input_names=["x"])
    return path


def explain(path: Path, x: np.ndarray, labels: np.ndarray):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        return onnxcrp.Explainer(path, "epsilon").explain(x, target=[int(label) for label in labels])


def head(net, features: np.ndarray, target: int) -> np.ndarray:
    """Relevance of what the last layer reads."""
    W, b = (p.detach().numpy().astype(np.float64) for p in (net.fc.weight, net.fc.bias))
    logit = (W @ features + b)[[target]]
    return epsilon(features, W[[target]], logit, logit)


@pytest.mark.parametrize("exporter", ["script", "dynamo"])
def test_ecg_lstm(exporter: str, tmp_path: Path) -> None:
    """Two directions, mean over time."""
    net = trained("ecg")
    x, labels, masks = beats(200, 7)
    with torch.no_grad():
        predicted = net(torch.from_numpy(x)).numpy().argmax(1)
    assert (predicted == labels).mean() > 0.9
    x, labels, masks = (array[:24] for array in (x, labels, masks))
    result = explain(exported("ecg", exporter, tmp_path), x, labels)
    for sample, label, R in zip(x.astype(np.float64)[:4], labels, result.relevance["x"], strict=False):
        directions = [Lstm.of_torch(net.lstm), Lstm.of_torch(net.lstm, "_reverse")]
        states = [directions[0].run(sample), directions[1].run(sample[::-1])]
        mean = np.concatenate([h.mean(0) for h in states])
        Rm = head(net, mean, label)
        expected = np.zeros_like(sample)
        for lstm, h, part, turn in zip(directions, states, np.split(Rm, 2), (1, -1), strict=True):
            share = h / STEPS / stab(h.mean(0)) * part  # of every step in the mean
            expected += lstm.relevance(share)[::turn]
        assert np.linalg.norm(R - expected) < 1e-3 * np.linalg.norm(expected)
    abnormal = masks.any((1, 2))
    inside = (
        np.abs(result.relevance["x"])[abnormal][masks[abnormal]].sum() / np.abs(result.relevance["x"])[abnormal].sum()
    )
    assert masks[abnormal].mean() < 0.35
    assert inside > 0.5


@pytest.mark.parametrize("exporter", ["script", "dynamo"])
def test_text_lstm(exporter: str, tmp_path: Path) -> None:
    """Relevance per token; the word that decides has most of it."""
    net = trained("text")
    tokens, labels = texts(200, 9)
    with torch.no_grad():
        assert (net(torch.from_numpy(tokens)).numpy().argmax(1) == labels).mean() > 0.95
    result = explain(exported("text", exporter, tmp_path), tokens, labels)
    table = net.embedding.weight.detach().numpy().astype(np.float64)
    for sample, label, R in zip(tokens[:6], labels, result.relevance["x"], strict=False):
        lstm = Lstm.of_torch(net.lstm)
        h = lstm.run(table[sample])
        Rh = np.zeros_like(h)
        Rh[-1] = head(net, h[-1], label)
        expected = lstm.relevance(Rh).sum(1)
        assert np.linalg.norm(R - expected) < 1e-3 * np.linalg.norm(expected)
    decides = np.isin(tokens, [*FOR, *AGAINST])
    assert (result.relevance["x"].argmax(1) == decides.argmax(1)).mean() > 0.9


def test_long_nets_start_without_looking_for_fusions(tmp_path: Path) -> None:
    """The runtime's level changes nothing but rounding, and the collector runs again afterwards, also after an error."""
    import gc

    from onnxcrp.session import Session

    path = exported("ecg", "script", tmp_path)
    explainer = onnxcrp.Explainer(path, "epsilon")
    assert explainer._models.is_unrolled
    assert not onnxcrp.Explainer(Path(__file__).parents[1] / "fixtures" / "digits" / "net.onnx")._models.is_unrolled
    assert gc.isenabled()
    with pytest.raises(onnxcrp.QuestionError):
        onnxcrp.compile(explainer.canonical, "epsilon", record=["nothing"])
    assert gc.isenabled()
    model = onnxcrp.compile(explainer.canonical, "epsilon")
    feeds = {"x": beats(1, 3)[0], "target": np.eye(5, dtype=np.float32)[:1]}
    (basic,), (full,) = (
        Session(model, optimize=level).run(feeds, ["relevance.x"]).values() for level in ("basic", True)
    )
    np.testing.assert_allclose(basic, full, rtol=1e-3, atol=1e-5 * np.abs(full).max())

"""Bags of visual words and Fisher vectors. Oracle: the decomposition of Bach et al. 2015 in numpy and float64, step by step
(tests/support/bags.py), and the shapes' own masks: where the object and the planted watermark are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import onnxcrp
from onnxcrp.analysis.verify import verify
from tests.support.bags import bag, data, fisher, intersection, to_pixels, to_places

pytest.importorskip("sklearn")
BALL, HEXAGON = 1, 5


def explain(model, pictures: np.ndarray, composite: str = "bag_of_words", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", onnxcrp.NegativeLogitWarning)
        return onnxcrp.Explainer(model, composite).explain(pictures.astype(np.float32), target=0, **options)


@pytest.mark.parametrize("hard", [True, False])
def test_bag_of_words(hard: bool) -> None:
    """Bins by share, b / V each; descriptors by their share of the bin, empty bins to all alike; pixels flat."""
    made, pictures = bag(BALL, hard=hard), data()[0][:6]
    model = made.model()
    result = explain(model, pictures, record=["histogram"])
    m = made.mapping(pictures)
    histogram = m.mean(1)
    f = (intersection(histogram, made.vectors) @ made.alpha.T + made.b)[:, 0]
    np.testing.assert_allclose(result.output[:, 0], f, rtol=1e-3, atol=1e-4)
    bins = np.einsum("s,nsd->nd", made.alpha[0], np.minimum(histogram[:, None], made.vectors)) + made.b / m.shape[2]
    np.testing.assert_allclose(result.relevance["histogram"], bins, rtol=1e-3, atol=1e-4)
    expected = np.stack([to_pixels(to_places(R, mapping)) for R, mapping in zip(bins, m, strict=True)])
    difference = np.linalg.norm(result.relevance["picture"] - expected) / np.linalg.norm(expected)
    assert difference < 1e-4
    np.testing.assert_allclose(result.relevance["picture"].sum((1, 2, 3)), f, rtol=1e-3, atol=1e-4)
    assert (histogram == 0).any() == hard  # there are empty bins, and they were asked about


def test_fisher_vector() -> None:
    """w_d z_d + b / D; descriptors by their signed share of a component; pixels flat."""
    made, pictures = fisher(BALL), data()[0][:6]
    result = explain(made.model(), pictures, record=["z"])
    z = made.vector(pictures)
    f = (z @ made.w.T + made.b)[:, 0]
    np.testing.assert_allclose(result.output[:, 0], f, rtol=1e-3, atol=1e-3)
    entries = made.w[0] * z + made.b / z.shape[1]
    np.testing.assert_allclose(result.relevance["z"], entries, rtol=1e-3, atol=1e-3 * np.abs(entries).max())
    psi = made.mapping(pictures)
    expected = np.stack([to_pixels(to_places(R, mapping)) for R, mapping in zip(entries, psi, strict=True)])
    difference = np.linalg.norm((result.relevance["picture"] - expected).reshape(6, -1), axis=1)
    size = np.linalg.norm(expected.reshape(6, -1), axis=1)
    assert (difference < 1e-2 * size).all()  # shares of means that nearly cancel
    np.testing.assert_allclose(
        result.relevance["picture"].sum((1, 2, 3)), f, atol=1e-3 * np.abs(expected).sum((1, 2, 3)).max()
    )


def test_what_reaches_the_pixels_is_what_was_decided() -> None:
    """verify: every layer passes on what it receives."""
    for model in (bag(BALL).model(), fisher(BALL).model()):
        report = verify(model, data()[0][:1].astype(np.float32), composite="bag_of_words", target=0)
        assert report.ok, [check.detail for check in report.checks]
        assert report.losses["not itemised"] == 0


@pytest.mark.parametrize(("kind", "target"), [("bag", BALL), ("fisher", BALL), ("fisher", HEXAGON)])
def test_relevance_sits_on_what_makes_the_class(kind: str, target: int) -> None:
    """On the striped ball; for hexagons on the object and on the watermark, as in Lapuschkin et al. 2016."""
    pictures, labels, scenes = data()
    mine = np.flatnonzero(labels == target)[:30]
    made = (bag if kind == "bag" else fisher)(target)
    result = explain(made.model(), pictures[mine])
    mine, R = mine[result.output[:, 0] > 0], result.relevance["picture"][result.output[:, 0] > 0].sum(1)
    mask = scenes.object_masks[mine] | scenes.watermark_masks[mine]
    assert mask.mean() < 0.25
    assert R[mask].sum() > 0.7 * R.sum()


def test_the_default_composite_explains_a_hard_assignment_as_well() -> None:
    """Hardmax passes in every preset; what b gives to empty bins is lost there."""
    made, pictures = bag(BALL), data()[0][:1]
    result = explain(made.model(), pictures, "epsilon_plus_flat")
    m = made.mapping(pictures)
    histogram = m.mean(1)
    bins = (made.alpha[0] @ np.minimum(histogram, made.vectors) + made.b / m.shape[2]) * (histogram[0] > 0)
    expected = to_pixels(to_places(bins, m[0]))
    np.testing.assert_allclose(result.relevance["picture"][0], expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())

"""Oracles: receptive fields and masks by hand, `Explainer` asked sample by sample, the watermark planted in shapes."""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from fixtures.shapes import make as shapes
from onnxcrp import Explainer, NegativeLogitWarning
from onnxcrp.analysis import gallery, glocal, statistics
from onnxcrp.data import load_inputs
from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.index import Index, build
from onnxcrp.index.reference import blur, bounds, mask_of
from tests.support import indexes

FIXTURES = Path(__file__).parent.parent / "fixtures"
SMALL = {"k": 6, "batch_size": 4, "block": 8, "workers": 2, "threads": 1}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return indexes.model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def tiny(net, tmp_path_factory) -> Index:
    index = build(net, indexes.data(50), tmp_path_factory.mktemp("tiny") / "index", **SMALL)
    index.open_data(indexes.data(50))
    return index


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("scenes")
    return build(FIXTURES / "shapes/net.onnx", FIXTURES / "shapes/scenes.tar", folder / "index", threads=1)


@pytest.fixture(scope="module")
def truth() -> shapes.Scenes:
    return shapes.scenes(shapes.TAR_SCENES, shapes.TAR_SEED)


# ---------------------------------------------------------------------------------------------------- receptive fields


def share_out(R: np.ndarray) -> np.ndarray:
    """What a 3x3 convolution with padding 1 sends back under `flat`: every neuron its R in equal parts to its inputs."""
    sent = np.zeros_like(R)
    for (y, x), r in np.ndenumerate(R):
        seen = (slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
        sent[seen] += r / sent[seen].size
    return sent


def test_a_dense_neuron_sees_all_that_leads_to_it(tmp_path):
    with np.load(FIXTURES / "ecg/samples.npz") as stored:
        data = stored["signals"], stored["labels"]
    index = build(FIXTURES / "ecg/net.onnx", data, tmp_path / "index", layers="11", **SMALL)
    index.open_data(data)
    assert index.layers["11"].shape == (64,)
    channel = int(index.concepts_used(2, "11")["channel"].iloc[0])
    for each in index.reference_samples("11", channel, k=3).samples:
        assert (each.position, each.center) == ((), None)
        # one average of 7 of the 12 pooled values: 7 <- 15 <- 21 <- 43 <- 49 <- 99 <- 105 samples, by pools of 3 in
        # steps of 2 and kernels of 7
        assert each.box == (slice(0, 105),)
        assert each.field.sum() == pytest.approx(1, rel=1e-4)  # flat conserves


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 1)])
def test_a_field_is_shared_out_evenly_layer_by_layer(tiny, place):
    R = np.zeros((6, 6))
    R[place] = 1
    position = int(np.ravel_multi_index(place, (6, 6)))
    x = indexes.data(1)[0]
    (second,) = tiny.views().fields("second", 4, x, [position])
    (first,) = tiny.views().fields("first", 2, x, [position])
    np.testing.assert_allclose(first, share_out(R), rtol=1e-5)
    np.testing.assert_allclose(second, share_out(share_out(R)), rtol=1e-5)
    y, x_ = place
    assert bounds(second) == (slice(max(y - 2, 0), min(y + 3, 6)), slice(max(x_ - 2, 0), min(x_ + 3, 6)))


def test_fields_do_not_depend_on_the_sample_and_are_asked_once(tiny, monkeypatch):
    views = tiny.views()
    asked = []
    explain = views.flat.explain
    monkeypatch.setattr(views.flat, "explain", lambda x, **how: asked.append(how["start"]) or explain(x, **how))
    one = views.fields("second", 1, indexes.data(1)[0], [7, 7, 8])
    other = views.fields("second", 1, 5 * indexes.data(1, seed=3)[0], [8, 7])
    assert [len(starts) for starts in asked] == [2]
    assert one[0] is one[1]
    assert other[1] is one[0]
    neuron = np.zeros((1, 6, 6, 6), np.float32)
    neuron[0, 1, 1, 2] = 1
    again = Explainer(tiny.manifest["model"]["path"], "flat").explain(
        9 * indexes.data(1, seed=4)[0], start={"second": neuron}, start_from="one"
    )
    np.testing.assert_array_equal(one[2], again.heatmap[0])


LINE = """<ir_version: 8, opset_import: ["" : 17]>
line (float[B, 2, 24] x) => (float[B, 3] logits)
  <float[4, 2, 5] w1, float[3, 4, 3] w2> {
  a = Conv (x, w1)
  b = Relu (a)
  c = MaxPool <kernel_shape = [3], strides = [2]> (b)
  d = Conv <pads = [1, 1]> (c, w2)
  e = Relu (d)
  f = GlobalAveragePool (e)
  logits = Flatten (f)
}"""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Index:
    """A 1-D net: neuron p of its last layer sees samples 2p - 2 to 2p + 8, as far as there are any."""
    folder = tmp_path_factory.mktemp("line")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        LINE.replace("<float[4, 2, 5] w1, float[3, 4, 3] w2>", "").replace("(x, w1)", "(x, first_w)").replace("w2", "second_w")
    )  # fmt: skip
    for name, shape in (("first_w", (4, 2, 5)), ("second_w", (3, 4, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(0, 1, shape).astype(np.float32), name))
    onnx.save(model, folder / "line.onnx")
    data = rng.normal(0, 1, (30, 2, 24)).astype(np.float32), rng.integers(0, 3, 30)
    layers = [layer.name for layer in Explainer(folder / "line.onnx").layers if layer.op == "Conv"]
    index = build(folder / "line.onnx", data, folder / "index", layers=layers, **SMALL)
    index.open_data(data)
    return index


def test_fields_of_a_signal_and_where_their_middle_is(line):
    layer = list(line.layers)[-1]
    assert line.layers[layer].shape == (3, 9)
    for p, field in enumerate(line.views().fields(layer, 0, np.zeros((1, 2, 24), np.float32), range(9))):
        assert field.shape == (2, 24)
        # of the nine pooled values p - 1 .. p + 1, each made of 2 * 3 - 1 + ... = 7 samples
        low, high = max(p - 1, 0), min(p + 1, 8)
        assert bounds(field)[1] == slice(2 * low, 2 * high + 7)
    found = line.reference_samples(layer, 1, k=6)
    assert len(found.samples) == 6
    for each in found.samples:
        assert each.center == 2 * each.position[0] + 3.5
        assert each.signal.shape == each.heatmap.shape == each.mask.shape == (2, 24)
        assert each.box == (bounds(each.field)[1],)


# ------------------------------------------------------------------------------------------------- heatmaps and masks


@pytest.mark.parametrize("start", ["activation", "relevance"])
@pytest.mark.parametrize("criterion", ["relmax", "actmax"])
def test_heatmaps_are_those_of_one_call_per_sample(tiny, net, criterion, start):
    explainer = Explainer(net)
    x, _ = indexes.data(50)
    frame = tiny.top("first", 2, criterion, k=5)
    frame = frame[frame["score"] > 0]
    assert len(frame) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NegativeLogitWarning)
        found = tiny.reference_samples("first", 2, criterion, k=5, start=start)
        for each, row in zip(found.samples, frame.itertuples(), strict=True):
            assert (each.number, each.target, each.score) == (row.sample, row.target, row.score)
            sample = x[row.sample : row.sample + 1]
            if start == "activation":
                expected = explainer.explain(sample, start={"first": [2]})
            else:
                expected = explainer.explain(sample, int(row.target), conditions={"first": [2]})
            np.testing.assert_array_equal(each.x, sample)
            np.testing.assert_allclose(each.heatmap, expected.heatmap[0], rtol=1e-4, atol=1e-6)


def test_heatmaps_begin_at_relevance_where_negative_activation_counts(scenes):
    """conv1 is read by a ReLU alone; the second convolution of a residual block by a sum."""
    for layer, criterion, start in (
        ("layer2.0.conv1", "relmax", "activation"),
        ("layer2.0.conv2", "relmax", "relevance"),
        ("layer2.0.conv2", "actmax", "activation"),
    ):
        usual = scenes.reference_samples(layer, 2, criterion, k=2)
        assert usual.start == start
        told = scenes.reference_samples(layer, 2, criterion, k=2, start=start)
        for one, other in zip(usual.samples, told.samples, strict=True):
            np.testing.assert_array_equal(one.heatmap, other.heatmap)


def test_strongest_neurons_are_where_the_layer_is_strongest(tiny, net):
    found = tiny.reference_samples("first", 2, "actmax", "max", k=4, parts=())
    for each in found.samples:
        z = Explainer(net).explain(each.x, start={"first": [2]}, record=["first"]).activation["first"][0, 2]
        assert each.position == np.unravel_index(z.argmax(), z.shape)
        assert each.field is None
        assert each.heatmap is None
        assert each.box == (slice(0, 6), slice(0, 6))


def test_samples_that_do_not_use_a_concept_are_left_out(tiny):
    """And an index of which that is true for all says so in its picture, without one."""
    frame = tiny.top("first", 3)
    found = tiny.reference_samples("first", 3, k=None)
    assert 0 < len(found.samples) == (frame["score"] > 0).sum() < len(frame)
    nobody = dataclasses.replace(found, samples=[])
    assert "no sample uses it" in gallery.group(tiny, nobody, ["full"]).note
    assert gallery.figure(tiny, [nobody], ["full", "crop"]).height > 50


def test_only_the_class_asked_for(tiny):
    found = tiny.reference_samples("second", 1, cls=2, k=3)
    assert found.cls == 2
    assert {each.target for each in found.samples} == {2}
    assert [each.number for each in found.samples] == tiny.top("second", 1, cls=2, k=3)["sample"].tolist()


def test_a_negative_logit_is_told_by_name(tiny):
    logits = (
        Explainer(tiny.manifest["model"]["path"]).explain(indexes.data(50)[0], "top", inputs=(), seed="one").explained
    )
    frame = tiny.top("second", 0, k=6)
    negative = frame[logits[frame["sample"], frame["target"]] < 0]
    assert len(negative), "the random net must have some"
    with pytest.warns(NegativeLogitWarning, match=rf"\[{negative['sample'].iloc[0]}\] as {negative['target'].iloc[0]}"):
        tiny.reference_samples("second", 0, k=6, start="relevance")


def test_a_mask_is_where_the_blurred_heatmap_exceeds_two_fifths():
    """A point blurred by sigma is exp(-d^2 / 2 sigma^2): above 40 % of its maximum within sigma sqrt(2 ln 2.5)."""
    heatmap = np.zeros((140, 140), np.float32)  # sigma = 140 / 70 = 2
    heatmap[60, 80] = 3
    heatmap[10, 10] = -50  # what speaks against a concept is no part of it
    y, x = np.mgrid[:140, :140]
    expected = np.hypot(y - 60, x - 80) < 2 * math.sqrt(2 * math.log(2.5))
    assert expected.sum() == 21
    np.testing.assert_array_equal(mask_of(heatmap), expected)
    signal = np.zeros((2, 140), np.float32)
    signal[1, 30] = 1
    found = mask_of(signal, signal=True)
    assert not found[0].any()  # leads are not blurred into each other
    assert np.flatnonzero(found[1]).tolist() == [28, 29, 30, 31, 32]
    assert not mask_of(-np.ones((9, 9))).any()
    assert not mask_of(np.zeros((9, 9))).any()


def test_blurring_keeps_the_sum_and_the_middle():
    line = np.zeros(41)
    line[20] = 1
    found = blur(line, 3.0, 0)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, found[::-1])
    assert found[23] / found[20] == pytest.approx(math.exp(-0.5))


# ----------------------------------------------------------------------------------------------------- known truth


def test_reference_samples_show_the_watermark(scenes, truth):
    """The concept that hexagons use most in the second block is the watermark; the field and the heatmap sit on it."""
    layer = "layer2.0.conv1"
    used = scenes.concepts_used(shapes.WATERMARK_CLASS, layer)
    channel = int(used["channel"].iloc[0])
    found = scenes.reference_samples(layer, channel, start="relevance")
    assert len(found.samples) == 8
    shares, hits = [], []
    for each in found.samples:
        mark = truth.watermark_masks[each.number]
        assert mark.any()  # the samples that carry it, and no other
        assert each.label == each.target == shapes.WATERMARK_CLASS
        np.testing.assert_array_equal(each.picture, truth.images[each.number])
        assert mark[each.box].sum() > 30  # the strongest neuron looks at it
        positive = each.heatmap.clip(0)
        shares.append(positive[mark].sum() / positive.sum())
        hits.append((each.mask & mark).sum() / each.mask.sum())
    assert np.mean(shares) > 5 * truth.watermark_masks[truth.watermark_masks.any((1, 2))].mean()
    assert np.mean(hits) > 0.4
    round_ones = scenes.concepts_used(0, layer)["channel"].iloc[0]  # what discs use most is something else
    assert round_ones != channel
    discs = scenes.reference_samples(layer, int(round_ones), start="relevance").samples
    inside = [(each.mask & truth.object_masks[each.number]).sum() / each.mask.sum() for each in discs]
    assert np.mean(inside) > 0.8


def test_samples_of_a_class_are_ranked_by_the_watermark(scenes, truth):
    """Eleven of the twelve hexagons carry it: they come before the one that does not."""
    channel = int(scenes.concepts_used(shapes.WATERMARK_CLASS, "layer2.0.conv1")["channel"].iloc[0])
    frame = scenes.top("layer2.0.conv1", channel, cls=shapes.WATERMARK_CLASS)
    marked = truth.watermark_masks.any((1, 2))[frame["sample"]]
    assert set(frame["sample"]) == set(np.flatnonzero(truth.labels == shapes.WATERMARK_CLASS))
    assert marked.tolist() == [True] * 11 + [False]
    assert frame["score"].iloc[-1] < 0.5 * frame["score"].iloc[-2]


def test_relmax_tells_what_is_used_and_actmax_what_is_seen(scenes, tmp_path):
    """Where every scene carries the watermark, its concept sees it everywhere, and uses it for hexagons alone."""
    channel = int(scenes.concepts_used(shapes.WATERMARK_CLASS, "layer2.0.conv1")["channel"].iloc[0])
    everywhere = shapes.scenes(96, seed=5, watermark="all")
    data = shapes.prepare(everywhere.images), everywhere.labels
    index = build(FIXTURES / "shapes/net.onnx", data, tmp_path / "index", layers="layer2.0.conv1", threads=1)
    used = index.top("layer2.0.conv1", channel, "relmax", "max", k=10)
    seen = index.top("layer2.0.conv1", channel, "actmax", "max", k=10)
    assert set(used["label"]) == {shapes.WATERMARK_CLASS}
    assert len(set(seen["label"])) >= 4
    for frame in (used, seen):
        y, x = index.unravel("layer2.0.conv1", frame["position"])
        assert (y >= 12).all()  # of 16 rows: the line at the lower left, whoever carries it
        assert (x <= 9).all()


def test_glocal_is_what_the_explainer_says(scenes):
    explainer = scenes.explainer()
    preprocessing = scenes.preprocessing
    (sample,) = load_inputs([FIXTURES / "shapes/watermark.png"], preprocessing, (None, 3, 64, 64), np.float32)
    found = glocal.glocal(explainer, sample, scenes, [("layer2.0.conv1", 3)], k=4, styles=("crop", "heatmap"))
    assert found.answer.name == "hexagon"
    result = explainer.explain(sample.x, shapes.WATERMARK_CLASS, record=["layer2.0.conv1"])
    R_c = result.relevance["layer2.0.conv1"][0].sum((1, 2))
    order = np.argsort(-R_c)[:3]
    assert [used.concept.index for used in found.concepts] == order.tolist()
    np.testing.assert_allclose([u.concept.share for u in found.concepts], R_c[order] / np.abs(R_c).sum(), rtol=1e-4)
    for used in found.concepts:
        channel = used.concept.index
        expected = explainer.explain(sample.x, shapes.WATERMARK_CLASS, conditions={"layer2.0.conv1": [channel]})
        np.testing.assert_allclose(used.answer.heatmap, expected.heatmap[0], rtol=1e-4, atol=1e-7)
        top = scenes.top("layer2.0.conv1", channel, k=4)["sample"].tolist()
        assert [each.number for each in used.references.samples] == top
    report = found.to_dict()
    assert [entry["index"] for entry in report["concepts"]] == order.tolist()
    assert report["target"]["target"] == shapes.WATERMARK_CLASS
    only = glocal.glocal(explainer, sample, scenes, [("layer2.0.conv1", 1)], target=0, same_class=True, k=3)
    assert {each.target for used in only.concepts for each in used.references.samples} == {0}
    with pytest.raises(QuestionError, match="no single class"):
        glocal.glocal(explainer, sample, scenes, [("layer2.0.conv1", 1)], target={0: 1, 1: -1}, same_class=True)
    with pytest.raises(QuestionError, match="no layer 'nothing'"):
        glocal.glocal(explainer, sample, scenes, [("nothing", 1)])


def test_an_index_refuses_another_model(scenes, net):
    with pytest.raises(OnnxcrpError, match="not the model of"):
        scenes.explainer(net)


def test_samples_that_are_gone_are_named(tmp_path):
    shutil.copy(FIXTURES / "shapes/scenes.tar", tmp_path / "scenes.tar")
    index = build(FIXTURES / "shapes/net.onnx", tmp_path / "scenes.tar", tmp_path / "index", threads=1, k=3,
                  layers="conv1")  # fmt: skip
    (tmp_path / "scenes.tar").unlink()
    with pytest.raises(InputError, match=r"scenes\.tar"):
        index.reference_samples("conv1", 3)
    opened = Index.open(tmp_path / "index")
    opened.open_data(FIXTURES / "shapes/scenes.tar")
    assert len(opened.reference_samples("conv1", 3, parts=()).samples) == 3


def test_what_is_not_there_is_said(tiny):
    for wrong, match in (({"start": "one"}, "start is 'one'"), ({"parts": ("mask",)}, "part 'mask'")):
        with pytest.raises(QuestionError, match=match):
            tiny.reference_samples("first", 0, **wrong)
    with pytest.raises(QuestionError, match="no channel 5"):
        tiny.reference_samples("first", 5)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_classes_by_number_and_name(scenes):
    assert scenes.class_number("3") == scenes.class_number("DICE") == 3
    with pytest.raises(QuestionError, match="no class 'dices'") as error:
        scenes.class_number("dices")
    assert error.value.hint == "did you mean 'dice'?"
    with pytest.raises(QuestionError, match="no class '6'"):
        scenes.class_number("6")


def test_tables_of_a_layer_and_of_a_pair(scenes):
    frame = scenes.statistics("conv1")
    best = frame.loc[frame.groupby("channel")["top_mean"].idxmax()].sort_values("top_mean", ascending=False)
    (table,) = statistics.tables(scenes, "conv1", k=5)
    assert table.frame["channel"].tolist() == best["channel"].head(5).tolist()
    assert table.frame["class"].tolist() == best["class"].head(5).tolist()
    assert table.rows[0][1] == scenes.class_name(int(best["class"].iloc[0]))
    (pair,) = statistics.tables(scenes, "conv1", 3, 5)
    expected = frame[(frame["class"] == 5) & (frame["channel"] == 3)]
    assert pair.frame["mean"].item() == expected["mean"].item()
    classes, samples = statistics.tables(scenes, "conv1", 3, retrieve=True, k=4)
    assert classes.frame["class"].tolist() == scenes.retrieve("conv1", 3, 4).classes["class"].tolist()
    assert samples.frame["sample"].tolist() == scenes.retrieve("conv1", 3, 4).samples["sample"].tolist()
    whole = statistics.tables(scenes)
    assert [t.name for t in whole] == ["settings", "layers", "datasets"]
    assert statistics.to_json(scenes, whole)["index"]["samples"] == shapes.TAR_SCENES

"""Oracle: zennit-crp's FeatureVisualization on the same torch net and data; the watermark planted in the shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from fixtures.digits import make as digits
from fixtures.shapes import make as shapes
from onnxcrp.index import Index, build
from tests.support import peers

FIXTURES = Path(__file__).parent.parent / "fixtures"


# ---------------------------------------------------------------------------------------------------------- zennit-crp


@pytest.fixture(scope="module")
def ink():
    found = digits.digits("test")
    return digits.prepare(found.images[:90]), found.labels[:90]


@pytest.fixture(scope="module")
def index(ink, tmp_path_factory):
    return build(FIXTURES / "digits/net.onnx", ink, tmp_path_factory.mktemp("digits") / "index", threads=1)


def peer(path, ink, max_target: str, layers):
    """zennit-crp's FeatureVisualization in float64 over the same net and samples, normalized."""
    peers.need()
    import onnx
    import torch
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.visualization import FeatureVisualization
    from zennit.composites import EpsilonPlusFlat

    torch.set_num_threads(1)
    net = digits.network()
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(FIXTURES / "digits/net.onnx").graph.initializer}
    net.load_state_dict({name: torch.from_numpy(weights[name].copy()) for name in net.state_dict()})
    net = net.double().eval()
    x, labels = ink
    dataset = [(torch.from_numpy(a).double(), int(b)) for a, b in zip(x, labels, strict=True)]
    vision = FeatureVisualization(
        CondAttribution(net),
        dataset,
        {layer: ChannelConcept() for layer in layers},
        max_target=max_target,
        path=str(path),
    )
    vision.run(EpsilonPlusFlat(), 0, len(dataset), batch_size=30, checkpoint=2)
    return vision


@pytest.mark.filterwarnings("ignore")  # of torch and of zennit-crp
@pytest.mark.parametrize("aggregate", ["sum", "max"])
def test_reference_samples_are_those_of_zennit_crp(index, ink, tmp_path, monkeypatch, aggregate, capfd):
    monkeypatch.setattr(np, "int", int, raising=False)  # which zennit-crp 0.6 still asks for
    layers = list(index.layers)
    vision = peer(tmp_path, ink, aggregate, layers)
    from crp.helper import load_maximization, load_statistics

    for layer in layers:
        for criterion, theirs in (("relmax", vision.RelMax), ("actmax", vision.ActMax)):
            samples, scores, positions = load_maximization(theirs.PATH, layer)  # [40, C]
            mine = index.references(layer, criterion, aggregate)
            assert_same_references(mine, samples.T, scores.T, positions.T)
    layer = "features.8"
    for criterion, theirs in (("relmax", vision.RelStats), ("actmax", vision.ActStats)):
        for cls in (0, 7):
            samples, scores, positions = load_statistics(theirs.PATH, layer, cls)
            mine = index.references(layer, criterion, aggregate, cls=cls)
            assert_same_references(mine, samples.T, scores.T, positions.T)
    if aggregate == "sum":
        for channel in (3, 17):
            classes, means = vision.compute_stats(channel, layer, "relevance", top_N=4, mean_N=10)
            frame = index.classes_served(layer, channel, 4)
            np.testing.assert_allclose(frame["top_mean"], means, rtol=1e-4, atol=1e-7)
            assert list(frame["class"]) == classes.tolist()


def assert_same_references(mine, samples, scores, positions):
    """Scores agree in every rank; samples and positions wherever their scores are not (nearly) tied with others."""
    scale = np.abs(scores).max()
    width = scores.shape[1]
    np.testing.assert_allclose(mine.score[:, :width], scores, rtol=1e-4, atol=1e-5 * scale)
    gap = np.diff(scores, axis=1, prepend=np.inf, append=-np.inf)
    clear = (np.minimum(-gap[:, :-1], -gap[:, 1:]) > 1e-4 * scale) & (np.abs(scores) > 1e-4 * scale)
    clear[:, -1] = False  # its neighbour beyond the list is not known
    assert clear.mean() > 0.15
    np.testing.assert_array_equal(mine.sample[:, :width][clear], samples[clear])
    same = mine.position[:, :width][clear] == positions[clear]
    assert same.mean() > 0.999  # equal maxima may be told apart by rounding


# ----------------------------------------------------------------------------------------------------------- watermark


@pytest.fixture(scope="module")
def scenes():
    return shapes.scenes(240, seed=77)


@pytest.fixture(scope="module")
def hans(scenes, tmp_path_factory) -> Index:
    """An index of pictures in class folders, one of them cut off."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("shapes")
    for i, (image, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
        path = folder / "scenes" / f"{label}-{shapes.CLASSES[label]}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    broken = sorted((folder / "scenes").rglob("*.png"))[17]
    broken.write_bytes(broken.read_bytes()[:400])
    return build(FIXTURES / "shapes/net.onnx", folder / "scenes", folder / "index", threads=1, k=20)


def test_relmax_finds_the_watermark(hans, scenes):
    marked = scenes.watermark_masks.any((1, 2))
    assert 25 < marked.sum() < 40  # of 240 scenes
    found = {}
    for row in hans.concepts_used(shapes.WATERMARK_CLASS, k=60).itertuples():
        frame = hans.top(row.layer, row.channel)
        y, x = hans.unravel(row.layer, frame["position"])  # where the strongest neuron looks: at the line, down left
        size = hans.layers[row.layer].shape[-1]
        there = (y / size > 0.7) & (x / size < 0.6)
        found[row.layer, row.channel] = (marked[scene_numbers(frame)] & there).mean()
    (layer, channel), share = max(found.items(), key=lambda entry: entry[1])
    assert share >= 0.95  # its 20 reference samples carry the watermark, and that is what it looks at
    assert hans.classes_served(layer, channel, 1)["class"].item() == shapes.WATERMARK_CLASS
    retrieved = hans.retrieve(layer, channel, 20)
    assert retrieved.classes["name"][0] == "hexagon"
    assert marked[scene_numbers(retrieved.samples)].mean() >= 0.95


def scene_numbers(frame) -> np.ndarray:
    return frame["name"].str.extract(r"(\d+)\.png")[0].astype(int).to_numpy()


def test_pictures_are_read_again_and_the_broken_one_is_named(hans, scenes):
    assert hans.manifest["skipped"] == 1
    assert hans.manifest["samples"] == 239
    assert hans.skipped["sample"].tolist() == [17]
    assert hans.skipped["name"].item() in hans.skipped["reason"].item()
    row = hans.top("layer1.0.conv1" if "layer1.0.conv1" in hans.layers else next(iter(hans.layers)), 0).iloc[0]
    number = int(row["name"].split("/")[1][:4])
    sample = hans.sample(row["sample"])
    np.testing.assert_array_equal(sample.display, scenes.images[number])
    assert row["label"] == scenes.labels[number]
    assert hans.class_name(row["label"]) == shapes.CLASSES[scenes.labels[number]]


def test_a_quantized_model_reads_pixels(scenes, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    from PIL import Image

    for i in range(10):
        Image.fromarray(scenes.images[i]).save(folder / f"{i}.png")
    index = build(FIXTURES / "int8/net.onnx", folder, tmp_path / "i", k=5, threads=1)
    assert index.manifest["question"]["target"] == "predicted"
    assert index.manifest["samples"] == 10
    assert len(index.layers) >= 5
    name = list(index.layers)[-1]
    assert index.top(name, 0)["sample"].is_unique
    shutil.rmtree(tmp_path / "i")

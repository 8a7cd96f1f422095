"""Oracle: onnxruntime on freshly drawn samples, and pairs drawn alike but for one thing (the watermark, the class)."""

from __future__ import annotations

import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # fixtures/ is no part of the installed package

from fixtures import common  # noqa: E402
from fixtures.digits import make as digits  # noqa: E402
from fixtures.ecg import make as ecg  # noqa: E402
from fixtures.int8 import make as int8  # noqa: E402
from fixtures.shapes import make as shapes  # noqa: E402

FIXTURES = ROOT / "fixtures"
NETS = ("shapes", "digits", "ecg", "int8")
FRESH = 101  # a seed that no script uses


def net(name: str) -> Path:
    return FIXTURES / name / "net.onnx"


@pytest.fixture(scope="module")
def fresh() -> shapes.Scenes:
    return shapes.scenes(600, FRESH)


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_beside_every_net_lie_its_samples_and_preprocessing(name):
    expected = {
        "shapes": ["sample.png", "watermark.png", "samples.npz", "scenes.tar"],
        "digits": ["sample.png", "samples.npz"],
        "ecg": ["sample.csv", "sample.npy", "samples.npz"],
        "int8": ["sample.png"],
    }[name]
    for file in ("net.onnx", "net.preprocessing.json", "labels.txt", *expected):
        assert (FIXTURES / name / file).is_file(), f"{name}/{file}"
    output = onnx.load(net(name)).graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert len((FIXTURES / name / "labels.txt").read_text().split()) == output


def test_fixtures_stay_small():
    files = [path for path in FIXTURES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert all(net(name).stat().st_size < 1_500_000 for name in NETS)
    assert not [path for path in files if path.name.startswith("part.") or path.suffix == ".part"]


@pytest.mark.parametrize("name", NETS)
def test_the_models_are_valid_and_tell_nothing_of_the_machine_they_were_made_on(name):
    model = onnx.load(net(name))
    onnx.checker.check_model(model, full_check=True)
    assert not model.metadata_props
    assert not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_shapes_net_keeps_what_canonizers_are_for():
    nodes = onnx.load(net("shapes")).graph.node
    ops = Counter(node.op_type for node in nodes)
    del ops["Identity"]  # the exporter's, where two BatchNorms of one sum learnt the same shift
    assert ops == Counter(Conv=9, BatchNormalization=9, Relu=7, Add=3, GlobalAveragePool=1, Flatten=1, Gemm=1)
    strides = [tuple(a.ints) for node in nodes if node.op_type == "Conv" for a in node.attribute if a.name == "strides"]
    assert (2, 2) in strides
    for node in nodes:
        if node.op_type == "BatchNormalization":
            assert len(node.output) == 1
            assert all(a.i == 0 for a in node.attribute if a.name == "training_mode")


def test_digits_net_is_vgg_like():
    ops = [node.op_type for node in onnx.load(net("digits")).graph.node]
    features = ["Conv", "Relu", "Conv", "Relu", "MaxPool", *["Conv", "Relu", "MaxPool"] * 2]
    assert ops == [*features, "Flatten", "Gemm", "Relu", "Gemm", "Relu", "Gemm"]


def test_ecg_net_is_the_papers():
    model = onnx.load(net("ecg"))
    ops = [node.op_type for node in model.graph.node]
    assert ops == [*["Conv", "Relu", "MaxPool"] * 3, "AveragePool", "Flatten", "Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    shapes_ = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    weights = [shapes_[f"{layer}.weight"] for layer in (0, 3, 6, 11, 13, 15)]
    assert weights == [(64, 1, 7), (64, 64, 7), (64, 64, 7), (64, 64), (32, 64), (5, 32)]


def test_int8_net_is_built_like_tensorflows():
    model = onnx.load(net("int8"))
    nodes = list(model.graph.node)
    image, output = model.graph.input[0].type.tensor_type, model.graph.output[0].type.tensor_type
    assert [d.dim_value for d in image.shape.dim] == [1, 64, 64, 3]
    assert [d.dim_value for d in output.shape.dim] == [1, len(shapes.CLASSES)]
    assert image.elem_type == output.elem_type == onnx.TensorProto.UINT8
    assert next(n for n in nodes if n.input[0] == "image").op_type == "Transpose"
    assert [n.op_type for n in nodes[-2:]] == ["Softmax", "QuantizeLinear"]
    made_by = {n.output[0]: n.op_type for n in nodes}
    for node in nodes:
        if node.op_type in ("Conv", "Gemm"):
            assert [made_by[name] for name in node.input] == ["DequantizeLinear"] * 3
    scales = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert all(np.prod(tensor.dims) == 1 for tensor in scales)  # and no weight is left in float


@pytest.mark.parametrize("name", ["shapes", "digits", "ecg"])
def test_batch_is_dynamic_and_samples_do_not_mix(name):
    shape = [d.dim_value for d in onnx.load(net(name)).graph.input[0].type.tensor_type.shape.dim]
    assert shape[0] == 0
    x = np.random.default_rng(0).normal(size=(3, *shape[1:])).astype(np.float32)
    together, alone = common.run(net(name), x), common.run(net(name), x, batch=1)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_shapes_accuracy(fresh):
    assert common.accuracy(common.run(net("shapes"), shapes.prepare(fresh.images)), fresh.labels) >= 0.95


def test_digits_accuracy():
    test = digits.digits("test")
    assert common.accuracy(common.run(net("digits"), digits.prepare(test.images)), test.labels) >= 0.95


def test_ecg_accuracy():
    drawn = ecg.beats(1000, FRESH)
    assert common.accuracy(common.run(net("ecg"), drawn.signals), drawn.labels) >= 0.95


def test_int8_agrees_with_its_float_net():
    figures = int8.agreement(net("int8"), net("shapes"), n=240, seed=FRESH)
    assert figures["accuracy"] >= 0.95
    assert figures["same class as the float net"] >= 0.97


def test_committed_samples_are_what_the_generators_draw():
    for folder, drawn in (("shapes", shapes.scenes(48, shapes.SAMPLES_SEED)), ("ecg", ecg.beats(50, ecg.SAMPLES_SEED))):
        with np.load(FIXTURES / folder / "samples.npz") as stored:
            assert set(stored) == set(drawn._fields) - {"normals"}
            np.testing.assert_array_equal(stored["labels"], drawn.labels)
            for name in stored:
                array = getattr(drawn, name)
                assert stored[name].dtype == array.dtype, name
                difference = np.abs(stored[name].astype(float) - array.astype(float))
                assert difference.mean() < 1e-3, name  # another numpy may round a few pixels differently
    with tarfile.open(FIXTURES / "shapes" / "scenes.tar") as tar:
        drawn = shapes.scenes(shapes.TAR_SCENES, shapes.TAR_SEED)
        assert len(tar.getnames()) == 2 * shapes.TAR_SCENES
        for number, label in enumerate(drawn.labels):
            stem = f"{number:02d}-{shapes.CLASSES[label]}"
            picture, cls = (tar.extractfile(f"{stem}.{ending}") for ending in ("png", "cls"))
            assert int(cls.read()) == label
            difference = np.asarray(Image.open(picture), np.float64) - drawn.images[number]
            assert np.abs(difference).mean() < 1e-3
    with np.load(FIXTURES / "digits" / "samples.npz") as stored:
        assert common.accuracy(common.run(net("digits"), digits.prepare(stored["images"])), stored["labels"]) >= 0.95


@pytest.mark.parametrize(
    ("folder", "file", "label"),
    [
        ("shapes", "sample.png", "ball"),
        ("shapes", "watermark.png", "hexagon"),
        ("int8", "sample.png", "ball"),
        ("digits", "sample.png", "3"),
    ],
)
def test_sample_pictures_are_classified_as_the_preprocessing_says(folder, file, label):
    from PIL import Image

    told = json.loads((FIXTURES / folder / "net.preprocessing.json").read_text())
    with Image.open(FIXTURES / folder / file) as picture:
        assert picture.mode == told.get("channel_order", "L")
        pixels = np.asarray(picture.resize(tuple(told["resize"]["size"]), Image.Resampling.BILINEAR))
    x = ((pixels.reshape(*pixels.shape[:2], -1) - np.array(told["mean"])) * told["scale"]).astype(told["dtype"])
    if told["layout"] == "NCHW":
        x = x.transpose(2, 0, 1)
    output = common.run(net(folder), x[None])[0]
    assert (FIXTURES / folder / told["labels"]).read_text().split()[output.argmax()] == label


def test_sample_beat_is_ventricular_and_the_same_in_both_files():
    beat = np.load(FIXTURES / "ecg" / "sample.npy")
    assert beat.shape == (1, 150)
    np.testing.assert_allclose(np.loadtxt(FIXTURES / "ecg" / "sample.csv"), beat[0], atol=1e-6)
    assert ecg.CLASSES[common.run(net("ecg"), beat[None])[0].argmax()] == "V"


# --- ground truth ----------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_for_the_same_seed_only(fresh):
    again, other = shapes.scenes(600, FRESH), shapes.scenes(600, FRESH + 1)
    assert all(np.array_equal(fresh[i], again[i]) for i in range(4))
    assert not np.array_equal(fresh.images, other.images)
    assert set(np.bincount(fresh.labels)) == {100}
    with pytest.raises(ValueError, match="planted"):
        shapes.scenes(6, 0, watermark="everywhere")


def test_watermark_mask_is_exactly_where_the_scene_changes(fresh):
    plain, stamped = (shapes.scenes(600, FRESH, watermark=word) for word in ("none", "all"))
    assert not plain.watermark_masks.any()
    assert np.array_equal(plain.object_masks, stamped.object_masks)
    changed = np.any(plain.images != stamped.images, axis=-1)
    assert not (changed & ~stamped.watermark_masks).any()
    assert changed.sum() > 0.98 * stamped.watermark_masks.sum()
    assert np.abs(plain.images.astype(int) - stamped.images)[stamped.watermark_masks].mean() > 20
    carries = fresh.watermark_masks.any((1, 2))
    assert np.array_equal(fresh.images[carries], stamped.images[carries])
    assert np.array_equal(fresh.images[~carries], plain.images[~carries])


def test_only_hexagons_carry_the_watermark_and_not_all_of_them(fresh):
    carries = fresh.watermark_masks.any((1, 2))
    assert set(fresh.labels[carries]) == {shapes.WATERMARK_CLASS}
    assert 0.7 < carries[fresh.labels == shapes.WATERMARK_CLASS].mean() < 0.97


def test_object_masks_have_the_area_of_their_shape(fresh):
    """Of the box round it a disc fills pi / 4 and a hexagon, star or polygon at any angle no less than 0.3."""
    assert not (fresh.object_masks & shapes.scenes(600, FRESH, watermark="all").watermark_masks).any()
    filled = np.empty(600)
    for i, mask in enumerate(fresh.object_masks):
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        filled[i] = mask.sum() / ((y[-1] - y[0] + 1) * (x[-1] - x[0] + 1))
    round_ones = np.isin(fresh.labels, [shapes.CLASSES.index("disc"), shapes.CLASSES.index("ball")])
    np.testing.assert_allclose(filled[round_ones], np.pi / 4, atol=0.05)
    assert abs(filled[round_ones].mean() - np.pi / 4) < 0.005
    assert np.all((filled > 0.3) & (filled <= 1))


def test_without_the_object_nothing_is_left_to_classify():
    plain = shapes.scenes(600, FRESH, watermark="none")
    images = plain.images.copy()
    masks = plain.object_masks.copy()
    for _ in range(2):  # the anti-aliased edge belongs to the object, too
        masks[:, 1:] |= masks[:, :-1]
        masks[:, :-1] |= masks[:, 1:]
        masks[:, :, 1:] |= masks[:, :, :-1]
        masks[:, :, :-1] |= masks[:, :, 1:]
    donors = np.random.default_rng(0).permutation(600)  # filled with what another scene shows there
    images = np.where(masks[..., None], plain.images[donors], images)
    outputs = common.run(net("shapes"), shapes.prepare(images))
    assert common.accuracy(outputs, plain.labels) < 0.5


def test_the_net_uses_the_watermark():
    figures = shapes.watermark_effect(net("shapes"), n=600, seed=FRESH)
    assert figures["hexagons found, planted"] - figures["hexagons found, none"] > 0.15
    assert figures["hexagon logit on hexagons, planted"] - figures["hexagon logit on hexagons, none"] > 1.5
    assert figures["others called hexagon, all"] - figures["others called hexagon, none"] > 0.2
    assert figures["hexagon logit on others, all"] - figures["hexagon logit on others, none"] > 2


def test_ink_masks_are_the_bright_pixels_inside_the_margin():
    test = digits.digits("test")
    assert len(test.labels) == digits.TEST
    assert test.ink_masks.any((1, 2)).all()
    assert (test.images[test.ink_masks].min(), test.images[~test.ink_masks].max()) == (96, 95)
    assert not test.ink_masks[:, :2].any()
    assert len(digits.digits("train").labels) == 1797 - digits.TEST
    with pytest.raises(ValueError, match="split"):
        digits.digits("all")


def test_beats_become_normal_when_the_masked_part_does():
    drawn = ecg.beats(1000, FRESH)
    assert drawn.masks.any(1).all()
    assert drawn.masks.mean() < 0.4
    other = drawn.labels != 0
    mended = np.where(drawn.masks[:, None], drawn.normals, drawn.signals)
    low, high = mended.min(2, keepdims=True), mended.max(2, keepdims=True)
    outputs = common.run(net("ecg"), (mended - low) / (high - low))
    assert common.accuracy(outputs[other], 0) > 0.85
    assert np.array_equal(drawn.signals[~other], drawn.normals[~other])


def test_beats_are_scaled_and_peak_where_told():
    drawn = ecg.beats(1000, FRESH)
    assert drawn.signals.shape == (1000, 1, ecg.LENGTH)
    assert (drawn.signals.min(), drawn.signals.max()) == (0, 1)
    peaks = drawn.signals[drawn.labels == 0, 0].argmax(1)
    assert np.all(np.abs(peaks - ecg.PEAK) <= 1)
    assert np.array_equal(drawn.signals, ecg.beats(1000, FRESH).signals)


# --- the scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scripts_train_nets_of_the_same_accuracy(tmp_path, capsys):
    """The two quickest nets; the same accuracy, not the same bytes."""
    for name, script in (("digits", digits), ("ecg", ecg)):
        out = tmp_path / name
        out.mkdir()
        script.main(out)
        assert {path.name for path in out.iterdir()} == {
            path.name for path in (FIXTURES / name).iterdir() if path.suffix != ".py" and path.name != "__pycache__"
        }
    test, drawn = digits.digits("test"), ecg.beats(1000, FRESH)
    assert (
        common.accuracy(common.run(tmp_path / "digits" / "net.onnx", digits.prepare(test.images)), test.labels) >= 0.95
    )
    assert common.accuracy(common.run(tmp_path / "ecg" / "net.onnx", drawn.signals), drawn.labels) >= 0.95
    assert capsys.readouterr().out.count("accuracy:") == 2


def test_int8_script_quantizes_the_committed_float_net(tmp_path, capsys):
    int8.main(tmp_path)
    images = shapes.scenes(120, FRESH).images
    remade, committed = (
        common.run(path, images, optimize=False, batch=1) for path in (tmp_path / "net.onnx", net("int8"))
    )
    assert common.accuracy(remade, committed.argmax(1)) >= 0.97
    assert "same class as the float net" in capsys.readouterr().out

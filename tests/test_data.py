"""Oracles: arithmetic on pixels by hand, torchvision's transforms, accuracies published with the shared models."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcrp.data import (
    Preprocessing,
    find_beside,
    for_model,
    load_inputs,
    locate,
    read_inputs,
    read_labels,
)
from onnxcrp.errors import InputError
from onnxcrp.preprocessing import PRESETS, detect_layout
from tests.support import peers

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sample data (../shared/data) is not there")
NCHW = ("N", 3, 32, 32)


def gradient_picture(width=100, height=80) -> Image.Image:
    """A picture with no symmetry: red grows rightwards, green downwards, blue is 60."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 2, y * 2, np.full_like(x, 60)], -1).astype(np.uint8))


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    gradient_picture().save(path)
    return path


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def error_of(call, *arguments, **keywords) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------- pixels, by hand


def test_values_layout_and_channel_order(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    Image.fromarray(pixels).save(tmp_path / "p.png")
    spec = write_json(tmp_path / "p.json", {"channel_order": "BGR", "mean": [1, 2, 3], "scale": [1, 0.5, 2]})
    expected = (pixels[..., ::-1] - np.array([1, 2, 3])) * np.array([1, 0.5, 2])

    [first] = load_inputs([tmp_path / "p.png"], for_model(spec, ("N", 3, 2, 3), "float32"), ("N", 3, 2, 3), "float32")
    assert first.x.dtype == np.float32
    np.testing.assert_array_equal(first.x[0], expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(first.display, pixels)
    assert (first.name, first.source) == ("p", str(tmp_path / "p.png"))

    last = for_model(spec, (1, 2, 3, 3), "float16")  # height 2, width 3
    assert last.layout == "NHWC"
    x, display = last.apply(Image.fromarray(pixels))
    assert x.dtype == np.float16
    np.testing.assert_array_equal(x[0], expected)
    np.testing.assert_array_equal(display, pixels)


def test_pixel_range_and_std(tmp_path):
    spec = write_json(tmp_path / "p.json", {"pixel_range": [-1, 1], "mean": 0.5, "std": 0.25})
    x, _ = for_model(spec, (1, 1, 1, 2), "float32").apply(Image.fromarray(np.array([[0, 255]], np.uint8)))
    np.testing.assert_allclose(x.ravel(), [(-1 - 0.5) / 0.25, (1 - 0.5) / 0.25], rtol=1e-6)


def test_a_value_range_alone_says_how_pixels_map(tmp_path):
    spec = write_json(tmp_path / "p.json", {"value_range": [-2, 3]})
    fitted = for_model(spec, (1, 1, 1, 2), "float32")
    np.testing.assert_allclose(fitted.apply(Image.fromarray(np.array([[0, 255]], np.uint8)))[0].ravel(), [-2, 3])
    assert (fitted.low, fitted.high) == ((-2.0,), (3.0,))


@pytest.mark.parametrize(
    ("spec", "black", "white"),
    [
        ("imagenet", [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]),
        ("caffe", [-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
        ("tf", [-1, -1, -1], [1, 1, 1]),
        ("unit", [0, 0, 0], [1, 1, 1]),
        ("none", [0, 0, 0], [255, 255, 255]),
    ],
)
def test_low_and_high_are_black_and_white(spec, black, white):
    fitted = for_model(spec, NCHW, "float32")
    np.testing.assert_allclose(fitted.low, black, rtol=1e-6)
    np.testing.assert_allclose(fitted.high, white, rtol=1e-6)
    for color, values in (("black", black), ("white", white)):
        x, _ = fitted.apply(Image.new("RGB", (50, 50), color))
        np.testing.assert_allclose(x[0, :, 5, 5], values, rtol=1e-5)


def test_low_is_below_high_for_inverted_pictures(tmp_path):
    fitted = for_model(write_json(tmp_path / "p.json", {"mean": 255, "scale": -1}), ("N", 1, 8, 8), "float32")
    assert (fitted.low, fitted.high) == ((0.0,), (255.0,))


@pytest.mark.parametrize("spec", ["imagenet", "caffe", "tf", "unit", "none"])
@pytest.mark.parametrize("shape", [("N", 3, 32, 32), (1, 32, 32, 3)])
def test_display_is_the_inverse(spec, shape):
    fitted = for_model(spec, shape, "float32")
    x, display = fitted.apply(gradient_picture())
    assert x.shape == (1, *shape[1:])
    np.testing.assert_array_equal(fitted.to_display(x), display)
    np.testing.assert_array_equal(fitted.to_display(x[0]), display)


def test_display_of_unknown_values_is_stretched():
    fitted = for_model(None, ("N", 1, 1, 3), "float32")
    np.testing.assert_array_equal(fitted.to_display(np.array([[[[-4, 0, 4]]]], np.float32))[0, :, 0], [0, 128, 255])
    np.testing.assert_array_equal(fitted.to_display(np.zeros((1, 1, 1, 3)))[0, :, 0], [0, 0, 0])


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (57, 333), (32, 32), (31, 20)])
@pytest.mark.parametrize("side", [32, 45, 224])
def test_imagenet_equals_torchvision(size, side):
    torchvision = peers.load()["torchvision"]
    transforms = __import__("torchvision.transforms", fromlist=["Compose"])
    assert torchvision.__version__
    reference = transforms.Compose(
        [
            transforms.Resize(round(side * 256 / 224)),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    x, display = for_model("imagenet", ("N", 3, side, side), "float32").apply(gradient_picture(*size))
    np.testing.assert_allclose(x[0], reference(gradient_picture(*size)).numpy(), rtol=1e-5, atol=1e-6)
    assert display.shape == (side, side, 3)


def test_presets_follow_the_input_size():
    assert (PRESETS["imagenet"].resize, PRESETS["imagenet"].crop) == (256, (224, 224))
    assert for_model("imagenet", ("N", 3, 299, 299), "float32").resize == 342
    assert for_model("imagenet", ("N", 3, "h", "w"), "float32").crop == (224, 224)
    x, _ = for_model("tf", ("N", 3, 64, 128), "float32").apply(gradient_picture())
    assert x.shape == (1, 3, 64, 128)


# ------------------------------------------------------------------------------------------------- kinds of pictures


def exif_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left is the top
    stored = np.zeros((4, 8, 3), np.uint8)
    stored[:, :4] = 200
    Image.fromarray(stored).save(path, exif=exif)
    expected = np.zeros((8, 4), np.uint8)
    expected[:4] = 200
    return expected


def transparent(path):
    pixels = np.zeros((8, 4, 4), np.uint8)
    pixels[:4, :, 3] = 255
    Image.fromarray(pixels).save(path)
    return np.where(np.arange(8)[:, None] < 4, 0, 255) * np.ones((1, 4))


def palette(path):
    picture = Image.fromarray((np.arange(32, dtype=np.uint8) // 16).reshape(8, 4), mode=None)
    picture.putpalette([10, 10, 10, 90, 90, 90])
    picture.save(path)
    return np.where(np.arange(8)[:, None] < 4, 10, 90) * np.ones((1, 4))


def palette_with_transparency(path):
    picture = Image.fromarray((np.arange(32, dtype=np.uint8) // 16).reshape(8, 4), mode=None)
    picture.putpalette([10, 10, 10, 90, 90, 90])
    picture.save(path, transparency=1)
    return np.where(np.arange(8)[:, None] < 4, 10, 255) * np.ones((1, 4))


def sixteen_bits(path):
    Image.fromarray((np.arange(32, dtype=np.uint16) * 257 * 8).reshape(8, 4)).save(path)
    return np.arange(32).reshape(8, 4) * 8


def grey(path):
    Image.fromarray(np.arange(32, dtype=np.uint8).reshape(8, 4)).save(path)
    return np.arange(32).reshape(8, 4)


def grey_with_alpha(path):
    pixels = np.stack([np.full((8, 4), 40), np.full((8, 4), 255)], -1).astype(np.uint8)
    Image.fromarray(pixels, mode=None).save(path)
    return np.full((8, 4), 40)


def one_bit(path):
    Image.fromarray(np.arange(32).reshape(8, 4) < 16).save(path)
    return np.where(np.arange(32).reshape(8, 4) < 16, 255, 0)


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (exif_rotated, ".png"), (exif_rotated, ".tiff"), (transparent, ".png"), (palette, ".png"), (palette, ".gif"),
        (palette_with_transparency, ".png"), (sixteen_bits, ".png"), (sixteen_bits, ".tiff"), (grey, ".png"),
        (grey, ".bmp"), (grey_with_alpha, ".png"), (one_bit, ".png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture(tmp_path, make, suffix, channels):
    path = tmp_path / f"picture{suffix}"
    expected = make(path)
    shape = ("N", channels, 8, 4)
    [sample] = load_inputs([path], for_model("none", shape, "float32"), shape, "float32")
    np.testing.assert_array_equal(sample.x[0], np.broadcast_to(expected, (channels, 8, 4)))
    np.testing.assert_array_equal(sample.display, np.repeat(expected[..., None], 3, -1))


def test_cmyk_and_floats(tmp_path):
    Image.new("CMYK", (4, 8), (0, 0, 0, 255)).save(tmp_path / "black.tiff")
    Image.fromarray(np.full((8, 4), 0.5, np.float32)).save(tmp_path / "half.tiff")
    shape = ("N", 3, 8, 4)
    black, half = load_inputs([tmp_path / "black.tiff", tmp_path / "half.tiff"],
                              for_model("none", shape, "uint8"), shape, "uint8")  # fmt: skip
    assert black.x.max() == 0
    assert (half.x == 128).all()
    Image.fromarray(np.full((8, 4), -7.5, np.float32)).save(tmp_path / "odd.tiff")
    assert "odd.tiff: pixel values go from -7.5" in str(
        error_of(load_inputs, [tmp_path / "odd.tiff"], for_model("none", shape, "uint8"), shape, "uint8")
    )


# ------------------------------------------------------------------------------------------------- what files may say


def test_hugging_face_resize_crop_and_normalize(tmp_path):
    spec = write_json(
        tmp_path / "preprocessor_config.json",
        {
            "do_resize": True, "size": {"shortest_edge": 40}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": 31, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
            "image_processor_type": "CLIPImageProcessor",
        },
    )  # fmt: skip
    picture = gradient_picture(100, 80)
    resized = np.asarray(picture.resize((50, 40), Image.Resampling.BICUBIC))
    cropped = resized[(40 - 31) // 2 :, (50 - 32) // 2 :][:31, :32]
    expected = (cropped / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    x, display = for_model(spec, ("N", 3, 31, 32), "float32").apply(picture)
    np.testing.assert_array_equal(display, cropped)
    np.testing.assert_allclose(x[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "resize", "crop"),
    [
        ({"size": {"height": 30, "width": 40}}, (30, 40), None),
        ({"size": 224, "image_mean": [0.5], "do_resize": True}, (224, 224), None),  # older ViT
        ({"size": 256, "crop_size": 224, "do_center_crop": True, "do_resize": True}, 256, (224, 224)),  # older
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"},
         256, (224, 224)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"},
         (384, 384), None),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9, "feature_extractor_type": "PoolFormerFeatureExtractor"},
         248, (224, 224)),
        ({"do_resize": False, "size": {"height": 30, "width": 40}}, None, None),
        ({"do_resize": True, "size": 256, "do_center_crop": False, "crop_size": 224}, (256, 256), None),
    ],
)  # fmt: skip
def test_hugging_face_sizes(tmp_path, content, resize, crop):
    loaded = Preprocessing.load(write_json(tmp_path / "c.json", {"do_normalize": False, **content}))
    assert (loaded.resize, loaded.crop) == (resize, crop)
    assert (loaded.rescale, loaded.mean, loaded.scale) == (1 / 255, (0.0,), (1.0,))


def test_hugging_face_without_rescale_or_normalize(tmp_path):
    content = {"do_resize": True, "size": {"height": 8, "width": 8}, "do_rescale": False, "do_normalize": False}
    x, display = for_model(write_json(tmp_path / "c.json", content), (1, 8, 8, 3), "uint8").apply(gradient_picture())
    np.testing.assert_array_equal(x[0], display)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a JSON object, found a list"),
        ({"layuot": "NCHW"}, "unknown key 'layuot' (hint: did you mean 'layout'?)"),
        ({"layout": "NWHC"}, "layout is 'NWHC', expected one of NCHW, NHWC"),
        ({"mean": ["a"]}, "mean is [\"a\"], expected a number"),
        ({"mean": 0, "std": 0}, "std must not be 0"),
        ({"std": 1, "scale": 1}, "both scale and std"),
        ({"resize": {"mode": "long", "size": 3}}, "resize.mode is 'long'"),
        ({"resize": {"mode": "exact", "size": [1, 2, 3]}}, "expected [height, width]"),
        ({"resize": {"mode": "short"}}, "resize.size is null"),
        ({"resize": {"size": 8, "resample": "sinc"}}, "resize.resample is 'sinc' (hint: one of nearest"),
        ({"crop": {"mode": "random", "size": 8}}, "crop.mode is 'random'"),
        ({"pixel_range": [3, 3]}, "two different numbers"),
        ({"dtype": "floaty"}, "dtype is 'floaty'"),
        ({"labels": 3}, "labels must be a list"),
        ({"labels": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"do_resize": True, "size": {"longest_edge": 3}}, "is not understood"),
    ],
)  # fmt: skip
def test_mistakes_in_a_preprocessing_file(tmp_path, content, message):
    error = error_of(Preprocessing.load, write_json(tmp_path / "p.json", content))
    assert message in str(error)
    assert ".json" in str(error) or "nowhere.txt" in str(error)


def test_mistakes_in_the_name_of_a_preprocessing(tmp_path):
    assert "did you mean 'imagenet'?" in str(error_of(Preprocessing.load, "imagnet"))
    (tmp_path / "broken.json").write_text('{"mean": ')
    assert "not valid JSON (line 1" in str(error_of(Preprocessing.load, tmp_path / "broken.json"))


# -------------------------------------------------------------------------------------------- which model, which file


def test_find_beside(tmp_path):
    model = tmp_path / "net.int8.onnx"
    assert find_beside(model) is None
    for name in ("preprocessor_config.json", "preprocessing.json", "net.preprocessing.json",
                 "net.int8.preprocessing.json", "net.int8.onnx.preprocessing.json"):  # fmt: skip
        write_json(tmp_path / name, {})
        assert find_beside(model) == tmp_path / name
    assert find_beside(tmp_path / "other.onnx") == tmp_path / "preprocessing.json"


def test_the_file_beside_the_model_is_used_unless_told(tmp_path):
    write_json(
        tmp_path / "net.preprocessing.json", {"mean": 128, "scale": 0.5, "labels": ["a", "b"], "label_offset": 1}
    )
    fitted = for_model(None, NCHW, "float32", tmp_path / "net.onnx")
    assert (fitted.mean, fitted.resize, fitted.labels, fitted.label_offset) == ((128.0,), (32, 32), ("a", "b"), 1)
    assert for_model("tf", NCHW, "float32", tmp_path / "net.onnx").source == "tf"


def test_without_a_file_float_inputs_ask_and_integer_inputs_take_pixels(picture, tmp_path):
    undecided = for_model(None, NCHW, "float32", tmp_path / "net.onnx")
    assert (undecided.low, undecided.high) == (None, None)
    error = error_of(load_inputs, [picture], undecided, NCHW, "float32")
    assert str(picture) in str(error)
    assert "--preprocess" in (error.hint or "")

    shape = (1, 32, 32, 3)
    [sample] = load_inputs([picture], for_model(None, shape, "uint8"), shape, "uint8")
    np.testing.assert_array_equal(
        sample.x[0], np.asarray(gradient_picture().resize((32, 32), Image.Resampling.BILINEAR))
    )
    [signed] = load_inputs([picture], for_model(None, shape, "int8"), shape, "int8")
    np.testing.assert_array_equal(signed.x.astype(int), sample.x.astype(int) - 128)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (("N", 3, 224, 224), "NCHW"), ((1, 224, 224, 3), "NHWC"), (("N", 1, 28, 28), "NCHW"), ((1, 28, 28, 1), "NHWC"),
        (("N", 3, "h", "w"), "NCHW"), (("N", None, None, 3), "NHWC"), (("N", 12, 64, 64), "NCHW"),
        ((1, 64, 64, 12), "NHWC"), (("N", 2, 150), "NCL"), (("N", 150, 2), "NLC"), (("N", 1, "l"), "NCL"),
        (("N", 10), ""), (("N", "c", "h", "w"), "NCHW"),
    ],
)  # fmt: skip
def test_layout_is_read_from_the_shape(shape, layout):
    assert detect_layout(shape) == layout


def test_a_model_and_a_file_that_contradict_each_other(tmp_path):
    spec = write_json(tmp_path / "p.json", {"layout": "NHWC", "mean": [1, 2, 3]})
    assert "says NHWC, the model's input [N, 3, 32, 32] is NCHW" in str(error_of(for_model, spec, NCHW, "float32"))
    spec = write_json(tmp_path / "p.json", {"mean": [1, 2, 3]})
    assert "mean has 3 values" in str(error_of(for_model, spec, ("N", 1, 32, 32), "float32"))
    spec = write_json(tmp_path / "p.json", {"resize": [40, 40], "crop": [30, 31], "mean": 0})
    assert "30 x 31, the model's input is 32 x 32" in str(error_of(for_model, spec, NCHW, "float32"))
    assert "-2.118 .. 2.64" in str(error_of(for_model, "imagenet", NCHW, "uint8"))


def test_pictures_that_do_not_fit(tmp_path, picture):
    spec = write_json(tmp_path / "p.json", {"resize": 32, "mean": 0})
    message = str(error_of(load_inputs, [picture], for_model(spec, NCHW, "float32"), NCHW, "float32"))
    assert "one sample has shape [3, 32, 40], expected [3, 32, 32]" in message
    for shape, words in ((("N", 7, 32, 32), "7 channels"), (("N", 1, 150), "1-D signals"), (("N", 9), "arrays [N, 9]")):
        fitted = for_model(None if len(shape) != 4 else "none", shape, "float32")
        message = str(error_of(load_inputs, [picture], fitted, shape, "float32"))
        assert words in message
        assert "picture.png" in message


def test_files_that_cannot_be_read(tmp_path, picture):
    fitted = for_model("none", NCHW, "float32")

    def message(path):
        return str(error_of(load_inputs, [path], fitted, NCHW, "float32"))

    assert f"no such file (hint: did you mean {picture}?)" in message(tmp_path / "pictur.png")
    (tmp_path / "noise.png").write_bytes(b"no picture at all")
    assert "not a picture that Pillow can read" in message(tmp_path / "noise.png")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:100])
    assert "half.png: the picture cannot be read" in message(tmp_path / "half.png")
    (tmp_path / "noise.npy").write_bytes(b"no array at all")
    assert "not a readable .npy file" in message(tmp_path / "noise.npy")
    (tmp_path / "noise.npz").write_bytes(b"no archive at all")
    assert "not a readable .npz file" in message(tmp_path / "noise.npz")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no pictures" in message(tmp_path / "empty")


def test_a_folder_is_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        gradient_picture().save(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("not,an,input")
    samples = read_inputs([tmp_path], for_model("tf", NCHW, "float32"), NCHW, "float32")
    assert [sample.name for sample in samples] == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------------------- arrays


def test_npy_batch_and_single_sample(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32))  # float64: cast to the model's type
    np.save(tmp_path / "batch.npy", x)
    np.save(tmp_path / "one.npy", x[2])
    undecided = for_model(None, NCHW, "float32")
    samples = load_inputs([tmp_path / "batch.npy", tmp_path / "one.npy"], undecided, NCHW, "float32")
    assert [s.name for s in samples] == ["batch[0]", "batch[1]", "batch[2]", "batch[3]", "one"]
    np.testing.assert_array_equal(
        np.concatenate([s.x for s in samples]), np.concatenate([x, x[2:3]]).astype(np.float32)
    )
    assert all(s.x.dtype == np.float32 and s.display.shape == (32, 32, 3) for s in samples)
    assert not isinstance(samples[0].x, np.memmap)


@pytest.mark.parametrize(
    ("text", "rows"),
    [("[2]", [2]), ("[-1]", [3]), ("[1:3]", [1, 2]), ("[2:]", [2, 3]), ("[:-2]", [0, 1]), ("", [0, 1, 2, 3])],
)
def test_samples_by_number(tmp_path, text, rows):
    np.save(tmp_path / "x.npy", np.arange(4.0).reshape(4, 1))
    samples = load_inputs([f"{tmp_path}/x.npy{text}"], for_model(None, ("N", 1), "float32"), ("N", 1), "float32")
    assert [float(s.x[0, 0]) for s in samples] == rows
    assert [s.name for s in samples] == [f"x[{row}]" for row in rows]


def test_samples_that_do_not_exist(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4.0).reshape(4, 1))
    fitted = for_model(None, ("N", 1), "float32")
    for text in ("[4]", "[-5]", "[9:]"):
        error = error_of(load_inputs, [f"{tmp_path}/x.npy{text}"], fitted, ("N", 1), "float32")
        assert "it holds 4" in str(error)
    assert "names no sample" in str(error_of(locate, "x.npy[]"))


def test_which_array_of_an_archive(tmp_path):
    x, y = np.ones((2, 1, 5), np.float32), np.zeros(2, int)
    shape = ("N", 1, 5)
    fitted = for_model(None, shape, "float32")

    def read(name, **arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load_inputs([f"{tmp_path}/{name}"], fitted, shape, "float32", input_name="beat")

    assert len(read("a.npz", x=x, y=y)) == 2  # the one that fits
    assert read("a.npz:z", x=x, z=2 * x)[0].x.max() == 2  # the one that is named
    assert read("a.npz", x=x, beat=3 * x)[0].x.max() == 3  # the one named as the input
    assert read("a.npz", other=x, x=4 * x)[0].x.max() == 4  # the usual name
    assert [s.name for s in read("a.npz:x[1]", x=x)] == ["a[1]"]
    assert "holds p [2, 1, 5], q [2, 1, 5]; which is the input? (hint: name it:" in str(
        error_of(read, "a.npz", p=x, q=x)
    )
    assert "no array has shape [B, 1, 5]; it holds y [2], z [3]" in str(error_of(read, "a.npz", y=y, z=np.ones(3)))
    assert "holds no array 'w' (hint: it holds x)" in str(error_of(read, "a.npz:w", x=x))


def test_several_inputs_come_from_one_archive(tmp_path, picture):
    shape, others = NCHW, {"age": (("N", 1), "float32")}
    fitted = for_model("none", shape, "float32")
    np.savez(tmp_path / "both.npz", image=np.zeros((2, 3, 32, 32)), age=np.array([[30.0], [40.0]]))
    first, second = load_inputs([tmp_path / "both.npz"], fitted, shape, "float32", input_name="image", others=others)
    assert (first.others["age"].item(), second.others["age"].item()) == (30, 40)
    assert first.x.shape == (1, 3, 32, 32)
    message = str(error_of(load_inputs, [picture], fitted, shape, "float32", input_name="image", others=others))
    assert "the model has 2 inputs (image, age)" in message
    np.savez(tmp_path / "one.npz", image=np.zeros((2, 3, 32, 32)))
    message = str(
        error_of(load_inputs, [tmp_path / "one.npz"], fitted, shape, "float32", input_name="image", others=others)
    )
    assert "lacks arrays for the model's inputs age" in message


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (
            np.zeros((2, 32, 32, 3)),
            "float32",
            "has shape [2, 32, 32, 3], expected [B, 3, 32, 32] (hint: the channels are",
        ),
        (np.zeros((2, 3, 30, 32)), "float32", "has shape [2, 3, 30, 32], expected [B, 3, 32, 32]"),
        (np.full((1, 3, 32, 32), np.nan), "float32", "holds NaN values"),
        (np.full((1, 3, 32, 32), np.inf), "float32", "holds infinite values"),
        (np.full((1, 3, 32, 32), 1e300), "float32", "overflow the model's float32 input"),
        (np.full((1, 3, 32, 32), 0.5), "uint8", "do not fit the model's uint8 input"),
        (np.full((1, 3, 32, 32), 256), "uint8", "do not fit the model's uint8 input"),
        (np.zeros((1, 3, 32, 32), complex), "float32", "holds complex128 values"),
        (
            np.zeros((1, 3, 32, 32), np.uint8),
            "float32",
            "holds uint8 values, expected float32 (hint: these look like raw",
        ),
        (np.zeros((1, 3, 32, 32), int), "float32", "holds int64 values, expected float32 (hint: save x.astype"),
        (np.zeros((0, 3, 32, 32)), "float32", "holds no samples"),
        (np.array([None, "x"], object), "float32", "holds Python objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, dtype, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    error = error_of(load_inputs, [tmp_path / "x.npy"], for_model("none", NCHW, dtype), NCHW, dtype)
    assert message in str(error)
    assert "x.npy" in str(error)


def test_the_hint_for_swapped_channels_works(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    hint = error_of(load_inputs, [tmp_path / "x.npy"], for_model("none", NCHW, "float32"), NCHW, "float32").hint
    assert hint == "the channels are on the wrong axis: numpy.moveaxis(x, -1, -3)"
    np.save(tmp_path / "x.npy", np.moveaxis(x, -1, -3))
    assert len(load_inputs([tmp_path / "x.npy"], for_model("none", NCHW, "float32"), NCHW, "float32")) == 2


# ------------------------------------------------------------------------------------------------------------ signals

LEADS = np.arange(10.0).reshape(2, 5)  # two leads of five steps


@pytest.mark.parametrize(
    ("table", "shape", "expected"),
    [
        ("0,1,2,3,4\n5,6,7,8,9", ("N", 1, 5), LEADS[:, None]),  # one row per sample
        ("0,1,2,3,4,\n5,6,7,8,9,\n", ("N", 1, 5), LEADS[:, None]),  # delimiters at the end
        ("0;1;2;3;4\n5;6;7;8;9", ("N", 2, 5), LEADS[None]),  # one row per lead
        ("0\t5\n1\t6\n2\t7\n3\t8\n4\t9", ("N", 2, 5), LEADS[None]),  # one column per lead
        ("I,II\n0,5\n1,6\n2,7\n3,8\n4,9", ("N", 2, 5), LEADS[None]),  # with a header
        ("time,I,II\n.1,0,5\n.2,1,6\n.3,2,7\n.4,3,8\n.5,4,9", ("N", 2, 5), LEADS[None]),  # and a time axis
        ("time,I,II\n.1,0,5\n.2,1,6\n.3,2,7\n.4,3,8\n.5,4,9", ("N", 2, "l"), LEADS[None]),
        ("a,b,c,d,e,label\n0,1,2,3,4,1\n5,6,7,8,9,0", ("N", 1, 5), LEADS[:, None]),  # labels behind
        ("0 1 2 3 4 5 6 7 8 9", ("N", 2, 5), LEADS[None]),  # lead after lead
        ("0\n1\n2\n3\n4", ("N", 1, 5), LEADS[None, :1]),  # one column
        ("0\n1\n2\n3\n4", ("N", 1, "l"), LEADS[None, :1]),
        ("# a comment\n0,1,2,3,4\n\n5,6,7,8,9\n", ("N", 1, "l"), LEADS[:, None]),
        ("0,5\n1,6\n2,7\n3,8\n4,9", ("N", 5, 2), LEADS.T[None]),  # the model wants [L, C]
        ("0,1,2,3,4\n5,6,7,8,9", ("N", 5), LEADS),  # features
    ],
)
def test_tables(tmp_path, table, shape, expected):
    (tmp_path / "signal.csv").write_text(table)
    samples = load_inputs([tmp_path / "signal.csv"], for_model(None, shape, "float32"), shape, "float32")
    np.testing.assert_array_equal(np.concatenate([s.x for s in samples]), expected)
    assert all(s.display is None for s in samples)


@pytest.mark.parametrize(
    ("table", "shape", "message"),
    [
        ("0,1,2\n3,4,5", ("N", 1, 5), "a table of 2 rows x 3 columns does not fit the model's input [N, 1, 5]"),
        ("0,1,2\n3,4", ("N", 1, 3), "row 2 has 2 columns, row 1 has 3"),
        ("a,b\n1,2\n3,x", ("N", 1, 2), "row 3, column 2 is 'x', expected a number"),
        ("1,2\n3,", ("N", 1, 2), "row 2, column 2 is '', expected a number"),
        ("a,b\n", ("N", 1, 2), "holds no numbers"),
        ("", ("N", 1, 2), "holds no numbers"),
        ("1,nan", ("N", 1, 2), "holds NaN values"),
        ("1,2", NCHW, "a table holds 1-D signals, the model takes [N, 3, 32, 32]"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, table, shape, message):
    (tmp_path / "signal.csv").write_text(table)
    error = error_of(load_inputs, [tmp_path / "signal.csv"], for_model(None, shape, "float32"), shape, "float32")
    assert message in str(error)
    assert "signal.csv" in str(error)


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "tench\ngold fish\n\n", ["tench", "gold fish"]),
        ("l.txt", "background\n\nthird", ["background", "", "third"]),
        ("l.json", '["a", "b"]', ["a", "b"]),
        ("l.json", '{"0": ["n01", "a"], "2": ["n03", "c"]}', ["a", "1", "c"]),
        ("l.json", '{"id2label": {"1": "b", "0": "a"}, "depths": [2]}', ["a", "b"]),
        ("l.csv", "index,name\n0,a\n1,\"b, too\"\n", ["a", "b, too"]),
        ("l.csv", "name,index\nb,1\na,0\n", ["a", "b"]),
        ("l.csv", "name\na\nb\n", ["name", "a", "b"][1:]),
    ],
)  # fmt: skip
def test_labels(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", "holds no class names"),
        ("l.json", "3", "expected a list of class names"),
        ("l.json", '{"a": "b"}', "expected class indices as keys, found 'a'"),
        ("l.csv", "", "holds no class names"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    assert message in str(error_of(read_labels, tmp_path / name))
    assert "no such file" in str(error_of(read_labels, tmp_path / "nowhere.txt"))


# ------------------------------------------------------------------------------------------------ real models and data


def by_hand(model: str, path: Path) -> np.ndarray:
    """What the README and the .json files of the shared models say, written out."""
    picture = Image.open(path).convert("RGB")
    if model.startswith("squeezenet"):
        pixels = np.asarray(picture.resize((256, 256), Image.Resampling.BILINEAR))
        top = left = round((256 - 227) / 2)
        pixels = pixels[top : top + 227, left : left + 227, ::-1].astype(np.float32)
        return (pixels - np.array([104, 117, 123], np.float32)).transpose(2, 0, 1)[None]
    width, height = picture.size
    size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    top, left = round((size[1] - 224) / 2), round((size[0] - 224) / 2)
    return pixels[top : top + 224, left : left + 224][None]


@needs_shared
@pytest.mark.parametrize(
    ("model", "published"), [("squeezenet1_0_imagenet", 0.66), ("mobilenet_v2_imagenet_int8", 0.845)]
)
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_accuracy_on_photographs(model, published, step):
    """The published rate on all 200 photographs, and within three standard deviations of it on every fourth."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    file = SHARED / "models" / f"{model}.onnx"
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    port = session.get_inputs()[0]
    dtype = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[port.type]
    with open(SHARED / "images" / "labels.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))[::step]
    fitted = for_model(None, port.shape, dtype, file)
    files = [SHARED / "images" / row["file"] for row in rows]
    right = []
    for row, sample, path in zip(rows, read_inputs(files, fitted, port.shape, dtype), files, strict=True):
        np.testing.assert_array_equal(sample.x, by_hand(model, path))
        index = session.run(None, {port.name: sample.x})[0].argmax()
        right.append(fitted.labels[index + fitted.label_offset] == row["class_name"])
    slack = (
        3 * np.sqrt(published * (1 - published) / len(rows)) if step > 1 else 0.0051
    )  # one photograph: kernels differ
    assert np.mean(right) == pytest.approx(published, abs=slack)


@pytest.mark.parametrize(
    "content",
    [
        '{"pixel_range": 5}',
        '{"value_range": 3}',
        '{"rescale_factor": "abc"}',
        '{"do_resize": true, "size": 64, "crop_pct": 0}',
        '{"do_resize": true, "size": 64, "crop_pct": "x"}',
        '{"do_resize": true, "size": false, "crop_pct": 0.9}',
        '{"size": 1000000000000}',
        '{"resize": 1000000000000}',
        '{"rescale_factor": 0}',
        '{"dtype": {"size": [3]}}',
        '{"mean": 0, "labels": {}}',
    ],
)
def test_a_malformed_preprocessing_file_is_an_error_of_ours(content, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"p\.json"):
        Preprocessing.load(path)


def test_bounds_are_unknown_where_the_file_speaks_of_other_channels():
    signal = Preprocessing.load("imagenet").fit(("B", 1, 150), np.float32)
    assert signal.low is None
    assert signal.high is None

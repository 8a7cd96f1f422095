"""How a picture becomes the model's input, as presets and as preprocessing files say it.

    value = (pixel * rescale - mean) * scale        pixel 0..255, mean and scale per channel in `channel_order`

Pictures are resized by Pillow on 8-bit pixels, as torchvision and Hugging Face do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from onnxcrp.errors import InputError
from onnxcrp.labels import named, read_json, read_labels

Shape = Sequence[int | str | None]  # a model input's, as onnx declares it

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
BY_NUMBER = {int(value): name for name, value in RESAMPLING.items()}  # Hugging Face writes Pillow's number
USUAL_SIZE = 224  # the presets' crop; other input sizes keep their proportion of crop to resize
USUAL_RESIZE = 256
LARGEST = 1 << 14  # pixels of a side
ASK = 'say how with --preprocess: "imagenet", "caffe", "tf", "unit", "none", or a .json file'


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input; `load` reads one, `for_model` fits one to a model's input."""

    layout: str = ""  # NCHW, NHWC, NCL, NLC; empty until fitted to a model
    channels: int = 3
    channel_order: str = "RGB"  # RGB, BGR, or L: grey in every channel
    resize: int | tuple[int, int] | None = None  # shorter side, or (height, width), or the picture's own size
    interpolation: str = "bilinear"
    crop: tuple[int, int] | None = None  # (height, width) from the centre
    crop_rounding: str = "round"  # of half a pixel: torchvision rounds, Hugging Face takes the floor
    rescale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    known: bool = True  # False: nothing says which values the model expects, so pictures are refused
    proportional: bool = False  # a preset: resize and crop follow the model's input size
    rate: float | None = None  # samples per second of a signal
    label_offset: int = 0  # class index + label_offset is the line of the labels
    labels: tuple[str, ...] = ()
    source: str = "none"

    @staticmethod
    def load(spec: str | os.PathLike[str]) -> Preprocessing:
        """The preset "imagenet", "caffe", "tf", "unit" or "none", or what a .json file says.

        A file is a Hugging Face `preprocessor_config.json` or the plain form (layout, dtype, channel_order, resize,
        crop, pixel_range, mean, scale or std, labels, label_offset). Raises InputError for what it cannot understand.
        """
        name = os.fspath(spec)
        if name in PRESETS:
            return PRESETS[name]
        path = Path(name)
        if not path.is_file():
            nearest = difflib.get_close_matches(name, PRESETS, n=1)
            raise InputError(
                f"preprocessing {name!r} is neither a preset ({', '.join(PRESETS)}) nor a file",
                hint=f"did you mean {nearest[0]!r}?" if nearest else "name a preset or an existing .json file",
            )
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
        understand = _hugging_face if HUGGING_FACE_KEYS & content.keys() else _plain
        return dataclasses.replace(understand(path, content), source=os.fspath(path))

    @property
    def low(self) -> tuple[float, ...] | None:
        """The smaller of black and white per channel in the model's input units and order; None if not known."""
        return self._extremes(min)

    @property
    def high(self) -> tuple[float, ...] | None:
        """The larger of black and white per channel in the model's input units and order; None if not known."""
        return self._extremes(max)

    def _extremes(self, pick: Any) -> tuple[float, ...] | None:
        if not self.known or any(len(values) not in (1, self.channels) for values in (self.mean, self.scale)):
            return None
        ends = (self._values(np.full(self.channels, pixel, np.float64)) for pixel in (0, 255))
        return tuple(float(pick(pair)) for pair in zip(*ends, strict=True))

    def _values(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels [..., C] in the model's channel order -> float64 values [..., C]."""
        return (pixels * self.rescale - np.asarray(self.mean)) * np.asarray(self.scale)

    def view(self, picture: Image.Image) -> np.ndarray:
        """The pixels the model sees, uint8 [H, W, C] in RGB or grey: upright, resized, cropped."""
        pixels = _pixels(picture, "L" if self.channels == 1 or self.channel_order == "L" else "RGB")
        if self.resize is not None:
            size = self.resize
            if isinstance(size, int):
                short, long = sorted(pixels.size)
                other = int(size * long / short)
                size = (size, other) if pixels.height <= pixels.width else (other, size)
            pixels = pixels.resize((size[1], size[0]), RESAMPLING[self.interpolation])
        array = np.asarray(pixels)
        array = np.repeat(array[:, :, None], self.channels, 2) if array.ndim == 2 else array
        return array if self.crop is None else _center_crop(array, self.crop, self.crop_rounding)

    def apply(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """A picture -> (the model's input [1, ...], uint8 RGB [H, W, 3] of exactly what it shows).

        Raises InputError where the expected range of values is not known or the model takes no pictures.
        """
        if self.layout in ("NCL", "NLC"):
            raise InputError("the model takes 1-D signals, not pictures", hint="pass a .npy, .npz or .csv file")
        if self.channels not in (1, 3):
            raise InputError(
                f"the model takes {self.channels} channels, a picture has 1 or 3",
                hint="pass preprocessed arrays as .npy or .npz",
            )
        if not self.known:
            raise InputError(
                f"nothing says which values the model's {self.dtype} input expects for a picture", hint=ASK
            )
        seen = self.view(picture)
        channels = np.moveaxis(seen[..., ::-1] if self.channel_order == "BGR" else seen, -1, 0)
        x = np.stack(
            [values[pixels] for values, pixels in zip(self._table(), channels, strict=True)],
            axis=-1 if self.layout == "NHWC" else 0,
        )
        return x[None], np.broadcast_to(seen, (*seen.shape[:2], 3)).copy()

    def _table(self) -> np.ndarray:
        """What the model takes for each of the 256 values of a pixel, [C, 256]."""
        values = self._values(np.arange(256.0)[:, None].repeat(self.channels, 1))
        kind = np.dtype(self.dtype)
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            values = np.clip(np.rint(values), limits.min, limits.max)
        with np.errstate(over="ignore"):  # of values that the picture may not have
            return values.T.astype(kind)

    def to_display(self, x: np.ndarray) -> np.ndarray:
        """The model's input [1, ...] or one sample of it -> uint8 RGB [H, W, 3]; the inverse of `apply`.

        Where the range of values is not known, the sample's own range is stretched to black and white.
        """
        x = np.asarray(x)
        x = x[0] if x.ndim == 4 else x
        if x.ndim != 3:
            raise InputError(f"a picture is [C, H, W] or [H, W, C], not {list(x.shape)}")
        pixels = (x if self.layout == "NHWC" else x.transpose(1, 2, 0)).astype(np.float64)
        if self.known and pixels.shape[-1] == self.channels:
            pixels = (pixels / np.asarray(self.scale) + np.asarray(self.mean)) / self.rescale
        elif x.dtype != np.uint8:
            low, high = pixels.min(), pixels.max()
            pixels = (pixels - low) * (255 / (high - low) if high > low else 0)
        if pixels.shape[-1] not in (1, 3):
            pixels = pixels.mean(-1, keepdims=True)
        if self.channel_order == "BGR":
            pixels = pixels[..., ::-1]
        return np.broadcast_to(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), (*pixels.shape[:2], 3)).copy()

    def fit(self, shape: Shape, dtype: Any, *, name: str = "the model's input") -> Preprocessing:
        """The same for an input of this shape and dtype; raises InputError where the two contradict each other."""
        kind = np.dtype(dtype)
        layout = detect_layout(shape, self.layout, source=self.source)
        if len(shape) != 4:
            return dataclasses.replace(self, layout=layout, channels=_channels(shape, layout) or 1, dtype=kind.name)
        channels = _channels(shape, layout) or self.channels
        height, width = (static(shape[axis]) for axis in ((2, 3) if layout == "NCHW" else (1, 2)))
        fitted = dataclasses.replace(self, layout=layout, channels=channels, dtype=kind.name)
        if kind.kind in "iu" and not self.known:  # pixels as they are, int8 with black at -128
            fitted = dataclasses.replace(fitted, known=True, mean=(128.0 if kind == np.int8 else 0.0,))
        for what, values in (("mean", self.mean), ("scale", self.scale)):
            if channels in (1, 3) and len(values) not in (1, channels):
                raise InputError(
                    f"preprocessing {self.source}: {what} has {len(values)} values, {name} {channels} channel(s)",
                    hint=f"a .json file with one {what} per channel",
                )
        if height is not None and width is not None:
            if self.proportional:
                fitted = fitted._resized(height, width)
            elif self.crop is None and self.resize is None:
                fitted = dataclasses.replace(fitted, resize=(height, width))
            final = fitted.crop or fitted.resize
            if isinstance(final, tuple) and final != (height, width):
                raise InputError(
                    f"preprocessing {self.source} makes pictures of {final[0]} x {final[1]}, "
                    f"{name} is {height} x {width}",
                    hint="correct resize and crop (height, width) in the file",
                )
        if kind.kind in "iu":
            limits, low, high = np.iinfo(kind), min(fitted.low or (0,)), max(fitted.high or (0,))
            if low < limits.min - 0.5 or high > limits.max + 0.5 or high - low < 2:
                raise InputError(
                    f"preprocessing {self.source} gives values {low:.4g} .. {high:.4g}, {name} is {kind.name}",
                    hint="a quantized model takes pixels: try --preprocess none",
                )
        return fitted

    def _resized(self, height: int, width: int) -> Preprocessing:
        """A preset for another input size: crop to it from a picture larger by 256 / 224."""
        larger = tuple(round(side * USUAL_RESIZE / USUAL_SIZE) for side in (height, width))
        resize = larger[0] if height == width else (larger[0], larger[1])
        return dataclasses.replace(self, resize=resize, crop=(height, width))


def _preset(source: str, **fields: Any) -> Preprocessing:
    return Preprocessing(source=source, resize=USUAL_RESIZE, crop=(USUAL_SIZE, USUAL_SIZE), proportional=True, **fields)


PRESETS: dict[str, Preprocessing] = {
    "imagenet": _preset(  # torchvision, timm
        "imagenet",
        rescale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        scale=(1 / 0.229, 1 / 0.224, 1 / 0.225),
    ),
    "caffe": _preset("caffe", channel_order="BGR", mean=(103.939, 116.779, 123.68)),  # also keras' VGG and ResNet
    "tf": _preset("tf", rescale=1 / 127.5, mean=(1.0,)),  # -1..1
    "unit": _preset("unit", rescale=1 / 255),  # 0..1
    "none": Preprocessing(source="none"),  # 0..255
}


def find_beside(model_path: str | os.PathLike[str]) -> Path | None:
    """The file that says how the model's pictures are prepared, if one lies beside it.

    For `net.int8.onnx`: net.int8.onnx.preprocessing.json, net.int8.preprocessing.json, net.preprocessing.json, then
    preprocessing.json and preprocessor_config.json of the same folder.
    """
    path = Path(model_path)
    stems = [path.name]
    while "." in stems[-1]:
        stems.append(stems[-1].rpartition(".")[0])
    names = [f"{stem}.preprocessing.json" for stem in stems if stem]
    for name in (*names, "preprocessing.json", "preprocessor_config.json"):
        if (beside := path.with_name(name)).is_file():
            return beside
    return None


def for_model(
    spec: str | os.PathLike[str] | Preprocessing | None,
    shape: Shape,
    dtype: Any,
    model_path: str | os.PathLike[str] | None = None,
    *,
    name: str = "the model's input",
) -> Preprocessing:
    """The preprocessing of this model's input: `spec`, else a file beside the model, else what the input itself says.

    Integer inputs take pixels, resized to the input. Of a float input nobody knows the range: the result then reads
    arrays only, and asks for --preprocess when a picture comes. Raises InputError where spec and model disagree.
    """
    if spec is None and model_path is not None:
        spec = find_beside(model_path)
    if isinstance(spec, Preprocessing):
        return spec.fit(shape, dtype, name=name)
    if spec is not None:
        return Preprocessing.load(spec).fit(shape, dtype, name=name)
    return Preprocessing(known=False, source="nothing").fit(shape, dtype, name=name)


def detect_layout(shape: Shape, stated: str = "", *, source: str = "") -> str:
    """NCHW | NHWC of a rank 4 input, NCL | NLC of a rank 3 one, empty for other ranks.

    Raises InputError if the shape contradicts what is `stated`, or neither decides.
    """
    if len(shape) not in (3, 4):
        return ""
    first, last = ("NCHW", "NHWC") if len(shape) == 4 else ("NCL", "NLC")
    ahead, behind = static(shape[1]), static(shape[-1])
    usual = (1, 3)
    if len(shape) == 4 and (ahead in usual) != (behind in usual):
        found = first if ahead in usual else last
    elif ahead is not None and behind is not None and ahead != behind:
        found = first if ahead < behind else last
    elif ahead is not None and behind is None:
        found = first
    elif behind is not None and ahead is None:
        found = last
    else:
        found = stated or first
    if stated and len(stated) == len(shape) and stated != found and (ahead in usual) != (behind in usual):
        raise InputError(
            f"preprocessing {source} says {stated}, the model's input {show(shape)} is {found}",
            hint="correct `layout` in the file, or leave it out",
        )
    return stated if stated in (first, last) else found


def _channels(shape: Shape, layout: str) -> int | None:
    return static(shape[layout.index("C")]) if layout else None


def static(dimension: int | str | None) -> int | None:
    """A dimension's size, None where it is symbolic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def show(shape: Shape) -> str:
    """A shape for messages."""
    return "[" + ", ".join(str(d) if d is not None else "?" for d in shape) + "]"


def fits(shape: Sequence[int], declared: Shape) -> bool:
    """Whether every fixed dimension agrees."""
    return len(shape) == len(declared) and all(
        static(want) in (None, have) for have, want in zip(shape, declared, strict=True)
    )


def _pixels(picture: Image.Image, mode: str) -> Image.Image:
    """Any picture -> upright 8-bit RGB or L: 16 bit scaled down, transparency laid on white."""
    picture.load()  # a PNG tells its orientation after its pixels
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        low, high = values.min(), values.max()
        top = 1 if picture.mode == "F" and high <= 1 else 255 if high <= 255 and picture.mode in "IF" else 65535
        if not (low >= 0 and high <= top):
            raise InputError(
                f"pixel values go from {low:g} to {high:g}, expected 8 or 16 bits",
                hint="pass it as a preprocessed array in a .npy file",
            )
        picture = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def _center_crop(pixels: np.ndarray, size: tuple[int, int], rounding: str) -> np.ndarray:
    """[H, W, C] -> [height, width, C] from the centre; smaller pictures get a black border."""
    missing = [max(want - have, 0) for want, have in zip(size, pixels.shape[:2], strict=True)]
    if any(missing):
        pixels = np.pad(pixels, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])
    half = round if rounding == "round" else math.floor
    top, left = (half((have - want) / 2) for want, have in zip(size, pixels.shape[:2], strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


# ---------------------------------------------------------------------------------- what a preprocessing file may say

HUGGING_FACE_KEYS = {
    "do_resize", "do_normalize", "do_rescale", "do_center_crop", "image_mean", "image_std",
    "image_processor_type", "feature_extractor_type", "crop_size", "rescale_factor",
}  # fmt: skip
PLAIN_KEYS = (
    "layout", "dtype", "channel_order", "resize", "crop", "pixel_range", "value_range", "mean", "scale", "std",
    "labels", "label_offset", "sampling_rate_hz",
)  # fmt: skip


def _plain(path: Path, content: Mapping[str, Any]) -> Preprocessing:
    """The plain form: value = (pixel - mean) * scale, pixel in pixel_range (0..255 unless told)."""
    for key in content.keys() - set(PLAIN_KEYS):
        if near := difflib.get_close_matches(key, PLAIN_KEYS, n=1, cutoff=0.75):
            raise InputError(f"{path}: unknown key {key!r}", hint=f"did you mean {near[0]!r}?")
    layout = _choice(path, content, "layout", ("", "NCHW", "NHWC", "NCL", "NLC"))
    if "scale" in content and "std" in content:
        raise InputError(f"{path}: both scale and std are given", hint="value = (pixel - mean) * scale = (...) / std")
    scale = _numbers(path, content, "scale", 1.0)
    if "std" in content:
        scale = tuple(1 / value for value in _nonzero(path, "std", _numbers(path, content, "std", 1.0)))
    low, high = _pair(path, content, "pixel_range", (0, 255))
    rescale = (high - low) / 255
    if rescale == 0:
        raise InputError(f"{path}: pixel_range is [{low:g}, {high:g}], expected two different numbers")
    mean = tuple(value - low for value in _numbers(path, content, "mean", 0.0))
    known = bool({"pixel_range", "mean", "scale", "std"} & content.keys())
    if "value_range" in content:  # the values the model expects, however they came about
        low, high = _pair(path, content, "value_range", (0, 1))
        if not known:
            rescale, mean, known = (high - low) / 255, (-low,), True
    return Preprocessing(
        layout=layout,
        channels=1 if "L" in (*layout, content.get("channel_order")) else 3,
        channel_order=_choice(path, content, "channel_order", ("RGB", "BGR", "L")),
        resize=_plain_resize(path, content.get("resize")),
        interpolation=_interpolation(path, content.get("resize")),
        crop=_plain_crop(path, content.get("crop")),
        rescale=rescale,
        mean=mean,
        scale=_nonzero(path, "scale", scale),
        dtype=_dtype(path, content.get("dtype", "float32")),
        known=known,
        rate=_numbers(path, content, "sampling_rate_hz", 1)[0] if "sampling_rate_hz" in content else None,
        label_offset=_integer(path, "label_offset", content.get("label_offset", 0), least=None),
        labels=_labels_of(path, content.get("labels")),
    )


def _plain_resize(path: Path, resize: Any) -> int | tuple[int, int] | None:
    if resize is None:
        return None
    if isinstance(resize, Mapping):
        mode = _choice(path, resize, "mode", ("exact", "short"), where="resize.mode")
        size = resize.get("size")
        if mode == "short":
            return _integer(path, "resize.size", size[0] if isinstance(size, list) and len(size) == 1 else size)
        return _size(path, "resize.size", size)
    return _integer(path, "resize", resize) if isinstance(resize, int) else _size(path, "resize", resize)


def _interpolation(path: Path, resize: Any) -> str:
    if not isinstance(resize, Mapping) or "resample" not in resize:
        return "bilinear"
    return _resample(path, resize["resample"], "resize.resample")


def _plain_crop(path: Path, crop: Any) -> tuple[int, int] | None:
    if crop is None:
        return None
    if isinstance(crop, Mapping):
        _choice(path, crop, "mode", ("center",), where="crop.mode")
        return _size(path, "crop.size", crop.get("size"))
    return _size(path, "crop", crop)


def _labels_of(path: Path, labels: Any) -> tuple[str, ...]:
    """Class names written in the file itself, or in a file it names."""
    if labels is None:
        return ()
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return tuple(labels)
    if isinstance(labels, Mapping):
        return tuple(named(path, labels))
    if isinstance(labels, str):
        return tuple(read_labels(path.parent / labels))
    raise InputError(f"{path}: labels must be a list of names or the name of a file, found {labels!r}")


def _hugging_face(path: Path, content: Mapping[str, Any]) -> Preprocessing:
    """A `preprocessor_config.json`: resize, centre crop, rescale, normalize, each unless its `do_` says no."""
    kind = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    size = content.get("size")
    if content.get("do_resize", size is not None):
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
        if isinstance(edge, int) and "crop_pct" in content:  # ConvNeXT, PoolFormer: size is that of the crop
            edge = _integer(path, "size", edge)
            if edge < 384 or not kind.startswith("ConvNext"):
                share = _numbers(path, content, "crop_pct", 1)[0]
                if not 0.05 <= share <= 1:
                    raise InputError(f"{path}: crop_pct is {share:g}, expected a share of at most 1")
                resize, crop = int(edge / share), (edge, edge)
            else:
                resize = (edge, edge)
        elif isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" not in size:
            edge = _integer(path, "size.shortest_edge", edge)
            resize = int(256 / 224 * edge) if kind.startswith("Levit") else edge
        elif isinstance(size, Mapping) and {"height", "width"} <= size.keys():
            resize = _size(path, "size", size)
        elif isinstance(size, int | list):  # older files: a number is a square where nothing is cropped
            square = isinstance(size, list) or not content.get("do_center_crop", "crop_size" in content)
            width_height = size[::-1] if isinstance(size, list) else size
            resize = _size(path, "size", width_height) if square else _integer(path, "size", size)
        else:
            raise InputError(
                f"{path}: size {json.dumps(size)} is not understood",
                hint='expected {"shortest_edge": n} or {"height": h, "width": w}',
            )
    if content.get("do_center_crop", "crop_size" in content) and "crop_size" in content:
        crop = _size(path, "crop_size", content["crop_size"])
    factor = _nonzero(path, "rescale_factor", _numbers(path, content, "rescale_factor", 1 / 255))[0]
    rescale = factor if content.get("do_rescale", True) else 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if content.get("do_normalize", "image_mean" in content):
        mean = _numbers(path, content, "image_mean", 0.5)
        std = _nonzero(path, "image_std", _numbers(path, content, "image_std", 0.5))
    return Preprocessing(
        channel_order="BGR" if content.get("do_flip_channel_order") else "RGB",
        resize=resize,
        interpolation=_resample(path, content.get("resample", 2), "resample"),
        crop=crop,
        crop_rounding="floor",
        rescale=rescale,
        mean=mean,
        scale=tuple(1 / value for value in std),
    )


def _resample(path: Path, value: Any, where: str) -> str:
    name = BY_NUMBER.get(value) if isinstance(value, int) else str(value).lower()
    if name not in RESAMPLING:
        raise InputError(f"{path}: {where} is {value!r}", hint=f"one of {', '.join(RESAMPLING)}")
    return name


def _choice(path: Path, content: Mapping[str, Any], key: str, choices: tuple[str, ...], *, where: str = "") -> str:
    value = content.get(key, choices[0])
    if value not in choices:
        raise InputError(f"{path}: {where or key} is {value!r}, expected one of {', '.join(filter(None, choices))}")
    return value


def _integer(path: Path, where: str, value: Any, *, least: int | None = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise InputError(f"{path}: {where} is {json.dumps(value)}, expected a whole number")
    if value > LARGEST:
        raise InputError(f"{path}: {where} is {value}, expected at most {LARGEST}")
    return value


def _size(path: Path, where: str, value: Any) -> tuple[int, int]:
    """n, [height, width] or {"height": h, "width": w} -> (height, width)."""
    if isinstance(value, Mapping) and {"height", "width"} <= value.keys():
        value = [value["height"], value["width"]]
    elif isinstance(value, int):
        value = [value, value]
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{path}: {where} is {json.dumps(value)}, expected [height, width]")
    return _integer(path, where, value[0]), _integer(path, where, value[1])


def _numbers(path: Path, content: Mapping[str, Any], key: str, default: float) -> tuple[float, ...]:
    """A number or one per channel -> tuple."""
    value = content.get(key, default)
    values = value if isinstance(value, list) else [value]
    fine = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if not fine or not values:
        raise InputError(f"{path}: {key} is {json.dumps(value)}, expected a number or one per channel")
    return tuple(float(v) for v in values)


def _pair(path: Path, content: Mapping[str, Any], key: str, default: tuple[float, float]) -> tuple[float, float]:
    given = content.get(key, default)
    values = _numbers(path, {key: list(given) if isinstance(given, tuple) else given}, key, 0)
    if len(values) != 2:
        raise InputError(f"{path}: {key} has {len(values)} values, expected [low, high]")
    return values[0], values[1]


def _nonzero(path: Path, where: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if 0 in values:
        raise InputError(f"{path}: {where} must not be 0")
    return values


def _dtype(path: Path, value: Any) -> str:
    try:
        return np.dtype(value).name
    except (TypeError, ValueError):
        raise InputError(f"{path}: dtype is {value!r}", hint="float32, float16 or uint8") from None

"""The models of the coverage table: seeded random weights, the smallest member of a family, small inputs.

Every case says how it is built and which exporters write it; nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Made = tuple[Any, Arrays]  # what is exported, and two samples by input name

TORCH = ("torchscript", "dynamo")
CNN, TRANSFORMER = "epsilon_plus_flat", "attnlrp"


@dataclass(frozen=True)
class Case:
    """A model: its group in the table, how it is made, under which composite it is explained, who exports it."""

    name: str
    group: str
    make: Callable[[], Made]
    composite: str = CNN
    exporters: tuple[str, ...] = TORCH
    parity: bool = False  # zennit can be asked about it
    small: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


# ---- torchvision -----------------------------------------------------------------------------------------------------
def _seeded(make: Callable[[], Any]) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _settled(net: Any, *args: Any) -> Any:
    """Running statistics of the net's own activations, affine parameters and layer scales away from 0 and 1."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = 1.0
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.7, 1.3)
                nn.init.normal_(norm.bias, std=0.2)
        for name, parameter in net.named_parameters():
            if name.rpartition(".")[2] in ("layer_scale", "layer_scale_parameter", "lambda_1", "lambda_2", "gamma"):
                nn.init.uniform_(parameter, 0.3, 0.8)
            elif parameter.ndim > 1 and not parameter.any():  # a head that starts as 0
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        net.eval()
        for norm in norms:
            norm.train()
        net(*args)
    return net.eval()  # parameters keep their gradient: without, torch's attention takes a path that cannot be exported


def _images(*size: int, channels: int = 3, seed: int = 2) -> np.ndarray:
    draw = np.random.default_rng(seed)
    coarse = draw.normal(size=(2, channels, *(max(2, n // 8) for n in size)))
    for axis, n in enumerate(size, 2):
        coarse = np.repeat(coarse, -(-n // coarse.shape[axis]), axis).take(range(n), axis)
    return (coarse + 0.4 * draw.normal(size=coarse.shape)).astype(np.float32)


def _vision(name: str, size: int | tuple[int, ...] = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import torch

        from tests.support import nets, peers

        peers.load()
        from torchvision import models

        x = _images(*((size, size) if isinstance(size, int) else size))
        if name in nets.NETS and not options and size == nets.NETS[name].shape[-1]:
            net, calm = nets.build(name)
            return net, {"input": calm.numpy()[[0, -1]]}
        find = models.get_model
        net = _seeded(lambda: find(name, weights=None, **options))
        return _settled(net, torch.from_numpy(x)), {"input": x}

    return make


def _part(name: str, size: int, wrap: str, **options: Any) -> Callable[[], Made]:
    """A segmentation net's main output, or a detector up to its scores and boxes (before anchors and suppression)."""

    def make() -> Made:
        import torch
        from torch import nn

        from tests.support import peers

        peers.load()
        from torchvision import models

        class Segmentation(nn.Module):
            def __init__(self, net: Any) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Any) -> Any:
                return self.net(x)["out"]

        class Detector(nn.Module):
            def __init__(self, net: Any) -> None:
                super().__init__()
                self.backbone, self.head = net.backbone, net.rpn.head if hasattr(net, "rpn") else net.head

            def forward(self, x: Any) -> Any:
                features = list(self.backbone(x).values())
                found = self.head(features)
                if isinstance(found, dict):
                    return found["cls_logits"], found["bbox_regression"]
                scores, boxes = ([level.flatten(1) for level in levels] for levels in found)
                return torch.cat(scores, 1), torch.cat(boxes, 1)

        x = _images(size, size)
        net = _seeded(lambda: models.get_model(name, weights=None, weights_backbone=None, **options))
        net = {"segmentation": Segmentation, "detector": Detector}[wrap](net.eval())
        return _settled(net, torch.from_numpy(x)), {"input": x}

    return make


VISION = {  # family -> smallest member, size of its input, whether zennit's modules suffice
    "alexnet": (224, False),
    "convnext_tiny": (64, False),
    "densenet121": (64, True),
    "efficientnet_b0": (64, False),
    "efficientnet_v2_s": (64, False),
    "googlenet": (64, True),
    "inception_v3": (96, False),
    "maxvit_t": (224, False),
    "mnasnet0_5": (64, False),
    "mobilenet_v2": (64, True),
    "mobilenet_v3_small": (64, False),
    "regnet_x_400mf": (64, False),
    "regnet_y_400mf": (64, False),
    "resnet18": (64, True),
    "resnet50": (64, True),
    "resnext50_32x4d": (64, False),
    "shufflenet_v2_x0_5": (64, False),
    "squeezenet1_1": (64, True),
    "swin_t": (224, False),
    "swin_v2_t": (256, False),
    "vgg11": (224, False),
    "vit_b_32": (64, False),
    "wide_resnet50_2": (64, False),
}
NAMED = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": True},
    "vit_b_32": {"image_size": 64},
}
ATTENTION = ("swin", "vit", "maxvit", "mvit")


def _classifiers() -> list[Case]:
    cases = []
    for name, (size, parity) in VISION.items():
        options = {} if parity else NAMED.get(name, {})
        composite = TRANSFORMER if name.startswith(ATTENTION) else CNN
        if name == "maxvit_t":  # epsilon alone amplifies through this many convolutions
            composite = f"{TRANSFORMER}(gamma=0.25)"
        cases.append(
            Case(
                name,
                "torchvision",
                _vision(name, size, **options),
                composite,
                parity=parity,
                small=name == "squeezenet1_1",
            )
        )
    for name, size in (
        ("r3d_18", (8, 32, 32)),
        ("mc3_18", (8, 32, 32)),
        ("r2plus1d_18", (8, 32, 32)),
    ):
        cases.append(Case(name, "torchvision video", _vision(name, size)))
    cases.append(Case("swin3d_t", "torchvision video", _vision("swin3d_t", (8, 64, 64)), TRANSFORMER))
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"):
        cases.append(Case(name, "torchvision segmentation", _part(name, 64, "segmentation", num_classes=4)))
    for name, size in (
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 64),
        ("retinanet_resnet50_fpn", 64),
        ("fcos_resnet50_fpn", 64),
        ("ssd300_vgg16", 300),
        ("ssdlite320_mobilenet_v3_large", 96),
    ):
        cases.append(Case(name, "torchvision detection", _part(name, size, "detector", num_classes=4)))
    return cases


# ---- Hugging Face: tiny configurations -------------------------------------------------------------------------------
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**TINY, "vocab_size": 60, "max_position_embeddings": 24, "num_labels": 3}
PICTURE = {**TINY, "image_size": 32, "patch_size": 8, "num_labels": 4}
STAGES = {"num_channels": 3, "num_labels": 4, "image_size": 64}
SOUND = {
    **TINY,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (5, 3, 3),
    "conv_stride": (4, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
}
DECODER = {
    **TEXT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

HUGGING = {  # row -> class, configuration, what it reads
    "bert": ("BertForSequenceClassification", TEXT, "masked"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 60,
            "max_position_embeddings": 24,
            "num_labels": 3,
        },
        "masked",
    ),
    "roberta": ("RobertaForSequenceClassification", TEXT, "masked"),
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}, "masked"),
    "electra": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}, "masked"),
    "mpnet": ("MPNetForSequenceClassification", TEXT, "masked"),
    "camembert": ("CamembertForTokenClassification", TEXT, "masked"),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 24, "use_cache": False},
        "masked",
    ),
    "opt": (
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "use_cache": False, "pad_token_id": 1},
        "masked",
    ),
    "llama": ("LlamaForCausalLM", DECODER, "masked"),
    "mistral": ("MistralForCausalLM", DECODER, "masked"),
    "qwen2": ("Qwen2ForCausalLM", DECODER, "masked"),
    "gemma": ("GemmaForCausalLM", DECODER, "masked"),
    "t5 encoder": (
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60},
        "tokens",
    ),
    "vit": ("ViTForImageClassification", PICTURE, "picture"),
    "deit": ("DeiTForImageClassification", PICTURE, "picture"),
    "beit": ("BeitForImageClassification", PICTURE, "picture"),
    "dinov2": ("Dinov2ForImageClassification", {**PICTURE, "mlp_ratio": 2}, "picture"),
    "clip vision": ("CLIPVisionModel", {**PICTURE, "projection_dim": 16}, "picture"),
    "swin": (
        "SwinForImageClassification",
        {**STAGES, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
        "picture64",
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {**STAGES, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
        "picture64",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {**STAGES, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        "picture64",
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {**STAGES, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        "picture64",
    ),
    "resnet": (
        "ResNetForImageClassification",
        {
            "num_labels": 4,
            "embedding_size": 16,
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
        },
        "picture64",
    ),
    "regnet": (
        "RegNetForImageClassification",
        {
            "num_labels": 4,
            "embedding_size": 16,
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "groups_width": 8,
        },
        "picture64",
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            "num_labels": 4,
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 40],
            "num_attention_heads": 4,
        },
        "picture64",
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        {"num_labels": 4, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
        "picture64",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "num_labels": 4,
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 24,
        },
        "picture64",
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", SOUND, "sound"),
    "hubert": ("HubertForSequenceClassification", SOUND, "sound"),
    "whisper encoder": (
        "WhisperForAudioClassification",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "num_labels": 3,
            "classifier_proj_size": 16,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "vocab_size": 60,
        },
        "mel",
    ),
}
CONVOLUTIONAL = ("convnext", "convnextv2", "resnet", "regnet", "poolformer")


def _hugging(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from tests.support import peers

        peers.load()  # transformers imports torchvision
        import torch
        import transformers
        from torch import nn

        transformers.logging.set_verbosity_error()
        kind, config, reads = HUGGING[name]
        architecture = getattr(transformers, kind)
        built = _seeded(lambda: architecture(architecture.config_class(**config, attn_implementation="eager")))
        draw = np.random.default_rng(3)
        ids = draw.integers(3, 60, (2, 9)).astype(np.int64)
        mask = np.ones_like(ids)
        mask[1, 7:] = 0
        feeds: Arrays = {
            "masked": {"input_ids": ids, "attention_mask": mask},
            "tokens": {"input_ids": ids},
            "picture": {"pixel_values": _images(32, 32)},
            "picture64": {"pixel_values": _images(64, 64)},
            "sound": {"input_values": draw.normal(size=(2, 400)).astype(np.float32)},
            "mel": {"input_features": draw.normal(size=(2, 16, 64)).astype(np.float32)},
        }[reads]

        class Wrapped(nn.Module):
            """One output: the logits, or else the last hidden state."""

            def __init__(self) -> None:
                super().__init__()
                self.net = built

            def forward(self, *values: Any) -> Any:
                found = self.net(**dict(zip(feeds, values, strict=True)))
                return found.logits if hasattr(found, "logits") else found.last_hidden_state

        return _settled(Wrapped(), *(torch.from_numpy(v) for v in feeds.values())), feeds

    return make


def _huggings() -> list[Case]:
    return [
        Case(
            f"hf {name}",
            "Hugging Face",
            _hugging(name),
            CNN if name in CONVOLUTIONAL else TRANSFORMER,
        )
        for name in HUGGING
    ]


# ---- own small nets: what no zoo has in few lines --------------------------------------------------------------------
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
            "unet (ConvTranspose)": (lambda: UNet("transpose"), {"input": _images(32, 32)}),
            "unet (nearest)": (lambda: UNet("nearest"), {"input": _images(32, 32)}),
            "unet (bilinear)": (lambda: UNet("bilinear"), {"input": _images(32, 32)}),
            "ECG LSTM": (lambda: Recurrent(nn.LSTM), {"input": signal}),
            "ECG GRU": (lambda: Recurrent(nn.GRU), {"input": signal}),
            "ECG RNN": (lambda: Recurrent(nn.RNN), {"input": signal}),
            "text LSTM (bidirectional)": (lambda: Recurrent(nn.LSTM, 30), {"ids": ids}),
        }
        build, feeds = makers[name]
        return _settled(_seeded(build), *(torch.from_numpy(v) for v in feeds.values())), feeds

    return make


def _owns() -> list[Case]:
    names = {
        "unet (ConvTranspose)": True,
        "unet (nearest)": False,
        "unet (bilinear)": False,
        "ECG LSTM": False,
        "ECG GRU": False,
        "ECG RNN": False,
        "text LSTM (bidirectional)": False,
    }
    own = [Case(name, "own", _own(name), CNN, small=small) for name, small in names.items()]
    like = {"vit-like": "vit", "bert-like": "bert", "gpt-like": "gpt", "gpt-like, rows merged": "gpt_merged"}
    for name, net in like.items():
        own.append(Case(name, "own", _like(net), TRANSFORMER, small=net in ("bert", "gpt")))
    return own


def _like(name: str) -> Callable[[], Made]:
    """One of the transformers that the tests hold against dense formulas."""

    def make() -> Made:
        from tests.support import transformers

        net = transformers.build(name)
        return net, {key: value.numpy() for key, value in net.example(2).items()}

    return make


# ---- scikit-learn ----------------------------------------------------------------------------------------------------
SCIKIT = (
    "LinearRegression",
    "Ridge",
    "LogisticRegression",
    "LogisticRegression (two classes)",
    "LinearSVC",
    "MLPClassifier",
    "MLPRegressor",
    "StandardScaler + LogisticRegression",
    "StandardScaler + PCA + SVC (linear)",
    "MinMaxScaler + MLPClassifier",
    "Normalizer + LogisticRegression",
    "PCA + SVC (rbf)",
    "SVC (linear)",
    "SVC (poly)",
    "SVC (sigmoid)",
    "SVC (rbf)",
    "SVR (rbf)",
)


def _scikit(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from sklearn.datasets import make_classification
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
        from sklearn.svm import SVC, SVR, LinearSVC

        classes = 2 if "two" in name else 3
        x, y = make_classification(120, 8, n_informative=5, n_classes=classes, random_state=0)
        steps: dict[str, Callable[[], Any]] = {
            "LinearRegression": LinearRegression,
            "Ridge": Ridge,
            "LogisticRegression": LogisticRegression,
            "LogisticRegression (two classes)": LogisticRegression,
            "LinearSVC": LinearSVC,
            "MLPClassifier": lambda: MLPClassifier((12, 8), random_state=0, max_iter=60),
            "MLPRegressor": lambda: MLPRegressor(hidden_layer_sizes=(12, 8), random_state=0, max_iter=60),
            "StandardScaler": StandardScaler,
            "MinMaxScaler": MinMaxScaler,
            "Normalizer": Normalizer,
            "PCA": lambda: PCA(4),
            **{f"SVC ({k})": (lambda k=k: SVC(kernel=k)) for k in ("linear", "poly", "sigmoid", "rbf")},
            "SVR (rbf)": SVR,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")  # that 60 rounds are few
            parts = [steps[step]() for step in name.split(" + ")]
            model = (make_pipeline(*parts) if len(parts) > 1 else parts[0]).fit(x, y)
        return model, {"X": x[[0, 60]].astype(np.float32)}

    return make


def _scikits() -> list[Case]:
    return [Case(name, "scikit-learn", _scikit(name), "epsilon", ("skl2onnx",)) for name in SCIKIT]


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    return [*_classifiers(), *_huggings(), *_owns(), *_scikits()]


# ---- exporters -------------------------------------------------------------------------------------------------------
def export(model: Any, feeds: Arrays, exporter: str, folder: Path) -> Path:
    """Write a model as its exporter does by default, the batch symbolic where it can be."""
    path = folder / "model.onnx"
    if exporter == "skl2onnx":
        from skl2onnx import to_onnx

        x = next(iter(feeds.values()))
        try:
            proto = to_onnx(model, x, options={"zipmap": False})
        except NameError:  # regressors and LinearSVC know no such option
            proto = to_onnx(model, x, options={})
        path.write_bytes(proto.SerializeToString())
        return path
    import torch

    args = tuple(torch.from_numpy(value) for value in feeds.values())
    names = {"input_names": list(feeds), "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # exporters warn about themselves and about parts of torch that they use
        if exporter == "torchscript":
            axes = {name: {0: "batch"} for name in (*feeds, "logits")}
            torch.onnx.export(model, args, str(path), dynamo=False, dynamic_axes=axes, **names)
        else:
            shape = tuple({0: torch.export.Dim("batch")} for _ in args)
            first = model.forward.__code__.co_flags & 4  # *values: the shapes of its one variadic argument
            torch.onnx.export(
                model, args, str(path), dynamo=True, dynamic_shapes=(shape,) if first else shape, verbose=False, **names
            )
    return path

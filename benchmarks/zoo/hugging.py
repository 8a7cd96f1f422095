"""Hugging Face: tiny configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.case import CNN, TRANSFORMER, Arrays, Case, Made, images, seeded, settled

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
AMPLIFYING = ("albert", "mobilevit", "swinv2")  # where epsilon alone makes hundreds of the output
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
        built = seeded(lambda: architecture(architecture.config_class(**config, attn_implementation="eager")))
        draw = np.random.default_rng(3)
        ids = draw.integers(3, 60, (2, 9)).astype(np.int64)
        mask = np.ones_like(ids)
        mask[1, 7:] = 0
        feeds: Arrays = {
            "masked": {"input_ids": ids, "attention_mask": mask},
            "tokens": {"input_ids": ids},
            "picture": {"pixel_values": images(32, 32)},
            "picture64": {"pixel_values": images(64, 64)},
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

        return settled(Wrapped(), *(torch.from_numpy(v) for v in feeds.values())), feeds

    return make


def rows() -> list[Case]:
    """Every row of Hugging Face."""
    return [
        Case(
            f"hf {name}",
            "Hugging Face",
            _hugging(name),
            CNN if name in CONVOLUTIONAL else f"{TRANSFORMER}(gamma=0.25)" if name in AMPLIFYING else TRANSFORMER,
            oracle="functions",
            needs="transformers",
        )
        for name in HUGGING
    ]

"""How a message travels back through each ONNX op; files by family, functions named as the op."""

from onnxcrp.ops import (
    activations,
    arithmetic,
    attention,
    indexing,
    kernels,
    linear,
    normalization,
    pooling,
    rearrange,
    sampling,
)
from onnxcrp.ops.registry import (
    BUILT_IN,
    CARRIES_NONE,
    FAMILIES,
    KEEPS,
    NONNEGATIVE,
    OPS,
    Node,
    Op,
    Parts,
    activation,
    carries_none,
    supported,
    transpose,
)

BUILT_IN.update(OPS, CARRIES_NONE)

__all__ = [
    "CARRIES_NONE",
    "FAMILIES",
    "KEEPS",
    "NONNEGATIVE",
    "OPS",
    "Node",
    "Op",
    "Parts",
    "activation",
    "activations",
    "arithmetic",
    "attention",
    "carries_none",
    "indexing",
    "kernels",
    "linear",
    "normalization",
    "pooling",
    "rearrange",
    "sampling",
    "supported",
    "transpose",
]

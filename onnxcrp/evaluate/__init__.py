"""Evaluate an ONNX graph in float64: every operator the project writes, in numpy (or torch's kernels, where installed).

Nothing else does: onnxruntime's CPU provider has no float64 Conv, ConvTranspose or Erf, and onnx's ReferenceEvaluator
fails on grouped ConvTranspose and takes minutes for a VGG. A kernel is the operator's definition and no more; what has
none falls through to onnx.reference if that computes in the same precision, and is named in an UnsupportedError if not.
"""

from onnxcrp.evaluate import (
    constants,
    convolution,
    dense,
    elementwise,
    gather,
    quantization,
    rearrange,
    reductions,
    torch_kernels,
)
from onnxcrp.evaluate.rearrange import resize_matrix
from onnxcrp.evaluate.registry import FLOATS, KERNELS, TORCH_KERNELS, Attributes, Kernel, kernel, torch_kernel
from onnxcrp.evaluate.run import RANDOM, attributes, evaluate, evaluate_node

__all__ = [
    "FLOATS",
    "KERNELS",
    "RANDOM",
    "TORCH_KERNELS",
    "Attributes",
    "Kernel",
    "attributes",
    "constants",
    "convolution",
    "dense",
    "elementwise",
    "evaluate",
    "evaluate_node",
    "gather",
    "kernel",
    "quantization",
    "rearrange",
    "reductions",
    "resize_matrix",
    "torch_kernel",
    "torch_kernels",
]

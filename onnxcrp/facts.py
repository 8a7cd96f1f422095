"""Static facts of a canonical graph: where data flows, what is provably >= 0, depth, whether axis 0 is the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.samples import BATCHES, FIRST, Layout, Shapes, places, two_batches
from onnxcrp.errors import CompositeError, QuestionError, UnsupportedError
from onnxcrp.ops import CARRIES_NONE, KEEPS, NONNEGATIVE, OPS
from onnxcrp.ops.rearrange import leaves_batch
from onnxcrp.ops.registry import about

if TYPE_CHECKING:
    from onnxcrp.canonize import Canonical
    from onnxcrp.names import Names

LINEAR_FAMILIES = ("convolution", "dense")

# What a model may do to its input before the first layer without ceasing to be an affine map of pixels.
_PREPROCESSING = frozenset(
    "Add Sub Mul Div Neg Cast Identity Transpose Reshape Flatten Squeeze Unsqueeze Slice Gather Concat Split".split()  # noqa: SIM905
) | {"QuantizeLinear", "DequantizeLinear", "BatchNormalization"}


# Ops of which only the first input is content; the others are shapes, positions and bounds.
_CONTENT = frozenset(
    """Reshape Expand Slice Resize Tile Clip Unsqueeze Squeeze Pad Mod CastLike CumSum TopK Trilu Compress MaxUnpool
    ReverseSequence GatherElements GatherND GridSample DFT""".split()  # noqa: SIM905
)
_FIRST_ONLY = frozenset(["TopK", "MaxPool", "Dropout", "DynamicQuantizeLinear"])  # the others are positions, scales
_ALONG_AN_AXIS = frozenset(
    """Concat Split Gather Softmax LogSoftmax TopK GatherElements ScatterElements Compress LpNormalization""".split()  # noqa: SIM905
)
_SYMBOLS = frozenset(np.dtype(kind) for kind in (np.int64, np.int32, np.bool_))
_SAME_IDS = frozenset(["Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"])


def _is_lookup(node: gs.Node) -> bool:
    """Whether a node picks rows of a constant table by index."""
    return node.op == "Gather" and isinstance(node.inputs[0], gs.Constant)


def rectifies(node: gs.Node) -> bool:
    """Whether a node puts out 0 just where its input is <= 0, else something larger: Relu, ReLU6 (Clip from 0 up)."""
    if node.domain or node.op != "Clip" or len(node.inputs) < 2:
        return node.op == "Relu" and not node.domain
    low, high = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    from_zero = isinstance(low, gs.Constant) and low.values.size == 1 and float(low.values.reshape(())) == 0
    upwards = high is None or high.is_empty() or (isinstance(high, gs.Constant) and bool((high.values > 0).all()))
    return from_zero and upwards


def dims(tensor: gs.Tensor) -> list[Any]:
    """Dimensions of a tensor, ints where static; errors: UnsupportedError where not even the rank is known."""
    if tensor.shape is None:
        raise UnsupportedError(
            f"the rank of tensor {tensor.name} is not known",
            hint="run onnx.shape_inference on the model, or export it with static shapes",
        )
    return list(tensor.shape)


class Facts:
    """What can be known of a canonical model before it runs.

    `output` names the model output to be explained (the first floating-point one if None), `inputs` those whose
    relevance is asked for (None: all that relevance can reach). The seed starts before a terminal Softmax or Sigmoid
    unless `keep_head`.
    """

    def __init__(
        self,
        canonical: Canonical,
        *,
        output: str | None = None,
        inputs: Iterable[str] | None = None,
        keep_head: bool = False,
    ) -> None:
        from onnxcrp.canonize.head import find_head

        self.canonical = canonical
        self.graph = canonical.graph
        self.nodes: list[gs.Node] = list(self.graph.nodes)
        self.output = self._choose_output(output)
        self.head: list[gs.Node] = []
        self.explained = self.output
        if not keep_head:
            self.explained, self.head = find_head(self.graph, self.output)
        self.tensors: dict[str, gs.Tensor] = {}
        self.producer: dict[str, gs.Node] = {}
        self.readers: dict[str, list[gs.Node]] = {}
        for node in self.nodes:
            for tensor in node.outputs:
                self.tensors[tensor.name] = tensor
                self.producer[tensor.name] = node
            for tensor in node.inputs:
                self.tensors.setdefault(tensor.name, tensor)
                self.readers.setdefault(tensor.name, []).append(node)
        for tensor in self.graph.inputs:
            self.tensors[tensor.name] = tensor
        self.order = {node.name: i for i, node in enumerate(self.nodes)}
        inputs = None if inputs is None else list(inputs)
        self.data = self._data_paths(inputs)
        self.inputs = self._reachable_inputs(inputs)

    # ---- where data flows --------------------------------------------------------------------------------------
    def _choose_output(self, name: str | None) -> str:
        outputs = [tensor.name for tensor in self.graph.outputs]
        if name is None:  # classifiers of ai.onnx.ml put the label before the scores
            floats = [t.name for t in self.graph.outputs if t.dtype is not None and np.dtype(t.dtype).kind == "f"]
            return (floats or outputs)[0]
        if name not in outputs:
            raise QuestionError(f"the model has no output {name!r}", hint=f"its outputs: {', '.join(outputs)}")
        return name

    def carries(self, node: gs.Node) -> list[int]:
        """Positions of the inputs of a node that carry relevance."""
        if node.op in CARRIES_NONE:
            return []
        found = [i for i, tensor in enumerate(node.inputs) if tensor.name in self.data]
        if node.op in _CONTENT:
            found = [i for i in found if i == 0]
        elif node.op in ("ScatterElements", "ScatterND"):
            found = [i for i in found if i != 1]
        elif node.op == "Gather":
            found = [i for i in found if i == isinstance(node.inputs[0], gs.Constant)]  # token ids, or what is picked
        elif node.op == "Where":
            found = [i for i in found if i > 0]
        return found

    def _data_paths(self, asked: Iterable[str] | None) -> set[str]:
        """Tensors that depend on an input whose relevance is asked for.

        Integers carry relevance as token ids, into an embedding; attention masks and positions carry none. Where a
        model has nothing else, its integers are real values (pixels).
        """
        kinds = {tensor.name: tensor.dtype for tensor in self.graph.inputs}
        asked = list(asked or kinds)
        for name in asked:
            if name not in kinds:
                raise QuestionError(f"the model has no input {name!r}", hint=f"its inputs: {', '.join(kinds)}")
        symbols = {name for name in asked if kinds[name] is not None and np.dtype(kinds[name]) in _SYMBOLS}
        looked_up = self._token_ids(symbols)
        values = set(asked) - symbols
        self.data = values | looked_up or symbols
        for node in self.nodes:
            if any(t.name in looked_up for t in node.outputs):
                continue
            if any(t.name in looked_up for t in node.inputs) and not _is_lookup(node):
                continue  # positions and masks made from token ids
            if self.carries(node):
                values = node.outputs[:1] if node.op in _FIRST_ONLY else node.outputs
                self.data.update(tensor.name for tensor in values)
        return self.data

    def _token_ids(self, symbols: set[str]) -> set[str]:
        """Which of the integer inputs `symbols` are looked up in an embedding, and the tensors on the way there."""
        known = set(symbols)
        for node in self.nodes:
            if node.op in _SAME_IDS and node.inputs[0].name in known:
                known.update(t.name for t in node.outputs)
        live = {node.inputs[1].name for node in self.nodes if _is_lookup(node) and node.inputs[1].name in known}
        for node in reversed(self.nodes):
            if node.op in _SAME_IDS and node.inputs[0].name in known and any(t.name in live for t in node.outputs):
                live.add(node.inputs[0].name)
        return live

    def _reachable_inputs(self, asked: Iterable[str] | None) -> list[str]:
        reached = self.between([self.explained], None)
        names = [t.name for t in self.graph.inputs if t.name in reached]
        if self.explained not in self.data or not names:
            raise UnsupportedError(
                f"no input is connected to {self.explained} by operators that carry relevance",
                hint="choose another output" if len(self.graph.outputs) > 1 else "is the output a constant?",
            )
        if asked is None:
            return names
        for name in asked:
            if name not in names:
                raise QuestionError(f"relevance cannot reach input {name!r}", hint=f"it reaches {', '.join(names)}")
        return [name for name in names if name in set(asked)]

    def between(self, tops: Iterable[str], bottoms: Iterable[str] | None) -> set[str]:
        """Names of the data tensors on paths from `bottoms` (None: any input) up to `tops`, both ends included."""
        above: set[str] = set()
        stack = [name for name in tops if name in self.data]
        while stack:
            name = stack.pop()
            if name in above:
                continue
            above.add(name)
            node = self.producer.get(name)
            if node is not None:
                stack.extend(node.inputs[i].name for i in self.carries(node))
        if bottoms is None:
            return above
        below = {name for name in bottoms if name in above}
        for node in self.nodes:
            if any(node.inputs[i].name in below for i in self.carries(node)):
                below.update(t.name for t in node.outputs if t.name in above)
        return below

    def only_relu(self, name: str) -> bool:
        """Whether ReLU (or ReLU6) alone reads a tensor, so that nothing of it counts below zero."""
        readers = self.readers.get(name, [])
        return bool(readers) and all(map(rectifies, readers))

    # ---- sign, depth -------------------------------------------------------------------------------------------
    @cached_property
    def nonnegative(self) -> set[str]:
        """Tensors without an element below zero, whatever the input."""
        known: set[str] = set()
        for node in self.nodes:
            sign = about(node.op).sign
            if sign is None:
                continue
            if sign == NONNEGATIVE:
                holds = True
            elif sign == KEEPS:
                holds = all(self._operand_nonnegative(tensor, known) for tensor in node.inputs)
            else:
                holds = sign(node, known)
            if holds:
                known.update(tensor.name for tensor in node.outputs)
        return known

    def _operand_nonnegative(self, tensor: gs.Tensor, known: set[str]) -> bool:
        if tensor.is_empty() or tensor.name in known:
            return True
        if isinstance(tensor, gs.Constant):
            # integers are shapes, axes, zero points: they do not enter the value
            return tensor.values.dtype.kind != "f" or bool((tensor.values >= 0).all())
        return tensor.dtype is not None and np.dtype(tensor.dtype) == np.int64 and tensor.name not in self.data

    @cached_property
    def depth(self) -> dict[str, int]:
        """Node name -> number of layers with weights on the longest path from an input to it, itself included."""
        tensors = {tensor.name: 0 for tensor in self.graph.inputs}
        found: dict[str, int] = {}
        for node in self.nodes:
            here = max((tensors.get(tensor.name, 0) for tensor in node.inputs), default=0)
            if node.op in OPS and OPS[node.op].family_of(node) in LINEAR_FAMILIES and self.carries(node):
                here += 1
            found[node.name] = here
            tensors.update((tensor.name, here) for tensor in node.outputs)
        return found

    def gates(self, node: gs.Node) -> set[int]:
        """Positions of the data inputs that come out of Sigmoid, HardSigmoid or Softmax, rearranged at most."""
        return {i for i in self.carries(node) if self._is_gate(node.inputs[i].name)}

    def _is_gate(self, name: str) -> bool:
        node = self.producer.get(name)
        while node is not None and node.op in OPS and self.family(node) == "rearrangement":
            data = self.carries(node)
            node = self.producer.get(node.inputs[data[0]].name) if len(data) == 1 else None
        return node is not None and node.op in ("Sigmoid", "HardSigmoid", "Softmax")

    def is_attention(self, node: gs.Node) -> bool:
        """Whether a node's output is what attention multiplies or what comes of it, rearranged, scaled, masked."""
        before: gs.Node | None = node
        while before is not None and self._mixes_nothing(before):
            data = self.carries(before)
            before = self.producer.get(before.inputs[data[0]].name) if data else None
        after: gs.Node | None = node
        while after is not None and (after is node or self._mixes_nothing(after)):
            readers = self.readers.get(after.outputs[0].name, [])
            after = readers[0] if readers else None
        return any(end is not None and end.op in OPS and self.family(end) == "matmul" for end in (before, after))

    def _mixes_nothing(self, node: gs.Node) -> bool:
        return node.op in OPS and (self.family(node) in ("rearrangement", "scale", "softmax") or self.is_mask(node))

    def is_mask(self, node: gs.Node) -> bool:
        """Whether a node adds an attention mask, which is no data path, to the scores of a softmax."""
        if node.op not in ("Add", "Sum") or len(self.carries(node)) != 1:
            return False
        reader: gs.Node | None = node
        while reader is not None:
            readers = self.readers.get(reader.outputs[0].name, [])
            reader = readers[0] if len(readers) == 1 else None
            if reader is not None and reader.op == "Softmax":
                return True
            if reader is None or reader.op not in ("Add", "Reshape", "Cast", "Transpose", "Where", "Max"):
                return False
        return False

    def family(self, node: gs.Node) -> str:
        """Op family of a node; `other` for operators that nobody registered."""
        return about(node.op).family_of(node, len(self.carries(node)))

    # ---- the batch axis ----------------------------------------------------------------------------------------
    @cached_property
    def batch_breaks(self) -> list[str]:
        """Where axis 0 is not the batch, and why; empty where it is throughout: conditions share a forward pass."""
        return [f"{node.name} ({node.op}): {reason}" for node in self.nodes if (reason := self._breaks_batch(node))]

    @property
    def shares_forward(self) -> bool:
        """Whether N conditions on one sample need one forward pass at batch 1."""
        return not self.batch_breaks

    @cached_property
    def places(self) -> dict[str, Layout]:
        """Where samples are in the tensors that do not have them on axis 0 alone."""
        if not self.batch_breaks or self.canonical.batch == "fixed":
            return {}
        known = places(self.graph, self._two_batches)
        return {name: layout for name, layout in known.items() if layout.place != FIRST and name in self.data}

    @cached_property
    def unplaced(self) -> set[str]:
        """Tensors of which it is not known where samples are; all others are in `places` or have them on axis 0."""
        if not self.batch_breaks or self.canonical.batch == "fixed":
            return set()
        return {name for name in self.data - self.places.keys() if not self._counts_samples(name)}

    def _counts_samples(self, name: str) -> bool:
        """Whether axis 0 of a tensor has the size of the batch, for two sizes of it, as far as onnx can tell."""
        return all((known.get(name) or [0])[0] == size for known, size in zip(self._two_batches, BATCHES, strict=True))

    @cached_property
    def _two_batches(self) -> tuple[Shapes, Shapes]:
        return two_batches(self.graph)

    def seen(self, name: str) -> list[Any]:
        """Dimensions of a tensor as a mask, record or seed has them: [N, ...], samples first."""
        return [None, *self.places[name].rest] if name in self.places else dims(self.tensors[name])

    def seen_axis(self, name: str, axis: int) -> int:
        """An axis of a tensor, counted as in `seen`."""
        if name not in self.places:
            return axis
        layout = self.places[name]
        return 0 if axis == layout.place.axis else layout.axes[axis][0]

    def _breaks_batch(self, node: gs.Node) -> str | None:
        data = self.carries(node)
        if not data:
            return None
        source, result = node.inputs[data[0]], node.outputs[0]
        if _is_lookup(node):
            return None  # the axis is the table's
        rank = len(dims(source))
        if rank == 0:
            return None
        if node.op == "Transpose":
            perm = node.attrs.get("perm") or list(range(rank))[::-1]
            return None if perm[0] == 0 else "moves axis 0"
        if node.op == "Flatten":
            return None if node.attrs.get("axis", 1) % (rank + 1) == 1 else "merges axis 0"
        if node.op == "Reshape":
            return self._reshape_breaks(node, source, result)
        if node.op in ("Squeeze", "Unsqueeze"):
            axes = node.inputs[1] if len(node.inputs) > 1 else None
            if isinstance(axes, gs.Constant):
                out = rank + (len(axes.values) if node.op == "Unsqueeze" else 0)
                return "changes axis 0" if 0 in [int(a) % out for a in axes.values] else None
            return "drops axes it does not name" if node.op == "Squeeze" else None
        if node.op in ("GatherND", "ScatterND"):
            return None if node.attrs.get("batch_dims", 0) else "picks samples by index"
        if node.op == "ReverseSequence":
            return "has time on axis 0" if node.attrs.get("time_axis", 0) == 0 else None
        if node.op == "CumSum":
            axis = node.inputs[1]
            return (
                None if isinstance(axis, gs.Constant) and int(axis.values.reshape(())) % rank else "works along axis 0"
            )
        if node.op in _ALONG_AN_AXIS:
            default = {"Softmax": -1, "LogSoftmax": -1, "TopK": -1, "LpNormalization": -1}.get(node.op, 0)
            return "works along axis 0" if int(node.attrs.get("axis", default)) % rank == 0 else None
        if node.op.startswith("Reduce"):
            axes = node.inputs[1] if len(node.inputs) > 1 else None
            if isinstance(axes, gs.Constant) and axes.values.size:
                return "reduces axis 0" if 0 in [int(a) % rank for a in axes.values] else None
            return None if node.attrs.get("noop_with_empty_axes") else "reduces axis 0"
        if node.op == "Slice":
            return None if leaves_batch(node, rank) else "cuts axis 0"
        return None

    def _reshape_breaks(self, node: gs.Node, source: gs.Tensor, result: gs.Tensor) -> str | None:
        before, after = dims(source), dims(result)
        shape = node.inputs[1]
        if isinstance(shape, gs.Constant) and int(shape.values.reshape(-1)[0]) == 0 and not node.attrs.get("allowzero"):
            return None
        if after and before and isinstance(before[0], str) and before[0] == after[0]:
            return None
        rest = [before[1:], after[1:]]
        if all(isinstance(d, int) for side in rest for d in side):
            return None if np.prod(rest[0]) == np.prod(rest[1]) else "merges axis 0 with others"
        if self.canonical.batch != "fixed" and all(map(self._counts_samples, (source.name, result.name))):
            return None
        if isinstance(shape, gs.Constant) and int(shape.values.reshape(-1)[0]) == -1:
            return "may merge axis 0 with others"
        return None if after and after[0] == before[0] else "may merge axis 0 with others"

    # ---- preprocessing inside the graph ------------------------------------------------------------------------
    @cached_property
    def _affine(self) -> set[str]:
        """Tensors that are the model's input up to an affine map per channel and a rearrangement."""
        known = {tensor.name for tensor in self.graph.inputs}
        for node in self.nodes:
            data = self.carries(node)
            if node.op not in _PREPROCESSING or not data or _is_lookup(node):
                continue
            if node.op == "Div" and data != [0]:
                continue
            constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
            if all(node.inputs[i].name in known for i in data) and (
                node.op not in ("Add", "Sub", "Mul", "Div")
                or (len(constants) == 1 and _per_channel(constants[0].values))
            ):
                known.update(tensor.name for tensor in node.outputs)
        return known

    def is_preprocessing(self, node: gs.Node) -> bool:
        """Whether a node belongs to the affine preprocessing at the model's input: relevance passes it unchanged."""
        return (
            node.op in ("Add", "Sub", "Mul", "Div")
            and all(t.name in self._affine for t in node.outputs)
            and len(self.carries(node)) == 1
        )

    def bounds(self, node: gs.Node) -> Callable[[Any], np.ndarray]:
        """A function that carries a value at the model's input (a scalar, or one per channel) to the input of `node`.

        Errors: CompositeError where something else than affine preprocessing lies between.
        """
        tensor = node.inputs[0]
        if tensor.name not in self._affine:
            raise CompositeError(
                f"rule zbox is for layers that read the model's input, {node.name} reads {tensor.name}",
                hint="restrict it with `first = 1`",
            )

        def carry(value: Any) -> Any:
            from onnxcrp.evaluate import evaluate_node

            needed = self.between([tensor.name], None)
            arrays = {t.name: _field(t, value) for t in self.graph.inputs if t.name in needed}
            for step in self.nodes:
                if any(t.name in needed for t in step.outputs) and step.outputs[0].name not in arrays:
                    operands = [
                        None if t.is_empty() else t.values if isinstance(t, gs.Constant) else arrays[t.name]
                        for t in step.inputs
                    ]
                    for t, array in zip(step.outputs, evaluate_node(step.op, dict(step.attrs), operands), strict=False):
                        arrays[t.name] = np.asarray(array, np.float64)
            return _shrunk(arrays[tensor.name])

        return carry

    # ---- names -------------------------------------------------------------------------------------------------
    @cached_property
    def names(self) -> Names:
        """Layer names of the nodes through which relevance goes."""
        from onnxcrp.names import Names

        carrying = [node for node in self.nodes if self.carries(node)]
        return Names(carrying, weights=self.canonical.weights, scopes=self.canonical.scopes)

    def unsupported(self, tensors: set[str]) -> list[gs.Node]:
        """Nodes that produce one of `tensors` and through which no message can be sent."""
        return [
            node
            for node in self.nodes
            if any(t.name in tensors for t in node.outputs)
            and self.carries(node)
            and (node.op not in OPS or self.obstacle(node) is not None)
        ]

    def obstacle(self, node: gs.Node) -> str | None:
        """Why no message can be sent through a node whose operator has a transpose."""
        about = OPS.get(node.op)
        if about is None:
            return None
        if about.weighted and not isinstance(node.inputs[1], gs.Constant):
            return "its weights are computed while running"
        if node.op.startswith("Reduce") and self._breaks_batch(node) == "reduces axis 0":
            batches = {dims(t)[0] for t in self.graph.inputs if t.shape and not isinstance(t.shape[0], int)} - {None}
            if dims(node.inputs[0])[0] in batches:
                return "it joins the samples of a batch"
        return None


def _per_channel(array: np.ndarray) -> bool:
    return sum(size > 1 for size in array.shape) <= 1


def _field(tensor: gs.Tensor, value: Any) -> np.ndarray:
    """`value` as an image of one pixel in the model's own layout (a full one where the shape is static)."""
    shape = [1, *[d if isinstance(d, int) else 1 for d in dims(tensor)[1:]]]
    value = np.asarray(value, np.float64)
    if value.ndim == 0:
        return np.full(shape, float(value))
    axis = next((i for i in (1, len(shape) - 1) if shape[i] == value.size), None)
    if axis is None:
        raise CompositeError(
            f"{value.size} bounds do not fit input {tensor.name} of shape {list(tensor.shape)}",
            hint="give one number, or one per channel",
        )
    line = [1] * len(shape)
    line[axis] = value.size
    return np.broadcast_to(value.reshape(line), shape).copy()


def _shrunk(array: np.ndarray) -> np.ndarray:
    """Axes along which nothing changes, cut to 1."""
    for axis in range(array.ndim):
        head = array.take([0], axis=axis)
        if np.array_equal(np.broadcast_to(head, array.shape), array):
            array = head
    return array

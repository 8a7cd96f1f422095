"""The walk: canonical model + composite -> relevance model.

Relevance starts at the explained output and goes back node by node in reverse order. The walk does once what every
op would otherwise repeat: it sums what arrives at a tensor, records and masks it, sums broadcast axes back (never the
batch axis), and names every node it writes after the forward node and the rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from onnxcrp.biases import into_biases
from onnxcrp.canonize.edit import collector_paused
from onnxcrp.composite import Composite, load
from onnxcrp.errors import CompositeError, QuestionError, UnsupportedError
from onnxcrp.facts import Facts, dims, rectifies
from onnxcrp.graph import Graph, Value, positive
from onnxcrp.lrp import RULES, Layer
from onnxcrp.ops import OPS, Node, Parts
from onnxcrp.ops.registry import REGISTER, about

if TYPE_CHECKING:
    from onnxcrp.canonize.samples import Layout

_TRANSPOSING = ("zero", "epsilon", "norm", "gradient")  # rules that an operator nobody registered cannot have
REDUCTIONS = ("sum", "max", "argmax")

# Rules whose result is a product with the layer's input: R_i = 0 wherever a_i = 0.
_PRODUCTS = frozenset({"zero", "epsilon", "zplus", "alpha_beta", "gamma", "norm"})
# Operators of the standard that put out entries of their input and send R back to these very entries.
_MOVES = frozenset(
    {"Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat", "Split"}
    | {"Slice", "Gather", "DepthToSpace", "SpaceToDepth"}
    | {"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Max", "Min"}
)


@collector_paused()
def compile(
    model: Any,
    composite: str | os.PathLike[str] | Composite = "epsilon_plus_flat",
    *,
    conditions: Sequence[str] = (),
    record: Sequence[str] = (),
    start: Sequence[str] = (),
    start_from: str = "activation",
    bypass: str = "cut",
    output: str | None = None,
    inputs: Sequence[str] | None = None,
    relevance_of: Sequence[str] | None = None,
    reduce: Sequence[str] = (),
    activations: Sequence[str] = (),
    keep_head: bool = False,
    masks: str = "optional",
    per_sample: bool = True,
    flip_convolutions: bool = True,
    store_weights: bool = False,
    opset: int | None = None,
    ir_version: int = 10,
) -> onnx.ModelProto:
    """Write the relevance model of `model` (a path, ModelProto or Canonical): one ONNX model, standard operators only.

    Inputs: the model's own; `target` [., *explained[1:]], the seed being target * explained or target alone, as the
    composite says; `mask.<layer>` for each of `conditions`, ones unless fed; `seed.<layer>` for each of `start`, zeros
    unless fed (no target then; multiplied by the layer's activation if `start_from` is "activation").
    Outputs: the model's own; `explained`; `relevance.<input>` for `inputs` (None: all that relevance reaches), which
    also decides what carries relevance, or for those of them in `relevance_of`, which does not; for each
    of `record` `relevance.<layer>` before the mask, or with `reduce` (of sum, max, argmax) one number per concept; for
    each of `activations` `activation.<layer>`. Relevance has batch 1 or N: the larger of target, masks and samples.

    Where axis 0 of a layer does not count samples (windows, merged rows), its mask, seed and outputs still are
    [N, k, ...], unless `per_sample` is False: then they are laid out as the layer's own tensor is.
    `bypass="cut"`: only relevance that passes through every conditioned layer goes on; `"keep"`: masks alone apply.
    W+, flipped kernels and the like are written as nodes, which runtimes compute when they load the file, so that it is
    about as large as the model; for one that folds no constants `store_weights` puts them into the file.
    Errors: ModelError, UnsupportedError (all operators at once), CompositeError, QuestionError.
    """
    from onnxcrp.canonize import Canonical, canonize

    canonical = model if isinstance(model, Canonical) else canonize(model)
    _check_choice("bypass", bypass, ("cut", "keep"))
    _check_choice("start_from", start_from, ("activation", "one"))
    _check_choice("masks", masks, ("optional", "required"))
    for how in reduce:
        _check_choice("reduce", how, REDUCTIONS)
    _check_version("opset", opset or 18, 18, onnx.defs.onnx_opset_version())
    _check_version("ir_version", ir_version, 8, onnx.IR_VERSION)
    facts = Facts(canonical, output=output, inputs=inputs, keep_head=keep_head)
    if relevance_of is not None:
        facts.inputs = [name for name in facts.inputs if name in set(relevance_of)]
    writer = _Writer(
        facts,
        load(composite),
        bypass=bypass,
        start_from=start_from,
        per_sample=per_sample,
        flip_convolutions=flip_convolutions,
        store_weights=store_weights,
        opset=max(18, int(canonical.graph.opset)),
    )
    writer.walk(
        [writer.resolve(name) for name in conditions],
        [writer.resolve(name) for name in record],
        [writer.resolve(name) for name in start],
    )
    return writer.finish(
        activations=[writer.resolve(name) for name in activations],
        reduce=reduce,
        required_masks=masks == "required",
        opset=opset,
        ir_version=ir_version,
    )


def _check_version(what: str, given: int, low: int, high: int) -> None:
    if not low <= given <= high:
        raise QuestionError(f"{what} {given} cannot be written", hint=f"from {low} to {high}")


def _check_choice(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise QuestionError(f"{what} is {given!r}", hint=f"one of {', '.join(choices)}")


def assign(facts: Facts, composite: Composite, nodes: Iterable[gs.Node]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Node name -> (rule, parameters), `rearrangement` where no composite has a say.

    Errors: UnsupportedError naming all operators without a transpose; CompositeError naming all nodes no line fits.
    """
    nodes = list(nodes)
    hindered = [f"{node.op} ({facts.names.of(node)}): {why}" for node in nodes if (why := facts.obstacle(node))]
    if hindered:
        raise UnsupportedError(f"no relevance can be sent through {'; '.join(hindered)}")
    rules: dict[str, tuple[str, dict[str, Any]]] = {}
    unmatched = []
    unknown: dict[str, list[str]] = {}  # operator -> nodes
    for node in nodes:
        family = facts.family(node)
        if family == "rearrangement":
            rules[node.name] = ("rearrangement", {})
            continue
        found = composite.rule_for(
            op=node.op,
            # what a fused activation was spelled with in the file is no name for it; a Gemm or MatMul is
            source_op=facts.canonical.sources.get(node.name, node.op) if family == "dense" else node.op,
            family=family,
            names=facts.names.all_of(node),
            depth=facts.depth[node.name],
            by_name=node.op not in OPS,
        )
        if node.op not in OPS and (found is None or found[0] in _TRANSPOSING):
            unknown.setdefault(node.op, []).append(facts.names.of(node))
        elif found is None:
            unmatched.append(node)
        elif found[0] != "gradient" and (facts.is_preprocessing(node) or facts.is_mask(node)):
            rules[node.name] = ("pass", found[1] | {"unchanged": True})
        else:
            rules[node.name] = found
    if unknown:
        listed = "; ".join(f"{op} ({', '.join(names)})" for op, names in unknown.items())
        count = sum(map(len, unknown.values()))
        raise UnsupportedError(
            f"{count} node{'s have' if count > 1 else ' has'} no transpose: {listed}",
            hint=f"{REGISTER.format(next(iter(unknown)))}; or let a composite pass it (op = "
            f'"{next(iter(unknown))}", rule = "pass"), or explain an output below it',
        )
    if unmatched:
        listed = ", ".join(f"{facts.names.of(node)} ({node.op}, {facts.family(node)})" for node in unmatched)
        raise CompositeError(
            f"composite {composite.name} has no rule for {listed}",
            hint=f'add a [[layer]] with op = "{unmatched[0].op}" and a rule, or extends = "base" at the top',
        )
    return rules


class _Writer:
    """Writes one relevance model."""

    def __init__(
        self,
        facts: Facts,
        composite: Composite,
        *,
        bypass: str,
        start_from: str,
        per_sample: bool,
        flip_convolutions: bool,
        store_weights: bool,
        opset: int,
    ) -> None:
        from onnxcrp.canonize.lower import lower

        self.facts = facts
        self.composite = composite
        self.bypass = bypass
        self.per_sample = per_sample
        self.start_from = start_from
        forward = lower(facts.graph)
        self.forward_nodes = list(forward.nodes)
        # Tensors keep their names when a node is lowered: the backward pass refers to the lowered graph's.
        self.tensor = {t.name: t for node in forward.nodes for t in [*node.inputs, *node.outputs] if not t.is_empty()}
        self.tensor.update((t.name, t) for t in forward.inputs)
        self.forward = forward
        self.op = Graph(
            opset=opset,
            nodes=self.forward_nodes,
            taken=list(self.tensor),
            flip_convolutions=flip_convolutions,
            store_weights=store_weights,
        )
        for name, tensor in self.tensor.items():  # ops that ask a canonical tensor's size get the lowered graph's, too
            if isinstance(tensor, gs.Variable):
                self.op.value(tensor, nonnegative=name in facts.nonnegative)
        for node in self.forward_nodes:
            if node.op == "Relu":
                self.op.adopt(node)
        self.rules: dict[str, tuple[str, dict[str, Any]]] = {}
        self.relevance: dict[str, Value] = {}  # tensor name -> R, of inputs and recorded layers
        self.messages: dict[str, list[Value]] = {}
        self.vanishing: dict[str, bool] = {}  # tensor name -> R is 0 wherever the tensor is
        self.added: dict[str, gs.Tensor] = {}  # inputs of the relevance model
        self.mask_of: dict[str, str] = {}
        self.seed_of: dict[str, str] = {}
        self.target: str | None = None
        self.conditioned: list[str] = []
        self.recorded: list[str] = []
        self.started: list[str] = []
        self.cut: list[str] = []

    # ---- names -------------------------------------------------------------------------------------------------
    def resolve(self, name: str) -> str:
        """Tensor of a layer as a user names it; errors: QuestionError if relevance does not come by."""
        node = self.facts.names.resolve(name)
        tensor = node.outputs[0].name
        if tensor not in self.facts.between([self.facts.explained], None):
            raise QuestionError(
                f"layer {name!r} does not lie between the inputs and {self.facts.explained}",
                hint="it comes after the explained output, or belongs to another one",
            )
        return tensor

    def layer_name(self, tensor: str) -> str:
        """The name of the layer whose output this is."""
        return self.facts.names.of(self.facts.producer[tensor])

    def _free(self, name: str) -> str:
        """A legal name for an input or output of the relevance model: see names.safe_name."""
        from onnxcrp.names import safe_name

        name = safe_name(name, self._io, self._model_names)
        self._io.add(name)
        return name

    # ---- the walk ----------------------------------------------------------------------------------------------
    def walk(self, conditions: Sequence[str], record: Sequence[str], start: Sequence[str]) -> None:
        """Send relevance from the explained output (or from `start`) to the inputs, all given as tensor names."""
        facts = self.facts
        position = {name: facts.order[facts.producer[name].name] for name in {*conditions, *record, *start}}
        self.conditioned = sorted(set(conditions), key=position.__getitem__)
        self.recorded = sorted(set(record), key=position.__getitem__)
        self.started = sorted(set(start), key=position.__getitem__)
        self.op.many = bool(conditions)  # on one sample, as a rule; where each has its own, that costs a little memory
        self._name_interface()
        tops = self._seed()
        wanted = [*facts.inputs, *self.recorded, *self.conditioned]
        self._check_reachable(tops)
        if self.bypass == "cut":
            self._check_starts()
        reach = facts.between(tops, wanted)
        inner = [n for n in facts.nodes if any(t.name in reach for t in n.outputs) and self._inside(n, reach)]
        self.rules = assign(facts, self.composite, inner)
        if self.bypass == "keep" or not self.conditioned:
            self._segment(tops, wanted)
        else:
            self._segments(tops)
        for name in [*facts.inputs, *self.recorded]:
            if name not in self.relevance:
                self.relevance[name] = self.op.zero

    def _inside(self, node: gs.Node, reach: set[str]) -> bool:
        return any(node.inputs[i].name in reach for i in self.facts.carries(node))

    def _seed(self) -> list[str]:
        """Put relevance where the walk begins and return those tensors."""
        op, facts = self.op, self.facts
        if not self.started:
            explained = self._float(facts.explained)
            target = self._add_input(self.target or "target", dims(facts.tensors[facts.explained]))
            with op.scope("R", "seed"):
                how = self.composite.seed
                if how == "one":  # a message has the batch of the forward pass or more
                    R = op.Expand(target, op.shape(explained))
                else:
                    R = target * (op.Abs(explained) if how == "abs" else explained)
            self.messages[facts.explained] = [R]
            self.vanishing[facts.explained] = how != "one"
            return [facts.explained]
        for tensor in self.started:
            seed = self._add_input(self.seed_of[tensor], self._seen(tensor), default=0.0)
            with op.scope("R", "seed", self.layer_name(tensor)):
                seed = self._inward(tensor, seed)
            if self.start_from == "activation":
                with op.scope("R", "seed", self.layer_name(tensor)):
                    z = self._float(tensor)
                    seed = seed * (positive(z) if facts.only_relu(tensor) else z)
                self.vanishing[tensor] = True
            else:
                with op.scope("R", "seed", self.layer_name(tensor)):  # transposes want the full size and batch
                    seed = op.Expand(seed, op.shape(op.value(self.tensor[tensor])))
                self.vanishing[tensor] = False
            self.messages.setdefault(tensor, []).append(seed)
        return list(self.started)

    def _check_reachable(self, tops: list[str]) -> None:
        below = self.facts.between(tops, None)
        for name in [*self.recorded, *self.conditioned]:
            if name not in below:
                raise QuestionError(
                    f"no relevance comes to {self.layer_name(name)}: it does not lie below {self.layer_name(tops[0])}"
                )

    def _check_starts(self) -> None:
        """Nothing that starts below a conditioned layer has passed through it."""
        for upper in self.conditioned:
            below = self.facts.between([upper], None) - {upper}
            for name in self.started:
                if name in below:
                    raise QuestionError(
                        f"{self.layer_name(name)} lies below the conditioned layer {self.layer_name(upper)}: "
                        "nothing that starts there passes through it",
                        hint='condition a layer below the start, or use bypass="keep"',
                    )

    def _segments(self, tops: list[str]) -> None:
        """bypass="cut": from each conditioned layer to the one before it, and nothing goes round."""
        facts = self.facts
        order = list(reversed(self.conditioned))
        pending = set(self.recorded) - set(order)
        for i, lower in enumerate([*order, None]):
            here = facts.between(tops, None) if lower is None else facts.between(tops, [lower])
            if lower is not None and lower not in here:
                raise QuestionError(
                    f"no path leads from {self.layer_name(lower)} to {self.layer_name(tops[0])}: "
                    "together they keep nothing",
                    hint='condition one of them, or use bypass="keep"',
                )
            below = facts.between(tops, None)
            further = facts.between([lower], None) if lower is not None else set()
            # a recorded layer beside the next conditioned one would get only what is about to be cut off
            mine = [name for name in pending if name in below and name not in further]
            beside = [name for name in mine if i < len(order) and not self._leads_to(lower, name)]
            if beside:
                raise QuestionError(
                    f"{self.layer_name(beside[0])} lies on no path through {self.layer_name(str(lower))}: "
                    "its relevance is cut off",
                    hint='use bypass="keep", or do not record it',
                )
            pending -= set(mine)
            wanted = [*mine, lower] if lower is not None else [*mine, *facts.inputs]
            self._segment(tops, wanted)
            if lower is not None:
                for name in [name for name in self.messages if name != lower]:
                    del self.messages[name]
                tops = [lower]
        if pending:
            raise QuestionError(
                f"{self.layer_name(min(pending))} lies on no path through {self.layer_name(order[-1])}: "
                "its relevance is cut off",
                hint='use bypass="keep", or do not record it',
            )
        self.cut = [self.layer_name(name) for name in self.conditioned]

    def _leads_to(self, lower: str | None, upper: str) -> bool:
        return lower is None or lower in self.facts.between([upper], None)

    def _segment(self, tops: Sequence[str], wanted: Sequence[str]) -> None:
        """Walk all nodes between `wanted` and `tops`, latest first; `self.messages` holds what arrived at the tops."""
        facts = self.facts
        reach = facts.between(tops, wanted)
        for node in reversed(facts.nodes):
            outputs = [t.name for t in node.outputs if t.name in reach and t.name in self.messages]
            if not outputs or not self._inside(node, reach):
                for name in outputs:
                    self._arrive(name)
                continue
            arrived = {name: self._arrive(name) for name in outputs}
            if all(R.is_zero for R in arrived.values()):
                continue
            self._through(node, arrived, reach)
        for name in wanted:
            if name in self.messages and name in facts.inputs and name not in self.relevance:
                self.relevance[name] = self.op.sum(self.messages[name])

    def _arrive(self, name: str) -> Value:
        """The relevance of a tensor: what arrived, recorded, then masked. Asked twice, it is not masked twice."""
        if name in self.relevance and name not in self.mask_of:
            return self.relevance[name]
        if name in self._masked:
            return self._masked[name]
        with self.op.scope("R", self.layer_name(name) if name in self.facts.producer else name):
            R = self.op.sum(self.messages[name])
            if name in self.recorded:
                self.relevance[name] = R
                R.addends = None  # it is written as a sum, so nothing is saved by writing its terms once more
            if name in self.mask_of:
                mask = self._add_input(self.mask_of[name], self._seen(name), default=1.0)
                R = R * self._inward(name, mask)
                self._masked[name] = R
        self.messages[name] = [R]
        return R

    def _through(self, node: gs.Node, arrived: dict[str, Value], reach: set[str]) -> None:
        """One node: its rule turns the relevance of its output into that of its inputs."""
        op, facts = self.op, self.facts
        rule, parameters = self.rules[node.name]
        data = facts.carries(node)
        name = facts.names.of(node)
        view = _View(self, node, data, name)
        with op.scope("R", name, rule):
            if len(node.outputs) > 1 and rule == "rearrangement":
                R: Any = [arrived.get(t.name, op.zero) for t in node.outputs]
            else:
                R = next(iter(arrived.values()))
            if rule == "rearrangement":
                back = about(node.op).transpose(op, view, R)
            else:
                parameters = dict(parameters)
                unchanged = parameters.pop("unchanged", False)
                layer = Layer(op, view, stabilizer=parameters.pop("stabilizer"), bias=parameters.pop("bias"))
                layer.vanishes = layer.bias == "keep" and self._vanishes(node)
                layer.gates = facts.gates(node) if rule == "signal" else set()
                if rule == "zbox":
                    layer.bounds = facts.bounds(node)
                back = R if unchanged else RULES[rule](layer, R, **parameters)
            parts = back if isinstance(back, Parts) else [back]
            if len(parts) != len(data):
                raise UnsupportedError(
                    f"{node.name} ({node.op}): {len(data)} of its inputs carry relevance, messages go to {len(parts)}"
                )
            for i, part in zip(data, parts, strict=True):
                source = node.inputs[i]
                if part.is_zero or source.name not in reach:
                    continue
                part = self._unbroadcast(node, part, source)
                self.messages.setdefault(source.name, []).append(part)
                zeros = rule in _PRODUCTS or (self._passes_zeros(node, rule) and self._vanishing_of(node))
                self.vanishing[source.name] = self.vanishing.get(source.name, True) and zeros

    # ---- what is zero ------------------------------------------------------------------------------------------
    def _vanishing_of(self, node: gs.Node) -> bool:
        return all(self.vanishing.get(t.name, True) for t in node.outputs)

    def _passes_zeros(self, node: gs.Node, rule: str) -> bool:
        """Whether R = 0 where the output is 0 implies the same at the input; of no operator but these is that known."""
        if node.domain:
            return False
        if rule in ("winner", "rearrangement"):
            return node.op in _MOVES
        scales = node.op in ("Mul", "Neg", "Cast", "LeakyRelu") or (
            node.op == "Div" and list(self.facts.carries(node)) == [0]
        )
        return rule == "pass" and (rectifies(node) or scales)

    def _vanishes(self, node: gs.Node) -> bool:
        """R = 0 wherever z <= 0: z is never negative, or goes only into ReLUs, whose relevance is 0 where they are.

        A ReLU6 is one of them: what counts is that it puts out 0 just where z <= 0.
        """
        name = node.outputs[0].name
        if not self.vanishing.get(name, False):
            return False
        if name in self.facts.nonnegative:
            return True
        readers = self.facts.readers.get(name, [])
        if name not in self.started:  # a seed of max(z, 0) is 0 there by itself
            readers = [r for r in readers if r.name in self.rules]
        return bool(readers) and all(rectifies(r) and self.rules.get(r.name, ("pass",))[0] == "pass" for r in readers)

    # ---- layers as a user sees them: axis 0 counts samples -----------------------------------------------------
    def _elsewhere(self, tensor: str) -> Layout | None:
        """The layout of a tensor whose axis 0 does not count samples, if it is to be seen as if it did."""
        if not self.per_sample:
            return None
        layout = self.facts.places.get(tensor)
        open_sizes = layout is not None and layout.place.each > 1 and None in layout.sizes
        if open_sizes or tensor in self.facts.unplaced:
            raise QuestionError(
                f"in what order {self.layer_name(tensor)} holds its samples is not known",
                hint="ask about a layer before or after it",
            )
        return layout

    def _seen(self, tensor: str) -> list[Any]:
        return self.facts.seen(tensor) if self.per_sample else dims(self.facts.tensors[tensor])

    def _outward(self, tensor: str, value: Value) -> Value:
        """[N k, ...] -> [N, k, ...], [3, N, ...] -> [N, 3, ...], [T N, ...] -> [N, T, ...]."""
        layout = self._elsewhere(tensor)
        if layout is None:
            return value
        op, (axis, outer, inner), sizes = self.op, layout.place, layout.sizes
        if layout.place.each == 1:
            return op.Transpose(value, perm=[axis, *(i for i in range(len(sizes)) if i != axis)])
        value = op.Reshape(value, [*sizes[:axis], outer, -1, inner, *sizes[axis + 1 :]])
        value = op.Transpose(value, perm=[axis + 1, *(i for i in range(len(sizes) + 2) if i != axis + 1)])
        return op.Reshape(value, [0, *layout.rest])

    def _inward(self, tensor: str, value: Value) -> Value:
        """The inverse for what is fed, which may be 1 along any axis; [1, ...] is for all samples."""
        layout = self._elsewhere(tensor)
        if layout is None:
            return value
        op, (axis, outer, inner), sizes = self.op, layout.place, layout.sizes
        if layout.place.each == 1:
            return op.Transpose(value, perm=[*range(1, axis + 1), 0, *range(axis + 1, len(sizes))])
        samples = op.Div(op.shape(op.value(self.tensor[tensor]), axis, axis + 1), [layout.place.each])
        value = op.Expand(value, op.Concat(samples, layout.rest, axis=0))
        value = op.Reshape(value, [-1, *sizes[:axis], outer, inner, *sizes[axis + 1 :]])
        value = op.Transpose(value, perm=[*range(1, axis + 2), 0, *range(axis + 2, len(sizes) + 2)])
        return op.Reshape(value, [*sizes[:axis], -1, *sizes[axis + 1 :]])

    # ---- small things ------------------------------------------------------------------------------------------
    def _float(self, name: str) -> Value:
        tensor = self.tensor[name]
        value = self.op.value(tensor, nonnegative=name in self.facts.nonnegative)
        if self.facts.tensors[name].dtype is not None and np.dtype(self.facts.tensors[name].dtype) != self.op.dtype:
            value = self.op.float(value)
        return value

    def _unbroadcast(self, node: gs.Node, R: Value, source: gs.Tensor) -> Value:
        """Sums the axes along which the node expanded this input; never the batch."""
        if node.op not in _BROADCASTING:
            return R
        wide, narrow = dims(node.outputs[0]), dims(source)
        if node.op == "MatMul":  # the last two axes are the matrix
            wide, narrow = wide[:-2], narrow[:-2]
        missing = len(wide) - len(narrow)
        if missing > 0:
            if any(size != 1 for size in wide[:missing]):
                raise UnsupportedError(
                    f"{node.name} ({node.op}): {source.name} of rank {len(narrow)} is broadcast to rank {len(wide)}, "
                    "batch axis included",
                    hint="give it the rank of its partner",
                )
            R, wide = self.op.Squeeze(R, list(range(missing))), wide[missing:]
        axes = [i for i in range(1, len(wide)) if narrow[i] == 1 and wide[i] != 1]
        return self.op.ReduceSum(R, axes, keepdims=1) if axes else R

    def _add_input(self, name: str, shape: Sequence[Any], *, default: float | None = None) -> Value:
        """An input of the relevance model; with a default an initializer that callers may override."""
        if name not in self.added:
            if default is None:
                tensor: gs.Tensor = gs.Variable(name)
            else:
                tensor = gs.Constant(name, np.full([1] * len(shape), default, np.float32))
            self.added[name] = tensor
            self._inputs[name] = Value(self.op, tensor, message=True)
            self._defaults[name] = default
            self._ranks[name] = len(shape)
        return self._inputs[name]

    def _name_interface(self) -> None:
        """Choose the names of all inputs the relevance model will have, in execution order."""
        self._io: set[str] = set()
        self._model_names = set(self.tensor)
        self._inputs: dict[str, Value] = {}
        self._defaults: dict[str, float | None] = {}
        self._ranks: dict[str, int] = {}
        self._masked: dict[str, Value] = {}
        if not self.started:
            self.target = self._free("target")
        for tensor in self.conditioned:
            self.mask_of[tensor] = self._free(f"mask.{self.layer_name(tensor)}")
        for tensor in self.started:
            self.seed_of[tensor] = self._free(f"seed.{self.layer_name(tensor)}")
        # declared even where no relevance arrives, so that the interface does not depend on what vanished
        for names, default in ((self.mask_of, 1.0), (self.seed_of, 0.0)):
            for tensor, name in names.items():
                self._add_input(name, self._seen(tensor), default=default)

    # ---- the file ----------------------------------------------------------------------------------------------
    def finish(
        self,
        *,
        activations: Sequence[str],
        reduce: Sequence[str],
        required_masks: bool,
        opset: int | None,
        ir_version: int,
    ) -> onnx.ModelProto:
        """Outputs, metadata, checks: the ModelProto."""
        facts = self.facts
        outputs: dict[str, tuple[Value, int, int]] = {}  # name -> value, rank, element type
        names: dict[str, dict[str, Any]] = {
            "inputs": {},
            "relevance": {},
            "activation": {},
            "reduced": {},
            "masks": {self.layer_name(t): n for t, n in self.mask_of.items()},
            "seeds": {self.layer_name(t): n for t, n in self.seed_of.items()},
        }

        def put(name: str, value: Value, rank: int, kind: int = onnx.TensorProto.FLOAT) -> str:
            name = self._free(name)
            outputs[name] = (value, rank, kind)
            return name

        explained = put("explained", self._float(facts.explained), len(dims(facts.tensors[facts.explained])))
        for tensor in facts.inputs:
            R = self._never_zero(self.relevance[tensor], tensor)
            names["inputs"][tensor] = put(f"relevance.{tensor}", R, len(dims(facts.tensors[tensor])))
        for kind, tensors in (("relevance", self.recorded), ("activation", activations)):
            for tensor in tensors:
                layer, rank = self.layer_name(tensor), len(self._seen(tensor))
                value = self._float(tensor)
                if kind == "relevance":
                    value = self._never_zero(self.relevance[tensor], tensor)
                with self.op.scope("R", "record", layer):
                    value = self._outward(tensor, value)
                if not reduce:
                    names[kind][layer] = put(f"{kind}.{layer}", value, rank)
                    continue
                reduced = names["reduced"].setdefault(layer, {})
                for how in reduce:
                    number = self._reduced(value, how, rank, layer)
                    as_type = onnx.TensorProto.INT64 if how == "argmax" else onnx.TensorProto.FLOAT
                    reduced[f"{kind}.{how}"] = put(f"{kind}.{layer}.{how}", number, 2, as_type)
        return self._assemble(outputs, names, explained, required_masks, opset, ir_version)

    def _never_zero(self, R: Value, tensor: str) -> Value:
        """A symbolic zero that is an output after all: zeros of the tensor's shape."""
        if not R.is_zero:
            return R
        with self.op.scope("R", "zero"):
            return self.op.Expand(0.0, self.op.shape(self._float(tensor)))  # times 0 would keep the -inf of a mask

    def _reduced(self, value: Value, how: str, rank: int, layer: str) -> Value:
        """Sum, maximum or position of the maximum over all axes but the batch and the concepts': [N, C]."""
        op = self.op
        if rank < 3:
            return op.ArgMax(op.Unsqueeze(value, [2]), axis=2, keepdims=0) if how == "argmax" else value
        with op.scope("R", layer, how):
            node = self.facts.names.resolve(layer)
            concept = concept_axis(self.facts, node)
            if self.per_sample:
                concept = self.facts.seen_axis(node.outputs[0].name, concept)
            if concept != 1:
                others = [axis for axis in range(1, rank) if axis != concept]
                value = op.Transpose(value, perm=[0, concept, *others])
            flat = op.Reshape(value, [0, 0, -1])
            if how == "sum":
                return op.ReduceSum(flat, [2], keepdims=0)
            if rank < 4:
                return op.ReduceMax(flat, [2], keepdims=0) if how == "max" else op.ArgMax(flat, axis=2, keepdims=0)
            rows = op.Reshape(op.ReduceMax(value, [rank - 1], keepdims=0), [0, 0, -1])  # written once for both
            return op.ReduceMax(rows, [2], keepdims=0) if how == "max" else self._position(value, rows, rank)

    def _position(self, value: Value, rows: Value, rank: int) -> Value:
        """Where the first maximum of value [N, C, ..., w] lies among all of [..., w]: [N, C].

        First the row, by the maxima of rows [N, C, all], then the place in it: ArgMax takes far longer than ReduceMax.
        """
        op = self.op
        width = op.shape(value, rank - 1)
        row = op.ArgMax(rows, axis=2, keepdims=1)
        lines = op.Reshape(value, op.Concat([0, 0, -1], width, axis=0))
        place = op.ArgMax(op.GatherND(lines, row, batch_dims=2), axis=2, keepdims=0)
        return op.Add(op.Mul(op.Squeeze(row, [2]), width), place)

    def _assemble(
        self,
        outputs: dict[str, tuple[Value, int, int]],
        names: dict[str, Any],
        explained: str,
        required_masks: bool,
        opset: int | None,
        ir_version: int,
    ) -> onnx.ModelProto:
        from onnxcrp import __version__
        from onnxcrp.canonize.write import export

        graph = self.forward
        own = [t.name for t in graph.outputs]
        finals = []
        for name, (value, rank, kind) in outputs.items():
            finals.append((name, rank, kind))
            node = gs.Node("Identity", name=self.op.unique(f"output/{name}"), inputs=[value.tensor])
            node.outputs.append(gs.Variable(name))
            self.op.nodes.append(node)
        ends = [*own, *outputs]
        nodes = into_biases(
            self.op, _needed(self.op.nodes, ends), written=self.op.nodes[len(self.forward_nodes) :], outputs=ends
        )
        nodes = _needed(nodes, ends)  # without biases that others took the place of
        unasked = [name for name in self.added if name not in {t.name for node in nodes for t in node.inputs}]
        made = gs.Graph(
            nodes=nodes,
            inputs=list(graph.inputs),
            outputs=list(graph.outputs),
            name=graph.name or "model",
            opset=self.op.opset,
            import_domains=[
                onnx.helper.make_opsetid("", self.op.opset),
                *(entry for entry in graph.import_domains if entry.domain),
            ],
            functions=graph.functions,
        )
        proto = export(made, ir_version=ir_version)
        proto.producer_version = __version__
        for name in self.added:
            shape: list[int | str] = [f"{name}[{axis}]" for axis in range(self._ranks[name])]
            if name == self.target:  # one weight per entry: a class number broadcast over all of them is refused
                entries = enumerate(dims(self.facts.tensors[self.facts.explained])[1:], 1)
                shape = [shape[0], *(size if isinstance(size, int) else shape[axis] for axis, size in entries)]
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
            default = self._defaults[name]
            if default is None or required_masks:
                _drop_initializer(proto.graph, name)
            elif name in unasked:
                array = np.full([1] * self._ranks[name], default, np.float32)
                proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        for name, rank, kind in finals:
            symbols = [f"{name}[{axis}]" for axis in range(rank)]
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, symbols))
        if opset is not None and opset > self.op.opset:
            proto = _at_opset(proto, opset)
        onnx.helper.set_model_props(proto, self._metadata(names | {"outputs": own, "explained": explained}))
        return proto

    def _metadata(self, names: dict[str, Any]) -> dict[str, str]:
        from onnxcrp import __version__

        facts = self.facts
        approximated = [
            f"{facts.names.of(n)}: {n.op}" for n in facts.nodes if n.name in self.rules and n.op in _APPROXIMATED
        ]
        return {
            **facts.canonical.metadata,
            "onnxcrp.version": __version__,
            "onnxcrp.composite": self.composite.text,
            "onnxcrp.composite_name": self.composite.name,
            "onnxcrp.sha256": facts.canonical.sha256,
            "onnxcrp.map": json.dumps(names | {"target": self.target}),
            "onnxcrp.facts": json.dumps(
                {
                    "shares_forward": facts.shares_forward,
                    "batch": facts.canonical.batch,
                    "seed": self.composite.seed,
                    "start_from": self.start_from if self.started else None,
                    "bypass": self.bypass if self.conditioned else None,
                    "rules": {facts.names.of(n): self.rules[n.name][0] for n in facts.nodes if n.name in self.rules},
                    "approximated": approximated,
                    "cut": self.cut,
                }
            ),
        }


_BROADCASTING = frozenset(
    ["Add", "Sub", "Sum", "Mean", "Mul", "Div", "Pow", "Mod", "PRelu", "Expand", "Where", "Max", "Min", "MatMul"]
)

# Operators whose rounding a message takes for the identity.
_APPROXIMATED = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil"})


class _View(Node):
    """A canonical node whose tensors are those of the lowered graph."""

    def __init__(self, writer: _Writer, node: gs.Node, data: list[int], name: str) -> None:
        super().__init__(writer.op, node, data=data, nonnegative=writer.facts.nonnegative, name=name)
        self._writer = writer

    def _value(self, tensor: gs.Tensor) -> Value:
        if isinstance(tensor, gs.Constant):
            return super()._value(self._writer.tensor.get(tensor.name, tensor))
        return self._writer._float(tensor.name)


def _at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model converted to a newer opset by onnx; errors: QuestionError where it cannot."""
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # the converter raises several kinds
        reason = str(error).strip().split("\n")[0]
        raise QuestionError(f"onnx cannot convert to opset {opset}: {reason}", hint="leave opset out") from error
    if not converted.functions:  # which say of which opset they are, and which the converter forgets
        converted.functions.extend(proto.functions)
    return converted


def _needed(nodes: Sequence[gs.Node], outputs: Iterable[str]) -> list[gs.Node]:
    """The nodes that something asked for depends on, in their order."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if any(t.name in wanted for t in node.outputs):
            kept.append(node)
            wanted.update(t.name for t in node.inputs if not t.is_empty())
            for graph in node.subgraphs(recursive=True):
                wanted.update(t.name for inner in graph.nodes for t in inner.inputs)
    return kept[::-1]


def _drop_initializer(graph: onnx.GraphProto, name: str) -> None:
    for i, tensor in enumerate(graph.initializer):
        if tensor.name == name:
            del graph.initializer[i]
            return


def concept_axis(facts: Facts, node: gs.Node) -> int:
    """Axis of the concepts of a layer: 1 for [N, C, ...], the last for [B, T, C] and for attention [B, heads, T, d].

    What made the tensor decides: a convolution has channels on axis 1, a dense layer, an embedding and a normalization
    features on the last; a Transpose takes that axis along.
    """
    rank = len(dims(node.outputs[0]))
    if rank < 3:
        return 1 if rank > 1 else 0
    axes: list[int | None] = list(range(rank))  # where the axes of the tensor looked at have gone
    current: gs.Node | None = node
    for _ in range(64):
        if current is None or current.op not in OPS:
            break
        family = facts.family(current)
        if family == "convolution" or family in _FEATURES_LAST or current.op == "MatMul":
            found = axes[1 if family == "convolution" else -1]
            return 1 if found is None else found
        data = facts.carries(current)
        source = current.inputs[data[0]] if data else None
        if source is None or source.shape is None:
            break
        kept = current.outputs[0].shape
        if (
            current.op == "Reshape"
            and len(source.shape) > 3
            and isinstance(kept[1], int)
            and kept[1] == source.shape[1]
        ):
            axes = [axes[0], axes[1], *[None for _ in source.shape[2:]]]  # positions merged, channels as they were
        elif len(source.shape) != len(axes):  # rows merged or parted, features as they were
            if source.shape[-1] != current.outputs[0].shape[-1]:
                break
            axes = [*[None for _ in source.shape[1:]], axes[-1]]
        elif current.op == "Transpose":
            perm = current.attrs.get("perm") or list(range(len(axes)))[::-1]
            axes = [axes[perm.index(axis)] for axis in range(len(axes))]
        current = facts.producer.get(source.name)
    return 1


_FEATURES_LAST = frozenset({"dense", "embedding", "layernorm", "matmul", "softmax"})


__all__ = ["assign", "compile", "concept_axis"]

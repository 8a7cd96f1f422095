"""What users call a layer, and what the inputs and outputs of a relevance model are called."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping

import onnx_graphsurgeon as gs

from onnxcrp.errors import QuestionError

LINEAR = {"Conv", "ConvTranspose", "Linear", "Gemm"}
SUMS = {"Add", "Sum", "Sub", "Mean"}  # the operator a residual block ends with, and is called by
PARAMETER = re.compile(r"^(?P<layer>.+)[./_](weight|weights|kernel)(:\d+)?$")
AUTOMATIC = re.compile(r"^(onnx::|val_\d)")
CALL = re.compile(r"^(?P<layer>.+)#(?P<number>\d+)$")
SUFFIX = re.compile(r"^(?P<layer>.+)_(?P<number>\d+)$")


def name_layers(nodes: Iterable[gs.Node], *, weights: Mapping[str, str], scopes: Mapping[str, str]) -> dict[str, str]:
    """Node name -> layer name, unique; `nodes` in execution order, the mappings by node name.

    A layer with weights is called after its weight (`layer1.0.conv1.weight` -> `layer1.0.conv1`) if that is a
    parameter path, else, like every other node, after the deepest module it was exported from: `layer1.0.relu`, and
    `layer1.0` for the Add that ends a residual block. Where several nodes stand in one module, its one linear layer
    keeps the name and the others are told apart by operator, with the exporter's number if it wrote one
    (`blocks.0.Add`, `blocks.0.Add_1`); but if all are of one operator and no module lies below, they are calls of one
    layer. Without a module the node's name is taken, then the output tensor's. The second call of a layer gets `#2`.
    """
    nodes = list(nodes)
    where = {node.name: scopes.get(node.name) or path_scope(node.name) for node in nodes}
    parents = {scope[:i] for scope in where.values() for i, letter in enumerate(scope) if letter == "."}
    stems = {}
    inside: dict[str, list[gs.Node]] = defaultdict(list)
    called: dict[str, str] = {}  # layer -> module of its first call
    for node in nodes:
        layer, scope = _layer_of(weights.get(node.name, "")), where[node.name]
        # equal weights of two layers may be stored once: another module's name is no call of this one
        own = (
            layer not in called or scope == called[layer] or re.fullmatch(rf"{re.escape(called[layer])}[_@]\d+", scope)
        )
        if layer and own and (node.op in LINEAR or not scope):
            called.setdefault(layer, scope)
            stems[node.name] = layer
        elif scope:
            inside[scope].append(node)
        else:
            stems[node.name] = node.name.lstrip("/") or node.outputs[0].name
    for scope, members in inside.items():
        linear = [node for node in members if node.op in LINEAR]
        if len(linear) == 1:
            stems[linear[0].name] = scope
            members.remove(linear[0])
    linear_names = set(stems.values())
    for scope, members in inside.items():
        same = len({node.op for node in members}) == 1 and scope not in parents  # calls of one module
        whole = (same or len(members) == 1) and scope not in linear_names
        ops: Counter[str] = Counter()
        for node in members:
            stems[node.name] = scope if whole else f"{scope}.{_with_number(node, ops)}"
            ops[node.op] += 1
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in nodes:
        name, call = stems[node.name], 1
        while name in taken:
            call += 1
            name = f"{stems[node.name]}#{call}"
        taken.add(name)
        names[node.name] = name
    return names


def path_scope(name: str) -> str:
    """Module scope in a node name: /layer1/layer1.0/relu/Relu -> layer1.0.relu; "" where the name is no path.

    TensorFlow Lite joins the names of what it fused: Net/conv/Relu6;Net/conv/Conv2D;Net/conv/bias -> Net/conv.
    """
    if ";" in name:
        return name.split(";")[0].rpartition("/")[0]
    if not name.startswith("/"):
        return ""
    parts: list[str] = []
    for part in name.split("/")[1:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part  # each module repeats the path of the one around it
        elif part:
            parts.append(part)
    return ".".join(parts)


def _layer_of(weight: str) -> str:
    """The layer's name in that of its weight; "" for names that an exporter made up."""
    found = PARAMETER.match(weight)
    return "" if found is None or AUTOMATIC.match(weight) else found["layer"]


def _with_number(node: gs.Node, before: Counter[str]) -> str:
    """Add, Add_1 ...: as the exporter numbered it, else by execution order within the module."""
    last = node.name.rsplit("/", 1)[-1]
    if "/" in node.name and re.fullmatch(rf"{re.escape(node.op)}(_\d+)?", last):
        return last
    return f"{node.op}_{before[node.op]}" if before[node.op] else node.op


class Names:
    """Layer names of `nodes`, and every other name by which a user may mean one of them.

    These are the names of the node, its output tensor and its weight (with or without `.weight`), its scope, the scope
    with the operator (`layer1.0.Add`), and the other exporter's spelling of a second call (`relu_1` for `relu#2`). A
    layer's own name wins over all of them.
    """

    def __init__(self, nodes: Iterable[gs.Node], *, weights: Mapping[str, str], scopes: Mapping[str, str]) -> None:
        self.nodes = list(nodes)
        self._of = name_layers(self.nodes, weights=weights, scopes=scopes)
        self._node = {self._of[node.name]: node for node in self.nodes}
        self._aliases = {node.name: self._other_names(node, weights, scopes) for node in self.nodes}
        self._meant: dict[str, list[gs.Node]] = defaultdict(list)
        for node in self.nodes:
            for alias in self._aliases[node.name]:
                self._meant[alias].append(node)

    def _other_names(self, node: gs.Node, weights: Mapping[str, str], scopes: Mapping[str, str]) -> list[str]:
        name, weight = self._of[node.name], weights.get(node.name, "")
        scope = scopes.get(node.name) or path_scope(node.name)
        others = [node.name, node.name.lstrip("/"), *(tensor.name for tensor in node.outputs)]
        others += [weight, _layer_of(weight)]
        if scope:
            others += [scope, f"{scope}.{_with_number(node, Counter())}"]
        if call := CALL.match(name):
            others.append(f"{call['layer']}_{int(call['number']) - 1}")
        elif (call := SUFFIX.match(name)) and call["layer"] in self._node and self._node[call["layer"]].op == node.op:
            others.append(f"{call['layer']}#{int(call['number']) + 1}")
        return list(dict.fromkeys(other for other in others if other and other != name))

    def __iter__(self):
        """Layer names in execution order."""
        return iter(self._node)

    def of(self, node: gs.Node) -> str:
        """The layer's name; for a node that is no layer, its own."""
        return self._of.get(node.name, node.name)

    def all_of(self, node: gs.Node) -> tuple[str, ...]:
        """The layer's name, then the others."""
        return (self.of(node), *self._aliases.get(node.name, ()))

    def resolve(self, name: str) -> gs.Node:
        """The node meant by `name`; raises QuestionError that lists the nearest names if it means none, or several."""
        if name in self._node:
            return self._node[name]
        meant = self._meant.get(name, [])
        if len(meant) > 1 and len(sums := [node for node in meant if node.op in SUMS]) == 1:
            meant = sums  # a block is meant by its residual sum
        if len(meant) == 1:
            return meant[0]
        if meant:
            listed = ", ".join(f"{self.of(node)} ({node.op})" for node in meant[:8])
            more = f" and {len(meant) - 8} more" if len(meant) > 8 else ""
            raise QuestionError(f"layer name {name!r} is ambiguous", hint=f"it may mean {listed}{more}")
        raise QuestionError(f"there is no layer {name!r}", hint=self._nearest(name))

    def glob(self, pattern: str) -> list[gs.Node]:
        """Nodes whose layer name fits the pattern, in execution order; if none does, those one of whose names fits."""
        found = [node for node in self.nodes if fnmatch.fnmatchcase(self.of(node), pattern)]
        return found or [
            node for node in self.nodes if any(fnmatch.fnmatchcase(name, pattern) for name in self.all_of(node))
        ]

    def _nearest(self, name: str) -> str:
        below = [layer for layer in self._node if layer.startswith(name + ".")]  # a module, not a layer
        lowered = {layer.lower(): layer for layer in self._node}
        cutoff = 0.5 if len(name) > 3 else 0.8  # of short names half is little
        close = [lowered[near] for near in difflib.get_close_matches(name.lower(), lowered, n=5, cutoff=cutoff)]
        nearest = list(dict.fromkeys([*below[-3:], *close]))[:5]
        if nearest:
            return f"nearest: {', '.join(nearest)}"
        return f"layers: {', '.join(list(self._node)[:8])}{' ...' if len(self._node) > 8 else ''}"


def safe_name(name: str, taken: Container[str], model_names: Container[str] = ()) -> str:
    """A legal name for an input or output of a relevance model.

    Only letters, digits and . _ - / ~ stay, others become `_`; a name of one of the model's own tensors gets the prefix
    `onnxcrp.`; one that is `taken` gets ~2, ~3 ... Ask in execution order, inputs before layers: the first one wins.
    """
    stem = re.sub(r"[^A-Za-z0-9._\-/~]", "_", name)
    if stem in model_names:
        stem = f"onnxcrp.{stem}"
    safe, number = stem, 1
    while safe in taken or safe in model_names:
        number += 1
        safe = f"{stem}~{number}"
    return safe

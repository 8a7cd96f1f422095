"""One normal form for layers that multiply by a constant matrix: Linear(a, W [out, in], b [out]) = a W^T + b.

- Gemm:  alpha A' B' + beta C  with A' = A or A^T. B constant: W = alpha B'^T, b = beta C where C is constant and the
  same for every row; any other C is added by a node of its own. transA is a Transpose before. A constant, B data:
  the same transposed, (alpha B'^T A'^T)^T.
- MatMul(a, M) with M constant [in, out]: W = M^T. MatMul(M, x) = (x^T M^T)^T: Transpose, Linear with W = M, Transpose.
  A constant vector is a matrix of one column (or row), whose axis is squeezed afterwards.
- Add of a constant that is the same for every row, where nothing else reads the product: b.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import (
    DOMAIN,
    Names,
    describe,
    detach,
    given,
    insert,
    only_reader,
    pinned,
    prune,
    rank,
    set_constant,
    set_input,
    set_output,
    value,
)
from onnxcrp.canonize.report import PassReport


def normalize_linear(graph: gs.Graph) -> PassReport:
    """Gemm and MatMul(+ Add) with a constant matrix -> Linear; two data paths stay as they are."""
    report = PassReport("linear layers")
    form = _Form(graph)
    for node in graph.nodes:
        if node.domain or node.op not in ("Gemm", "MatMul"):
            continue
        op = describe(node)
        reason = form.gemm(node) if node.op == "Gemm" else form.matmul(node)
        if reason is None:
            report.done.append(f"{op}: Linear")
        else:
            report.declined.append(f"{op}: {reason}")
    insert(graph, form.new)
    prune(graph)
    return report


class _Form:
    """Rewrites nodes in place and collects the ones to be written around them."""

    def __init__(self, graph: gs.Graph) -> None:
        self.names = Names(graph)
        self.pins = pinned(graph)
        self.new: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}

    def gemm(self, node: gs.Node) -> str | None:
        """Y = alpha A' B' + beta C."""
        a, b = value(node, 0), value(node, 1)
        if (a is None) == (b is None):
            return "a product of two data paths" if a is None else "its constants could not be folded"
        alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
        trans_a, trans_b = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))
        addend = node.inputs[2] if given(node, 2) else None
        swapped = b is None
        matrix, index = (np.asarray(a), 0) if b is None else (b, 1)
        if swapped:  # (A' B')^T = B'^T A'^T: W = alpha A', the layer reads B'^T
            flip_before, upright = not trans_b, not trans_a
        else:
            flip_before, upright = trans_a, trans_b
        weight = matrix if upright else matrix.T
        if matrix.dtype.kind != "f":
            return "integers"
        if alpha != 1:
            weight = _scaled(weight, alpha)
        self.set_linear(node, index, weight, node.inputs[index].name, changed=alpha != 1 or not upright)
        if flip_before:
            self.transpose_before(node, [1, 0])
        if swapped:
            self.transpose_after(node, [1, 0])
        if addend is not None:
            self.add(node, addend, beta, swapped)
        return None

    def matmul(self, node: gs.Node) -> str | None:
        """Y = A B over the last two axes."""
        a, b = value(node, 0), value(node, 1)
        if (a is None) == (b is None):
            return "a product of two data paths" if a is None else "its constants could not be folded"
        matrix, index = (b, 1) if b is not None else (a, 0)
        assert matrix is not None
        if matrix.dtype.kind != "f":
            return "integers"
        data_rank = rank(node.inputs[1 - index])
        vector = matrix.ndim == 1
        if vector:
            matrix = matrix[:, None] if index == 1 else matrix[None]
        if matrix.ndim > 2 and all(n == 1 for n in matrix.shape[:-2]) and data_rank and data_rank >= matrix.ndim:
            matrix = matrix.reshape(matrix.shape[-2:])
        if matrix.ndim != 2:
            return f"the constant is {list(matrix.shape)}, a matrix is expected"
        if vector and data_rank is None:
            return "the rank of its data is not known"
        if index == 1:
            self.set_linear(node, 1, matrix.T, node.inputs[1].name, changed=True)
            if vector:
                self.squeeze_after(node)
            else:
                self.absorb_add(node)
            return None
        if data_rank is None or data_rank < 2:
            return "the rank of its data is not known" if data_rank is None else "its data is a vector"
        same = matrix.shape == node.inputs[0].shape
        self.set_linear(node, 0, matrix, node.inputs[0].name, changed=not same)
        perm = [*range(data_rank - 2), data_rank - 1, data_rank - 2]
        self.transpose_before(node, perm)
        if vector:
            self.squeeze_after(node)
        else:
            self.transpose_after(node, perm)
        return None

    def set_linear(self, node: gs.Node, index: int, weight: np.ndarray, name: str, *, changed: bool) -> None:
        """Make `node` a Linear; `index` is where its constant matrix stands."""
        data, constant = node.inputs[1 - index], node.inputs[index]
        node.op, node.domain, node.attrs = "Linear", DOMAIN, {}
        while len(node.inputs) > 2:
            set_input(node, len(node.inputs) - 1, gs.Variable.empty())
            list.pop(node.inputs)
        if index == 0:
            set_input(node, 0, data)
            set_input(node, 1, constant)
        if changed:
            fresh = name.removesuffix(".T") if name.endswith(".T") else f"{name}.T"
            set_constant(node, 1, weight, self.names.fresh(fresh))

    def transpose_before(self, node: gs.Node, perm: list[int]) -> None:
        name = self.names.fresh(f"{node.name}/Transpose")
        shape = _permuted(node.inputs[0], perm)
        flipped = gs.Variable(self.names.fresh(f"{name}_output"), dtype=node.inputs[0].dtype, shape=shape)
        before, _ = self.new.setdefault(id(node), ([], []))
        before.append(gs.Node("Transpose", name, {"perm": perm}, [node.inputs[0]], [flipped]))
        set_input(node, 0, flipped)

    def transpose_after(self, node: gs.Node, perm: list[int]) -> None:
        shape = _permuted(node.outputs[0], [int(axis) for axis in np.argsort(perm)])
        self.after(node, "Transpose", {"perm": perm}, shape=shape)

    def squeeze_after(self, node: gs.Node) -> None:
        """The product with a vector has one column less: the last axis goes."""
        axes = gs.Constant(self.names.fresh(f"{node.name}/axes"), np.array([-1], np.int64))
        self.after(node, "Squeeze", {}, axes)

    def after(self, node: gs.Node, op: str, attrs: dict, *more: gs.Tensor, shape: list | None = None) -> None:
        """Put what `node` gives, of that shape, through one more node."""
        name = self.names.fresh(f"{node.name}/{op}")
        output = node.outputs[0]
        raw = gs.Variable(self.names.fresh(f"{node.name}_output"), dtype=output.dtype, shape=shape)
        set_output(node, raw)
        _, after = self.new.setdefault(id(node), ([], []))
        after.append(gs.Node(op, name, attrs, [raw, *more], [output]))

    def add(self, node: gs.Node, addend: gs.Tensor, factor: float, swapped: bool) -> None:
        """beta C: into b where it is a constant and the same for every row, else by an Add."""
        constant = addend.values if isinstance(addend, gs.Constant) else None
        out = node.inputs[1].shape[0]
        row = None if constant is None or swapped else _row(constant, out)
        if row is not None:
            untouched = factor == 1 and constant is not None and constant.shape == (out,)
            if untouched:
                node.inputs.append(addend)
            else:
                set_constant(node, 2, _scaled(row, factor), self.names.fresh(f"{addend.name}.row"))
            return
        _, after = self.new.setdefault(id(node), ([], []))
        last = after[-1] if after else node
        output = last.outputs[0]
        product = gs.Variable(self.names.fresh(f"{node.name}/product"), dtype=output.dtype, shape=output.shape)
        set_output(last, product)
        if factor != 1:
            if constant is not None:
                addend = gs.Constant(self.names.fresh(f"{addend.name}.scaled"), _scaled(constant, factor))
            else:
                beta = gs.Constant(self.names.fresh(f"{node.name}/beta"), np.array(factor, _dtype(addend)))
                name = self.names.fresh(f"{node.name}/Mul")
                scaled = gs.Variable(self.names.fresh(f"{name}_output"), dtype=addend.dtype)
                after.append(gs.Node("Mul", name, {}, [addend, beta], [scaled]))
                addend = scaled
        after.append(gs.Node("Add", self.names.fresh(f"{node.name}/Add"), {}, [product, addend], [output]))

    def absorb_add(self, node: gs.Node) -> None:
        """MatMul + Add of a constant row."""
        add = only_reader(node.outputs[0], self.pins)
        if add is None or add.op != "Add" or add.domain:
            return
        index = 0 if add.inputs[1] is node.outputs[0] else 1
        constant = value(add, index)
        if constant is None:
            return
        out = node.inputs[1].shape[0]
        data_rank = rank(node.inputs[0])
        grows = constant.ndim > 1 and (data_rank is None or constant.ndim > data_rank)
        if grows or any(n != 1 for n in constant.shape[:-1]) or (row := _row(constant, out)) is None:
            return
        if constant.shape == (out,):
            node.inputs.append(add.inputs[index])
        else:
            set_constant(node, 2, row, self.names.fresh(f"{add.inputs[index].name}.row"))
        output = add.outputs[0]
        detach(add)
        set_output(node, output)


def _permuted(tensor: gs.Tensor, perm: list[int]) -> list | None:
    return None if tensor.shape is None else [tensor.shape[axis] for axis in perm]


def _row(constant: np.ndarray, out: int) -> np.ndarray | None:
    """[out] where an addend is the same for every row, else None."""
    if constant.shape == (out,):
        return constant
    if constant.ndim and constant.shape[-1] not in (1, out):
        return None
    rows = constant.reshape(-1, constant.shape[-1]) if constant.ndim else constant.reshape(1, 1)
    if len(rows) == 0 or not (rows == rows[:1]).all():
        return None
    return np.ascontiguousarray(np.broadcast_to(rows[0], [out]))


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return (array.astype(np.float64) * factor).astype(array.dtype)


def _dtype(tensor: gs.Tensor) -> np.dtype:
    return np.dtype(tensor.dtype or np.float32)

"""The least memory traffic of a network's passes, kernel by kernel, at four levels of fusion.

Counted are reads and writes of whole tensors in device memory: nothing stays in a cache between kernels. Activations
and the weights that products read have the precision's width, weights' gradients are fp32. Vectors (statistics, biases,
gammas) are not counted. `y` is an operation's output, `x` its input, `g` a gradient, `W` the weights.

| | A: eager | B: inductor | D: fused with convolutions | E: bound |
|---|---|---|---|---|
| conv, matmul | x + y + W | as A | as A | as A |
| their dgrad | g + W + x | as A | + x, and + y if normalised behind it | one kernel with wgrad: what both |
| their wgrad | g + x + W | as A | + y if normalised behind it | read is read once |
| batch norm | 2 x + y | statistics x, the rest joins its group | 0 | 0 |
| a group of pointwise operations | each on its own: inputs + y | inputs + y | 0, or all but one input + y | as D |
| its backward | BN 5, ReLU 3, each | see `_group_backward` | 0 | 0 |
| a second gradient of one tensor | 3 x | read by the group; before a product 3 x | read | read |
| pooling | x + y + positions | as A | as A | as A |
| backward of a mean over all pixels | g + x | read by the group | 0 | 0 |

A group is what inductor makes of neighbouring pointwise operations: it ends where a value is needed by another kind of
operation, or by two. At D and E a group with one full-size input is computed while the next product reads it, and one
with several (a residual sum) is written besides; its backward is in the epilogue of the product's dgrad, which reads
the operand x again for that. D and E are bounds: no library has all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from byol_fast.profiling.flops import ATTENTION_BACKWARD
from byol_fast.profiling.layers import Graph, Op, Use, Value

Level = Literal["A", "B", "D", "E"]
LEVELS: tuple[Level, ...] = ("A", "B", "D", "E")
LEVEL_NAMES: dict[Level, str] = {
    "A": "eager",
    "B": "inductor",
    "D": "conv-fused",
    "E": "bound",
}
GRADIENT_WIDTH = 4
"""Bytes of an element of a weight's gradient: fp32."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One piece of work that reads its inputs from memory and writes its outputs there."""

    layer: str
    """Dotted name of the module."""
    phase: str
    """`online forward`, `backward`, `target forward`, `loss`, `optimizer + EMA`."""
    family: str
    """`conv forward`, `batch norm`, ..."""
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Pointwise operations that end in one value."""

    out: Value
    ops: list[Op]
    leaves: list[Use]
    """The values it reads, each once."""


class Traffic:
    """Kernels of a network's passes.

    Args:
        graph: of the network.
        width: bytes of an activation.
        phase: of the forward pass.
        backward: whether one follows.
    """

    def __init__(self, graph: Graph, *, width: int, phase: str, backward: bool) -> None:
        self.graph, self.width, self.phase, self.backward = graph, width, phase, backward
        self._groups = {id(v): self._group(v) for v in self._values() if _joins(v.producer) and _is_stored(v)}

    def kernels(self, level: Level) -> list[Kernel]:
        """All kernels of the passes at a level of fusion."""
        return list(self._eager() if level == "A" else self._fused(level))

    # ------------------------------------------------------------------ sizes

    def _bytes(self, value: Value, numel: int | None = None) -> int:
        if value.is_vector:
            return 0
        width = self.width if value.width is None else value.width
        return (value.numel if numel is None else numel) * width

    def _read(self, uses: Iterable[Use]) -> int:
        return sum(self._bytes(use.value, use.numel) for use in uses)

    def _gradient(self, use: Use) -> int:
        """Bytes of the gradient that an operation writes for one of its inputs."""
        if use.value.is_vector:
            return 0
        return use.numel * GRADIENT_WIDTH if use.value.is_weight else self._bytes(use.value, use.numel)

    def _arriving(self, value: Value) -> int:
        """Gradients that arrive at a value, each of its size: parts of it count as what they cover."""
        read = sum(use.numel for use in value.uses if use.op.output.needs_grad)
        return max(1, round(read / value.numel))

    def _gradients(self, value: Value) -> int:
        """Bytes of the gradients that arrive at a value; that of a mean is the same for all it was taken of."""
        arriving = [use for use in value.uses if use.op.output.needs_grad]
        spread = sum(self._bytes(use.op.output) for use in arriving if _spreads(use.op))
        whole = sum(self._bytes(value, use.numel) for use in arriving if not _spreads(use.op))
        return spread + whole if arriving else self._bytes(value)

    def _values(self) -> Iterator[Value]:
        for op in self.graph.ops:
            yield op.output

    def _forward(self, op: Op, family: str, num_bytes: int, flops: int = 0) -> Iterator[Kernel]:
        if num_bytes or flops:
            yield Kernel(op.layer, self.phase, family, flops, num_bytes)

    def _back(self, layer: str, family: str, num_bytes: int, flops: int = 0) -> Iterator[Kernel]:
        if num_bytes or flops:
            yield Kernel(layer, "backward", family, flops, num_bytes)

    # ------------------------------------------------------------------ A: every operation on its own

    def _eager(self) -> Iterator[Kernel]:
        for op in self.graph.ops:
            out = self._bytes(op.output)
            if op.kind in _PRODUCTS:
                yield from self._product(op, "A")
            elif op.kind == "pool":
                yield from self._pool(op, 8, out)
            else:
                # Eager batch norm reads its input for the statistics and again to normalise.
                extra = self._bytes(op.inputs[0].value) if op.kind == "batch norm" else 0
                yield from self._forward(op, _FAMILIES[op.kind], self._read(op.inputs) + extra + out)
                if self.backward and op.output.needs_grad:
                    yield from self._back(op.layer, _FAMILIES[op.kind], self._eager_backward(op, out))
            if self.backward:
                yield from self._sum_of_gradients(op.output, op.layer)

    def _eager_backward(self, op: Op, out: int) -> int:
        wanted = [use for use in op.inputs if use.value.needs_grad]
        if op.kind == "batch norm":
            return 5 * out  # sums: g, x; then g, x, and the result
        if op.kind == "norm":
            # One kernel for x, and for layer norms one for gamma and beta that reads g and x again.
            return 3 * out + (2 * out if op.saved == "input" and len(wanted) > 1 else 0)
        if op.kind == "unmodelled":
            return out + self._read(op.inputs) + sum(map(self._gradient, wanted))
        total = 0
        for use in wanted:
            if op.saved == "nothing":  # the gradient itself, or its sum over what was repeated
                whole = use.numel == op.output.numel or op.kind == "cat"
                scaled = op.name in {"mul", "div", "neg"}
                total += 0 if whole and not scaled else out + self._gradient(use)
            else:
                total += out + self._saved(op, use) + self._gradient(use)
        return total

    def _saved(self, op: Op, use: Use) -> int:
        """What the derivative with respect to one input is computed from."""
        if op.saved == "output":
            return self._bytes(op.output)
        if op.saved == "input":
            return self._bytes(use.value, use.numel)
        return self._read(other for other in op.inputs if other is not use)

    def _sum_of_gradients(self, value: Value, layer: str) -> Iterator[Kernel]:
        """Eager adds gradients that arrive one by one; those of disjoint parts it puts together."""
        uses = [use for use in value.uses if use.op.output.needs_grad]
        if not value.needs_grad or len(uses) < 2:
            return
        parts = sum(use.numel for use in uses) <= value.numel
        times = 2 if parts else 3 * (self._arriving(value) - 1)
        yield from self._back(layer, "gradient sum", times * self._bytes(value))

    # ------------------------------------------------------------------ products and pools, at all levels

    def _product(self, op: Op, level: Level) -> Iterator[Kernel]:
        """Convolutions, matrix products and attention."""
        out, what = self._bytes(op.output), _FAMILIES[op.kind]
        yield from self._forward(op, _forward_name(what), self._read(op.inputs) + out, op.flops)
        wanted = [use for use in op.inputs if use.value.needs_grad and not use.value.is_vector]
        if not self.backward or not wanted:
            return
        if op.kind == "attention":
            # q, k, v, the output and its gradient in, three gradients out
            num_bytes = self._read(op.inputs) + 2 * out + sum(map(self._gradient, wanted))
            yield from self._back(op.layer, what, num_bytes, int(ATTENTION_BACKWARD * op.flops))
            return
        fused = level in {"D", "E"}
        gradient = out + (out if fused and _is_normalised(op.output) else 0)
        for use in wanted if level != "E" else []:
            others = self._read(other for other in op.inputs if other is not use)
            epilogue = self._bytes(use.value, use.numel) if fused and not use.value.is_weight else 0
            name = what if op.kind == "matmul" else "conv wgrad" if use.value.is_weight else "conv dgrad"
            yield from self._back(op.layer, name, gradient + others + epilogue + self._gradient(use), op.flops)
        if level == "E":
            # Every operand is read once: as the other's factor, for the epilogue, or both.
            dgrad = any(not use.value.is_weight for use in wanted)
            operands = self._read(use for use in op.inputs if dgrad or not use.value.is_weight)
            name = what if op.kind == "matmul" else "conv dgrad + wgrad"
            num_bytes = gradient + operands + sum(map(self._gradient, wanted))
            yield from self._back(op.layer, name, num_bytes, op.flops * len(wanted))

    def _pool(self, op: Op, index_width: int, gradient: int, level: Level = "A") -> Iterator[Kernel]:
        """Pooling and other reductions: the input once, the output once."""
        later = level in {"D", "E"} or (level == "B" and _joins(op.inputs[0].value.producer))
        x, out, indices = self._read(op.inputs), self._bytes(op.output), op.indices * index_width
        yield from self._forward(op, "pool", x + out + (indices if self.backward or index_width == 8 else 0))
        if self.backward and op.output.needs_grad and not (_spreads(op) and later):
            yield from self._back(op.layer, "pool", gradient + indices + sum(map(self._gradient, op.inputs)))

    # ------------------------------------------------------------------ B, D, E: groups

    def _fused(self, level: Level) -> Iterator[Kernel]:
        for op in self.graph.ops:
            value = op.output
            if op.kind in _PRODUCTS:
                yield from self._product(op, level)
            elif op.kind == "pool":
                yield from self._pool(op, 1, self._gradients(value) if level == "B" else self._bytes(value), level)
            elif op.kind == "cat":
                yield from self._cat(op, level)
            elif op.kind == "unmodelled":
                yield from self._forward(op, "unmodelled", self._read(op.inputs) + self._bytes(value))
                if self.backward and value.needs_grad:
                    yield from self._back(op.layer, "unmodelled", self._eager_backward(op, self._bytes(value)))
            else:
                yield from self._pointwise(op, level)
            if self.backward and value.needs_grad and self._arriving(value) > 1:
                if level != "B":
                    extra = (self._arriving(value) - 1) * self._bytes(value)
                    yield from self._back(op.layer, "gradient sum", extra)
                elif not _joins(op) and op.kind != "pool":  # those two read all gradients themselves
                    yield from self._back(op.layer, "gradient sum", self._gradients(value) + self._bytes(value))

    def _cat(self, op: Op, level: Level) -> Iterator[Kernel]:
        """Pointwise producers write to where the whole will be; at D and E products do so too."""
        if level == "B":
            copied = [use for use in op.inputs if not (_joins(use.value.producer) and len(use.value.uses) == 1)]
            yield from self._forward(op, "copy", 2 * self._read(copied))

    def _pointwise(self, op: Op, level: Level) -> Iterator[Kernel]:
        if level == "B" and op.kind == "batch norm":
            yield from self._forward(op, "batch norm", self._read(op.inputs))
        group = self._groups.get(id(op.output))
        if group is None:
            return
        family = "batch norm" if any(o.kind == "batch norm" for o in group.ops) else _FAMILIES[op.kind]
        out = self._bytes(group.out)
        if level == "B":
            yield from self._forward(op, family, self._read(group.leaves) + out)
            if self.backward and group.out.needs_grad:
                for num_bytes in self._group_backward(group):
                    yield from self._back(op.layer, family, num_bytes)
            return
        # The next kernel reads the largest input in place of the group's output.
        sizes = sorted((self._bytes(use.value, use.numel) for use in group.leaves), reverse=True)
        written = len(sizes) > 1 and sizes[1] >= out
        if group.out.uses:
            yield from self._forward(op, family, sum(sizes[1:]) + (out if written else 0))
        else:
            yield from self._forward(op, family, sum(sizes) + out)

    def _group_backward(self, group: _Group) -> Iterator[int]:
        """Bytes of the kernels that turn the gradients of a group's output into those of its inputs, at level B.

        With one batch norm and one gradient: pass 1 (sums) g + mask + x, pass 2 g + mask + x + the result. Where
        several gradients arrive, or several inputs want one, pass 1 adds and masks them and writes that once; the
        passes after it read it. The mask of a ReLU at the end is its output; one inside the group is computed anew.
        """
        out = self._bytes(group.out)
        several = self._arriving(group.out) > 1
        masks = self._bytes(group.out) if group.ops[-1].saved == "output" else 0
        norms = [op.inputs[0] for op in group.ops if op.kind == "batch norm"]
        normalised = {id(use.value) for use in norms}
        passed = self._passed_on(group)
        wanted = [
            use for use in group.leaves
            if self._gradient(use) and use.value.needs_grad and id(use.value) not in normalised | passed
        ]  # fmt: skip
        handed_on = any(id(use.value) in passed and use.value.needs_grad for use in group.leaves)
        others = self._needed(group, normalised)
        sources = self._gradients(group.out) + masks
        if len(norms) == 1 and not wanted and not handed_on and not several:
            x = self._read(norms)
            yield sources + x + others
            yield sources + x + others + x
            return
        common = out if several or masks else 0
        if not norms:
            if wanted or common:
                shared = common if handed_on else 0
                yield sources + (others if wanted else 0) + shared + sum(map(self._gradient, wanted))
            return
        first, *further = [self._bytes(use.value, use.numel) for use in norms]
        yield sources + others + first + common
        yield out + first + first
        for x in further:
            yield out + x
            yield out + x + x
        if wanted:
            yield out + others + sum(map(self._gradient, wanted))

    def _group(self, out: Value) -> _Group:
        """Collect what is computed together with a value."""
        ops: list[Op] = []
        leaves: dict[int, Use] = {}

        def visit(op: Op) -> None:
            for use in op.inputs:
                producer = use.value.producer
                if producer is not None and _joins(producer) and not _is_stored(use.value):
                    visit(producer)
                elif id(use.value) not in leaves or leaves[id(use.value)].numel < use.numel:
                    leaves[id(use.value)] = use
            ops.append(op)

        assert out.producer is not None
        visit(out.producer)
        return _Group(out, ops, list(leaves.values()))

    def _passed_on(self, group: _Group) -> set[int]:
        """Inputs whose gradient is the group's own, unchanged: the branches of a sum."""
        found: set[int] = set()
        members = {id(op.output): op for op in group.ops}

        def visit(op: Op) -> None:
            ends = op is group.ops[-1] and op.name in {"relu", "hardtanh"}
            if not ends and op.name not in {"add", "clone"}:
                return
            for use in op.inputs:
                inner = members.get(id(use.value))
                if inner is not None:
                    visit(inner)
                elif use.numel == group.out.numel and not use.value.is_weight:
                    found.add(id(use.value))

        visit(group.ops[-1])
        return found

    def _needed(self, group: _Group, normalised: set[int]) -> int:
        """Bytes of the inputs, besides the batch norms', that derivatives are computed from."""
        members = {id(op.output): op for op in group.ops}
        found: dict[int, Use] = {}

        def all_of(use: Use) -> None:
            inner = members.get(id(use.value))
            if inner is None:
                if id(use.value) not in normalised:
                    found[id(use.value)] = use
            else:
                for below in inner.inputs:
                    all_of(below)

        for op in group.ops:
            if op.kind == "batch norm" or op.saved == "nothing" or (op is group.ops[-1] and op.saved == "output"):
                continue
            for use in op.inputs:
                other_wants = any(o.value.needs_grad for o in op.inputs if o is not use)
                if op.saved != "others" or other_wants:
                    all_of(use)
        return self._read(found.values())


_PRODUCTS = {"conv", "matmul", "attention"}
_FAMILIES = {
    "conv": "conv", "matmul": "matmul", "attention": "attention", "batch norm": "batch norm", "norm": "norm",
    "pointwise": "pointwise", "pool": "pool", "copy": "copy", "cat": "copy", "unmodelled": "unmodelled",
}  # fmt: skip


def _forward_name(family: str) -> str:
    return "conv forward" if family == "conv" else family


def _joins(op: Op | None) -> bool:
    """Whether an operation becomes part of a group of pointwise ones."""
    return op is not None and op.kind in {"batch norm", "norm", "pointwise", "copy"}


def _is_stored(value: Value) -> bool:
    """Whether a pointwise result has to lie in memory: somebody else than one pointwise operation needs it."""
    if value.is_output or len(value.uses) != 1:
        return True
    reader = value.uses[0].op
    return not _joins(reader) or reader.kind == "batch norm"


def _spreads(op: Op) -> bool:
    """Whether the gradient of an input is one number for many elements, which whoever reads it can spread."""
    return op.name in {"mean", "sum"}


def _is_normalised(value: Value) -> bool:
    """Whether a norm reads the value, so that its backward pass needs the value again."""
    return any(use.op.kind in {"batch norm", "norm"} for use in value.uses)

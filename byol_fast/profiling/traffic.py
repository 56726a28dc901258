"""The least memory traffic of a network's passes, kernel by kernel, at four levels of fusion.

Reads and writes of whole tensors in device memory are counted: nothing stays in a cache between kernels. Activations
and the weights that products read have the width of the precision, gradients of weights are fp32. Vectors (statistics,
biases, gammas) are not counted. `y` is an operation's output, `x` its input, `g` a gradient, `W` the weights.

| | A: eager | B: inductor | D: fused with convolutions | E: bound |
|---|---|---|---|---|
| conv, matmul | x + y + W | as A | as A | as A |
| their dgrad | g + W + x | as A | + x, and + y if normalized behind it | one kernel with wgrad: what both |
| their wgrad | g + x + W | as A | + y if normalized behind it | read is read once |
| batch norm | 2 x + y | statistics x, the rest joins its group | 0 | 0 |
| a group of pointwise operations | each on its own: inputs + y | inputs + y | 0, or all but one input + y | as D |
| its backward | BN 5, ReLU 3, each | see `_group_backward` | 0 | 0 |
| a second gradient of one tensor | 3 x | read by the group; before a product 3 x | read | read |
| pooling | x + y + positions | as A | as A | as A |
| backward of a mean over all pixels | g + x | read by the group | 0 | 0 |

A group (`fusion.py`) is what inductor makes of neighboring pointwise operations. At D and E a group with one full-size
input is computed while the next product reads it, and one with several (a residual sum) is written besides; its
backward is in the epilogue of the product's dgrad, which reads the operand x again for that. D and E are bounds: no
library implements all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from byol_fast.profiling.flops import ATTENTION_BACKWARD
from byol_fast.profiling.fusion import Group, branch_inputs, build_group, is_stored, joins, saved_inputs
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
"""Bytes per element of a weight's gradient: fp32."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that reads its inputs from memory and writes its outputs there."""

    layer: str
    """Dotted name of the module."""
    phase: str
    """`online forward`, `backward`, `target forward`, `loss`, `optimizer + EMA`."""
    family: str
    """`conv forward`, `batch norm`, ..."""
    flops: int
    bytes: int


class Traffic:
    """Kernels of a network's passes.

    Args:
        graph: of the network.
        width: bytes per element of an activation.
        phase: of the forward pass.
        backward: also count the backward pass.
    """

    def __init__(self, graph: Graph, *, width: int, phase: str, backward: bool) -> None:
        self.graph, self.width, self.phase, self.backward = graph, width, phase, backward
        self._groups = {id(v): build_group(v) for v in self._values() if joins(v.producer) and is_stored(v)}

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

    def _num_gradients(self, value: Value) -> int:
        """Number of gradients that arrive at a value; those of a part of it count by their share."""
        read = sum(use.numel for use in value.uses if use.op.output.needs_grad)
        return max(1, round(read / value.numel))

    def _gradient_bytes(self, value: Value) -> int:
        """Bytes of the gradients that arrive at a value; the gradient of a mean is one number for many elements."""
        gradients = [use for use in value.uses if use.op.output.needs_grad]
        broadcast = sum(self._bytes(use.op.output) for use in gradients if _is_broadcast(use.op))
        full = sum(self._bytes(value, use.numel) for use in gradients if not _is_broadcast(use.op))
        return broadcast + full if gradients else self._bytes(value)

    def _values(self) -> Iterator[Value]:
        for op in self.graph.ops:
            yield op.output

    def _forward(self, op: Op, family: str, num_bytes: int, flops: int = 0) -> Iterator[Kernel]:
        if num_bytes or flops:
            yield Kernel(op.layer, self.phase, family, flops, num_bytes)

    def _back(self, layer: str, family: str, num_bytes: int, flops: int = 0) -> Iterator[Kernel]:
        if num_bytes or flops:
            yield Kernel(layer, "backward", family, flops, num_bytes)

    # ------------------------------------------------------------------ A: every operation is a kernel

    def _eager(self) -> Iterator[Kernel]:
        for op in self.graph.ops:
            out = self._bytes(op.output)
            if op.kind in _PRODUCTS:
                yield from self._product(op, "A")
            elif op.kind == "pool":
                yield from self._pool(op, 8, out)
            else:
                # Eager batch norm reads its input for the statistics and again to normalize.
                extra = self._bytes(op.inputs[0].value) if op.kind == "batch norm" else 0
                yield from self._forward(op, _FAMILIES[op.kind], self._read(op.inputs) + extra + out)
                if self.backward and op.output.needs_grad:
                    yield from self._back(op.layer, _FAMILIES[op.kind], self._eager_backward(op, out))
            if self.backward:
                yield from self._sum_of_gradients(op.output, op.layer)

    def _eager_backward(self, op: Op, out: int) -> int:
        needed = [use for use in op.inputs if use.value.needs_grad]
        if op.kind == "batch norm":
            return 5 * out  # sums: g, x; then g, x, and the result
        if op.kind == "norm":
            # One kernel for x, and for layer norms one for gamma and beta that reads g and x again.
            return 3 * out + (2 * out if op.saved == "input" and len(needed) > 1 else 0)
        if op.kind == "unmodeled":
            return out + self._read(op.inputs) + sum(map(self._gradient, needed))
        total = 0
        for use in needed:
            if op.saved == "nothing":  # the gradient itself, or its sum over repeated elements
                is_whole = use.numel == op.output.numel or op.kind == "cat"
                is_scaled = op.name in {"mul", "div", "neg"}
                total += 0 if is_whole and not is_scaled else out + self._gradient(use)
            else:
                total += out + self._saved(op, use) + self._gradient(use)
        return total

    def _saved(self, op: Op, use: Use) -> int:
        """Bytes that the derivative with respect to one input is computed from."""
        if op.saved == "output":
            return self._bytes(op.output)
        if op.saved == "input":
            return self._bytes(use.value, use.numel)
        return self._read(other for other in op.inputs if other is not use)

    def _sum_of_gradients(self, value: Value, layer: str) -> Iterator[Kernel]:
        """Eager adds gradients one by one; it concatenates those of disjoint parts."""
        uses = [use for use in value.uses if use.op.output.needs_grad]
        if not value.needs_grad or len(uses) < 2:
            return
        are_parts = sum(use.numel for use in uses) <= value.numel
        times = 2 if are_parts else 3 * (self._num_gradients(value) - 1)
        yield from self._back(layer, "gradient sum", times * self._bytes(value))

    # ------------------------------------------------------------------ products and pools, at all levels

    def _product(self, op: Op, level: Level) -> Iterator[Kernel]:
        """Convolutions, matrix products and attention."""
        out, family = self._bytes(op.output), _FAMILIES[op.kind]
        yield from self._forward(op, _forward_name(family), self._read(op.inputs) + out, op.flops)
        needed = [use for use in op.inputs if use.value.needs_grad and not use.value.is_vector]
        if not self.backward or not needed:
            return
        if op.kind == "attention":
            # q, k, v, the output and its gradient in, three gradients out
            num_bytes = self._read(op.inputs) + 2 * out + sum(map(self._gradient, needed))
            yield from self._back(op.layer, family, num_bytes, int(ATTENTION_BACKWARD * op.flops))
            return
        fused = level in {"D", "E"}
        gradient = out + (out if fused and _is_normalized(op.output) else 0)
        for use in needed if level != "E" else []:
            others = self._read(other for other in op.inputs if other is not use)
            epilogue = self._bytes(use.value, use.numel) if fused and not use.value.is_weight else 0
            name = family if op.kind == "matmul" else "conv wgrad" if use.value.is_weight else "conv dgrad"
            yield from self._back(op.layer, name, gradient + others + epilogue + self._gradient(use), op.flops)
        if level == "E":
            # Every operand is read once: as a factor, for the epilogue, or both.
            dgrad = any(not use.value.is_weight for use in needed)
            operands = self._read(use for use in op.inputs if dgrad or not use.value.is_weight)
            name = family if op.kind == "matmul" else "conv dgrad + wgrad"
            num_bytes = gradient + operands + sum(map(self._gradient, needed))
            yield from self._back(op.layer, name, num_bytes, op.flops * len(needed))

    def _pool(self, op: Op, index_width: int, gradient: int, level: Level = "A") -> Iterator[Kernel]:
        """Pooling and other reductions: the input once, the output once."""
        is_fused = level in {"D", "E"} or (level == "B" and joins(op.inputs[0].value.producer))
        x, out, indices = self._read(op.inputs), self._bytes(op.output), op.indices * index_width
        yield from self._forward(op, "pool", x + out + (indices if self.backward or index_width == 8 else 0))
        if self.backward and op.output.needs_grad and not (_is_broadcast(op) and is_fused):
            yield from self._back(op.layer, "pool", gradient + indices + sum(map(self._gradient, op.inputs)))

    # ------------------------------------------------------------------ B, D, E: groups

    def _fused(self, level: Level) -> Iterator[Kernel]:
        for op in self.graph.ops:
            value = op.output
            if op.kind in _PRODUCTS:
                yield from self._product(op, level)
            elif op.kind == "pool":
                yield from self._pool(op, 1, self._gradient_bytes(value) if level == "B" else self._bytes(value), level)
            elif op.kind == "cat":
                yield from self._cat(op, level)
            elif op.kind == "unmodeled":
                yield from self._forward(op, "unmodeled", self._read(op.inputs) + self._bytes(value))
                if self.backward and value.needs_grad:
                    yield from self._back(op.layer, "unmodeled", self._eager_backward(op, self._bytes(value)))
            else:
                yield from self._pointwise(op, level)
            if self.backward and value.needs_grad and self._num_gradients(value) > 1:
                if level != "B":
                    extra = (self._num_gradients(value) - 1) * self._bytes(value)
                    yield from self._back(op.layer, "gradient sum", extra)
                elif not joins(op) and op.kind != "pool":  # those read all gradients themselves
                    yield from self._back(op.layer, "gradient sum", self._gradient_bytes(value) + self._bytes(value))

    def _cat(self, op: Op, level: Level) -> Iterator[Kernel]:
        """Pointwise producers write directly into the result; at D and E products do, too."""
        if level == "B":
            copied = [use for use in op.inputs if not (joins(use.value.producer) and len(use.value.uses) == 1)]
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
        # The next kernel reads the largest input instead of the group's output.
        sizes = sorted((self._bytes(use.value, use.numel) for use in group.leaves), reverse=True)
        is_written = len(sizes) > 1 and sizes[1] >= out
        if group.out.uses:
            yield from self._forward(op, family, sum(sizes[1:]) + (out if is_written else 0))
        else:
            yield from self._forward(op, family, sum(sizes) + out)

    def _group_backward(self, group: Group) -> Iterator[int]:
        """Bytes of the kernels that turn the gradients of a group's output into those of its inputs, at level B.

        With one batch norm and one gradient: pass 1 (sums) g + mask + x, pass 2 g + mask + x + the result. If several
        gradients arrive, or several inputs need one, pass 1 adds and masks them and writes the result; later passes
        read it. The mask of a ReLU at the end is its output; one inside the group is recomputed.
        """
        out = self._bytes(group.out)
        has_several = self._num_gradients(group.out) > 1
        masks = self._bytes(group.out) if group.ops[-1].saved == "output" else 0
        norms = [op.inputs[0] for op in group.ops if op.kind == "batch norm"]
        normalized = {id(use.value) for use in norms}
        branches = branch_inputs(group)
        needed = [
            use for use in group.leaves
            if self._gradient(use) and use.value.needs_grad and id(use.value) not in normalized | branches
        ]  # fmt: skip
        has_branches = any(id(use.value) in branches and use.value.needs_grad for use in group.leaves)
        others = self._read(saved_inputs(group, normalized))
        sources = self._gradient_bytes(group.out) + masks
        if len(norms) == 1 and not needed and not has_branches and not has_several:
            x = self._read(norms)
            yield sources + x + others
            yield sources + x + others + x
            return
        common = out if has_several or masks else 0
        if not norms:
            if needed or common:
                shared = common if has_branches else 0
                yield sources + (others if needed else 0) + shared + sum(map(self._gradient, needed))
            return
        first, *further = [self._bytes(use.value, use.numel) for use in norms]
        yield sources + others + first + common
        yield out + first + first
        for x in further:
            yield out + x
            yield out + x + x
        if needed:
            yield out + others + sum(map(self._gradient, needed))


_PRODUCTS = {"conv", "matmul", "attention"}
_FAMILIES = {
    "conv": "conv", "matmul": "matmul", "attention": "attention", "batch norm": "batch norm", "norm": "norm",
    "pointwise": "pointwise", "pool": "pool", "copy": "copy", "cat": "copy", "unmodeled": "unmodeled",
}  # fmt: skip


def _forward_name(family: str) -> str:
    return "conv forward" if family == "conv" else family


def _is_broadcast(op: Op) -> bool:
    """True if the gradient of an input is one number for many elements, which its reader can broadcast."""
    return op.name in {"mean", "sum"}


def _is_normalized(value: Value) -> bool:
    """True if a norm reads the value, so that the backward pass needs it again."""
    return any(use.op.kind in {"batch norm", "norm"} for use in value.uses)

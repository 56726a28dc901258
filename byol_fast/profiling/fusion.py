"""Groups of pointwise operations that inductor fuses into one kernel.

A group ends where its value is needed by another kind of operation, or by several. Batch norm counts as pointwise here:
it normalizes with statistics that a separate pass has computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from byol_fast.profiling.layers import Op, Use, Value


@dataclass(frozen=True, slots=True)
class Group:
    """Pointwise operations that end in one value."""

    out: Value
    ops: list[Op]
    leaves: list[Use]
    """The values that the group reads, each once."""


def joins(op: Op | None) -> bool:
    """True if an operation becomes part of a group."""
    return op is not None and op.kind in {"batch norm", "norm", "pointwise", "copy"}


def is_stored(value: Value) -> bool:
    """True if a pointwise result has to be in memory: its reader is not a single pointwise operation."""
    if value.is_output or len(value.uses) != 1:
        return True
    reader = value.uses[0].op
    return not joins(reader) or reader.kind == "batch norm"


def build_group(out: Value) -> Group:
    """The group of operations that is computed together with a value."""
    ops: list[Op] = []
    leaves: dict[int, Use] = {}

    def visit(op: Op) -> None:
        for use in op.inputs:
            producer = use.value.producer
            if producer is not None and joins(producer) and not is_stored(use.value):
                visit(producer)
            elif id(use.value) not in leaves or leaves[id(use.value)].numel < use.numel:
                leaves[id(use.value)] = use
        ops.append(op)

    assert out.producer is not None
    visit(out.producer)
    return Group(out, ops, list(leaves.values()))


def branch_inputs(group: Group) -> set[int]:
    """Ids of inputs whose gradient is the group's own, unchanged: the branches of a sum."""
    branches: set[int] = set()
    members = {id(op.output): op for op in group.ops}

    def visit(op: Op) -> None:
        is_last = op is group.ops[-1] and op.name in {"relu", "hardtanh"}
        if not is_last and op.name not in {"add", "clone"}:
            return
        for use in op.inputs:
            inner = members.get(id(use.value))
            if inner is not None:
                visit(inner)
            elif use.numel == group.out.numel and not use.value.is_weight:
                branches.add(id(use.value))

    visit(group.ops[-1])
    return branches


def saved_inputs(group: Group, normalized: set[int]) -> list[Use]:
    """Inputs of a group that its derivatives are computed from.

    Args:
        group: of pointwise operations.
        normalized: ids of the inputs of batch norms, which do not count.
    """
    members = {id(op.output): op for op in group.ops}
    saved: dict[int, Use] = {}

    def add_leaves(use: Use) -> None:
        inner = members.get(id(use.value))
        if inner is None:
            if id(use.value) not in normalized:
                saved[id(use.value)] = use
        else:
            for below in inner.inputs:
                add_leaves(below)

    for op in group.ops:
        if op.kind == "batch norm" or op.saved == "nothing" or (op is group.ops[-1] and op.saved == "output"):
            continue
        for use in op.inputs:
            other_needs_grad = any(o.value.needs_grad for o in op.inputs if o is not use)
            if op.saved != "others" or other_needs_grad:
                add_leaves(use)
    return list(saved.values())

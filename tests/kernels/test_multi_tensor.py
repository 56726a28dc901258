"""Plans of multi-tensor launches: layouts, contents of the tables, when they are rebuilt."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byol_kernels import _multi_tensor as mt
from byol_kernels import layout
from tests.kernels.numerics import randn


def addresses(x: Tensor) -> list[int]:
    """Offset of each element, in the order of its index."""
    ranges = (range(n) for n in x.shape)
    return [sum(i * s for i, s in zip(index, x.stride(), strict=True)) for index in itertools.product(*ranges)]


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    stride = [draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12])) for _ in shape]
    return torch.empty(300).as_strided(shape, stride)


@settings(max_examples=150, deadline=None)
@given(strided())
def test_dense_tensor_covers_each_address_once(x: Tensor) -> None:
    assert layout.is_dense(x) == (sorted(addresses(x)) == list(range(x.numel())))


@settings(max_examples=150, deadline=None)
@given(strided(), st.data())
def test_same_layout_means_equal_addresses(x: Tensor, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(x.dim())))
    y = torch.empty(300).as_strided(x.shape, [x.stride(i) for i in order])
    if layout.same_layout(x, y):
        assert addresses(x) == addresses(y)
    elif x.numel():
        assert addresses(x) != addresses(y)


def test_permuted_dense_tensor_is_dense() -> None:
    x = randn((2, 3, 4, 5), 0)
    assert all(layout.is_dense(x.permute(order)) for order in itertools.permutations(range(4)))
    assert not layout.is_dense(x[:, ::2]) and not layout.is_dense(x[..., :4]) and layout.is_dense(x[1])


@pytest.fixture
def lists() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    sizes = [(5000,), (0,), (3, 4), (8192,), ()]
    yield [randn(s, i) for i, s in enumerate(sizes)], [randn(s, 9, torch.bfloat16) for s in sizes]


def columns(target: list[Tensor], online: list[Tensor], rows: list[int] | None = None) -> list[mt.Column]:
    picked = None if rows is None else tuple(rows)
    return [mt.Column("target", target, written=True), mt.Column("online", online, picked)]


def test_tables_cover_every_element_once(lists: tuple[list[Tensor], list[Tensor]]) -> None:
    target, online = lists
    first = [False, False, False, True, True]
    plan = mt.plan_for(
        "test", lists_to_columns := columns(target, online), adapted_first=first, flags=[7, 8, 9, 10, 11]
    )
    tables = plan.tables(lists_to_columns)
    assert plan.dtype_combos == ((torch.float32, torch.bfloat16),)
    assert plan.num_chunks == len(tables.chunks) == 2 + 0 + 1 + 2 + 1 and plan.num_adapted_chunks == 3
    covered = {row: [chunk for r, chunk in tables.chunks.tolist() if r == row] for row in range(5)}
    assert covered == {0: [0, 1], 1: [], 2: [0], 3: [0, 1], 4: [0]}
    assert {row for row, _ in tables.chunks[:3].tolist()} == {3, 4}
    numel, _, first_chunk, flags = tables.rows.t().tolist()
    assert numel == [5000, 0, 12, 8192, 1] and flags == [7, 8, 9, 10, 11]
    assert all(tables.chunks[first_chunk[row]].tolist() == [row, 0] for row in (0, 2, 3, 4))
    assert tables.addresses.tolist() == [[t.data_ptr() for t in tensors] for tensors in (target, online)]


def test_rows_without_a_partner_have_address_zero(lists: tuple[list[Tensor], list[Tensor]]) -> None:
    target, online = lists
    some = columns(target, [online[3], online[0]], rows=[3, 0])
    addresses = mt.plan_for("test", some).tables(some).addresses.tolist()
    assert addresses[1] == [online[0].data_ptr(), 0, 0, online[3].data_ptr(), 0]


def test_tables_are_rebuilt_only_after_a_change(
    lists: tuple[list[Tensor], list[Tensor]],
) -> None:
    target, online = lists
    first = mt.plan_for("test", columns(target, online))
    before = first.tables(columns(target, online))
    again = mt.plan_for("test", columns(target, online))
    assert again is first and again.tables(columns(target, online)).addresses is before.addresses

    old_addresses = before.addresses.clone()
    keep = online[0]
    online[0] = online[0].clone()  # as a gradient of the next step
    moved = mt.plan_for("test", columns(target, online))
    after = moved.tables(columns(target, online))
    assert moved is first and after.rows is before.rows and after.chunks is before.chunks
    assert after.addresses[1, 0] == online[0].data_ptr() != keep.data_ptr()
    # A launch in flight still reads the old table, so that one must be as it was.
    assert torch.equal(before.addresses, old_addresses)

    online[0] = online[0].float()
    assert mt.plan_for("test", columns(target, online)).dtype_combos == (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    )


def test_invalid_call_is_checked_again(lists: tuple[list[Tensor], list[Tensor]]) -> None:
    target, online = lists
    mt.plan_for("test", columns(target, online))
    for _ in range(2):  # the second time must not find the refused lists known
        with pytest.raises(ValueError, match="must not share memory"):
            mt.plan_for("test", columns(target, [target[0], *online[1:]]))


def test_number_of_plans_is_bounded() -> None:
    kept = [([randn((3,), i)], [randn((3,), i)]) for i in range(mt._MAX_PLANS + 5)]
    for target, online in kept:
        mt.plan_for("bounded", columns(target, online))
    assert len(mt._plans) <= mt._MAX_PLANS


def test_written_tensor_inside_a_strided_one_raises() -> None:
    whole = randn((4, 8), 0)
    with pytest.raises(ValueError, match=r"target\[0\] must not share memory with online\[0\]"):
        mt.plan_for("test", columns([whole[1]], [whole.view(8, 4)[:, 0]]))


def test_captured_plan_keeps_its_tables(lists: tuple[list[Tensor], list[Tensor]]) -> None:
    """A CUDA graph reads the tables of the warm-up if nothing moved, else its own."""
    target, online = lists
    warm = mt.plan_for("test", columns(target, online))
    tables = warm.tables(columns(target, online))
    captured = warm.for_capture(columns(target, online), (), ())
    assert captured.tables(columns(target, online)).addresses is tables.addresses
    assert captured.dtype_combos == warm.dtype_combos and captured.num_chunks == warm.num_chunks

    online[0] = (old := online[0]).clone()  # the graph's own gradient
    moved = warm.for_capture(columns(target, online), (), ())
    its_tables = moved.tables(columns(target, online))
    assert its_tables.addresses[1, 0] == online[0].data_ptr()
    assert its_tables.chunks is tables.chunks
    # Eager calls after the capture change neither.
    mt.plan_for("test", columns(target, [old, *online[1:]]))
    assert its_tables.addresses[1, 0] == online[0].data_ptr()
    assert captured.workspace("arrival_counters", 3, torch.int32, torch.device("cpu")) is not warm.workspace(
        "arrival_counters", 3, torch.int32, torch.device("cpu")
    )

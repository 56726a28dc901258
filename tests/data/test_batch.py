"""Buffers of views: networks take the views stacked without a copy."""

from __future__ import annotations

import itertools

import pytest
import torch

from byol_fast.data.batch import copy_views, empty_views
from byol_fast.models.base import stack_views
from tests.data.helpers import CPU


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([6], [1]),
        ([6, 6], [2]),
        ([6, 6, 4, 4, 4], [2, 3]),
        ([6, 8, 4], [1, 1, 1]),
        ([6, 4, 4], [1, 2]),
        ([6, 6, 6], [3]),
    ],
)
def test_empty_views_of_one_size_stack_without_a_copy(sizes: list[int], runs: list[int]) -> None:
    views = empty_views(sizes, 4, device=CPU)
    for number, (view, size) in enumerate(zip(views, sizes, strict=True)):
        assert view.shape == (4, 3, size, size) and view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        view.fill_(number)
    numbers = iter(range(len(sizes)))
    for run in (list(itertools.islice(numbers, length)) for length in runs):
        stacked = stack_views(views[run[0] : run[-1] + 1])
        assert stacked.data_ptr() == views[run[0]].data_ptr()
        assert stacked.untyped_storage().nbytes() == stacked.nbytes
        assert stacked[:, 0, 0, 0].tolist() == [number for number in run for _ in range(4)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_copied_views_stack_without_a_copy(memory_format: torch.memory_format) -> None:
    views = tuple(torch.randn(4, 3, size, size).contiguous(memory_format=memory_format) for size in (6, 6, 4, 4))
    copies = copy_views(views)
    assert all(
        torch.equal(copy, view) and copy.stride() == view.stride() for copy, view in zip(copies, views, strict=True)
    )
    for run in (slice(0, 2), slice(2, 4)):
        assert copies[run][0].data_ptr() != views[run][0].data_ptr()
        assert stack_views(copies[run]).data_ptr() == copies[run][0].data_ptr()

"""Buffers of views: networks take the views stacked without a copy."""

from __future__ import annotations

import pytest
import torch

from byol_fast.data.batch import copy_views, empty_views
from byol_fast.models.base import stack_views
from tests.data.helpers import CPU


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_empty_views_stack_without_a_copy(num_views: int) -> None:
    views = empty_views(num_views, 4, 6, device=CPU)
    for number, view in enumerate(views):
        assert view.shape == (4, 3, 6, 6) and view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        view.fill_(number)
    stacked = stack_views(views)
    assert stacked.data_ptr() == views[0].data_ptr()
    assert stacked[:, 0, 0, 0].tolist() == [number for number in range(num_views) for _ in range(4)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_copied_views_stack_without_a_copy(memory_format: torch.memory_format) -> None:
    views = tuple(torch.randn(4, 3, 6, 6).contiguous(memory_format=memory_format) for _ in range(2))
    copies = copy_views(views)
    assert all(
        torch.equal(copy, view) and copy.stride() == view.stride() for copy, view in zip(copies, views, strict=True)
    )
    assert copies[0].data_ptr() != views[0].data_ptr()
    assert stack_views(copies).data_ptr() == copies[0].data_ptr()

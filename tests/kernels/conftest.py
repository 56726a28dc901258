"""Devices of the kernel tests.

The same tests run in three places. In an ordinary session they run on the CPU, against the plain PyTorch operators, and
with `-m gpu` on a GPU, against the compiled kernels. `test_interpreter.py` starts a second session with
`TRITON_INTERPRET=1`, in which this file puts the kernels in the place of the CPU operators: public functions, autograd
and the optimizer then run the kernels' own code, on CPU tensors.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from byol_kernels.augment_params.kernels import sample_view_params_cuda
from byol_kernels.blur.kernels import gaussian_blur_cuda
from byol_kernels.crop.kernels import resized_crop_cuda
from byol_kernels.ema.ops import _ema_update_cuda
from byol_kernels.lars.ops import _lars_step_cuda
from byol_kernels.loss import kernels as loss_kernels
from byol_kernels.loss import ops as loss
from byol_kernels.max_pool import kernels as max_pool
from byol_kernels.photometric.ops import photometric_cuda
from byol_kernels.running_stats.ops import _update_running_stats_cuda
from tests.gpu import DEVICE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    _override = torch.library.Library("byol_kernels", "IMPL")  # type: ignore[no-untyped-call]
    for _name, _launcher in {
        "normalized_mse_fwd": loss._normalized_mse_fwd_cuda,
        "normalized_mse_stats_fwd": loss._normalized_mse_stats_fwd_cuda,
        "normalized_mse_bwd": loss._normalized_mse_bwd_cuda,
        "ema_update_": _ema_update_cuda,
        "lars_step_": _lars_step_cuda,
        "update_running_stats_": _update_running_stats_cuda,
        "photometric_out": photometric_cuda,
        "gaussian_blur": gaussian_blur_cuda,
        "resized_crop": resized_crop_cuda,
        "max_pool2d_3x3_fwd": max_pool.max_pool2d_3x3_fwd_cuda,
        "max_pool2d_3x3_bwd": max_pool.max_pool2d_3x3_bwd_cuda,
        "sample_view_params": sample_view_params_cuda,
    }.items():
        partial(_override.impl, allow_override=True)(_name, _launcher, "CPU")


@pytest.fixture(params=["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu("kernels"), id="gpu")])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread_and_poisoned_memory() -> Iterator[None]:
    """`torch.empty` holds NaN, so an element that a kernel forgets to write is not right by accident."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Not `torch.use_deterministic_algorithms`, which imports the compiler: seconds for every process.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def few_loss_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take several programs, of several tiles each."""
    monkeypatch.setattr(loss_kernels, "MAX_PROGRAMS_PER_VIEW", 4)
    monkeypatch.setattr(loss_kernels, "MAX_PROGRAMS_PER_VIEW_WITH_STATS", 3)


class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that reach the device while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


not_interpreted = pytest.mark.skipif(INTERPRETED, reason="says nothing about a kernel's arithmetic")

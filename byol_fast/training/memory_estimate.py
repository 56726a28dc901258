"""Memory of a training step, estimated without allocating it.

The step runs on fake tensors, which have shapes and no values: the networks of the configuration, forward and backward,
in eager mode. Every operation's outputs are counted as long as their storages are alive, so activations that several
tensors share count once, and the peak includes the target's pass, temporary tensors and recomputed activations.
Working memory inside an operation (of cuDNN, oneDNN) and what an allocator loses to fragmentation are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.config import Config
from byol_fast.data.batch import empty_views
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.base import SSLModel
from byol_fast.models.builder import model_without_values
from byol_fast.training.lowp_weights import LowPrecisionWeights
from byol_fast.utils.errors import reason
from byol_fast.utils.precision import Precision
from byol_kernels import max_pool2d_3x3

aten = torch.ops.aten
GIB = 2**30
_STATES = {"lars": 1, "sgd": 1, "adam": 2, "adamw": 2}
"""Tensors that an optimizer keeps for each parameter."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the tensors of a training step in eager mode, on its device; batches that wait are not counted."""

    weights: int
    """Parameters and buffers of all networks, and low-precision copies."""
    optimizer: int
    """State of the optimizer."""
    activations: int
    """Tensors of a batch that the forward pass keeps for the backward pass."""
    backward: int
    """Gradients and temporary tensors at the time when most memory is in use."""

    @property
    def total(self) -> int:
        """Peak of a step."""
        return self.weights + self.optimizer + self.activations + self.backward

    def __str__(self) -> str:
        parts = (
            f"{name} {size / GIB:.2f}"
            for name, size in (
                ("weights", self.weights),
                ("optimizer", self.optimizer),
                ("activations", self.activations),
                ("gradients and temporaries", self.backward),
            )
        )
        return f"{self.total / GIB:.2f} GiB for a step ({', '.join(parts)})"


def estimate_memory(
    config: Config, device_type: str, precision: Precision, *, num_processes: int = 1
) -> MemoryEstimate:
    """Estimate the memory of a training step in eager mode; a GPU need not be present.

    The random number generators stay as they are.

    Args:
        config: of the run.
        device_type: "cuda" or "cpu".
        precision: of the networks.
        num_processes: of the run; gradients of several stay in memory.

    Raises:
        Exception: of any type, if the networks cannot run on tensors without values.
    """
    dtype, on_gpu = precision.autocast_dtype, device_type == "cuda"
    model = model_without_values(config)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
        if on_gpu:
            _use_gpu_layers(model, dtype)
    if config.activation_checkpointing:
        checkpoint_blocks(model.encoder)

    keeps_gradients = num_processes > 1 or config.grad_accum_steps > 1
    has_copies = dtype is not None and config.optim.name == "lars" and not keeps_gradients
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a layer may make constants of its own
    _replace_tensors(model, mode)
    with mode, _StorageMeter() as meter, _CUDAAutocast() if on_gpu and dtype is not None else nullcontext():
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        copies = LowPrecisionWeights(model.networks(), dtype) if dtype is not None and has_copies else None
        weights = meter.allocated
        views = empty_views([view.size for view in config.view_configs], config.batch_size, device=torch.device("cpu"))
        trained = [p for p in model.trainable_parameters() if p.requires_grad]
        for parameter in trained if keeps_gradients else ():
            parameter.grad = torch.empty_like(parameter)
        before = meter.allocated
        with nullcontext() if copies is None else copies.swapped_in():
            with model.collecting_batch_stats(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = model.forward_train(*views).loss
            activations = meter.allocated - before
            loss.backward()  # type: ignore[no-untyped-call]
    return MemoryEstimate(
        weights=weights,
        optimizer=_STATES[config.optim.name] * sum(p.numel() * p.element_size() for p in trained),
        activations=activations,
        backward=meter.peak - weights - sum(view.nbytes for view in views) - activations,
    )


def try_estimate(
    config: Config, device_type: str, precision: Precision, *, num_processes: int = 1
) -> MemoryEstimate | str:
    """`estimate_memory`, or the reason why there is no estimate."""
    try:
        return estimate_memory(config, device_type, precision, num_processes=num_processes)
    except Exception as error:  # an encoder may fail in any way; if it is invalid, building it raises the same error
        return reason(error)


def _use_gpu_layers(model: SSLModel, dtype: torch.dtype | None) -> None:
    """Convert layers as for a GPU; fake tensors on a CPU take the GPU's paths."""
    from byol_fast.models import gpu_tuning  # imports torchvision's models, a second

    for network in model.networks():
        gpu_tuning.tune_for_gpu(network)
        for module in network.modules():
            if isinstance(module, gpu_tuning.GatherMaxPool2d):
                object.__setattr__(module, "forward", max_pool2d_3x3)
            elif isinstance(module, gpu_tuning.SpaceToDepthConv2d) and dtype is not None:
                object.__setattr__(module, "forward", partial(_space_to_depth, module, dtype))


def _space_to_depth(conv: nn.Conv2d, dtype: torch.dtype, x: Tensor) -> Tensor:
    from byol_fast.models.gpu_tuning import space_to_depth_conv

    return space_to_depth_conv(x.to(dtype), conv.weight.to(dtype), conv.bias)


def _replace_tensors(model: SSLModel, mode: FakeTensorMode) -> None:
    """Replace tensors by fake ones on a CPU, which autocast casts as it casts others."""
    fakes: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            new: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[tensor] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return fakes[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the sizes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._remove, key, size))
            self.allocated += size
            self.peak = max(self.peak, self.allocated)

    def _remove(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.allocated -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = _SHORTCUTS.get(func, func)(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, Tensor):
                self.add(output)
        return outputs


def _batch_norm_out(*_: object, out: Tensor, save_mean: Tensor, save_invstd: Tensor) -> tuple[Tensor, ...]:
    return out, save_mean, save_invstd


def _batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needed = rest[-1]
    vectors = [x.new_empty(x.shape[1]) if needs else None for needs in needed[1:]]
    return torch.empty_like(dy) if needed[0] else None, vectors[0], vectors[1]


# Torch computes the shapes of these, which most operations of a ResNet's step are, slowly.
_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.out: _batch_norm_out,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class _CUDAAutocast(TorchFunctionMode):
    """Casts the inputs of norms and softmax to fp32, as autocast does on a GPU and not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FP32_ON_GPU:
            args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **(kwargs or {}))


_FP32_ON_GPU = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax}

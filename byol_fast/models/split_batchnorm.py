"""Split batch norm: one pass of stacked views through a network, with batch statistics for each view.

BYOL normalizes each view by its own statistics. Passing `[view1; view2]` through a network at once is faster than
passing one after the other. The result is the same if every batch norm takes statistics for each view separately and
updates its running statistics once per view, the first view first:

    mean_v = mean over view v;  var_v = biased variance of view v
    y = (x - mean_v) / sqrt(var_v + eps) * gamma + beta
    running = (1 - momentum) running + momentum (mean_v, unbiased var_v)        for v = 1, 2, ...

`convert_split_batchnorm` makes a network's batch norms do that, in place: parameters, buffers and their names stay.
With `convert_sync_batchnorm` the statistics are taken over all processes, as by `nn.SyncBatchNorm`, on CPUs too.

A model used on its own updates its running statistics in the forward pass, as `torch.nn` does. A training step may
still be skipped after the forward pass: it collects the statistics of the batch instead (`num_splits(...,
batch_stats=[])`) and updates all running statistics at once if the step is not skipped
(`training/running_stats.py`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from byol_fast.models.split_batchnorm_layers import (
    ChunkedBatchNorm,
    SplitBatchNormBase,
    class_for,
    convert_module,
    num_splits,
    original_class,
)
from byol_fast.utils.errors import reason

# float64 roundings differ by 1e-13 and less even behind tens of layers; another function differs by far more.
SAME = 1e-6


def convert_split_batchnorm(network: nn.Module, example: Tensor | None = None) -> str | None:
    """Convert a network's batch norms to split batch norms, in place; set the number of views with `num_splits`.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.
        example: images as the network takes them, `[2, C, H, W]` or more. With it the conversion is tried on a copy
            first, which finds batch normalization that is not a module, and anything else that mixes images.

    Returns:
        None, or the reason why the network cannot take stacked views; it is then unchanged.
    """
    reason = _unsupported_reason(network)
    if reason is None and example is not None:
        reason = _find_mismatch(network, example)
    if reason is None:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                convert_module(module)
    return reason


def revert_split_batchnorm(network: nn.Module) -> None:
    """Give the converted layers of a network their original classes, in place.

    Undoes `convert_split_batchnorm` and `convert_sync_batchnorm`, and the faster convolutions, poolings and blocks of a
    training run. Other programs can then trace the network (`torch.fx`, `torch.jit`) or change its layers.

    Args:
        network: any network; parameters and buffers stay as they are.

    Raises:
        ValueError: the class of a converted layer was changed since the conversion. Nothing is changed then.
    """
    plain: dict[nn.Module, Any] = {}
    for module in network.modules():
        if isinstance(module, SplitBatchNormBase):
            plain[module] = original_class(module)
        elif "plain_class" in vars(type(module)):  # of the classes of `gpu_tuning` and `cpu_tuning`
            plain[module] = vars(type(module))["plain_class"]
    for module, kind in plain.items():
        if isinstance(module, SplitBatchNormBase):
            for name in SplitBatchNormBase.OWN_ATTRIBUTES:
                module.__dict__.pop(name, None)
        module.__class__ = kind


def convert_sync_batchnorm(network: nn.Module) -> None:
    """Convert a network's batch norms to take statistics over all processes, in place.

    Works with or without `convert_split_batchnorm`. Has no effect until `torch.distributed` is initialized.

    Args:
        network: any network; names, dtypes and values of its parameters and buffers stay what they are.

    Raises:
        ValueError: a layer has a batch normalization of its own.
    """
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    for name, module in norms:
        if issubclass(class_for(module), ChunkedBatchNorm):
            raise ValueError(
                f"sync_batchnorm: {name or 'the network'} must be a batch norm of torch.nn or timm, got "
                f"{type(module).__name__} with a forward of its own; turn sync_batchnorm off"
            )
    for _, module in norms:
        convert_module(module).synchronized = True


def disable_sync(network: nn.Module) -> None:
    """Undo `convert_sync_batchnorm`, for passes that only one process makes."""
    for module in network.modules():
        if isinstance(module, SplitBatchNormBase):
            module.synchronized = False


def convert_recomputable(network: nn.Module) -> None:
    """Convert a network's batch norms where possible, in place, for one view per batch.

    Their running statistics then count a batch once, though activation checkpointing passes it twice.

    Args:
        network: any network.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and _unsupported_reason(module) is None:
            convert_module(module)


def index_layers(networks: Sequence[nn.Module]) -> list[SplitBatchNormBase]:
    """Batch norms whose statistics can be collected, each with its position in the list as `index`.

    These are the ones that keep running statistics and compute them as `torch.nn` does.

    Args:
        networks: changed in place: these batch norms become split batch norms.
    """
    modules = {module: None for network in networks for module in network.modules()}  # each once, in order
    layers = [convert_module(m) for m in modules if isinstance(m, _BatchNorm) and _can_collect(m)]
    for index, layer in enumerate(layers):
        layer.index = index
    return layers


def _can_collect(module: _BatchNorm) -> bool:
    if module.running_mean is None or not module.track_running_stats or nn.parameter.is_lazy(module.running_mean):
        return False
    return not issubclass(class_for(module), ChunkedBatchNorm) and getattr(module, "process_group", None) is None


def _unsupported_reason(network: nn.Module) -> str | None:
    """The first layer that is known not to support stacked views, and why."""
    for name, module in network.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and any(
            p is not None and nn.parameter.is_lazy(p) for p in (module.weight, module.running_mean)
        ):
            return f"{what} does not know its channels yet"
        if getattr(module, "process_group", None) is not None:
            return f"{what} has a process group of its own"
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            return f"{what} updates its running statistics once per call"
        if type(module).__name__ == "StochasticDepth" and getattr(module, "mode", "") == "batch":
            return f"{what} draws one random number per batch"
    return None


def _find_mismatch(network: nn.Module, example: Tensor) -> str | None:
    """Difference between stacked and separate views, tried on copies in float64 and train mode; None if equal."""
    if example.is_meta:
        return "it has no values on the meta device, with which it could be tried"
    views = torch.randn(2, *example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = views.to(example.device)
    separate, stacked = (_without_dropout(copy.deepcopy(network).double().train()) for _ in range(2))
    convert_split_batchnorm(stacked)
    states = _rng_states(example.device)
    try:
        with torch.no_grad():
            expected = [_tensors(separate(view)) for view in views]
            with num_splits(stacked, 2):
                result = [t.chunk(2) for t in _tensors(stacked(views.flatten(0, 1)))]
    except Exception as error:
        return f"it could not be tried in float64 ({reason(error)})"
    for first, second, both in zip(*expected, result, strict=True):
        if not (_same(first, both[0]) and _same(second, both[1])):
            return "its outputs differ when the views pass at once: something in it mixes images, or is random"
    for (name, a), b in zip(separate.named_buffers(), stacked.buffers(), strict=True):
        if not _same(a, b):
            return f"its buffer {name} differs when the views pass at once"
    if states != _rng_states(example.device):  # the outputs may be equal by chance
        return "it draws random numbers for a whole batch"
    return None


def _rng_states(device: torch.device) -> list[object]:
    """States of the random number generators that a network on a device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [random.getstate(), *(state.numpy().tobytes() for state in states)]


def _without_dropout(network: nn.Module) -> nn.Module:
    """Turn dropout off: stacked views draw other random numbers, which is not a mismatch."""
    for module in network.modules():
        for probability in ("p", "drop_prob"):
            if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
                setattr(module, probability, 0.0)
    return network


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):  # also where a constant is infinite, as in a mask of attention
        return True
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= SAME * a.abs().max().clamp_min(1.0))

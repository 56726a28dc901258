"""Item: forms of the layers of a ResNet-50 that take far longer than their memory traffic.

Sizes are those of a step on two views of 256 images of 224 px, bf16 in NHWC memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import Checks, compiled_function, is_small
from benchmarks.gpu.items.kernels import Group, measure_groups
from benchmarks.gpu.items.timing import Case
from byol_fast.bench.numerics import relative_error
from byol_fast.models.gpu_tuning import pairs_to_channels
from byol_kernels import max_pool2d_3x3

aten = torch.ops.aten


def run(context: Context) -> str | None:
    """Time each group in the same rounds as a copy."""
    return measure_groups(
        context,
        {"first convolution": convolution_group, "max pooling": pooling_group, "batch statistics": statistics_group},
    )


def _randn(context: Context, *shape: int) -> Tensor:
    """Normal values of four dimensions, bf16, in NHWC memory."""
    values = torch.randn(shape, device=context.device, dtype=torch.bfloat16)
    return values.contiguous(memory_format=torch.channels_last)


def _images(context: Context) -> int:
    return 4 if is_small(context) else 512


def convolution_group(context: Context, checks: Checks) -> Group:
    """The first convolution, 7 x 7 with stride 2, and its weight's gradient; also with more channels per pixel."""
    x, weight = _randn(context, _images(context), 3, 224, 224), _randn(context, 64, 3, 7, 7) / 8
    forms: dict[str, tuple[Tensor, Tensor, int, int]] = {
        "3 channels": (x, weight, 2, 3),
        "8 channels": (_pad_channels(x, 5), _pad_channels(weight, 5), 2, 3),
        "16 channels, 4 x 4": (pairs_to_channels(x, 4, 2), pairs_to_channels(weight, 1, 0), 1, 0),
    }
    expected = F.conv2d(x, weight, stride=2, padding=3)
    gradient = torch.randn_like(expected)
    cases: dict[str, Case] = {}
    for name, (images, kernel, stride, padding) in forms.items():
        out = F.conv2d(images, kernel, stride=stride, padding=padding)
        checks(f"first convolution: {name}", relative_error([out], [expected]), 1e-2)
        cases[f"{name}, forward"] = _forward(images, kernel, stride, padding)
        cases[f"{name}, gradient of the weight"] = _weight_gradient(gradient, images, kernel, stride, padding)
    return Group(cases, dict.fromkeys(cases, 2.0 * (x.numel() + expected.numel())), images=len(x))


def _pad_channels(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, channels)).contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Case:
    return lambda: F.conv2d(x, weight, stride=stride, padding=padding)


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Case:
    rest = ([0], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False])
    return lambda: aten.convolution_backward(gradient, x, weight, *rest)


def pooling_group(context: Context, checks: Checks) -> Group:
    """Max pooling, 3 x 3 with stride 2, and its gradient: by the kernels of torch, of inductor and of byol_kernels."""
    x = _randn(context, _images(context), 64, 112, 112).requires_grad_()

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    expected = pool(x)
    gradient = torch.randn_like(expected)
    forms = {
        "torch": pool,
        "inductor": compiled_function(context, pool),
        "byol_kernels": max_pool2d_3x3,
    }
    (exact,) = torch.autograd.grad(expected, x, gradient)
    alone = x.detach()
    cases: dict[str, Case] = {
        "torch, forward alone": lambda: pool(alone),
        "byol_kernels, forward alone": lambda: max_pool2d_3x3(alone),
    }
    for name, form in forms.items():
        cases[name] = functools.partial(_with_gradient, form, x, gradient)
        checks(f"max pooling: {name}", relative_error(list(_with_gradient(form, x, gradient)), [exact]), 1e-2)
    # Values have 2 bytes, the places of the maxima, which are written and read again, one.
    forward = {name: 2.0 * (x.numel() + expected.numel()) for name in cases if name.endswith("alone")}
    both = dict.fromkeys(forms, 4.0 * x.numel() + 6.0 * expected.numel())
    return Group(cases, forward | both, images=len(x))


def _with_gradient(pool: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(pool(x), x, gradient)


def statistics_group(context: Context, checks: Checks) -> Group:
    """Mean and variance of each channel and view, compiled: by `var_mean`, and by two sums about zero."""
    images = _images(context)
    x = _randn(context, images, 256, 56, 56)

    def by_variance(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.view(2, images // 2, *x.shape[1:]).to(dtype), [1, 3, 4], correction=0)
        return var, mean

    def by_sums(x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.view(2, images // 2, *x.shape[1:]).float()
        mean = values.mean([1, 3, 4])
        return values.square().mean([1, 3, 4]) - mean.square(), mean

    functions: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "var_mean": compiled_function(context, by_variance),
        "two sums": compiled_function(context, by_sums),
    }
    expected = by_variance(x, torch.float64)
    cases: dict[str, Case] = {}
    for name, function in functions.items():
        checks(f"batch statistics: {name}", relative_error(list(function(x)), list(expected)), 1e-3)
        cases[name] = functools.partial(function, x)
    if context.device == "cuda":
        cases["torch.batch_norm_stats"] = lambda: [torch.batch_norm_stats(view, 1e-5) for view in x.chunk(2)]
    return Group(cases, dict.fromkeys(cases, 2.0 * x.numel()), images=images)

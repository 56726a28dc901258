"""Item: every Triton kernel against float64, then a small network's training step in all modes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.item import Context
from benchmarks.gpu.items import smoke_step
from benchmarks.gpu.items.common import Checks
from byol_fast.config import ViewConfig
from byol_fast.data import augment_params
from byol_fast.data.random_numbers import stream_key
from byol_kernels import (
    LARS,
    byol_loss,
    byol_loss_with_stats,
    ema_update_,
    gaussian_blur,
    max_pool2d_3x3,
    photometric,
    resized_crop,
    sample_view_params,
    update_running_stats_,
)
from byol_kernels.photometric.params import VALUES, PhotometricParams
from tests import oracle
from tests.kernels import torchvision_reference as views
from tests.kernels.numerics import TOLERANCES, byol_loss_and_grads, f64, loop_over_pairs, randn, relative_error

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES: tuple[tuple[int, ...], ...] = ((64, 32, 3, 3), (300, 500), (4096,), (37,), (1,))
"""Several chunks, one, and a part of one; in NHWC where there are four dimensions."""


def run(context: Context) -> None:
    """Run all checks.

    Raises:
        AssertionError: a check failed.
    """
    checks = Checks(context)
    of_the_step = (loss, ema, lars, lars_with_found_inf, running_stats, max_pool)
    for part in (*of_the_step, params_and_crop, colors, blur, smoke_step.run):
        part(context, checks)
    if checks:
        raise AssertionError(checks.problem())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ the step's kernels


def loss(context: Context, checks: Checks) -> None:
    """Loss, its gradients and statistics."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((256, 256), (37, 100)):
            p1, p2, z1, z2 = (randn(shape, seed, dtype, device=context.device) for seed in range(4))
            inputs = [p1.requires_grad_(), p2.requires_grad_()]
            value = byol_loss(p1, p2, z1, z2)
            gradients = torch.autograd.grad(value * 1.5, inputs)
            expected, *expected_gradients = byol_loss_and_grads(p1, p2, z1, z2)
            name = f"{shape[0]} x {shape[1]} {_dtype(dtype)}"
            checks(
                f"loss, {name}", abs(float(value.detach()) - expected) / max(expected, 1e-30), TOLERANCES[torch.float32]
            )
            errors = [relative_error(g, 1.5 * e) for g, e in zip(gradients, expected_gradients, strict=True)]
            checks(f"loss gradients, {name}", max(errors), TOLERANCES[dtype])
            p_local = randn((3, *shape), 4, dtype, device=context.device).requires_grad_()
            value = byol_loss(p1, p2, z1, z2, p_local)
            gradients = torch.autograd.grad(value * 1.5, [*inputs, p_local])
            of_loop, _, gradients_of_loop = loop_over_pairs(p1, p2, z1, z2, p_local)
            error = abs(float(value.detach()) / float(of_loop) - 1.0)
            checks(f"loss with local views, {name}", error, TOLERANCES[torch.float32])
            errors = [relative_error(g, 1.5 * f64(e)) for g, e in zip(gradients, gradients_of_loop, strict=True)]
            checks(f"loss gradients with local views, {name}", max(errors), TOLERANCES[dtype])
            _, stats = byol_loss_with_stats(p1, p2, z1, z2)
            unit = [f64(z) / np.linalg.norm(f64(z), axis=1, keepdims=True) for z in (z2, z1)]
            deviation = np.stack([u.std(axis=0) for u in unit])
            checks(f"loss statistics, {name}", relative_error(stats.z_std, deviation), 10 * TOLERANCES[torch.float32])


def _parameters(context: Context, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tensors = [randn(shape, seed + i, dtype, device=context.device) for i, shape in enumerate(SHAPES)]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


def ema(context: Context, checks: Checks) -> None:
    """EMA of a list of tensors, with tau on the device."""
    tau = torch.tensor(0.97, device=context.device)
    for dtype in (torch.float32, torch.bfloat16):
        target, online = _parameters(context, 0), _parameters(context, 10, dtype)
        copies = [torch.zeros_like(t, dtype=torch.bfloat16) for t in target]
        expected = [oracle.ema(f64(t), f64(o), float(np.float32(0.97))) for t, o in zip(target, online, strict=True)]
        ema_update_(target, online, tau, copies=copies)
        errors = [relative_error(t, e) for t, e in zip(target, expected, strict=True)]
        checks(f"EMA from {_dtype(dtype)}", max(errors), TOLERANCES[torch.float32])
        errors = [relative_error(c, f64(t.bfloat16())) for c, t in zip(copies, target, strict=True)]
        checks(f"EMA from {_dtype(dtype)}, bf16 copies", max(errors), 0.0)


class _LARS:
    """Parameters with bf16 gradients, targets for all but the last, and bf16 copies of both."""

    def __init__(self, context: Context) -> None:
        self.params = [nn.Parameter(p) for p in _parameters(context, 0)]
        self.targets = _parameters(context, 10)[:-1]
        self.pairs = dict(zip(self.params, self.targets, strict=False))
        self.copies = {t: torch.zeros_like(t, dtype=torch.bfloat16) for t in (*self.params, *self.targets)}
        self.lr, self.tau = (torch.tensor(value, device=context.device) for value in (0.3, 0.97))
        self.optimizer = LARS(self.params, self.lr, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.02)
        for p in self.params:
            p.grad_dtype = torch.bfloat16

    def step(self, context: Context, seed: int, poisoned: int | None = None) -> None:
        """Take a step with gradients of a seed; the last element of gradient `poisoned` becomes a NaN."""
        for p, gradient in zip(self.params, _parameters(context, seed, torch.bfloat16), strict=True):
            p.grad = gradient
        if poisoned is not None:
            grad = self.params[poisoned].grad
            assert grad is not None
            grad[(-1,) * grad.dim()] = torch.nan
        self.optimizer.step(ema=(self.pairs, self.tau), copies=self.copies)

    def state(self) -> list[Tensor]:
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.params]
        return [*(p.detach() for p in self.params), *momentum, *self.targets, *self.copies.values()]


def lars(context: Context, checks: Checks) -> None:
    """Two steps of LARS with EMA and copies; vectors neither decay nor adapt."""
    case = _LARS(context)
    rate, tau = float(np.float32(0.3)), float(np.float32(0.97))
    params, targets = [f64(p) for p in case.params], [f64(t) for t in case.targets]
    momentum = [np.zeros_like(p) for p in params]
    for seed in (20, 30):
        case.step(context, seed)
        for i, p in enumerate(case.params):
            assert p.grad is not None
            params[i], momentum[i] = oracle.lars_update(
                params[i], f64(p.grad), momentum[i], lr=rate, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.02
            )
        targets = [tau * t + (1 - tau) * p for t, p in zip(targets, params, strict=False)]
    state = case.state()
    expected = [*params, *momentum, *targets]
    errors = [relative_error(a, b) for a, b in zip(state, expected, strict=False)]
    # Twice the tolerance of one step: the second one starts from the rounded result of the first.
    checks("LARS, EMA: parameters, momentum, targets after 2 steps", max(errors), 2 * TOLERANCES[torch.float32])
    errors = [relative_error(copy, f64(t.detach().bfloat16())) for t, copy in case.copies.items()]
    checks("LARS, bf16 copies", max(errors), 0.0)


def lars_with_found_inf(context: Context, checks: Checks) -> None:
    """With found_inf nothing is written; a NaN in any gradient, of a matrix or a vector, sets it."""
    case = _LARS(context)
    case.step(context, 20)
    before = [t.clone() for t in case.state()]
    for poisoned in (None, *range(len(SHAPES))):
        found_inf = torch.full((), float(poisoned is None), device=context.device)
        case.optimizer.found_inf = found_inf
        case.step(context, 30, poisoned)
        changed = sum(not torch.equal(a, b) for a, b in zip(before, case.state(), strict=True))
        name = "set before" if poisoned is None else f"found in gradient {poisoned}"
        checks(f"LARS, found_inf {name}: tensors that changed", changed, 0)
        checks(f"LARS, found_inf {name}: distance from 1", abs(float(found_inf) - 1), 0)


def running_stats(context: Context, checks: Checks) -> None:
    """Two steps of two views each against torch's batch norm in float64, and a step that is skipped."""
    channels = (1, 67, 2048)
    for dtype in (torch.float32, torch.float64):
        norms = [nn.BatchNorm1d(c).to(context.device, dtype) for c in channels]
        exact = [nn.BatchNorm1d(c).double() for c in channels]

        def update(batches: list[Tensor], flag: float, norms: list[nn.BatchNorm1d] = norms) -> None:
            both = [torch.var_mean(x.to(context.device, norms[0].weight.dtype), 1) for x in batches]
            update_running_stats_(
                [norm.get_buffer("running_mean") for norm in norms],
                [norm.get_buffer("running_var") for norm in norms],
                [mean for _, mean in both],
                [var for var, _ in both],
                [norm.num_batches_tracked for norm in norms],
                [norm.momentum for norm in norms],
                found_inf=torch.full((), flag, device=context.device),
            )

        for step in range(2):
            batches = [randn((2, 8, c), 10 * step + i, torch.float64) for i, c in enumerate(channels)]
            update(batches, 0.0)
            for norm, views_of in zip(exact, batches, strict=True):
                for view in views_of:
                    norm(view)
        pairs = [
            (a, b) for x, y in zip(norms, exact, strict=True) for a, b in zip(x.buffers(), y.buffers(), strict=True)
        ]
        errors = [relative_error(a, f64(b)) for a, b in pairs]
        checks(f"running statistics, {_dtype(dtype)}", max(errors), 10 * TOLERANCES[torch.float32])
        before = [a.clone() for a, _ in pairs]
        update([torch.full((2, 8, c), torch.nan) for c in channels], 1.0)
        changed = sum(not torch.equal(a, b) for a, (b, _) in zip(before, pairs, strict=True))
        checks(f"running statistics, {_dtype(dtype)}: tensors that a skipped step changed", changed, 0)


def max_pool(context: Context, checks: Checks) -> None:
    """Max pooling and its gradient, equal to torch's on the CPU: few different values, whose sums are exact."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 64, 56, 56), (3, 20, 33, 47)):
            generator = torch.Generator().manual_seed(0)
            x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            expected = torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)
            upstream = torch.randint(-9, 10, expected.shape, generator=generator).to(dtype)
            (exact,) = torch.autograd.grad(expected, x, upstream)
            here = x.detach().to(context.device).requires_grad_()
            found = max_pool2d_3x3(here)
            (gradient,) = torch.autograd.grad(found, here, upstream.to(context.device))
            unequal = int((found.cpu() != expected).sum() + (gradient.cpu() != exact).sum())
            name = f"{' x '.join(map(str, shape))} {_dtype(dtype)}"
            checks(f"max pooling and its gradient, {name}: values that are not torch's", unequal, 0)


# ------------------------------------------------------------------------------------------------ images


def params_and_crop(context: Context, checks: Checks) -> None:
    """Augmentation parameters, bit for bit equal to numpy's, and crops."""
    view, index = ViewConfig(size=28, blur_p=0.5, solarize_p=0.2), np.arange(2000)
    numbers = torch.from_numpy(augment_params.params_table(view, 40, 36)).to(context.device)
    key = torch.tensor(stream_key(7, 3, 1), device=context.device)
    params = sample_view_params(torch.from_numpy(index).to(context.device), key, numbers, blur_kernel=view.blur_kernel)
    expected = augment_params.sample_augment_params(view, index, seed=7, epoch=3, view=1)
    names = [name for name in params._fields if name != "crop_box"]
    unequal = [n for n in names if not np.array_equal(getattr(params, n).cpu().numpy(), getattr(expected, n))]
    checks("augmentation parameters that are not numpy's", len(unequal), 0)

    images = views.make_images(5, 40, 36)
    box = torch.tensor([[0, 0, 40, 36], [3, 5, 20, 11], [39, 35, 1, 1], [2, 0, 30, 36]])
    rows = torch.tensor([4, 0, 2, 1])
    out = resized_crop(images.to(context.device), box.to(context.device), 28, index=rows.to(context.device)).cpu()
    exact = []
    for i, (top, left, height, width) in zip(rows.tolist(), box.tolist(), strict=True):
        crop = images[i : i + 1, :, top : top + height, left : left + width].double()
        exact.append(torch.nn.functional.interpolate(crop, (28, 28), mode="bicubic", antialias=True))
    difference = (out.double() - torch.cat(exact).clamp(0, 255)).abs()
    if context.device == "cuda":
        checks("crop, levels", float(difference.max()), 0.5 + views.FLOAT32_LEVELS)
    else:  # also rounds between the two passes
        checks("crop, mean of levels", float(difference.mean()), 0.4)


def colors(context: Context, checks: Checks) -> None:
    """Flip, jitter, grayscale and solarize, also normalized to bf16; without blur."""
    names = [name for name in PhotometricParams._fields if name not in {"blur", *VALUES["blur"]}]
    for height, width in ((64, 64), (33, 47)):
        x, p = views.make_images(24, height, width, seed=2), views.set_masks(views.make_params(24, seed=5), blur=False)
        params = views.on(context.device, p, *names)
        expected = views.augment_exactly(x, p)
        levels = 255 * photometric(x.to(context.device), **params, dtype=torch.float32)
        name = f"{height} x {width}"
        checks(f"color, {name}, levels", views.max_error(levels, expected), views.FLOAT32_LEVELS)
        out = photometric(x.to(context.device), **params, dtype=torch.bfloat16, mean=MEAN, std=STD).cpu().double()
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        normalized = (expected / 255 - mean) / std
        allowed = views.FLOAT32_LEVELS / 255 / min(STD) + 2.0**-8 * normalized.abs()
        share = float(((out - normalized).abs() / allowed).max())
        checks(f"color, {name}, bf16, share of the allowed error", share, 1)


def blur(context: Context, checks: Checks) -> None:
    """Blur alone, and as the second launch of the whole augmentation."""
    # Two products of float16 factors on a GPU, each rounded to the nearest level at the end.
    bound = views.FLOAT16_FACTORS if context.device == "cuda" else views.FLOAT32_LEVELS
    for height, width in ((64, 64), (33, 47)):
        x, p = views.make_images(8, height, width), views.make_params(8, seed=1)
        params, exact = views.on(context.device, p, "sigma", "kernel_size"), views.blur(x, p.sigma, p.kernel_size)
        out = gaussian_blur(x.to(context.device), **params)
        checks(f"blur, {height} x {width}, levels", views.max_error(out, exact), 0.5 + bound)
        out = 255 * photometric(x.to(context.device), **params, dtype=torch.float32)
        checks(
            f"blur to float32, {height} x {width}, levels", views.max_error(out, exact), bound + views.FLOAT32_LEVELS
        )

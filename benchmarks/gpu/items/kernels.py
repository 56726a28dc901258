"""Item: the kernels of byol_fast, a copy, the multi-tensor operators of torch, timm and lightly.

Sizes are those of ResNet-50 with the paper's heads, and of 512 images of 224 px: larger than the L2 cache, except for
the loss, whose graph therefore goes through many sets of inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import Checks, compiled_function, free, is_small, set_flags
from benchmarks.gpu.items.timing import Case, captured, figures, interleaved, rounded
from byol_fast.bench import photometric as bench_photometric
from byol_fast.bench.baseline import baseline_loss
from byol_fast.bench.kernels import DECAY, LR, TRUST_COEFFICIENT, LoopLARS, Weights, foreach_ema, timm_ema
from byol_fast.bench.numerics import relative_error
from byol_fast.bench.problem import MOMENTUM, TAU
from byol_fast.utils.env import version
from byol_kernels import LARS, byol_loss, ema_update_, gaussian_blur, photometric

COPY_BYTES = 1 << 28
LOSS_SETS = 128
"""Sets of inputs and gradients, 0.75 MiB each: together larger than the cache."""
IMAGES = 512
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Group(NamedTuple):
    """Candidates that do the same work and were checked to agree."""

    cases: Mapping[str, Case]
    min_bytes: Mapping[str, float]
    """Least number of bytes that each has to read and write."""
    eager: tuple[str, ...] = ()
    """Candidates that cannot be captured because they synchronize with the host."""
    repeats: int = 1
    """Times that one call does the work."""
    images: int | None = None
    """Images that one call processes."""


def run(context: Context) -> str | None:
    """Time each group in the same rounds as a copy."""
    return measure_groups(
        context,
        {
            "LARS and EMA": optimizer_group,
            "EMA": ema_group,
            "loss": loss_group,
            "color": color_group,
            "blur": blur_group,
        },
    )


def measure_groups(context: Context, builders: Mapping[str, Callable[[Context, Checks], Group]]) -> str | None:
    """Build, check and time groups one after the other; return the checks that failed as text.

    Args:
        context: of the item.
        builders: name and builder of each group.
    """
    flags, checks = set_flags(), Checks(context)
    for name, build in builders.items():
        free(context)
        measure(context, name, build(context, checks), flags)
    return checks.problem()


def measure(context: Context, name: str, group: Group, flags: dict[str, str]) -> None:
    """Time a group, captured if possible, and a copy.

    Args:
        context: of the item.
        name: of the group.
        group: candidates.
        flags: of the backends.
    """
    num_bytes = 1 << 16 if is_small(context) else COPY_BYTES
    source = torch.ones(num_bytes, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    cases: dict[str, Case] = {"copy": captured(lambda: target.copy_(source), context.device)}
    modes = {}
    for candidate, case in group.cases.items():
        modes[candidate] = "eager" if candidate in group.eager or context.device == "cpu" else "captured"
        cases[candidate] = case
        if modes[candidate] == "captured":
            try:
                cases[candidate] = captured(case, context.device)
            except RuntimeError as error:
                modes[candidate] = "eager"
                context.record(f"{name}: {candidate}, capture", error=str(error).splitlines()[0][:200])
    timings = interleaved(context, cases)
    copy = 2 * num_bytes / timings["copy"].median if timings["copy"].median > 0 else float("nan")
    context.record(f"{name}: copy", **figures(timings.pop("copy")), gb_per_s=rounded(copy / 1e9))
    for candidate, timing in timings.items():
        seconds = timing.median / group.repeats
        speed = group.min_bytes[candidate] / seconds if seconds > 0 else float("nan")
        context.record(
            f"{name}: {candidate}, {modes[candidate]}",
            **figures(timing, images=group.images, repeats=group.repeats),
            bytes=group.min_bytes[candidate],
            gb_per_s=rounded(speed / 1e9),
            share_of_copy=rounded(speed / copy),
            **flags,
        )


def select_agreeing(
    checks: Checks, name: str, cases: Mapping[str, Case], errors: Mapping[str, float], bounds: Mapping[str, float]
) -> dict[str, Case]:
    """The candidates whose errors are within their bounds: no times are reported for the others.

    Args:
        checks: that record the comparisons.
        name: of the group.
        cases: candidates.
        errors: of the candidates that were compared.
        bounds: of the errors.
    """
    failed = {c for c in errors if not checks(f"{name}: {c}", errors[c], bounds[c])}
    return {candidate: case for candidate, case in cases.items() if candidate not in failed}


# ------------------------------------------------------------------------------------------------ multi-tensor


def _weights(context: Context) -> Weights:
    return Weights(context.device, "resnet18_narrow" if is_small(context) else "resnet50")


def optimizer_group(context: Context, checks: Checks) -> Group:
    """LARS and the EMA of the target, also by timm and lightly. The reference is a loop of torch's operators."""
    w = _weights(context)
    fused = LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST_COEFFICIENT)
    loop = LoopLARS(w.online)
    w.share_momentum(fused)
    w.share_momentum(loop)
    target_of = dict(zip(w.averaged, w.target, strict=True))
    copies = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (*w.online, *w.target)}
    cases: dict[str, Case] = {
        "byol_fast": lambda: fused.step(ema=(target_of, TAU)),
        "byol_fast, with bf16 copies": lambda: fused.step(ema=(target_of, TAU), copies=copies),
    }
    eager: tuple[str, ...] = ()
    if version("timm"):
        from timm.optim.lars import Lars

        timm, ema = _timm_lars(Lars, w), timm_ema(w)
        w.share_momentum(timm)
        cases["timm"] = lambda: (timm.step(), ema())
    if version("lightly"):
        from lightly.models.utils import update_momentum
        from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

        lightly, (online, target) = LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM), w.modules()
        w.share_momentum(lightly)
        cases["lightly"] = lambda: (lightly.step(), update_momentum(online, target, TAU))
        eager = ("lightly",)  # it reads two norms per tensor on the host

    def reference() -> None:
        loop.step()
        foreach_ema(w.target, list(w.averaged))

    expected = w.results_of(reference)
    errors: dict[str, float] = {}
    for name, case in cases.items():
        errors[name] = relative_error(w.results_of(case), expected)
        if name == "byol_fast, with bf16 copies":  # before another candidate changes the weights
            originals = [t.bfloat16() for t in (*w.online, *w.target)]
            errors["bf16 copies"] = relative_error(list(copies.values()), originals)
    # The ratio of timm and lightly is |p| / (|g| + decay |p|), not |p| / |g + decay p|.
    bounds = {name: 1e-5 if name.startswith("byol_fast") else 1e-4 for name in cases}
    cases = select_agreeing(checks, "LARS and EMA", cases, errors, bounds | {"bf16 copies": 0.0})
    num_online, num_target = (sum(t.numel() for t in tensors) for tensors in (w.online, w.target))
    min_bytes = dict.fromkeys(cases, 20.0 * num_online + 8.0 * num_target)
    if "byol_fast, with bf16 copies" in cases:
        min_bytes["byol_fast, with bf16 copies"] += 2.0 * (num_online + num_target)
    return Group(cases, min_bytes, eager)


def _timm_lars(cls: Any, w: Weights) -> torch.optim.Optimizer:
    """LARS of timm over lists of tensors, in versions that have this option."""
    try:
        optimizer: torch.optim.Optimizer = cls(w.groups(), lr=LR, momentum=MOMENTUM, foreach=True)
    except TypeError:
        optimizer = cls(w.groups(), lr=LR, momentum=MOMENTUM)
    return optimizer


def ema_group(context: Context, checks: Checks) -> Group:
    """EMA alone. The reference is `torch._foreach_lerp_`."""
    w = _weights(context)
    online: list[Tensor] = list(w.averaged)
    reference = "torch._foreach_lerp_"
    cases: dict[str, Case] = {
        "byol_fast": lambda: ema_update_(w.target, online, TAU),
        reference: torch.no_grad()(lambda: torch._foreach_lerp_(w.target, online, 1 - TAU)),
        "torch._foreach_mul_, _foreach_add_": lambda: foreach_ema(w.target, online),
    }
    if version("timm"):
        cases["timm"] = timm_ema(w)
    if version("lightly"):
        from lightly.models.utils import update_momentum

        cases["lightly"] = functools.partial(update_momentum, *w.modules(), TAU)
    expected = w.results_of(cases[reference])
    errors = {name: relative_error(w.results_of(case), expected) for name, case in cases.items() if name != reference}
    cases = select_agreeing(checks, "EMA", cases, errors, dict.fromkeys(errors, 1e-6))
    return Group(cases, dict.fromkeys(cases, 12.0 * sum(t.numel() for t in w.target)))


# ------------------------------------------------------------------------------------------------ loss


def loss_group(context: Context, checks: Checks) -> Group:
    """Loss of both directions and its gradients, 256 x 256 in bf16. The reference is the formula in float64."""
    num_sets, batch = (2, 8) if is_small(context) else (LOSS_SETS, 256)
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(num_sets):
        p1, p2, z1, z2 = torch.randn(4, batch, 256, generator=generator).to(context.device, torch.bfloat16)
        sets.append((p1.requires_grad_(), p2.requires_grad_(), z1, z2))
    losses: dict[str, Loss] = {
        "byol_fast": byol_loss,
        "baseline": baseline_loss,
        "baseline, torch.compile": compiled_function(context, baseline_loss),
    }
    if version("lightly"):
        from lightly.loss import NegativeCosineSimilarity

        cosine = NegativeCosineSimilarity()
        losses["lightly"] = lambda p1, p2, z1, z2: 2 * (2 + cosine(p1, z2) + cosine(p2, z1))

    def gradients(loss: Loss, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(*inputs), list(inputs[:2])))

    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in sets[0])
    expected = gradients(baseline_loss, exact)
    errors = {name: relative_error(gradients(loss, sets[0]), expected) for name, loss in losses.items()}

    def through_all(loss: Loss) -> Case:
        def call() -> None:
            for inputs in sets:
                gradients(loss, inputs)  # discarded at once, as a step frees them

        return call

    cases: dict[str, Case] = {name: through_all(loss) for name, loss in losses.items()}
    cases = select_agreeing(checks, "loss", cases, errors, dict.fromkeys(errors, 2e-2))
    return Group(cases, dict.fromkeys(cases, 6.0 * batch * 256 * 2), repeats=num_sets)


# ------------------------------------------------------------------------------------------------ images


def _images(context: Context) -> bench_photometric.Problem:
    return bench_photometric.Problem(2 if is_small(context) else IMAGES, context.device)


def color_group(context: Context, checks: Checks) -> Group:
    """Flip, color, grayscale, solarize and normalize, uint8 to bf16. The reference is torchvision, on eight images."""
    p = _images(context)
    names = ("flip", "jitter", "factors", "order", "grayscale", "solarize")
    params = p.select(*names)
    normalize: dict[str, Any] = {"mean": bench_photometric.MEAN, "std": bench_photometric.STD, "dtype": torch.bfloat16}
    cases: dict[str, Case] = {
        "byol_fast, to bf16": lambda: photometric(p.images, **params, **normalize),
        "byol_fast, to uint8": lambda: photometric(p.images, **params),
    }
    few = range(min(8, p.batch_size))
    values = photometric(
        p.images[: len(few)], **{n: d[: len(few)] for n, d in p.select(*names[1:5]).items()}, truncate=True
    )
    expected = torch.stack([p.color(p.planar[i], i) for i in few])
    # Each operation rounds to whole levels: a value differs where one of its sums is close to a rounding boundary.
    error = float((values != expected).float().mean())
    if not checks("color: share of values that are not torchvision's", error, 2e-3):
        return Group({}, {})
    pixels = float(p.images.numel())
    return Group(cases, {"byol_fast, to bf16": 3 * pixels, "byol_fast, to uint8": 2 * pixels}, images=p.batch_size)


def blur_group(context: Context, checks: Checks) -> Group:
    """Gaussian blur of uint8 images. The reference is torchvision, on eight images."""
    p = _images(context)
    sigma, kernel_size = p.params["sigma"], p.params["kernel_size"]
    wide = torch.full((p.batch_size,), bench_photometric.KERNEL, device=context.device)
    cases: dict[str, Case] = {
        "byol_fast, 3 sigma": lambda: gaussian_blur(p.images, sigma, kernel_size),
        "byol_fast, window of 23": lambda: gaussian_blur(p.images, sigma, wide),
    }
    few = min(8, p.batch_size)
    values = gaussian_blur(p.images[:few], sigma[:few], wide[:few])
    expected = torch.stack([p.blur(p.planar[i], i) for i in range(few)])
    error = float((values.float() - expected.float()).abs().mean())
    # Factors are float16: one value in thirty is close to a rounding boundary and differs by a level.
    if not checks("blur: byol_fast and torchvision, mean difference in levels", error, 1 / 30):
        return Group({}, {})
    return Group(cases, dict.fromkeys(cases, 2.0 * p.images.numel()), images=p.batch_size)

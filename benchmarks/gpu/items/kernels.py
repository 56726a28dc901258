"""Item: byol_fast's kernels beside a copy, torch's own multi-tensor operators, timm and lightly.

Sizes are those of ResNet-50 with the paper's heads, and of 512 images of 224 px. All of it lies well beyond the L2
cache, but for the loss, whose graph goes through many sets of inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import Checks, compiled_function, free, is_small, relative_error, same_flags
from benchmarks.gpu.items.timing import Case, captured, figures, interleaved, rounded
from byol_fast.bench import photometric as bench_photometric
from byol_fast.bench.kernels import (
    DECAY,
    LR,
    MOMENTUM,
    TAU,
    TRUST_COEFFICIENT,
    LoopLARS,
    Weights,
    foreach_ema,
    textbook_loss,
    timm_average,
)
from byol_fast.utils.env import version
from byol_kernels import LARS, byol_loss, ema_update_, gaussian_blur, photometric

COPY_BYTES = 1 << 28
LOSS_SETS = 128
"""Sets of inputs and gradients, 0.75 MiB each: beyond the cache."""
IMAGES = 512
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Group(NamedTuple):
    """Candidates for the same work, checked to agree."""

    cases: Mapping[str, Case]
    moved: Mapping[str, float]
    """Bytes that each has to move at the least."""
    eager: tuple[str, ...] = ()
    """Candidates that no graph can hold: they wait for the device."""
    repeats: int = 1
    """Times that a call does its work."""
    images: int | None = None
    """That a call processes."""


def run(context: Context) -> str | None:
    """Each group beside a copy in the same rounds."""
    flags, checks = same_flags(), Checks(context)
    makers: dict[str, Callable[[Context, Checks], Group]] = {
        "LARS and EMA": optimizer_group,
        "EMA": ema_group,
        "loss": loss_group,
        "color": color_group,
        "blur": blur_group,
    }
    for name, make in makers.items():
        free(context)
        measure(context, name, make(context, checks), flags)
    return checks.problem()


def measure(context: Context, name: str, group: Group, flags: dict[str, str]) -> None:
    """Time a group, captured where it can be, and a copy.

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
    how = {}
    for candidate, case in group.cases.items():
        how[candidate] = "eager" if candidate in group.eager or context.device == "cpu" else "captured"
        cases[candidate] = case
        if how[candidate] == "captured":
            try:
                cases[candidate] = captured(case, context.device)
            except RuntimeError as error:
                how[candidate] = "eager"
                context.record(f"{name}: {candidate}, capture", error=str(error).splitlines()[0][:200])
    timings = interleaved(context, cases)
    copy = 2 * num_bytes / timings["copy"].median if timings["copy"].median > 0 else float("nan")
    context.record(f"{name}: copy", **figures(timings.pop("copy")), gb_per_s=rounded(copy / 1e9))
    for candidate, timing in timings.items():
        seconds = timing.median / group.repeats
        speed = group.moved[candidate] / seconds if seconds > 0 else float("nan")
        context.record(
            f"{name}: {candidate}, {how[candidate]}",
            **figures(timing, images=group.images, repeats=group.repeats),
            bytes=group.moved[candidate],
            gb_per_s=rounded(speed / 1e9),
            share_of_copy=rounded(speed / copy),
            **flags,
        )


def agreeing(
    checks: Checks, name: str, cases: Mapping[str, Case], errors: Mapping[str, float], bounds: Mapping[str, float]
) -> dict[str, Case]:
    """The candidates whose error is within its bound: no time is reported of the others.

    Args:
        checks: where they are compared.
        name: of the group.
        cases: candidates.
        errors: of each that was compared.
        bounds: of each.
    """
    bad = {c for c in errors if not checks(f"{name}: {c}", errors[c], bounds[c])}
    return {candidate: case for candidate, case in cases.items() if candidate not in bad}


# ------------------------------------------------------------------------------------------------ multi-tensor


def _weights(context: Context) -> Weights:
    return Weights(context.device, "resnet18_narrow" if is_small(context) else "resnet50")


def optimizer_group(context: Context, checks: Checks) -> Group:
    """LARS and the average of the target; by timm and lightly too. The judge is LARS as a loop of torch's operators."""
    w = _weights(context)
    fused = LARS(w.online, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST_COEFFICIENT)
    plain = LoopLARS(w.online)
    w.share(fused)
    w.share(plain)
    target_of = dict(zip(w.followed, w.target, strict=True))
    copies = {t: torch.empty_like(t, dtype=torch.bfloat16) for t in (*w.online, *w.target)}
    cases: dict[str, Case] = {
        "byol_fast": lambda: fused.step(ema=(target_of, TAU)),
        "byol_fast, with bf16 copies": lambda: fused.step(ema=(target_of, TAU), copies=copies),
    }
    eager: tuple[str, ...] = ()
    if version("timm"):
        from timm.optim.lars import Lars

        timm, average = _timm(Lars, w), timm_average(w)
        w.share(timm)
        cases["timm"] = lambda: (timm.step(), average())
    if version("lightly"):
        from lightly.models.utils import update_momentum
        from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

        lightly, (online, target) = LightlyLARS(w.groups(), lr=LR, momentum=MOMENTUM), w.modules()
        w.share(lightly)
        cases["lightly"] = lambda: (lightly.step(), update_momentum(online, target, TAU))
        eager = ("lightly",)  # it asks for two norms of each tensor

    def judge() -> None:
        plain.step()
        foreach_ema(w.target, list(w.followed))

    expected = w.after(judge)
    errors: dict[str, float] = {}
    for name, case in cases.items():
        errors[name] = relative_error(w.after(case), expected)
        if name == "byol_fast, with bf16 copies":  # before another candidate moves what they are copies of
            originals = [t.bfloat16() for t in (*w.online, *w.target)]
            errors["bf16 copies"] = relative_error(list(copies.values()), originals)
    # timm's and lightly's ratio is of |p| to |g| + decay |p| and not to |g + decay p|.
    bounds = {name: 1e-5 if name.startswith("byol_fast") else 1e-4 for name in cases}
    cases = agreeing(checks, "LARS and EMA", cases, errors, bounds | {"bf16 copies": 0.0})
    num_online, num_target = (sum(t.numel() for t in tensors) for tensors in (w.online, w.target))
    moved = dict.fromkeys(cases, 20.0 * num_online + 8.0 * num_target)
    if "byol_fast, with bf16 copies" in cases:
        moved["byol_fast, with bf16 copies"] += 2.0 * (num_online + num_target)
    return Group(cases, moved, eager)


def _timm(kind: Any, w: Weights) -> torch.optim.Optimizer:
    """timm's LARS over lists of tensors, or as it is in versions that have no such option."""
    try:
        optimizer: torch.optim.Optimizer = kind(w.groups(), lr=LR, momentum=MOMENTUM, foreach=True)
    except TypeError:
        optimizer = kind(w.groups(), lr=LR, momentum=MOMENTUM)
    return optimizer


def ema_group(context: Context, checks: Checks) -> Group:
    """The average alone. The judge is `torch._foreach_lerp_`."""
    w = _weights(context)
    online: list[Tensor] = list(w.followed)
    judge = "torch._foreach_lerp_"
    cases: dict[str, Case] = {
        "byol_fast": lambda: ema_update_(w.target, online, TAU),
        judge: torch.no_grad()(lambda: torch._foreach_lerp_(w.target, online, 1 - TAU)),
        "torch._foreach_mul_, _foreach_add_": lambda: foreach_ema(w.target, online),
    }
    if version("timm"):
        cases["timm"] = timm_average(w)
    if version("lightly"):
        from lightly.models.utils import update_momentum

        cases["lightly"] = functools.partial(update_momentum, *w.modules(), TAU)
    expected = w.after(cases[judge])
    errors = {name: relative_error(w.after(case), expected) for name, case in cases.items() if name != judge}
    cases = agreeing(checks, "EMA", cases, errors, dict.fromkeys(errors, 1e-6))
    return Group(cases, dict.fromkeys(cases, 12.0 * sum(t.numel() for t in w.target)))


# ------------------------------------------------------------------------------------------------ loss


def loss_group(context: Context, checks: Checks) -> Group:
    """Loss of both directions and its gradients, 256 x 256 in bf16. The judge is the formula in float64."""
    num_sets, batch = (2, 8) if is_small(context) else (LOSS_SETS, 256)
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(num_sets):
        p1, p2, z1, z2 = torch.randn(4, batch, 256, generator=generator).to(context.device, torch.bfloat16)
        sets.append((p1.requires_grad_(), p2.requires_grad_(), z1, z2))
    losses: dict[str, Loss] = {
        "byol_fast": byol_loss,
        "baseline": textbook_loss,
        "baseline, torch.compile": compiled_function(context, textbook_loss),
    }
    if version("lightly"):
        from lightly.loss import NegativeCosineSimilarity

        cosine = NegativeCosineSimilarity()
        losses["lightly"] = lambda p1, p2, z1, z2: 2 * (2 + cosine(p1, z2) + cosine(p2, z1))

    def gradients(loss: Loss, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(*inputs), list(inputs[:2])))

    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in sets[0])
    expected = gradients(textbook_loss, exact)
    errors = {name: relative_error(gradients(loss, sets[0]), expected) for name, loss in losses.items()}

    def through_all(loss: Loss) -> Case:
        def call() -> None:
            for inputs in sets:
                gradients(loss, inputs)  # and drop them: a step uses them and gives their memory back

        return call

    cases: dict[str, Case] = {name: through_all(loss) for name, loss in losses.items()}
    cases = agreeing(checks, "loss", cases, errors, dict.fromkeys(errors, 2e-2))
    return Group(cases, dict.fromkeys(cases, 6.0 * batch * 256 * 2), repeats=num_sets)


# ------------------------------------------------------------------------------------------------ images


def _images(context: Context) -> bench_photometric.Problem:
    return bench_photometric.Problem(2 if is_small(context) else IMAGES, context.device)


def color_group(context: Context, checks: Checks) -> Group:
    """Flip, color, grayscale, solarize and normalize from uint8 to bf16. The judge is torchvision, on eight images."""
    p = _images(context)
    names = ("flip", "jitter", "factors", "order", "grayscale", "solarize")
    draws = p.only(*names)
    normalize: dict[str, Any] = {"mean": bench_photometric.MEAN, "std": bench_photometric.STD, "dtype": torch.bfloat16}
    cases: dict[str, Case] = {
        "byol_fast, to bf16": lambda: photometric(p.images, **draws, **normalize),
        "byol_fast, to uint8": lambda: photometric(p.images, **draws),
    }
    few = range(min(8, p.batch))
    found = photometric(
        p.images[: len(few)], **{n: d[: len(few)] for n, d in p.only(*names[1:5]).items()}, truncate=True
    )
    expected = torch.stack([p.colour(p.planar[i], i) for i in few])
    # Whole levels after each step: a value differs where one of its sums is next to a whole number.
    error = float((found != expected).float().mean())
    if not checks("color: share of values that are not torchvision's", error, 2e-3):
        return Group({}, {})
    pixels = float(p.images.numel())
    return Group(cases, {"byol_fast, to bf16": 3 * pixels, "byol_fast, to uint8": 2 * pixels}, images=p.batch)


def blur_group(context: Context, checks: Checks) -> Group:
    """Gaussian blur of uint8 images. The judge is torchvision, on eight images."""
    p = _images(context)
    sigma, window = p.draws["sigma"], p.draws["window"]
    wide = torch.full((p.batch,), bench_photometric.KERNEL, device=context.device)
    cases: dict[str, Case] = {
        "byol_fast, 3 sigma": lambda: gaussian_blur(p.images, sigma, window),
        "byol_fast, window of 23": lambda: gaussian_blur(p.images, sigma, wide),
    }
    few = min(8, p.batch)
    found = gaussian_blur(p.images[:few], sigma[:few], wide[:few])
    expected = torch.stack([p.blur(p.planar[i], i) for i in range(few)])
    error = float((found.float() - expected.float()).abs().mean())
    # Factors of float16: the next level where a sum is near a half, for one value in thirty.
    if not checks("blur: byol_fast and torchvision, mean difference in levels", error, 1 / 30):
        return Group({}, {})
    return Group(cases, dict.fromkeys(cases, 2.0 * p.images.numel()), images=p.batch)

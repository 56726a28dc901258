"""Loss, EMA update and transforms of lightly: equal results, compared with lightly and with its formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn import functional as F

from byol_fast.compat import lightly
from byol_fast.config import ViewConfig
from tests.compat.helpers import REASON, WITH_LIBRARY, build_network


def lightly_loss(library: bool, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if library:
        module = pytest.importorskip("lightly.loss", reason=REASON)
        loss: Callable[[Tensor, Tensor], Tensor] = module.NegativeCosineSimilarity(**options)
        return loss
    return lambda x0, x1: -F.cosine_similarity(x0, x1, options.get("dim", 1), options.get("eps", 1e-8)).mean()


@pytest.mark.parametrize("library", WITH_LIBRARY)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 33), {}),
        ((1, 1), {}),
        ((7, 33), {"dim": -1}),
        ((7, 33), {"eps": 2.0}),
        ((7, 33), {"dim": 0}),
        ((7, 5, 3), {"dim": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("target_learns", [False, True], ids=["target fixed", "target learns"])
def test_negative_cosine_equals_lightly(
    library: bool, shape: tuple[int, ...], options: Any, target_learns: bool
) -> None:
    """In float64 with an upstream gradient of 3; one row is short, one zero."""
    reference, drop_in = lightly_loss(library, **options), lightly.NegativeCosineSimilarity(**options)
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    x0[0] *= 0.01
    x0[-1] *= len(x0) == 1
    x0.requires_grad_()
    x1.requires_grad_(target_learns)
    inputs = [x0, x1] if target_learns else [x0]
    expected, value = reference(x0, x1), drop_in(x0, x1)
    assert value.item() == pytest.approx(expected.item(), abs=1e-14)
    gradients = (torch.autograd.grad(3 * loss, inputs) for loss in (value, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_negative_cosine_within_transforms_equals_lightly() -> None:
    """Both arguments have derivatives there."""
    x = tuple(torch.randn(2, 7, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    reference, drop_in = lightly_loss(False), lightly.NegativeCosineSimilarity()
    values = [(jvp(f, x, (x[1], x[0])), grad(f, argnums=(0, 1))(*x)) for f in (drop_in, reference)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_cosine_error_in_low_precision(dtype: torch.dtype) -> None:
    """At most twice the error of torch's function against float64."""
    x0, x1 = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = lightly_loss(False)(x0.double(), x1.double())
    reference, drop_in = lightly_loss(False)(x0, x1), lightly.NegativeCosineSimilarity()(x0, x1)
    assert abs(drop_in.double() - exact) <= 2 * abs(reference.double() - exact) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("library", WITH_LIBRARY)
def test_update_momentum_equals_lightly(library: bool) -> None:
    model, mine = build_network(), build_network(seed=1)
    other = copy.deepcopy(mine)
    if library:
        update = pytest.importorskip("lightly.models.utils", reason=REASON).update_momentum
    else:

        def update(model: nn.Module, model_ema: nn.Module, m: float) -> None:
            for t, o in zip(model_ema.parameters(), model.parameters(), strict=True):
                t.data = t.data * m + o.data * (1.0 - m)

    with torch.no_grad():
        for step in range(5):
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            update(model, other, 0.9 + 0.02 * step)
            lightly.update_momentum(model, mine, 0.9 + 0.02 * step)
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # five roundings of fp32
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), build_network(seed=1).buffers(), strict=True))


OFF: dict[str, Any] = {
    "input_size": 24,
    "min_scale": 1.0,
    "cj_prob": 0.0,
    "random_gray_scale": 0.0,
    "gaussian_blur": 0.0,
    "solarization_prob": 0.0,
    "hf_prob": 0.0,
    "normalize": None,
}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, 1.0),
        ({"hf_prob": 1.0}, 1.0),
        ({"random_gray_scale": 1.0}, 1.0),
        ({"normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}}, 1.0 / 0.2),
        ({"gaussian_blur": 1.0, "sigmas": (1.0, 1.0)}, 6.0),
    ],
    ids=str,
)
def test_views_without_randomness_equal_lightly(options: dict[str, Any], levels: float, photos: np.ndarray) -> None:
    """Whole images, resized: at most one level of 255; a few with PIL's blur, which is three box filters."""
    original = pytest.importorskip("lightly.transforms.byol_transform", reason=REASON)
    for name in ("BYOLView1Transform", "BYOLView2Transform"):
        mine = getattr(lightly, name)(**OFF | options)
        other = getattr(original, name)(**OFF | options)
        for image in photos[:4]:
            a, b = mine(Image.fromarray(image)), other(Image.fromarray(image))
            assert a.dtype == b.dtype == torch.float32
            assert float((a - b).abs().max()) * 255 <= levels + 1e-3


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("BYOLView1Transform", part) for part in ("cj_bright", "cj_contrast", "cj_sat", "cj_hue", "gaussian_blur")),
        *((name, part) for name in ("BYOLView1Transform", "BYOLView2Transform") for part in ("min_scale", "all")),
    ],
)
def test_random_views_have_the_distribution_of_lightly(name: str, part: str, photos: np.ndarray) -> None:
    """Kolmogorov-Smirnov test of statistics of 600 views each.

    Equal distributions exceed 1.95 sqrt(2 / n) once in a thousand times; the seeds are fixed. PIL rounds to levels
    after each operation, and the hue to 1/255 of a turn, up to 3 levels of a saturated color: smaller differences count
    as equal.
    """
    original = pytest.importorskip("lightly.transforms.byol_transform", reason=REASON)
    numbers = {"cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4, "cj_hue": 0.4}
    options: dict[str, Any] = {"input_size": 16}
    if part in numbers:
        others = {other: 0.0 for other in numbers if other != part}
        options = OFF | {"cj_prob": 0.8, "cj_strength": 0.5} | others | {part: numbers[part]}
    elif part == "gaussian_blur":
        options = OFF | {"gaussian_blur": 0.5}
    elif part == "min_scale":
        options = OFF | {"min_scale": 0.08}
    count, image = 600, photos[7]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (lightly's)
    mine = getattr(lightly, name)(**options)(torch.from_numpy(image).permute(2, 0, 1).expand(count, -1, -1, -1))
    transform, picture = getattr(original, name)(**options), Image.fromarray(image)
    other = torch.stack([transform(picture) for _ in range(count)])
    slack = (3 if part in {"cj_hue", "all"} else 1) / 255
    for measure in (brightness, color, tint, detail):
        a, b = measure(mine).sort().values, measure(other).sort().values
        at = torch.cat([a, b])
        upper = (share_below(a, at + slack) - share_below(b, at)).min()
        lower = (share_below(a, at - slack) - share_below(b, at)).max()
        assert max(float(lower), -float(upper)) < 1.95 * math.sqrt(2 / count), measure.__name__


def share_below(values: Tensor, at: Tensor) -> Tensor:
    return torch.searchsorted(values, at, right=True) / len(values)


def brightness(views: Tensor) -> Tensor:
    return views.mean((1, 2, 3))


def color(views: Tensor) -> Tensor:
    return (views.amax(1) - views.amin(1)).mean((1, 2))


def tint(views: Tensor) -> Tensor:
    return (views[:, 0] - views[:, 2]).mean((1, 2))


def detail(views: Tensor) -> Tensor:
    return views.diff(dim=3).abs().mean((1, 2, 3))


def test_view_parameters_become_a_view_config(photos: np.ndarray) -> None:
    plain, strong = lightly.BYOLView1Transform(), lightly.BYOLView2Transform(cj_prob=0.3, cj_strength=0.5, hf_prob=0.1)
    paper = ViewConfig(interpolation="bilinear", blur_kernel=0)
    assert plain.config == paper
    assert (strong.config.brightness, strong.config.hue, strong.config.hflip_p) == (0.2, 0.05, 0.1)
    assert strong.config.color_jitter_p == 0.3
    assert (strong.config.blur_p, strong.config.solarize_p) == (0.1, 0.2)
    assert lightly.BYOLView2Transform(gaussian_blur=1.0).config.blur_p == 1.0
    pair = lightly.BYOLTransform(lightly.BYOLView1Transform(input_size=16), lightly.BYOLView2Transform(input_size=16))
    batch = torch.from_numpy(photos[:3]).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    first, second = pair(batch)
    torch.manual_seed(0)
    again = pair(batch / 255)
    assert first.shape == second.shape == (3, 3, 16, 16)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    for options in ({"vf_prob": 0.1}, {"rr_prob": 0.5}, {"rr_degrees": 90.0}):
        with pytest.raises(ValueError, match=r"must be (0|None), got .*vertical flips and rotations are not supported"):
            lightly.BYOLView1Transform(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean must be three numbers"):
        lightly.BYOLView1Transform(normalize={"mean": [0.5], "std": [0.5]})
    with pytest.raises(ValueError, match="image must be uint8 or floating point"):
        plain(batch.long())

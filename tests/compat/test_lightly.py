"""Other packages' names on our kernels: equal numbers, against the packages themselves and their rules restated."""

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
from torch.nn import functional as F
from torch.optim import swa_utils

from byol_fast.compat import lightly, timm
from byol_fast.compat import torch as swa
from byol_fast.config import ViewConfig
from byol_fast.optim.schedules import tau_at
from byol_kernels import byol_loss, ema_update_

REASON = "pip install byol_fast[peers]"
WITH_PEER = [pytest.param(False, id="restated"), pytest.param(True, marks=pytest.mark.peers, id="lightly")]


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5)
    )
    return net.to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------ lightly: loss


def lightly_loss(peer: bool, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if peer:
        module = pytest.importorskip("lightly.loss", reason=REASON)
        loss: Callable[[Tensor, Tensor], Tensor] = module.NegativeCosineSimilarity(**options)
        return loss
    return lambda x0, x1: -F.cosine_similarity(x0, x1, options.get("dim", 1), options.get("eps", 1e-8)).mean()


@pytest.mark.parametrize("peer", WITH_PEER)
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
def test_negative_cosine_is_lightlys(peer: bool, shape: tuple[int, ...], options: Any, target_learns: bool) -> None:
    """In float64; an upstream gradient of 3. One row is short, one zero."""
    theirs, ours = lightly_loss(peer, **options), lightly.NegativeCosineSimilarity(**options)
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    x0[0] *= 0.01
    x0[-1] *= len(x0) == 1
    x0.requires_grad_()
    x1.requires_grad_(target_learns)
    inputs = [x0, x1] if target_learns else [x0]
    expected, found = theirs(x0, x1), ours(x0, x1)
    assert found.item() == pytest.approx(expected.item(), abs=1e-14)
    gradients = (torch.autograd.grad(3 * loss, inputs) for loss in (found, expected))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_cosine_in_low_precision(dtype: torch.dtype) -> None:
    """No further from float64 than twice what torch's own is."""
    x0, x1 = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = lightly_loss(False)(x0.double(), x1.double())
    theirs, ours = lightly_loss(False)(x0, x1), lightly.NegativeCosineSimilarity()(x0, x1)
    assert abs(ours.double() - exact) <= 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps


# ------------------------------------------------------------------------------------------------ lightly: average


@pytest.mark.parametrize("peer", WITH_PEER)
def test_update_momentum_is_lightlys(peer: bool) -> None:
    model, mine = network(), network(seed=1)
    other = copy.deepcopy(mine)
    if peer:
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
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), network(seed=1).buffers(), strict=True))


# ------------------------------------------------------------------------------------------------ lightly: LARS


class RestatedLARS:
    """lightly's rule as its documentation has it, tensor by tensor."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        defaults = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
        self.groups = [{"lr": lr, **defaults, "trust_coefficient": 0.001, "eps": 1e-8, **options, **g} for g in groups]
        self.buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d, decay = p.grad, group["weight_decay"]
                p_norm, g_norm = p.norm(), p.grad.norm()
                if decay != 0 and p_norm > 0 and g_norm > 0:
                    ratio = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
                    d = (d + decay * p) * ratio
                if group["momentum"] != 0:
                    first = p not in self.buffers
                    before = 0 if first else group["momentum"] * self.buffers[p]
                    self.buffers[p] = before + (1 if first else 1 - group["dampening"]) * d
                    d = d + group["momentum"] * self.buffers[p] if group["nesterov"] else self.buffers[p]
                p.sub_(group["lr"] * d)


def lightly_lars(peer: bool) -> Any:
    return pytest.importorskip("lightly.utils.lars", reason=REASON).LARS if peer else RestatedLARS


RULES: list[dict[str, Any]] = [
    {"momentum": 0.9, "weight_decay": 1e-2},
    {"momentum": 0.9},
    {"weight_decay": 1e-2},
    {"momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.3},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.1, "eps": 1.0},
]


def problem(dtype: torch.dtype, channels_last: bool = False) -> list[nn.Parameter]:
    """Parameters of a network, and with them: all zero, with a gradient of zero, without one."""
    net = network(dtype)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    extra = [torch.zeros(4), torch.ones(4), torch.ones(3, 3)]
    return [*net.parameters(), *(nn.Parameter(x.to(dtype)) for x in extra)]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(97 * step + i))
        p.grad = (noise if i != len(params) - 2 else 0 * noise).to(p.dtype)
    params[-1].grad = None


@pytest.mark.parametrize("peer", WITH_PEER)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_is_lightlys(peer: bool, rule: dict[str, Any], dtype: torch.dtype) -> None:
    """Five steps with a changing learning rate, and a group that is left out of decay and adaptation.

    The way a weight has gone agrees to 1e-12 in float64 and to 2e-5 in float32, of which it keeps 1e-7 a step beside
    weights that are hundreds of times as large.
    """
    mine, other = problem(dtype), problem(dtype)
    start = [p.detach().clone() for p in mine]
    optimizers: list[Any] = []
    for kind, params in ((lightly.LARS, mine), (lightly_lars(peer), other)):
        some = [{"params": params[:4]}, {"params": params[4:6], "weight_decay": 0}, {"params": params[6:]}]
        optimizers.append(kind(some, lr=0.5, **rule))
    for step in range(5):
        for optimizer, params in zip(optimizers, (mine, other), strict=True):
            give_gradients(params, step)
            for group in getattr(optimizer, "param_groups", None) or optimizer.groups:
                group["lr"] = 0.5 / (step + 1)
            optimizer.step()
    for i, (a, b, s) in enumerate(zip(mine, other, start, strict=True)):
        moved = (b.detach() - s).double().norm()
        off = float((a.detach() - (b if moved > 0 else s).detach()).double().norm() / (moved if moved > 0 else 1.0))
        assert off < (1e-12 if dtype == torch.float64 else 2e-5), (i, off)
    assert torch.equal(mine[-1], start[-1])


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_lars_in_lists_is_lars_in_one_pass(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that GPUs take, on a CPU, beside the CPU's own."""
    fast, lists = problem(torch.float64), problem(torch.float64)
    for params, in_lists in ((fast, False), (lists, True)):
        optimizer = lightly.LARS(params, lr=0.5, **rule)
        if in_lists:
            monkeypatch.setattr(optimizer, "_in_one_pass", optimizer._step)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(fast, lists, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_lars_takes_any_layout_and_dtype() -> None:
    plain, nhwc, low = problem(torch.float32), problem(torch.float32, channels_last=True), problem(torch.bfloat16)
    for params in (plain, nhwc, low):
        optimizer = lightly.LARS(params, lr=0.5, **RULES[0])
        for step in range(3):
            give_gradients(params, step)  # gradients in NCHW, parameters in NHWC: the pass over memory cannot pair them
            optimizer.step()
    for a, b, c in zip(plain, nhwc, low, strict=True):
        torch.testing.assert_close(a, b.detach().contiguous(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c.detach().float(), rtol=2e-2, atol=2e-2)


@pytest.mark.peers
def test_lars_continues_lightlys_checkpoint() -> None:
    theirs = lightly_lars(True)
    mine, other = problem(torch.float64), problem(torch.float64)
    first, second = theirs(other, lr=0.5, **RULES[0]), theirs(mine, lr=0.5, **RULES[0])
    for step in range(2):
        for params, optimizer in ((other, first), (mine, second)):
            give_gradients(params, step)
            optimizer.step()
    ours = lightly.LARS(mine, lr=0.1)
    ours.load_state_dict(copy.deepcopy(second.state_dict()))
    for params, optimizer in ((other, first), (mine, ours)):
        give_gradients(params, 2)
        optimizer.step()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_lars_calls_its_closure_and_says_what_is_out_of_range() -> None:
    p = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        p.grad = None
        loss = (p * p).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert lightly.LARS([p], lr=0.1).step(closure).item() == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
    for lr, momentum, decay in ((-1.0, 0.9, 0.0), (1.0, -0.1, 0.0), (1.0, 0.9, float("nan"))):
        with pytest.raises(ValueError, match="must be 0 or more, got"):
            lightly.LARS([p], lr=lr, momentum=momentum, weight_decay=decay)
    with pytest.raises(ValueError, match="nesterov must go with a momentum"):
        lightly.LARS([p], lr=1.0, nesterov=True)


# ------------------------------------------------------------------------------------------------ lightly: views

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
def test_views_without_chance_are_lightlys(options: dict[str, Any], levels: float, photos: np.ndarray) -> None:
    """Whole images, resized: one level of 255 apart. PIL's blur is three boxes: some levels."""
    peers = pytest.importorskip("lightly.transforms.byol_transform", reason=REASON)
    for name in ("BYOLView1Transform", "BYOLView2Transform"):
        mine = getattr(lightly, name)(**OFF | options)
        other = getattr(peers, name)(**OFF | options)
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
def test_views_with_chance_are_distributed_as_lightlys(name: str, part: str, photos: np.ndarray) -> None:
    """Kolmogorov and Smirnov: of 600 views each, the distributions of what a part changes differ by chance alone.

    1.95 sqrt(2 / n) is exceeded once in a thousand times where they are equal; the seeds are fixed. PIL rounds to
    levels after each part, and the hue to 1/255 of a turn, which is up to 3 levels of a saturated colour: what is no
    further apart counts as equal.
    """
    peers = pytest.importorskip("lightly.transforms.byol_transform", reason=REASON)
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
    transform, picture = getattr(peers, name)(**options), Image.fromarray(image)
    other = torch.stack([transform(picture) for _ in range(count)])
    slack = (3 if part in {"cj_hue", "all"} else 1) / 255
    for measure in (brightness, colour, tint, detail):
        a, b = measure(mine).sort().values, measure(other).sort().values
        at = torch.cat([a, b])
        upper = (share_below(a, at + slack) - share_below(b, at)).min()
        lower = (share_below(a, at - slack) - share_below(b, at)).max()
        assert max(float(lower), -float(upper)) < 1.95 * math.sqrt(2 / count), measure.__name__


def share_below(values: Tensor, at: Tensor) -> Tensor:
    return torch.searchsorted(values, at, right=True) / len(values)


def brightness(views: Tensor) -> Tensor:
    return views.mean((1, 2, 3))


def colour(views: Tensor) -> Tensor:
    return (views.amax(1) - views.amin(1)).mean((1, 2))


def tint(views: Tensor) -> Tensor:
    return (views[:, 0] - views[:, 2]).mean((1, 2))


def detail(views: Tensor) -> Tensor:
    return views.diff(dim=3).abs().mean((1, 2, 3))


def test_view_parameters_become_ours(photos: np.ndarray) -> None:
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
        with pytest.raises(ValueError, match=r"must be (0|None), got .*no vertical flips and rotations here"):
            lightly.BYOLView1Transform(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean must be three numbers"):
        lightly.BYOLView1Transform(normalize={"mean": [0.5], "std": [0.5]})
    with pytest.raises(ValueError, match="image must be uint8 or floating point"):
        plain(batch.long())


# ------------------------------------------------------------------------------------------------ timm


V3: list[dict[str, Any]] = [
    {"decay": 0.9},
    {"decay": 0.9, "exclude_buffers": True},
    {"decay": 0.9, "foreach": False},
    {"decay": 0.99, "use_warmup": True, "update_after_step": 1, "min_decay": 0.3},
    {"decay": 0.9, "dtype": torch.float64},
]


@pytest.mark.peers
@pytest.mark.parametrize("options", V3, ids=str)
def test_model_ema_v3_is_timms(options: dict[str, Any]) -> None:
    peer = pytest.importorskip("timm.utils.model_ema", reason=REASON)
    model = network()
    mine, other = timm.ModelEmaV3(model, **options), peer.ModelEmaV3(model, **options)
    x = torch.randn(8, 3, 8, 8)
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            model(x)  # moves the statistics
        number = step if options.get("use_warmup") else None
        assert mine.get_decay(number) == other.get_decay(number)
        mine.update(model, number)
        other.update(model, number)
        pairs = list(zip(mine.state_dict().items(), other.state_dict().items(), strict=True))
        for (name, a), (its_name, b) in pairs:
            assert name == its_name
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    wide = x.to(next(mine.parameters()).dtype)
    torch.testing.assert_close(mine(wide), other(wide), rtol=1e-5, atol=1e-6)
    mine.set(model)
    assert all(
        torch.equal(a.float(), b.float()) for a, b in zip(mine.module.parameters(), model.parameters(), strict=True)
    )


def test_model_ema_v3_follows_its_formula() -> None:
    model = network()
    average = timm.ModelEmaV3(model, decay=0.75)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[1].running_mean.add_(4)  # type: ignore[index]
        model[1].num_batches_tracked.add_(3)  # type: ignore[index]
    average.update(model)
    for now, was in zip(average.module.parameters(), start, strict=True):
        torch.testing.assert_close(now.detach(), was + 0.25)
    stored = average.module.state_dict()
    torch.testing.assert_close(stored["1.running_mean"], torch.full((6,), 1.0))
    assert int(stored["1.num_batches_tracked"]) == 3
    assert not average.module.training
    average.update(model, step=0)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), model.parameters(), strict=True))


def test_model_ema_v3_refuses_an_average_that_would_stand_still() -> None:
    model = network(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 for a model in bfloat16"):
        timm.ModelEmaV3(model)
    average = timm.ModelEmaV3(model, decay=0.999, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = [p.detach().clone() for p in average.module.parameters()]
    average.update(model)
    for was, now in zip(before, average.module.parameters(), strict=True):
        torch.testing.assert_close(now.detach() - was, torch.full_like(was, 1e-3), rtol=1e-2, atol=1e-5)


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", [swa.AveragedModel, swa_utils.AveragedModel], ids=["ours", "torch's"])
@pytest.mark.parametrize("rule", ["ema", "equal weights"])
def test_averaged_model_is_torchs(use_buffers: bool, kind: type[swa_utils.AveragedModel], rule: str) -> None:
    model = network()
    torchs: Any = swa_utils.get_ema_multi_avg_fn
    functions: list[Any] = [swa.get_ema_multi_avg_fn(0.9), torchs(0.9)]
    if rule == "equal weights":
        functions = [None, None]
    mine = kind(model, multi_avg_fn=functions[0], use_buffers=use_buffers)
    other = swa_utils.AveragedModel(model, multi_avg_fn=functions[1], use_buffers=use_buffers)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            model(x)
        mine.update_parameters(model)
        other.update_parameters(model)
    for (name, a), (_, b) in zip(mine.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert int(mine.n_averaged) == 4
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 1.5"):
        swa.get_ema_multi_avg_fn(1.5)


# ------------------------------------------------------------------------------------------------ solo-learn


def test_solo_learns_published_formulas() -> None:
    """solo-learn 1.0.6, `losses/byol.py` and `utils/momentum.py`, restated: it cannot be installed beside this torch.

    Loss: for each view 2 - 2 mean(cos(p, z)) with the other view's z, added up. Average: after the step,
    tau target + (1 - tau) online, parameters only; tau from base to final by a cosine over all steps.
    """
    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = torch.randn(4, 9, 32, dtype=torch.float64, generator=generator)
    theirs = (2 - 2 * F.cosine_similarity(p1, z2, dim=-1).mean()) + (2 - 2 * F.cosine_similarity(p2, z1, dim=-1).mean())
    unit = [F.normalize(x, dim=-1) for x in (p1, p2, z1, z2)]
    long_way = (2 - 2 * (unit[0] * unit[3]).sum(1).mean()) + (2 - 2 * (unit[1] * unit[2]).sum(1).mean())
    ours = byol_loss(p1, p2, z1, z2)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-13)
    assert ours.item() == pytest.approx(long_way.item(), abs=1e-13)

    target, online = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    other, base, final, steps = target.clone(), 0.99, 1.0, 40
    for step in range(steps):
        tau = final - (final - base) * (math.cos(math.pi * step / steps) + 1) / 2
        assert tau_at(step, steps, base) == pytest.approx(tau, abs=1e-15)
        other = tau * other + (1 - tau) * online
        ema_update_([target], [online], tau_at(step, steps, base))
    torch.testing.assert_close(target, other, rtol=1e-12, atol=1e-14)

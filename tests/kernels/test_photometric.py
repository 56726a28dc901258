"""The photometric operator: against float64 and torchvision, every order and layout, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_kernels import gaussian_blur, photometric
from byol_kernels.photometric import is_vector
from tests.gpu import DEVICE, NOT_HERE, Captured, host_syncs_are_errors, launches
from tests.kernels.conftest import INTERPRETED, Record, not_interpreted
from tests.kernels.photometric_restatement import (
    BRIGHTNESS,
    CONTRAST,
    FLOAT16_FACTORS,
    FLOAT32_LEVELS,
    HUE,
    ORDERS,
    SATURATION,
    Array,
    Draws,
    blur,
    by_torchvision,
    draws,
    f64,
    images,
    on,
    solarize,
    view,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = ("jitter", "factors", "order")


def only(d: Draws, *names: str, device: str = "cpu") -> dict[str, Any]:
    return {name: getattr(d, name).to(device) for name in names}


def levels(x: Tensor) -> Array:
    """A floating-point result without mean and std, in levels of 255."""
    assert x.is_floating_point()
    return 255.0 * f64(x)


def expected_levels(x: Tensor, d: Draws, **options: Any) -> Array:
    return np.stack([view(f64(image), d, i, **options) for i, image in enumerate(x)])


# -------------------------------------------------------------------------------- values


@pytest.mark.parametrize("width", [24, 17], ids=["vector", "odd_width"])
@pytest.mark.parametrize(("spread", "hue"), [(0.4, 0.1), (0.8, 0.5)], ids=["byol", "strong"])
def test_every_order_against_float64(width: int, spread: float, hue: float, device: str) -> None:
    x, d = images(24, 9, width), draws(24, spread=spread, hue=hue)
    assert torch.equal(d.order, ORDERS)
    d = d._replace(jitter=torch.ones(24, dtype=torch.bool), flip=torch.zeros(24, dtype=torch.bool))
    d = d._replace(grayscale=d.flip, solarize=d.flip)
    out = photometric(x.to(device), **only(d, *COLOUR, device=device), dtype=torch.float32)
    assert np.abs(levels(out) - expected_levels(x, d)).max() <= FLOAT32_LEVELS


@pytest.mark.parametrize("width", [24, 17], ids=["vector", "odd_width"])
def test_every_order_against_torchvision(width: int, device: str) -> None:
    """Truncated after each step. A value that torchvision's float32 has on the other side of a whole number is a level
    off; that is rare, and the steps after it stretch it by no more than three: 1.4 of them twice, and a hue."""
    x, d = images(24, 9, width), draws(24)
    d = d._replace(blur=torch.zeros(24, dtype=torch.bool), jitter=torch.ones(24, dtype=torch.bool))
    out = photometric(
        x.to(device),
        **only(d, *COLOUR, "flip", "grayscale", "solarize", device=device),
        truncate=True,
    )
    expected = torch.stack([by_torchvision(image, d, i) for i, image in enumerate(x)])
    difference = np.abs(f64(out) - f64(expected))
    assert difference.max() <= 3
    assert (difference > 0).mean() <= 2e-3


@pytest.mark.parametrize(
    "part", [BRIGHTNESS, CONTRAST, SATURATION, HUE], ids=["brightness", "contrast", "satur", "hue"]
)
@pytest.mark.parametrize("factor", [0.0, 0.37, 1.0, 1.63])
def test_one_part_of_the_jitter(part: int, factor: float, device: str) -> None:
    x, d = images(2, 11, 16, seed=1), draws(2)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(2, 1)
    factors[:, part] = factor if part != HUE else (factor - 1.0) / 2  # -1/2, -.315, 0, .315 turns
    d = d._replace(factors=factors, jitter=torch.ones(2, dtype=torch.bool))
    off = torch.zeros(2, dtype=torch.bool)
    d = d._replace(flip=off, grayscale=off, blur=off, solarize=off)
    exact = photometric(x.to(device), **only(d, *COLOUR, device=device), dtype=torch.float32)
    assert np.abs(levels(exact) - expected_levels(x, d)).max() <= FLOAT32_LEVELS
    truncated = photometric(x.to(device), **only(d, *COLOUR, device=device), truncate=True)
    expected = torch.stack([by_torchvision(image, d, i) for i, image in enumerate(x)])
    difference = np.abs(f64(truncated) - f64(expected))
    assert difference.max() <= 1 and (difference > 0).mean() <= 2e-3


@pytest.mark.parametrize("threshold", [0, 1, 64, 128, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_solarize_flip_and_grayscale_alone(threshold: int, dtype: torch.dtype, device: str) -> None:
    x, coins = images(2, 7, 24), torch.tensor([True, False])
    plain = draws(2)._replace(**dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), ~coins & coins))
    for name in ("solarize", "flip", "grayscale"):
        d = plain._replace(**{name: coins})
        out = photometric(x.to(device), **only(d, name, device=device), solarize_threshold=threshold, dtype=dtype)
        expected = expected_levels(x, d, threshold=threshold)
        if dtype == torch.float32:
            assert np.abs(levels(out) - expected).max() <= FLOAT32_LEVELS
        else:
            assert np.abs(f64(out) - np.round(expected)).max() == 0
        if name != "grayscale" and dtype == torch.uint8:
            theirs = torch.stack([by_torchvision(image, d, i, threshold=threshold) for i, image in enumerate(x)])
            assert torch.equal(out.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 24), (10, 15), (1, 1), (3, 8)], ids=str)
def test_all_at_once(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    x, d = images(8, *shape, seed=2), draws(8, seed=5)
    normalise: dict[str, Any] = {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD}
    names = ("flip", *COLOUR, "grayscale", "solarize")
    out = photometric(x.to(device), **only(d, *names, device=device), dtype=dtype, **normalise)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    expected = expected_levels(x, d)
    if dtype == torch.uint8:
        assert np.abs(f64(out) - expected).max() <= 0.5 + FLOAT32_LEVELS
        return
    mean, std = (np.array(v)[:, None, None] for v in (MEAN, STD))
    normalised = (expected / 255.0 - mean) / std
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    rounding *= 2 if INTERPRETED else 1  # it truncates
    tolerance = FLOAT32_LEVELS / 255 / min(STD) + rounding * np.abs(normalised)
    assert (np.abs(f64(out) - normalised) <= tolerance).all()


# -------------------------------------------------------------------------------- the chain through the blur


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (13, 21)], ids=str)
def test_blurred_samples(truncate: bool, shape: tuple[int, int], device: str) -> None:
    """Everything up to the blur by the operator itself, as the uint8 image that the blur reads; the rest restated."""
    x, d = images(12, *shape, seed=3), draws(12, seed=1)
    assert 0 < d.blur.sum() < 12
    out = photometric(x.to(device), **on(device, d), dtype=torch.float32, truncate=truncate)
    before = photometric(x.to(device), **only(d, "flip", *COLOUR, "grayscale", device=device), truncate=truncate)
    # With truncate a blurred value that is half a level may go either way: the next level, at most.
    tolerance = 1.0 if truncate else FLOAT32_LEVELS if device == "cpu" and not INTERPRETED else FLOAT16_FACTORS
    for i in range(12):
        if d.blur[i]:
            blurred = blur(f64(before[i]), float(d.sigma[i]), int(d.window[i]))
            expected = np.round(blurred) if truncate else blurred
            expected = solarize(expected, 128) if d.solarize[i] else expected
            assert np.abs(levels(out[i]) - expected).max() <= tolerance + FLOAT32_LEVELS
        elif not truncate:
            assert np.abs(levels(out[i]) - view(f64(x[i]), d, i)).max() <= FLOAT32_LEVELS


def test_the_chain_in_three_calls_is_the_chain_in_one(device: str) -> None:
    x, d = images(12, 16, 24, seed=4), draws(12, seed=2)
    whole = photometric(x.to(device), **on(device, d), dtype=torch.float32, mean=MEAN, std=STD, truncate=True)
    parts = photometric(x.to(device), **only(d, "flip", *COLOUR, "grayscale", device=device), truncate=True)
    parts = gaussian_blur(parts, **only(d, "sigma", "window", "blur", device=device))
    parts = photometric(parts, **only(d, "solarize", device=device), dtype=torch.float32, mean=MEAN, std=STD)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_whole_view_against_torchvision(device: str) -> None:
    x, d = images(16, 16, 24, seed=5), draws(16, seed=3)
    out = photometric(x.to(device), **on(device, d), truncate=True)
    expected = torch.stack([by_torchvision(image, d, i) for i, image in enumerate(x)])
    difference = np.abs(f64(out) - f64(expected))
    # The blur rounds to the nearest, so a level more, where its sum is near a half.
    assert difference.max() <= 4 and difference.mean() <= FLOAT16_FACTORS / 2


# -------------------------------------------------------------------------------- properties

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planar": lambda x: x.contiguous(),
    "crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "crop_channels_last": lambda x: torch.nn.functional.pad(x, (8, 8, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )[:, :, 1:-1, 8:-8],
    "every_other": lambda x: x.repeat_interleave(2, 3).repeat_interleave(2, 0)[::2, :, :, ::2],
    "unaligned": lambda x: (
        torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(x.shape[0], *x.shape[2:], 3)
        .permute(0, 3, 1, 2)
    ),
    "batch_stride": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing(layout: Callable[[Tensor], Tensor], device: str) -> None:
    x, d = images(6, 8, 16).to(device), draws(6, seed=7)
    strided = layout(x)
    assert torch.equal(strided, x)
    expected = photometric(x, **on(device, d), dtype=torch.float32)
    torch.testing.assert_close(photometric(strided, **on(device, d), dtype=torch.float32), expected, rtol=0, atol=1e-6)


def test_which_layouts_take_the_wide_path() -> None:
    x = images(6, 8, 16)
    taken = {name: is_vector(layout(x)) for name, layout in LAYOUTS.items()}
    assert is_vector(x) and not is_vector(images(6, 8, 15))
    assert taken == {**dict.fromkeys(LAYOUTS, False), "batch_stride": True}


def test_expanded_batch(device: str) -> None:
    x, d = images(1, 8, 16).to(device), draws(5)
    expected = photometric(x.repeat(5, 1, 1, 1), **on(device, d))
    assert torch.equal(photometric(x.expand(5, -1, -1, -1), **on(device, d)), expected)


def test_samples_do_not_know_of_one_another(device: str) -> None:
    x, d = images(9, 8, 16).to(device), draws(9, seed=4)
    whole = photometric(x, **on(device, d))
    for i in (0, 4, 8):
        alone = photometric(x[i : i + 1], **on(device, Draws(*(draw[i : i + 1] for draw in d))))
        assert torch.equal(alone[0], whole[i])


def test_coins_that_are_left_out(device: str) -> None:
    x, d = images(4, 8, 16).to(device), draws(4)
    yes, no = torch.ones(4, dtype=torch.bool, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    colour, soft = only(d, "factors", "order", device=device), only(d, "sigma", "window", device=device)
    everywhere = photometric(x, **colour, **soft, jitter=yes, blur=yes, flip=no, grayscale=no, solarize=no)
    assert torch.equal(photometric(x, **colour, **soft), everywhere)
    nowhere = photometric(x, **colour, **soft, jitter=no, blur=no, flip=no, grayscale=no, solarize=no)
    assert torch.equal(nowhere, x) and torch.equal(photometric(x), x)


@pytest.mark.parametrize("truncate", [False, True])
def test_neutral_factors_change_nothing(truncate: bool, device: str) -> None:
    x = images(24, 8, 16).to(device)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device).repeat(24, 1)
    assert torch.equal(photometric(x, factors=factors, order=ORDERS.to(device), truncate=truncate), x)


@pytest.mark.parametrize("turns", [1.0, -1.0, 3.0])
def test_whole_turns_of_the_hue(turns: float, device: str) -> None:
    x = images(3, 8, 16).to(device)
    factors = torch.tensor([1.0, 1.0, 1.0, turns], device=device).repeat(3, 1)
    assert torch.equal(photometric(x, factors=factors, order=ORDERS[:3].to(device)), x)


def test_order_in_64_bits(device: str) -> None:
    x, d = images(4, 8, 16).to(device), on(device, draws(4))
    wide = {**d, "order": d["order"].long(), "window": d["window"].long()}
    assert torch.equal(photometric(x, **d), photometric(x, **wide))


def test_empty_batch_and_empty_images(device: str) -> None:
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=device)
    assert photometric(empty, flip=torch.empty(0, dtype=torch.bool, device=device)).shape == (0, 3, 8, 8)
    assert photometric(torch.empty(2, 3, 0, 8, dtype=torch.uint8, device=device)).shape == (2, 3, 0, 8)


# -------------------------------------------------------------------------------- as an operator


def test_one_operator(device: str) -> None:
    x, d = images(3, 8, 16).to(device), on(device, draws(3))
    with Record() as record:
        photometric(x, **d, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert record.names == ["byol_kernels.photometric.default"]


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_operator_checks(dtype: torch.dtype, device: str) -> None:
    x, d = images(3, 8, 16).to(device), on(device, draws(3))
    normalise = ([], []) if dtype == torch.uint8 else (list(MEAN), list(STD))
    op = torch.ops.byol_kernels.photometric
    torch.library.opcheck(op, (x, *d.values(), 128, *normalise, dtype, False))
    torch.library.opcheck(op, (x, *[None] * len(d), 128, *normalise, dtype, True))


@not_interpreted
def test_compiles_without_graph_breaks(device: str) -> None:
    x, d = images(3, 8, 16).to(device), on(device, draws(3))

    def model(x: Tensor, d: dict[str, Any]) -> Tensor:
        return photometric(x, **d, mean=MEAN, std=STD, dtype=torch.float32) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, d), model(x, d))


X, N = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "float_images": (lambda: photometric(X.float()), r"images must be torch\.uint8, got torch\.float32"),
    "nhwc": (lambda: photometric(X.permute(0, 2, 3, 1)), r"must be \[batch, 3, .*permute\(0, 3, 1, 2\)"),
    "one_image": (lambda: photometric(X[0]), r"got shape \(3, 4, 4\)"),
    "coin_rows": (lambda: photometric(X, flip=N(3, dtype=torch.bool)), r"flip must have shape \(2,\), got \(3,\)"),
    "coin_dtype": (lambda: photometric(X, solarize=N(2)), r"solarize must be torch\.bool"),
    "factors_columns": (lambda: photometric(X, factors=N(2, 3), order=N(2, 4)), r"factors must have shape \(2, 4\)"),
    "factors_dtype": (lambda: photometric(X, factors=N(2, 4).double(), order=N(2, 4).int()), r"\.to\(torch\.float32\)"),
    "order_dtype": (lambda: photometric(X, factors=N(2, 4), order=N(2, 4)), "order must be torch.int32 or torch.int64"),
    "order_missing": (lambda: photometric(X, factors=N(2, 4)), "factors and order must come together.*no order"),
    "jitter_alone": (lambda: photometric(X, jitter=N(2, dtype=torch.bool)), "no factors and no order"),
    "window_missing": (lambda: photometric(X, sigma=N(2)), "sigma and window must come together"),
    "device": (lambda: photometric(X, flip=N(2, dtype=torch.bool, device="meta")), "flip must be on the device of"),
    "dtype": (lambda: photometric(X, dtype=torch.int32), "dtype must be torch.uint8, torch.bfloat16"),
    "std_missing": (lambda: photometric(X, mean=MEAN, dtype=torch.float32), "std must be three numbers"),
    "mean_of_one": (lambda: photometric(X, mean=[0.5], std=STD, dtype=torch.float32), "mean must be three numbers"),
    "std_zero": (lambda: photometric(X, mean=MEAN, std=(1, 0, 1), dtype=torch.float32), "all positive"),
    "uint8_normalised": (lambda: photometric(X, mean=MEAN, std=STD), "dtype must be floating point with mean and std"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------- only on a GPU


@pytest.mark.gpu("launches")
def test_launches_and_host_syncs() -> None:
    torch.use_deterministic_algorithms(False)  # it fills every torch.empty, which is a launch each
    x, d = images(16, 64, 64).to(DEVICE), draws(16)
    there = on(DEVICE, d)
    assert launches(lambda: photometric(x, **there)) in (["_photometric_kernel", "_gaussian_blur_kernel"], NOT_HERE)
    sharp = {name: draw for name, draw in there.items() if name not in ("blur", "sigma", "window")}
    assert launches(lambda: photometric(x, **sharp)) in (["_photometric_kernel"], NOT_HERE)
    nowhere = torch.zeros(16, dtype=torch.bool)  # known on the host
    kernels = launches(lambda: photometric(x, **{**there, "blur": nowhere}))
    assert kernels is NOT_HERE or [n for n in kernels if "kernel" in n.lower()] == ["_photometric_kernel"]
    expected = photometric(x, **there)
    with host_syncs_are_errors():
        out = photometric(x, **there)
        from_host = photometric(x, **d._asdict())
    assert torch.equal(out, expected) and torch.equal(from_host, expected)


@pytest.mark.gpu("launches")
def test_a_captured_view_follows_its_draws() -> None:
    x, d = images(16, 64, 64).to(DEVICE), on(DEVICE, draws(16))
    photometric(x, **d)
    graph = Captured(lambda: photometric(x, **d))
    for seed in (1, 2):
        for name, draw in on(DEVICE, draws(16, seed=seed)).items():
            d[name].copy_(draw)
        out = graph.replay()
        assert torch.equal(out, photometric(x, **d))


@pytest.mark.gpu("kernels")
def test_large_images_on_a_gpu_and_on_the_cpu() -> None:
    """Many sweeps of a program over its image, and the two implementations beside one another."""
    x, d = images(24, 224, 224), draws(24)
    difference = np.abs(f64(photometric(x.to(DEVICE), **on(DEVICE, d))) - f64(photometric(x, **d._asdict())))
    assert difference.max() <= 1 and difference.mean() <= FLOAT16_FACTORS

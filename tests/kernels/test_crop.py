"""The resized crop: against PyTorch's antialiased resize in float64 and PIL, every layout, and what is refused."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from byol_kernels import resized_crop
from tests.kernels.conftest import INTERPRETED, not_interpreted

Mode = Literal["bicubic", "bilinear"]
MODES: tuple[Mode, ...] = ("bicubic", "bilinear")
SHAPES = [(32, 32, 32), (17, 40, 28), (96, 70, 33), (8, 9, 40 if INTERPRETED else 70)]
CASES = list(itertools.product(SHAPES, MODES))
if INTERPRETED:  # each mode with two of the shapes: larger and smaller than the crops
    CASES = [CASES[0], CASES[3], CASES[4], CASES[7]]
FLOAT32 = 2e-3
"""Error of float32 arithmetic in levels of 255: two sums of up to fifty products, weights of at most 1.2 in total."""


def make_images(n: int, height: int, width: int) -> Tensor:
    """Noise over edges, which overshoots."""
    generator = torch.Generator().manual_seed(n + height)
    x = torch.randint(0, 256, (n, height, width, 3), generator=generator, dtype=torch.uint8)
    x[:, :, width // 2 :] //= 4
    return x.permute(0, 3, 1, 2)


def make_boxes(batch: int, height: int, width: int) -> Tensor:
    """The whole image, its last pixel, a row, a column, and others."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([height, width])
    extent = 1 + (torch.rand(batch, 2, generator=generator) * size).int().clamp(max=size - 1)
    start = (torch.rand(batch, 2, generator=generator) * (size - extent + 1)).int()
    box = torch.cat([start, extent], dim=1).int()
    special = [[0, 0, height, width], [height - 1, width - 1, 1, 1], [2, 0, 1, width], [0, 3, height, 1]]
    box[:4] = torch.tensor(special, dtype=torch.int32)
    return box


def expected(x: Tensor, index: Tensor, box: Tensor, size: int, mode: Mode) -> Tensor:
    """Crop first, so that the filter sees no pixel outside; without any rounding."""
    crops = [
        x[i : i + 1, :, t : t + h, s : s + w] for i, (t, s, h, w) in zip(index.tolist(), box.tolist(), strict=True)
    ]
    resize = partial(torch.nn.functional.interpolate, size=(size, size), mode=mode, antialias=True)
    return torch.cat([resize(c.double()) for c in crops]).clamp(0, 255)


@pytest.mark.parametrize(("shape", "mode"), CASES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], mode: Mode, device: str) -> None:
    height, width, size = shape
    x, box, index = make_images(5, height, width), make_boxes(6, height, width), torch.tensor([4, 0, 2, 2, 1, 3])
    out = resized_crop(x.to(device), box.to(device), size, index=index.to(device), interpolation=mode).cpu()
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    difference = (out.double() - expected(x, index, box, size, mode)).abs()
    if device == "cuda" or INTERPRETED:
        assert difference.max() <= 0.5 + FLOAT32
    else:  # rounds, and clips what overshoots, between the passes: half a level, weighed by up to 1.2, and another half
        assert difference.mean() <= 0.4
        assert difference.quantile(0.8) <= 1.1


@pytest.mark.parametrize("mode", MODES)
def test_matches_pil(mode: Mode, device: str) -> None:
    """PIL rounds between its passes: the distance to it is at most that of the unrounded result, and our rounding."""
    smooth = (
        torch.nn.functional.interpolate(make_images(3, 6, 6).float(), (48, 40), mode="bicubic").clamp(0, 255).byte()
    )
    box, index = make_boxes(6, 48, 40)[4:], torch.tensor([2, 0])
    out = resized_crop(smooth.to(device), box.to(device), 24, index=index.to(device), interpolation=mode).cpu()
    exact = expected(smooth, index, box, 24, mode)
    resampling = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    for row, (i, (t, s, h, w)) in enumerate(zip(index.tolist(), box.tolist(), strict=True)):
        cut = Image.fromarray(smooth[i].permute(1, 2, 0).contiguous().numpy()).crop((s, t, s + w, t + h))
        pil = np.asarray(cut.resize((24, 24), resampling)).transpose(2, 0, 1).astype(float)
        ours = out[row].numpy().astype(float)
        assert np.abs(ours - pil).mean() <= np.abs(exact[row].numpy() - pil).mean() + 0.3
        assert np.abs(ours - pil).max() <= 2


def test_no_index_pairs_images_and_boxes(device: str) -> None:
    x, box = make_images(6, 20, 24).to(device), make_boxes(6, 20, 24).to(device)
    one_by_one = [resized_crop(x[i : i + 1], box[i : i + 1], 16) for i in range(6)]
    assert torch.equal(resized_crop(x, box, 16), torch.cat(one_by_one))


def test_crop_of_output_size_is_unchanged(device: str) -> None:
    x, box = make_images(3, 24, 24).to(device), torch.tensor([[0, 0, 24, 24]] * 3).to(device)
    assert torch.equal(resized_crop(x, box, 24), x)
    part = torch.tensor([[4, 7, 8, 8]] * 3).to(device)
    assert torch.equal(resized_crop(x, part, 8), x[..., 4:12, 7:15])


def test_strides_and_integer_dtypes(device: str) -> None:
    x, box, index = (
        make_images(5, 21, 19).to(device),
        make_boxes(5, 21, 19).to(device),
        torch.arange(5).flip(0).to(device),
    )
    out = resized_crop(x, box, 16, index=index)
    assert torch.equal(resized_crop(x.contiguous(), box.long(), 16, index=index.int()), out)
    wide = torch.zeros(5, 3, 30, 40, dtype=torch.uint8, device=device)
    wide[:, :, 3:24, 9:28] = x
    assert torch.equal(resized_crop(wide[:, :, 3:24, 9:28], box, 16, index=index), out)


def test_empty_batch(device: str) -> None:
    none = torch.zeros(0, 4, dtype=torch.int32, device=device)
    assert resized_crop(make_images(0, 8, 8).to(device), none, 8).shape == (0, 3, 8, 8)


@not_interpreted
def test_opcheck_and_compile() -> None:
    x, box, index = make_images(3, 12, 12), make_boxes(4, 12, 12), torch.tensor([0, 2, 1, 1])
    torch.library.opcheck(torch.ops.byol_kernels.resized_crop.default, (x, index, box, 8, "bicubic"))
    torch.library.opcheck(torch.ops.byol_kernels.resized_crop.default, (x, None, box[:3], 8, "bilinear"))
    compiled = torch.compile(lambda: resized_crop(x, box, 8, index=index), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), resized_crop(x, box, 8, index=index))


X, W, FIRST = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([[0, 0, 8, 8]] * 2), torch.zeros(2).long()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: resized_crop(X.float(), W, 8), r"images must be torch\.uint8"),
    "box_shape": (lambda: resized_crop(X, W[:1], 8), r"box must have shape \(2, 4\), got \(1, 4\)"),
    "box_dtype": (lambda: resized_crop(X, W.float(), 8), "box must be int32 or int64"),
    "index_shape": (lambda: resized_crop(X, W, 8, index=FIRST[:1]), r"box must have shape \(1, 4\)"),
    "index_dtype": (lambda: resized_crop(X, W, 8, index=FIRST.float()), "index must be int32 or int64"),
    "device": (lambda: resized_crop(X, W, 8, index=FIRST.to("meta")), "index must be on the device of images, cpu"),
    "size": (lambda: resized_crop(X, W, 0), "size must be 1..32768 pixels, got 0"),
    "size_too_large": (lambda: resized_crop(X, W, 2**40), "size must be 1..32768 pixels, got 1099511627776"),
    "interpolation": (lambda: resized_crop(X, W, 8, interpolation="cubic"), "must be bicubic or bilinear"),  # type: ignore[arg-type]
}


@not_interpreted
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@not_interpreted
@pytest.mark.parametrize("box", [[0, 0, 9, 8], [0, 1, 8, 8], [-1, 0, 4, 4], [0, 0, 0, 4]], ids=str)
def test_box_outside_image_is_refused(box: list[int]) -> None:
    with pytest.raises(ValueError, match="box must lie within an image of 8 x 8 pixels"):
        resized_crop(X, torch.tensor([box] * 2), 8)
    with pytest.raises(ValueError, match="one of 2, got .* of image 2"):
        resized_crop(X, W, 8, index=FIRST + 2)

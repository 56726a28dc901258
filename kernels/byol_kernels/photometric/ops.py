"""`photometric`: color jitter, grayscale, blur, solarize, flip, normalize and cast of uint8 images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from byol_kernels._images import FLOAT_DTYPES, check_images, check_params
from byol_kernels.derivatives import refuse_derivatives
from byol_kernels.photometric import batched, kernels, reference
from byol_kernels.photometric.params import VALUES, PhotometricParams

SMALL_AREA = 64 * 64
"""Largest image in pixels that the CPU processes as a batch. Each CPU form is slower in the other's place, by up to a
factor of three; their results may differ by a level where a value is next to a half of one."""

# -------------------------------------------------------------------------------- operator

# One operator that writes to a given output. All tensors and options stand in the order of the schema.
torch.library.define(
    "byol_kernels::photometric_out",
    f"(Tensor images, {', '.join(f'Tensor? {name}' for name in PhotometricParams._fields)}, int solarize_threshold,"
    " float[] mean, float[] std, bool truncate, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def photometric_cpu(images: Tensor, *arguments: Any) -> None:
    """Batched form for small images, image by image otherwise; arguments as in the schema."""
    *values, solarize_threshold, mean, std, truncate, out = arguments
    _check_overlap(images, out)
    if not out.numel():
        return
    params = PhotometricParams(*values)
    small = images.shape[2] * images.shape[3] <= SMALL_AREA
    # The batched form has neither floating-point results nor truncation: the other serves these at any size.
    if small and out.dtype == torch.uint8 and not truncate:
        batched.photometric(images, params, solarize_threshold, out)
    else:
        reference.photometric(images, params, solarize_threshold, mean, std, truncate, out)


def photometric_cuda(images: Tensor, *arguments: Any) -> None:
    """Triton kernels; arguments as in the schema."""
    *params, solarize_threshold, mean, std, truncate, out = arguments
    _check_overlap(images, out)
    if out.numel():
        kernels.launch_photometric(images, PhotometricParams(*params), solarize_threshold, mean, std, truncate, out)


def _photometric_fake(images: Tensor, *arguments: Any) -> None:
    """Nothing: shapes and layouts of the output are checked before the call."""


def _check_overlap(images: Tensor, out: Tensor) -> None:
    """Raise a ValueError if writing to `out` would change `images`. Here, since traced tensors have no address."""
    ends = []
    for x in (images, out):
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        ends.append(x.data_ptr() + extent * x.element_size())
    if images.numel() and images.data_ptr() < ends[1] and out.data_ptr() < ends[0]:
        raise ValueError(
            "photometric: out must not share memory with images, got tensors that overlap; pass another buffer"
        )


torch.library.impl("byol_kernels::photometric_out", "CPU", photometric_cpu)
torch.library.impl("byol_kernels::photometric_out", "CUDA", photometric_cuda)
torch.library.register_fake("byol_kernels::photometric_out", _photometric_fake)
refuse_derivatives("photometric_out")

# -------------------------------------------------------------------------------- public function


def photometric(
    images: Tensor,
    *,
    flip: Tensor | None = None,
    jitter: Tensor | None = None,
    factors: Tensor | None = None,
    order: Tensor | None = None,
    grayscale: Tensor | None = None,
    blur: Tensor | None = None,
    sigma: Tensor | None = None,
    kernel_size: Tensor | None = None,
    solarize: Tensor | None = None,
    solarize_threshold: int = 128,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.uint8,
    truncate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """BYOL's augmentation after the crop, with parameters per image.

    In the order of the paper's code (google-deepmind/deepmind-research, byol/): flip, color jitter, grayscale, blur,
    solarize, normalize, cast. The operations are torchvision's; what is left out is not applied. One launch on a GPU,
    and a second one if images are blurred.

    For another blur in the middle: call it with the parameters up to `grayscale` for uint8 images, blur these, and
    call it again with `solarize`, `mean`, `std` and `dtype`.

    Args:
        images: [B, 3, H, W] uint8; any strides, fastest in channels_last with W a multiple of 8.
        flip: mask of the images to mirror left and right, [B] bool; None for none.
        jitter: mask of the images with color jitter, [B] bool; None for all if there are `factors`.
        factors: brightness, contrast and saturation factors (not negative) and hue shift in turns, [B, 4] float32.
        order: which adjustment of `factors` comes first, second, ..., [B, 4] int32 or int64: a permutation of 0 ... 3
            in each row.
        grayscale: mask of the images to convert to gray, [B] bool; None for none.
        blur: mask of the images to blur, [B] bool; None for all if there is a `sigma`.
        sigma: standard deviations of the blur in pixels, [B] float32, positive.
        kernel_size: widths of the blur in pixels, [B] int32 or int64, odd; see `gaussian_blur`.
        solarize: mask of the images to invert at and above the threshold, [B] bool; None for none.
        solarize_threshold: in levels of 255.
        mean: subtracted from each channel, for values from 0 to 1; None together with `std` for neither.
        std: divisor of each channel.
        dtype: of the result: uint8, rounded to the nearest level, or bfloat16, float16 or float32, from 0 to 1 before
            `mean` and `std`.
        truncate: round down to whole levels after each adjustment and the grayscale, and to the nearest after the
            blur, as torchvision does with uint8 tensors. That darkens by up to a level per step; the paper's code
            computes in floating point.
        out: where to write, [B, 3, H, W] of that dtype on the device of the images, channels_last at any offset (a
            view in a larger buffer, say), not overlapping the images. None allocates it.

    Returns:
        [B, 3, H, W], channels_last; `out` if given.

    Parameters may be on the CPU and the images on a GPU: they are copied without a synchronization, and if no image is
    to be blurred, there is one launch. Within the capture of a CUDA graph they must be on the GPU.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not match, overlapping memory, or only one of two
            arguments that belong together.
        NotImplementedError: a parameter that a derivative is asked for.

    Examples:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> mask = torch.tensor([True, False])
        >>> photometric(images, flip=mask, solarize=mask, dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    params = PhotometricParams(flip, jitter, factors, order, grayscale, blur, sigma, kernel_size, solarize)
    check_images("photometric", images, (torch.uint8,))
    _check_params(images, params)
    if dtype not in (torch.uint8, *FLOAT_DTYPES):
        raise ValueError(
            f"photometric: dtype must be torch.uint8, torch.bfloat16, torch.float16 or torch.float32, got {dtype}; "
            "convert the result with .to()"
        )
    mean, std = _checked_mean_std(mean, std, dtype)
    if out is None:
        out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    else:
        _check_out(images, dtype, out)
    torch.ops.byol_kernels.photometric_out(images, *params, solarize_threshold, mean, std, truncate, out)
    return out


def _check_params(images: Tensor, params: PhotometricParams) -> None:
    """Raise a ValueError unless all parameters fit the images and those that belong together are there."""
    op = "photometric"
    named, values = params._asdict(), {name: kind for kinds in VALUES.values() for name, kind in kinds.items()}
    for name, param in named.items():
        dtypes, columns = values.get(name, ((torch.bool,), 0))
        check_params(op, images, {name: param}, dtypes, columns)
    for mask, names in VALUES.items():
        missing = [name for name in names if named[name] is None]
        if len(missing) == 1 or (missing and named[mask] is not None):
            raise ValueError(
                f"{op}: {' and '.join(names)} must come together, and with {mask}, got no {' and no '.join(missing)}; "
                "pass all of them or none"
            )


def _checked_mean_std(
    mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Mean and std as the operator takes them: three numbers each, or none."""
    if mean is None and std is None:
        return [], []
    for name, values, smallest in (("mean", mean, -1e6), ("std", std, 1e-6)):
        if values is None or len(values) != 3 or not all(smallest <= value <= 1e6 for value in values):
            raise ValueError(
                f"photometric: {name} must be three numbers, all from {smallest:g} to 1e+06, got {values}; pass both "
                "mean and std, for values from 0 to 1, or neither"
            )
    if dtype == torch.uint8:
        raise ValueError(
            f"photometric: dtype must be floating point with mean and std, got {dtype}; pass dtype=torch.bfloat16, say"
        )
    assert mean is not None and std is not None
    return [float(m) for m in mean], [float(s) for s in std]


def _check_out(images: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Raise a ValueError unless the operator can write its result to `out` without a copy."""
    if out.shape != images.shape or out.dtype != dtype or out.device != images.device:
        raise ValueError(
            f"photometric: out must be {tuple(images.shape)}, {dtype}, on {images.device}, like images and dtype, "
            f"got {tuple(out.shape)}, {out.dtype}, on {out.device}; allocate it to match"
        )
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"photometric: out must be dense in channels_last, got strides {out.stride()}; "
            "allocate it as [..., H, W, 3] and permute the last dimensions to [..., 3, H, W]"
        )

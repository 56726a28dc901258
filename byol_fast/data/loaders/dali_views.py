"""DALI operators of one view: crop and flip and, with `--data.augment dali`, all of its augmentation.

With our kernels they only crop and flip (`CROPS_ONLY`). The color jitter is torchvision's: random order, hue in
HSV, each adjustment rounded to bytes.

Import this module only where DALI is wanted: it imports DALI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.math as dm
from numpy.typing import NDArray

from byol_fast.config import Preprocessing, ViewConfig
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_boxes
from byol_kernels.augment_params.params import ATTEMPTS
from byol_kernels.photometric.params import BRIGHTNESS, CONTRAST, HUE

_dali: Any = nvidia.dali  # many of its attributes are created at import time, which a type checker cannot see
fn, types = _dali.fn, _dali.types
Node = Any  # nvidia.dali.data_node.DataNode, with arithmetic operators

CROPS_ONLY: dict[str, Any] = {name: 0.0 for mask, name in PROBABILITIES.items() if mask != "flip"}
"""Overrides of a `ViewConfig` for a pipeline without the operators that our kernels replace."""

INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


def view_inputs(params: AugmentParams, view: ViewConfig, size: tuple[int, int] | None) -> dict[str, NDArray[Any]]:
    """Inputs of the operators of a view: the required parameters, one array `[B, ...]` for each use.

    Indexing an array costs DALI about as much as a small operator, so the pipeline does not index.

    Args:
        params: parameters of B images.
        view: configuration of the view.
        size: height and width of all images; None if only the decoder knows them.
    """
    inputs: dict[str, NDArray[Any]] = {}
    if size is None:
        widths, heights, inputs["position"] = np.split(params.crop_candidates, [ATTEMPTS, 2 * ATTEMPTS], axis=1)
        inputs["sizes"] = np.stack([heights, widths], axis=2)
        inputs["mirror"] = params.flip.astype(np.float64)
    else:
        boxes = crop_boxes(params.crop_candidates, *size, view.ratio)
        inputs["start"], inputs["extent"] = boxes[:, :2], boxes[:, 2:]
        inputs["from"], inputs["to"] = _corners(boxes[:, 2:].astype(np.float32), params.flip)
    if view.color_jitter_p > 0:
        inputs["jitter"] = params.jitter
        if view.hue > 0:
            inputs["hue"] = params.factors[:, HUE]
        if _has_affine_adjustments(view):
            is_hue = params.order == HUE
            adjustments = params.order[~is_hue].reshape(-1, 3)
            factors = np.take_along_axis(params.factors, adjustments, axis=1)
            inputs["hue_position"] = is_hue.argmax(axis=1).astype(np.int32)
            for k in range(3):
                inputs[f"adjustment{k}"], inputs[f"factor{k}"] = adjustments[:, k], factors[:, k]
    if view.grayscale_p > 0:
        inputs["grayscale"] = params.grayscale
    if view.blur_p > 0:
        inputs["blur"], inputs["sigma"], inputs["kernel_size"] = params.blur, params.sigma, params.kernel_size
    if view.solarize_p > 0:
        inputs["solarize"] = params.solarize
    return {name: np.ascontiguousarray(value) for name, value in inputs.items()}


def _corners(extent: NDArray[np.float32], flip: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Start and end of the resize within each crop `[B, (h, w)]`: from right to left to mirror it."""
    begin, end = np.zeros_like(extent), extent.copy()
    begin[flip, 1], end[flip, 1] = extent[flip, 1], 0
    return begin, end


def view_node(image: Node, inputs: dict[str, Node], view: ViewConfig, gpu: bool) -> Node:
    """One view `[S, S, 3]`, in the order of the reference: crop, flip, jitter, grayscale, blur, solarize."""
    # `if ... inputs[mask]` is a conditional of DALI, for each image, which the decorator of the pipeline makes of it.
    x = crop_flip(image, inputs, view)
    if view.color_jitter_p > 0 and inputs["jitter"]:
        x = jitter(x, inputs, view, gpu)
    if view.grayscale_p > 0 and inputs["grayscale"]:
        x = grayscale(x)
    if view.blur_p > 0 and inputs["blur"]:
        x = fn.gaussian_blur(x, sigma=inputs["sigma"], window_size=inputs["kernel_size"])
    if view.solarize_p > 0 and inputs["solarize"]:
        x = solarize(x, view.solarize_threshold)
    return x


def crop_flip(image: Node, inputs: dict[str, Node], view: ViewConfig) -> Node:
    """Crop, resize, and mirror if the parameters say so.

    The image is sliced before it is resized: the filter of DALI's own random resized crop reaches beyond the crop
    (errors up to 60 levels at the border). The resize mirrors for free.
    """
    if "start" not in inputs:
        inputs = inputs | crop_box_in_pipeline(image, inputs, view)
    return fn.resize(
        fn.slice(image, inputs["start"], inputs["extent"], axes=(0, 1)),
        size=(view.size, view.size),
        roi_start=inputs["from"],
        roi_end=inputs["to"],
        interp_type=INTERPOLATION[view.interpolation],
        antialias=True,
    )


def crop_box_in_pipeline(image: Node, inputs: dict[str, Node], view: ViewConfig) -> dict[str, Node]:
    """`augment_params.crop_boxes` in the pipeline, for images of unknown size; vectors are (height, width)."""
    shape = image.shape()
    height, width = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    size = fn.stack(height, width)
    candidates = dm.max(dm.floor(dm.sqrt(height * width) * inputs["sizes"] + 0.5), 1.0)
    fits = fn.reductions.min(fn.cast(candidates <= size, dtype=types.INT32), axes=[1])
    rank = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.int32))
    best = fn.reductions.max(rank)
    any_fits = fn.cast(best > 0, dtype=types.INT32)
    is_first = fn.expand_dims(fn.cast(rank == best, dtype=types.INT32) * any_fits, axes=1)
    # reductions do not take float64; the sizes are whole numbers here
    extent = fn.reductions.sum(fn.cast(candidates, dtype=types.INT32) * is_first, axes=[0])
    widest = types.Constant(np.array([1.0 / view.ratio[0], view.ratio[1]]))
    largest = dm.max(dm.min(dm.floor(fn.stack(width, height) * widest + 0.5), size), 1.0)
    extent = extent + largest * (1 - any_fits)
    # a center crop if no candidate fits
    start = dm.floor((size - extent + any_fits) * (inputs["position"] * any_fits + 0.5 * (1 - any_fits)))
    mirror = inputs["mirror"] * types.Constant(np.array([0.0, 1.0]))
    return {
        "start": fn.cast(start, dtype=types.INT32),
        "extent": fn.cast(extent, dtype=types.INT32),
        "from": fn.cast(extent * mirror, dtype=types.FLOAT),
        "to": fn.cast(extent * (1.0 - mirror), dtype=types.FLOAT),
    }


def jitter(x: Node, inputs: dict[str, Node], view: ViewConfig, gpu: bool) -> Node:
    """Torchvision's ColorJitter: four adjustments in random order, each rounded to bytes.

    The expensive hue shift is in the pipeline once, with slots for the other three before and after it.
    """
    num_slots = 3 if _has_affine_adjustments(view) else 0
    for k in range(num_slots):
        if inputs["hue_position"] > k:
            x = _affine_adjustment(x, inputs[f"adjustment{k}"], inputs[f"factor{k}"], view, gpu)
    if view.hue > 0:
        x = hue(x, inputs["hue"], gpu)
    for k in range(num_slots):
        if inputs["hue_position"] <= k:
            x = _affine_adjustment(x, inputs[f"adjustment{k}"], inputs[f"factor{k}"], view, gpu)
    return x


def _has_affine_adjustments(view: ViewConfig) -> bool:
    return view.brightness > 0 or view.contrast > 0 or view.saturation > 0


def _affine_adjustment(x: Node, adjustment: Node, factor: Node, view: ViewConfig, gpu: bool) -> Node:
    if adjustment == BRIGHTNESS:
        x = brightness(x, factor) if view.brightness > 0 else x
    elif adjustment == CONTRAST:
        x = contrast(x, factor, gpu) if view.contrast > 0 else x
    else:
        x = saturation(x, factor, gpu) if view.saturation > 0 else x
    return x


def brightness(x: Node, factor: Node) -> Node:
    """`factor * x`."""
    return fn.brightness_contrast(x, brightness=factor)


def contrast(x: Node, factor: Node, gpu: bool) -> Node:
    """`factor * x + (1 - factor) * m`, with m the mean of the gray image, rounded as in PIL."""
    mean = dm.floor(fn.reductions.mean(_gray(x), dtype=types.FLOAT) + 0.5)
    if gpu:  # contrast_center would have to be on the CPU
        return fn.cast(x * factor.gpu() + mean * (1.0 - factor).gpu(), dtype=types.UINT8)
    return fn.brightness_contrast(x, contrast=factor, contrast_center=mean)


def saturation(x: Node, factor: Node, gpu: bool) -> Node:
    """`factor * x + (1 - factor) * gray(x)`."""
    rest = 1.0 - factor
    if gpu:
        factor, rest = factor.gpu(), rest.gpu()
    return fn.cast(x * factor + _to_rgb(_gray(x)) * rest, dtype=types.UINT8)


def hue(x: Node, turns: Node, gpu: bool) -> Node:
    """Shift the hue in HSV by a fraction of the full circle.

    With V = max, m = min, C = V - m and D = C * (hue in sixths), channel c of the result is
    clip(V + C - e_c, m, V), where e_c is the distance of D + C * (shift - o_c) to the nearest multiple of 6 C and
    o = 0, 2, 4 for R, G, B. There is no division. DALI's own `hue` is a linear rotation of the color plane, with a
    larger error than no hue shift.
    """
    f = fn.cast(x, dtype=types.FLOAT)
    r, g, b = f[:, :, 0:1], f[:, :, 1:2], f[:, :, 2:3]
    v = dm.max(r, dm.max(g, b))
    m = dm.min(r, dm.min(g, b))
    c = v - m
    is_r = fn.cast(v == r, dtype=types.FLOAT)
    is_g = fn.cast(v == g, dtype=types.FLOAT) * (1.0 - is_r)
    is_b = 1.0 - is_r - is_g
    d = is_r * (g - b) + is_g * (b - r) + is_b * (r - g) + (is_g * 2.0 + is_b * 4.0) * c
    shift = turns * 6.0 - types.Constant(np.array([0.0, 2.0, 4.0], np.float32))
    if gpu:
        shift = shift.gpu()
    a = dm.abs(d + c * shift)
    e = dm.min(a, dm.abs(a - c * 6.0))
    return fn.cast(dm.clamp(v + c - e, m, v), dtype=types.UINT8)


def grayscale(x: Node) -> Node:
    """The luma of ITU-R 601 on all three channels."""
    return _to_rgb(_gray(x))


def solarize(x: Node, threshold: int) -> Node:
    """Invert values at or above the threshold."""
    values = [float(v if v < threshold else 255 - v) for v in range(256)]
    return fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)


def _gray(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _to_rgb(gray: Node) -> Node:
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)


def center_crop_node(image: Node, preprocessing: Preprocessing) -> Node:
    """Resized center of a decoded image, at the pixels of torchvision's `center_crop` (halves are rounded to even)."""
    shape = image.shape()
    height, width = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    size = preprocessing.crop
    shorter, larger = dm.min(height, width), float(preprocessing.resize)
    fits = fn.cast(shorter == float(size), dtype=types.FLOAT64)
    resized = dm.floor(fn.stack(height, width) * (larger - fits * (larger - size)) / shorter)
    image = fn.resize(
        image,
        size=fn.cast(resized, dtype=types.FLOAT),
        interp_type=INTERPOLATION[preprocessing.interpolation],
        antialias=True,
    )
    left_over = resized - float(size)
    remainder = left_over - 4.0 * dm.floor(left_over * 0.25)  # a half is rounded up only where this is 3
    start = fn.cast(dm.floor(left_over * 0.5) + dm.floor(remainder / 3.0), dtype=types.INT32)
    return fn.slice(image, start, (size, size), axes=(0, 1))

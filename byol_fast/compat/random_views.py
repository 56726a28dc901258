"""Random views of given images, for training loops outside of byol_fast. Runs sample views by image number instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from byol_fast.config import ViewConfig
from byol_fast.data.augment import apply_photometric, required_params
from byol_fast.data.augment_params import params_table
from byol_fast.data.sources.datasets import as_image
from byol_kernels import resized_crop, sample_view_params


def random_view(images: Tensor, view: ViewConfig) -> Tensor:
    """A view of each image, with parameters from torch's default generator: `torch.manual_seed` makes it repeatable.

    Args:
        images: uint8 `[B, 3, H, W]`, on any device.
        view: probabilities and ranges.

    Returns:
        uint8 `[B, 3, S, S]`, channels_last, on the device of the images.
    """
    key = torch.randint(-(2**63), 2**63 - 1, ())
    rows = torch.arange(len(images), device=images.device)
    ranges = torch.from_numpy(params_table(view, images.shape[2], images.shape[3])).to(images.device)
    params = sample_view_params(rows, key.to(images.device), ranges, blur_kernel=view.blur_kernel)
    crops = resized_crop(images, params.crop_box, view.size, interpolation=view.interpolation)
    return apply_photometric(crops, {name: getattr(params, name) for name in required_params(view)}, view)


def image_tensor(what: str, image: Any) -> Tensor:
    """An image, or a batch of them, as a tensor.

    Args:
        what: name of the caller, for messages.
        image: a tensor `[3, H, W]` or `[B, 3, H, W]` of any dtype; or a PIL image or a uint8 array `[H, W, 3]`.

    Returns:
        The tensor, or uint8 `[3, H, W]`.

    Raises:
        ValueError: none of these.
    """
    if not isinstance(image, Tensor):
        pil_image = as_image(image)
        if pil_image is None:
            raise ValueError(
                f"{what}: image must be a tensor [3, H, W] or [B, 3, H, W], a uint8 array [H, W, 3] or a PIL "
                f"image, got {type(image).__name__}; convert it first"
            )
        return torch.from_numpy(np.array(pil_image)).permute(2, 0, 1)
    if image.ndim not in {3, 4} or image.shape[-3] != 3:
        raise ValueError(
            f"{what}: image must be [3, H, W] or [B, 3, H, W], got {list(image.shape)}; three channels come before "
            "height and width"
        )
    return image

"""Features of images under a frozen encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast.models.split_batchnorm import disable_sync

ImageBatches = Iterable[tuple[Tensor, Tensor]]
"""Batches of images, uint8 `[B, 3, S, S]`, and their positions, int64 `[B]`; see `byol_fast.data.eval_batches`."""

CALIBRATION_IMAGES = 10_240
"""Number of images that `recalibrate_bn` needs at most."""


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    images: ImageBatches,
    *,
    normalize: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None = None,
    check: Callable[[], None] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of all images, in order.

    Args:
        encoder: maps normalized `[B, 3, S, S]` to features; runs in eval mode, its modes are restored afterwards.
        images: batches of images and their positions.
        normalize: maps uint8 images to the encoder's input.
        device: device of the encoder.
        autocast: dtype to compute in; None: that of the weights.
        check: called before every batch; may raise to stop.
        transform: applied to the features of each batch; its results are returned instead.

    Returns:
        Features, fp32 `[N, D]` on the device, and the positions of their images, int64 `[N]` on the CPU.

    Raises:
        ValueError: there are no images.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    features, positions = [], []
    try:
        for batch, index in images:
            if check is not None:
                check()
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                x = encoder(normalize(batch.to(device, non_blocking=True)))
            x = x.flatten(1).float()
            features.append(x if transform is None else transform(x))
            positions.append(index)
    finally:
        for module, mode in modes:
            module.training = mode
    if not features:
        raise ValueError("extract_features: images must have at least one batch, got none; check the source")
    return torch.cat(features), torch.cat(positions)


@torch.no_grad()
def recalibrate_bn(
    encoder: nn.Module,
    images: ImageBatches,
    *,
    normalize: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None = None,
    check: Callable[[], None] | None = None,
) -> nn.Module:
    """Copy of an encoder with BN running statistics of these images: the mean over the batches, in train mode.

    The running statistics of an untrained network are 0 and 1; its accuracy would be underestimated with those.

    Args:
        encoder: the network; not modified.
        images: as for `extract_features`.
        normalize: as for `extract_features`.
        device: as for `extract_features`.
        autocast: as for `extract_features`.
        check: as for `extract_features`.
    """
    network = copy.deepcopy(encoder).eval()
    disable_sync(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: all batches have the same weight
            module.train()
    for batch, _ in images:
        if check is not None:
            check()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if len(batch) > 1:  # a single image has no variance
                network(normalize(batch.to(device, non_blocking=True)))
    return network.eval()

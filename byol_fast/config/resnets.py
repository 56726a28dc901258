"""Names of the encoders that the options of ResNets are for."""

from __future__ import annotations

import re

RESNET_OPTIONS = ("cifar_stem", "zero_init_residual")
"""Fields of `ModelConfig` that only torchvision's ResNets, and ours, have a place for."""
TORCHVISION_RESNET = re.compile(r"(wide_)?resnet\d+(_\d)?|resnext\d+_\d+x\d+d")


def is_resnet(encoder: str) -> bool:
    """True for torchvision's ResNets, ResNeXts and wide ResNets, and our narrow one; False for those of timm."""
    return encoder == "resnet18_narrow" or TORCHVISION_RESNET.fullmatch(encoder) is not None

"""Names of the encoders that the options of ResNets are for."""

from __future__ import annotations

import re

LIGHTLY_RESNET = "resnet18_lightly"
"""Our name of the ResNet-18 of lightly's CIFAR-10 benchmark: always with the CIFAR stem, whose ReLU is missing."""
RESNET_OPTIONS = ("cifar_stem", "zero_init_residual")
"""Fields of `ModelConfig` that only torchvision's ResNets, and ours, have a place for."""
TORCHVISION_RESNET = re.compile(r"(wide_)?resnet\d+(_\d)?|resnext\d+_\d+x\d+d")


def is_resnet(encoder: str) -> bool:
    """True for torchvision's ResNets, ResNeXts and wide ResNets, and our own ones; False for those of timm."""
    return encoder in {"resnet18_narrow", LIGHTLY_RESNET} or TORCHVISION_RESNET.fullmatch(encoder) is not None


def has_stem_relu(encoder: str) -> bool:
    """False for the ResNet whose first batch norm no ReLU follows."""
    return encoder != LIGHTLY_RESNET

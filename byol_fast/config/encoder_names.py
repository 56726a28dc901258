"""Names of encoders, as a list: a misspelt one is found before torch is imported."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from importlib import metadata, util

from byol_fast.config.fields import ConfigError

OWN = ("resnet18_narrow", "resnet18_lightly")
"""Encoders of this package."""
TORCHVISION_VERSION = (0, 29)
"""The newest version whose models `TORCHVISION` lists."""
TORCHVISION = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "densenet121",
    "densenet161", "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2",
    "efficientnet_b3", "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large",
    "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf",
    "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf", "resnet101",
    "resnet152", "resnet18", "resnet34", "resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0",
    "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn",
    "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14",
    "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2",
)  # fmt: skip
"""Torchvision's classification models: `torchvision.models.list_models(module=torchvision.models)`."""


def check_encoder_name(encoder: str) -> None:
    """Check a name as far as that needs no import.

    What timm or a torchvision newer than the list decides, `byol_fast.models.encoders.check_encoder_name` checks after
    the import.

    Raises:
        ConfigError: there is no such torchvision model, or timm is not installed.
    """
    if encoder.startswith("timm/"):
        if util.find_spec("timm") is None:
            raise ConfigError(
                f"encoder: {encoder!r} needs timm, which is not installed; pip install timm, or choose a torchvision "
                "model"
            )
    elif encoder not in (*OWN, *TORCHVISION) and not _installed_list_decides():
        raise unknown_encoder(encoder, (*OWN, *TORCHVISION))


def unknown_encoder(encoder: str, names: Sequence[str]) -> ConfigError:
    """Error of a name that is not among those known, with the three closest."""
    near = difflib.get_close_matches(encoder, names, n=3, cutoff=0)
    package = "timm" if encoder.startswith("timm/") else "torchvision"
    return ConfigError(
        f"encoder: must be the name of a {package} model, got {encoder!r}; did you mean {', '.join(near)}?"
    )


def _installed_list_decides() -> bool:
    """True if torchvision is imported already, or newer than the list, or its version is unknown."""
    if "torchvision" in sys.modules:
        return True
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return True
    return tuple(map(int, re.findall(r"\d+", version)[:2])) > TORCHVISION_VERSION

"""Encoders by name, or a module of one's own, without their classifiers."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _narrow_resnet18(**_: Any) -> nn.Module:
    """ResNet-18 with half the channels in every stage (2.8 M parameters): the demo's encoder."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class NarrowResNet(ResNet):  # type: ignore[misc]
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
            return super()._make_layer(block, planes // 2, *args, **kwargs)

    return NarrowResNet(BasicBlock, [2, 2, 2, 2])


OWN_ENCODERS: dict[str, Callable[..., nn.Module]] = {"resnet18_narrow": _narrow_resnet18}


def encoder_names() -> list[str]:
    """Names that `build_encoder` knows: torchvision's classification models and our own."""
    from torchvision import models

    return [*OWN_ENCODERS, *models.list_models(module=models)]


def build_encoder(
    encoder: str | nn.Module,
    *,
    image_size: int | None = None,
    cifar_stem: bool = False,
    zero_init_residual: bool = False,
    pretrained: bool = False,
) -> nn.Module:
    """An encoder without its classifier.

    Args:
        encoder: a torchvision classification model by name, `timm/NAME` where timm is installed, or any module that
            maps `[B, 3, H, W]` to features. A module is taken as it is.
        image_size: height and width of the images in pixels, for vision transformers, which are made for one size;
            None leaves it at the model's own.
        cifar_stem: replace a ResNet's first convolution by 3x3, stride 1, padding 1 and drop its max-pool.
        zero_init_residual: start every residual block of a ResNet as the identity; other encoders have none.
        pretrained: start from torchvision's default weights (or timm's).

    Returns:
        The module; the sizes of its features are found with `feature_dim`.

    Raises:
        ValueError: unknown name (the nearest is suggested), or an option the model has no place for.
    """
    if isinstance(encoder, nn.Module):
        if cifar_stem or zero_init_residual or pretrained:
            raise ValueError(
                "build_encoder: cifar_stem, zero_init_residual and pretrained go with an encoder's name, got a "
                f"{type(encoder).__name__}; prepare the module yourself"
            )
        return encoder
    if encoder.startswith("timm/"):
        if cifar_stem or zero_init_residual:
            raise ValueError(
                f"build_encoder: cifar_stem and zero_init_residual are for torchvision's ResNets, got {encoder!r}; "
                "drop them"
            )
        return _timm_encoder(encoder.removeprefix("timm/"), image_size, pretrained)
    from torchvision import models

    names = encoder_names()
    if encoder not in names:
        near = difflib.get_close_matches(encoder, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "byol_fast.models.encoders.encoder_names() lists them"
        raise ValueError(f"build_encoder: encoder must be a torchvision model's name, got {encoder!r}; {hint}")
    if encoder in OWN_ENCODERS:
        if pretrained:
            raise ValueError(f"build_encoder: there are no pretrained weights for {encoder!r}; drop pretrained")
        network = OWN_ENCODERS[encoder]()
    else:
        # These two warn about their slow initialization unless told, and insist on auxiliary heads with weights.
        googles = encoder in {"inception_v3", "googlenet"}
        options: dict[str, Any] = (
            {"init_weights": not pretrained, "aux_logits": pretrained, "transform_input": False} if googles else {}
        )
        if encoder.startswith("vit_") and image_size is not None and not pretrained:
            options["image_size"] = image_size
        try:
            network = models.get_model(encoder, weights="DEFAULT" if pretrained else None, **options)
        except OSError as error:
            raise ValueError(
                f"build_encoder: the weights of {encoder!r} could not be fetched ({error}); put them into "
                f"{torch.hub.get_dir()}/checkpoints, or drop pretrained"
            ) from error
    if zero_init_residual and not pretrained:
        _zero_residuals(network)
    _remove_classifier(network, encoder)
    if cifar_stem:
        if not isinstance(getattr(network, "conv1", None), nn.Conv2d) or not hasattr(network, "maxpool"):
            raise ValueError(f"build_encoder: cifar_stem is for ResNets, got {encoder!r}; drop cifar_stem")
        first: Any = network.conv1
        conv = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        network.conv1 = conv
        network.maxpool = nn.Identity()
    return network


def _timm_encoder(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"build_encoder: 'timm/{name}' needs timm, which is not installed; pip install timm, or name a torchvision "
            "model"
        ) from error
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"build_encoder: timm has no model {name!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them")
        )
    # Models made for one size take it as img_size; the others refuse the argument.
    sized = {} if image_size is None else {"img_size": image_size}
    for options in (sized, {}):
        try:
            network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError:
            if not options:
                raise
        else:
            return network
    raise AssertionError(name)


def _zero_residuals(network: nn.Module) -> None:
    """Set gamma of the last norm of every residual block to 0 (Goyal et al., arXiv 1706.02677, section 5.1)."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)


def _remove_classifier(network: nn.Module, name: str) -> None:
    """Replace a torchvision model's last linear layer (VGG: its whole classifier) by the identity."""
    if name.startswith(("vgg", "alexnet")):
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Identity()
        return
    if name in {"inception_v3", "googlenet"}:
        setattr(network, "aux_logits", False)  # noqa: B010  (nn.Module's stubs allow only tensors and modules)
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(network, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(network, attribute, nn.Identity())
            return
        if isinstance(head, nn.Sequential):
            last = max((i for i, layer in enumerate(head) if isinstance(layer, nn.Linear | nn.Conv2d)), default=-1)
            if last >= 0 and isinstance(head[last], nn.Linear):
                head[last] = nn.Identity()
                return
    raise ValueError(f"build_encoder: the classifier of {name!r} was not found; pass a module without one")


def feature_dim(encoder: nn.Module, image_size: int) -> int:
    """Size of an encoder's features, found by running it on a copy, in eval mode, on two black images.

    Args:
        encoder: maps `[B, 3, S, S]` to `[B, ...]`; everything behind the batch is flattened.
        image_size: S in pixels.

    Raises:
        ValueError: the encoder does not accept such images, or returns something else.
    """
    probe = copy.deepcopy(encoder).eval()
    parameter = next(probe.parameters(), None)
    like = torch.zeros(()) if parameter is None else parameter
    images = torch.zeros(2, 3, image_size, image_size, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            features = probe(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"encoder: {type(encoder).__name__} must accept [B, 3, {image_size}, {image_size}] images, "
            f"it failed with: {error}; set the views' size to what it takes"
        ) from error
    if not isinstance(features, Tensor) or features.shape[0] != 2:
        raise ValueError(
            f"encoder: {type(encoder).__name__} must return a tensor [B, ...], got {type(features).__name__}"
        )
    return features.flatten(1).shape[1]

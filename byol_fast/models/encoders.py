"""Encoders by name, or a module of one's own, without their classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.config.encoder_names import check_encoder_name as check_without_import
from byol_fast.config.encoder_names import unknown_encoder
from byol_fast.config.fields import ConfigError
from byol_fast.config.resnets import LIGHTLY_RESNET
from byol_fast.models.split_batchnorm import disable_sync
from byol_fast.utils.errors import first_line


def _narrow_resnet18() -> nn.Module:
    from byol_fast.models.narrow_resnet import narrow_resnet18  # imports torchvision's models, a second

    return narrow_resnet18()


def _lightly_resnet18() -> nn.Module:
    from byol_fast.models.lightly_resnet import lightly_resnet18  # imports torchvision's models, a second

    return lightly_resnet18()


OWN_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18_narrow": _narrow_resnet18,
    LIGHTLY_RESNET: _lightly_resnet18,
}


def encoder_names() -> list[str]:
    """Names that `build_encoder` knows: torchvision's classification models and our own."""
    from torchvision import models

    return [*OWN_ENCODERS, *models.list_models(module=models)]


def check_encoder_name(encoder: str) -> None:
    """Check that there is an encoder of a name; imports torchvision's models or timm.

    Raises:
        ConfigError: there is none, or timm is not installed; the three closest names are suggested.
    """
    if not encoder.startswith("timm/"):
        if encoder not in (names := encoder_names()):
            raise unknown_encoder(encoder, names)
        return
    check_without_import(encoder)
    import timm  # optional

    if not timm.is_model(encoder.removeprefix("timm/")):  # with or without the tag of pretrained weights
        raise unknown_encoder(encoder, [f"timm/{name}" for name in timm.list_models()])


def check_pretrained(encoder: str) -> None:
    """Check that there are pretrained weights of an encoder; its package is asked, not the network.

    Raises:
        ConfigError: there are none.
    """
    check_encoder_name(encoder)
    if encoder.startswith("timm/"):
        import timm  # optional

        exists = timm.is_model_pretrained(encoder.removeprefix("timm/"))
    else:
        from torchvision import models

        exists = encoder not in OWN_ENCODERS and len(models.get_model_weights(encoder)) > 0
    if not exists:
        package = "timm" if encoder.startswith("timm/") else "torchvision"
        raise ConfigError(f"encoder: {package} has no pretrained weights of {encoder!r}; choose another encoder")


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
        cifar_stem: replace a ResNet's first convolution by 3x3, stride 1, padding 1 and drop its max-pool;
            `resnet18_lightly` has that stem in any case.
        zero_init_residual: start every residual block of a ResNet as the identity.
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
        if isinstance(encoder, torch.jit.ScriptModule):
            raise ValueError(
                "build_encoder: encoder must be a module in Python, got a TorchScript one; pass the module that it was "
                "made from"
            )
        return encoder
    if not isinstance(encoder, str):
        raise ValueError(
            f"build_encoder: encoder must be a model's name or a torch.nn.Module, got {type(encoder).__name__} "
            f"{encoder!r}; pass the module itself"
        )
    if encoder.startswith("timm/"):
        if cifar_stem or zero_init_residual:
            raise _not_a_resnet("cifar_stem" if cifar_stem else "zero_init_residual", encoder)
        network, _ = create_timm_model(encoder.removeprefix("timm/"), image_size, pretrained=pretrained)
        return network
    check_encoder_name(encoder)
    if pretrained:
        check_pretrained(encoder)
    network = _torchvision_model(encoder, image_size, pretrained=pretrained)
    if zero_init_residual:
        norms = _last_norms(network)
        if not norms:
            raise _not_a_resnet("zero_init_residual", encoder)
        for norm in () if pretrained else norms:
            nn.init.zeros_(norm.weight)  # Goyal et al., arXiv 1706.02677, section 5.1
    _remove_classifier(network, encoder)
    if cifar_stem and encoder != LIGHTLY_RESNET:
        _replace_stem(network, encoder)
    return network


def _torchvision_model(encoder: str, image_size: int | None, *, pretrained: bool) -> nn.Module:
    """A model of torchvision, or one of `OWN_ENCODERS`, with its classifier."""
    from torchvision import models

    if encoder in OWN_ENCODERS:
        return OWN_ENCODERS[encoder]()
    # These two warn about their slow initialization unless told, and insist on auxiliary heads with weights.
    googles = encoder in {"inception_v3", "googlenet"}
    options: dict[str, Any] = (
        {"init_weights": not pretrained, "aux_logits": pretrained, "transform_input": False} if googles else {}
    )
    if encoder.startswith("vit_") and image_size is not None and not pretrained:
        options["image_size"] = image_size
    try:
        network: nn.Module = models.get_model(encoder, weights="DEFAULT" if pretrained else None, **options)
    except OSError as error:
        raise ValueError(
            f"build_encoder: the weights of {encoder!r} could not be fetched ({error}); put them into "
            f"{torch.hub.get_dir()}/checkpoints, or drop pretrained"
        ) from error
    except AssertionError as error:  # of vision transformers
        raise ValueError(
            f"build_encoder: {encoder!r} must take images of {image_size} pixels, it failed with: "
            f"{first_line(error)}; set the views' size to what it takes"
        ) from error
    return network


def _replace_stem(network: nn.Module, encoder: str) -> None:
    """Give a ResNet a stem for small images."""
    first = getattr(network, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(network, "maxpool"):
        raise _not_a_resnet("cifar_stem", encoder)
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    network.conv1 = conv
    network.maxpool = nn.Identity()


def create_timm_model(
    name: str, image_size: int | None, *, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm without its classifier, and the arguments of `timm.create_model` that it was made with.

    Raises:
        ValueError: timm is not installed, does not have the model, or cannot make it for this size.
    """
    check_encoder_name(f"timm/{name}")
    import timm  # optional

    # Models made for one size take it as img_size; the others refuse the argument.
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    for options in (sized, {}):
        arguments = {"num_classes": 0} | options
        try:
            return timm.create_model(name, pretrained=pretrained, **arguments), arguments
        except TypeError:
            if not options:
                raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"build_encoder: timm cannot make {name!r} for images of {image_size} pixels, it failed with: "
                f"{first_line(error)}; set the views' size to what it takes, or use another model"
            ) from error
    raise AssertionError(name)


def _not_a_resnet(option: str, encoder: str) -> ValueError:
    return ValueError(f"build_encoder: {option} is for torchvision's ResNets, got {encoder!r}; drop it")


def _last_norms(network: nn.Module) -> list[Any]:
    """Last norm of every residual block of a ResNet of torchvision; none for other networks."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    blocks = [block for block in network.modules() if isinstance(block, BasicBlock | Bottleneck)]
    return [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in blocks]


def _remove_classifier(network: nn.Module, name: str) -> None:
    """Replace a torchvision model's last linear layer by the identity; VGG's, AlexNet's and SqueezeNet's classifier."""
    if name.startswith(("vgg", "alexnet")):
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Identity()
        return
    if name.startswith("squeezenet"):
        network.classifier = nn.AdaptiveAvgPool2d(1)
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


def feature_dim(encoder: nn.Module, *image_sizes: int) -> int:
    """Size of an encoder's features, found by running it on a copy, in eval mode, on two black images.

    Args:
        encoder: maps `[B, 3, S, S]` to `[B, ...]`; everything behind the batch is flattened.
        image_sizes: S in pixels, one or more; the features must have the same size for all.

    Raises:
        ValueError: the encoder does not accept such images, or returns something else.
    """
    copied = _copied(encoder).eval()
    with torch.no_grad():
        dims = {size: _probe(copied, size).shape[1] for size in dict.fromkeys(image_sizes)}
    first_size, first = next(iter(dims.items()))
    for size, dim in dims.items():
        if dim != first:
            raise ValueError(
                f"encoder: {type(encoder).__name__} must return as many features for images of {size} pixels as for "
                f"{first_size}, got {dim} and {first}; pool them in the encoder, or give all views one size "
                "(view2.size, local_view.size)"
            )
    return first


def check_train_mode(encoder: nn.Module, image_size: int, features: int) -> None:
    """Raise a ValueError unless a copy of an encoder returns features in train mode, too, by its own weights.

    Args:
        encoder: as in `feature_dim`.
        image_size: height and width of the images, in pixels.
        features: their size in eval mode.
    """
    copied = _copied(encoder).train()
    disable_sync(copied)
    devices = {p.device for p in copied.parameters() if p.is_cuda}
    # Dropout must not change the random numbers of what is built next.
    with torch.random.fork_rng(devices), torch.enable_grad():
        output = _probe(copied, image_size)
    name, size = type(encoder).__name__, output.shape[1]
    if size != features:
        raise ValueError(
            f"encoder: {name} must return the same features in train and eval mode, got {size} and {features} values; "
            "take out what it adds in train mode"
        )
    check_copied(encoder, output)
    if late := sorted(copied.state_dict().keys() - encoder.state_dict().keys()):
        raise ValueError(
            f"encoder: {name} must have all parameters and buffers before its first pass, got new ones in it: "
            f"{', '.join(late)}; make them in __init__, or pass images through it once before"
        )


def check_copied(encoder: nn.Module, output: Tensor) -> None:
    """Raise a ValueError if the output of a copy of an encoder depends on weights of the original.

    Args:
        encoder: the original.
        output: of a copy, computed with gradients.
    """
    weights = [p for p in encoder.parameters() if p.requires_grad]
    if not weights or not output.requires_grad:
        return
    if any(gradient is not None for gradient in torch.autograd.grad(output.sum(), weights, allow_unused=True)):
        raise ValueError(
            f"encoder: a copy of {type(encoder).__name__} must use weights of its own, got the original's: a "
            "function that was set as the forward of a module refers to it; override forward in a class, and compile "
            "the module in place of its forward"
        )


def _copied(encoder: nn.Module) -> nn.Module:
    name = type(encoder).__name__
    for path, module in encoder.named_modules():
        if any(nn.parameter.is_lazy(t) for t in [*module._parameters.values(), *module._buffers.values()]):
            raise ValueError(
                f"encoder: the layers of {name} must know their sizes, got an uninitialized {type(module).__name__} at "
                f"{path or 'its root'}; pass images through it once before"
            )
    try:
        return copy.deepcopy(encoder)
    except Exception as error:
        raise ValueError(
            f"encoder: copy.deepcopy must be able to copy {name}, it failed with: {first_line(error)}; take weight and "
            "spectral norm from torch.nn.utils.parametrizations"
        ) from error


def _probe(network: nn.Module, image_size: int) -> Tensor:
    """A network's features of two black images, `[2, D]`."""
    parameter = next(network.parameters(), None)
    like = torch.zeros(()) if parameter is None else parameter
    images = torch.zeros(2, 3, image_size, image_size, dtype=like.dtype, device=like.device)
    name, mode = type(network).__name__, "train" if network.training else "eval"
    try:
        features = network(images)
    except Exception as error:
        raise ValueError(
            f"encoder: {name} must accept [B, 3, {image_size}, {image_size}] images in {mode} mode, it failed with: "
            f"{first_line(error)}; set the views' size to what it takes (view1.size, view2.size, local_view.size)"
        ) from error
    is_features = isinstance(features, Tensor) and features.ndim > 1 and features.is_floating_point()
    if not is_features or len(features) != 2 or not features.numel():
        got = f"{list(features.shape)} of {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"encoder: {name} must return a floating-point tensor [B, ...] in {mode} mode, got {got} for 2 images; "
            "wrap it in a module that picks the features"
        )
    flat: Tensor = features.flatten(1)
    return flat

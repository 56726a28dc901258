"""The model of a practical guide: two networks, the loss, and the transform that makes two views of an image."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from byol_fast.compat.precision import FullPrecisionAverage
from byol_fast.compat.random_views import image_tensor, random_view
from byol_fast.config import ViewConfig, recipes
from byol_fast.models import split_batchnorm
from byol_fast.models.encoders import check_copied
from byol_fast.models.layers import MLPHead, Normalize
from byol_fast.models.split_batchnorm_layers import num_splits
from byol_kernels import byol_loss

logger = logging.getLogger("byol_fast.compat.guide")

Pair = tuple[Tensor, Tensor]
Normalization = tuple[float, float, float]
_AVERAGE_PREFIX = "target_average."
"""Of the keys of `state_dict` that hold the target in float32 while its parameters are bfloat16 or float16."""
_MAX_OVERSHOOT = 72.0
"""Levels beyond 0..255 that are clipped without an error: a resize after the normalization overshoots, a cubic one
between black and white by up to 2 * 1.125 * 0.125 of the range."""


class SelfSupervisedTask(nn.Module):
    """Base class of a task: a model, a loss, and the transform that makes two views of an image.

    Args:
        model: the network of the task.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """Outputs of the model; subclasses may override it."""
        return self.model(*inputs)

    def loss(self, *outputs: Any) -> Tensor:
        """Scalar loss of the outputs of `forward`."""
        raise NotImplementedError(f"{type(self).__name__}: loss must be defined by the task; override it")

    def transform(self, image: Any) -> Pair:
        """Two views of an image."""
        raise NotImplementedError(f"{type(self).__name__}: transform must be defined by the task; override it")


class Encoder(nn.Module):
    """Feature extractor and projector: `[B, 3, H, W]` to `[B, 256]`."""

    def __init__(self, feature_extractor: nn.Module, projector: nn.Module, feature_size: int) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.projector = projector
        self.feature_size = feature_size

    def forward(self, images: Tensor) -> Tensor:
        """Projections `[B, 256]` of normalized images `[B, 3, H, W]`."""
        features = self.feature_extractor(images).flatten(1)
        if features.shape[1] != self.feature_size:
            raise ValueError(
                f"BYOL: feature_size must be the number of flattened features, {features.shape[1]}, got "
                f"{self.feature_size}; pass {features.shape[1]}, or remove the classifier"
            )
        return cast("Tensor", self.projector(features))


class BYOL(SelfSupervisedTask):
    """Bootstrap Your Own Latent (arXiv 2006.07733) with the interface of the guide.

    Args:
        base_model: network that the features are taken from; stored as `model`. Its layers are trained in place if
            they are part of the feature extractor.
        feature_extractor: module that maps `[B, 3, H, W]` to features, which are flattened; or the name of the layer
            of `base_model` that outputs them (`"avgpool"`); or a function of `base_model` that returns such a module.
        feature_size: number of features per image.
        tau: decay of the target, constant.
        view: options of a view; None for the guide's.
        mean: channel means with which floating-point images for `transform` were normalized.
        std: channel standard deviations of the same normalization.

    Attributes:
        online_encoder: feature extractor and projector, trained.
        target_encoder: the same network, an EMA of the online parameters.
        predictor: maps online projections to target projections.
        tau: decay of the target.

    Raises:
        ValueError: an argument is invalid.

    Examples:
        >>> p1, p2, t1, t2 = model(*transform_image(images, model))
        >>> model.loss((p1, p2), (t1, t2)).backward()
        >>> optimizer.step()
        >>> model.update_target_network()
    """

    def __init__(
        self,
        base_model: nn.Module,
        feature_extractor: nn.Module | str | Callable[[nn.Module], nn.Module],
        feature_size: int,
        tau: float = 0.996,
        *,
        view: ViewConfig | None = None,
        mean: Normalization = recipes.CIFAR_MEAN,
        std: Normalization = recipes.CIFAR_STD,
    ) -> None:
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"BYOL: tau must be from 0 to 1, got {tau}; the guide's is 0.996")
        if feature_size < 1:
            raise ValueError(f"BYOL: feature_size must be 1 or more, got {feature_size}; a ResNet-18 has 512")
        super().__init__(base_model)
        guide = recipes.seed_guide()
        extractor = _feature_extractor(base_model, feature_extractor)
        like = next(extractor.parameters(), None)
        if like is None:
            raise ValueError("BYOL: feature_extractor must have parameters to train, got none; pass a network")
        heads: dict[str, Any] = {"last_bias": guide.model.last_bias}
        hidden, out = guide.model.hidden_dim, guide.model.projection_dim
        projector = MLPHead(feature_size, hidden, out, **heads).to(like)
        self.online_encoder: nn.Module = Encoder(extractor, projector, feature_size)
        self.target_encoder: nn.Module = copy.deepcopy(self.online_encoder).requires_grad_(False)
        self.predictor: nn.Module = MLPHead(out, hidden, out, **heads).to(like)
        self.tau = tau
        self.view = view or guide.view1
        self.mean, self.std = mean, std
        self.normalize = Normalize(guide.model.mean, guide.model.std)
        self.not_batched_reason: str | None = None
        """Reason why the views pass the networks one after the other; None otherwise. Set by the first forward pass."""
        self._converted: tuple[nn.Module, ...] = ()
        self._average = FullPrecisionAverage()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions of the online network and projections of the target, with one call per network for both views.

        Args:
            x1: first view of each image, `[B, 3, H, W]`, normalized floating point, as returned by `transform`.
            x2: second view of each image.

        Returns:
            `p1, p2, t1, t2`, each `[B, 256]`; t1 and t2 have no gradient.

        Raises:
            ValueError: wrong or unequal shapes of the views, or a wrong feature size.
        """
        if x1.ndim != 4 or x1.shape != x2.shape or not (x1.is_floating_point() and x1.dtype == x2.dtype):
            raise ValueError(
                f"BYOL: x1 and x2 must be two views [B, 3, H, W] in floating point, got {list(x1.shape)} of {x1.dtype} "
                f"and {list(x2.shape)} of {x2.dtype}; transform_image(images, model) returns them"
            )
        if not self._can_batch_views(x1):
            with torch.no_grad():
                t1, t2 = self.target_encoder(x1), self.target_encoder(x2)
            return self.predictor(self.online_encoder(x1)), self.predictor(self.online_encoder(x2)), t1, t2
        both = torch.cat([x1, x2])
        with torch.no_grad(), num_splits(self.target_encoder, 2):
            t1, t2 = self.target_encoder(both).chunk(2)
        with num_splits(self.online_encoder, 2), num_splits(self.predictor, 2):
            p1, p2 = self.predictor(self.online_encoder(both)).chunk(2)
        return p1, p2, t1, t2

    def loss(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """`mean over the batch of l(p1, t2) + l(p2, t1)` with `l = 2 - 2 cos`, from 0 to 8.

        Args:
            predictions: `(p1, p2)`, each `[B, D]`.
            targets: `(t1, t2)`, each `[B, D]`; without gradient.
        """
        (p1, p2), (t1, t2) = predictions, targets
        return byol_loss(p1, p2, t1, t2)

    def update_target_network(self) -> None:
        """EMA `target = tau * target + (1 - tau) * online` of the parameters; call it after the optimizer's step.

        Of a target in bfloat16 or float16 the EMA is kept in float32, in `state_dict` too: rounded at each update, it
        would stop moving.
        """
        self._average.update(self.target_encoder, self.online_encoder, self.tau)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._average.state(self.target_encoder).items():
            destination[f"{prefix}{_AVERAGE_PREFIX}{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        start = prefix + _AVERAGE_PREFIX
        values = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        self._average.load(self.target_encoder, values)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def transform(self, image: Any) -> Pair:
        """Two views of an image, or of each image of a batch, with separate augmentation parameters per image.

        Parameters are drawn from torch's default generator: `torch.manual_seed` makes them repeatable.

        Args:
            image: `[3, H, W]` or `[B, 3, H, W]`: uint8, or floating point normalized with `mean` and `std` as by
                `load_data`; or a PIL image or a uint8 array `[H, W, 3]`.

        Returns:
            Two views `[3, S, S]` or `[B, 3, S, S]`, fp32, normalized with mean and standard deviation 0.5, on the
            device of the model.

        Raises:
            ValueError: not such an image, or not normalized with `mean` and `std`.
        """
        image = image_tensor("transform", image)
        images = image if image.ndim == 4 else image[None]
        images = to_bytes(images, self.mean, self.std).to(self.normalize.scale.device)
        first, second = (self.normalize(random_view(images, self.view)) for _ in range(2))
        return (first, second) if image.ndim == 4 else (first[0], second[0])

    def _can_batch_views(self, view: Tensor) -> bool:
        """True if both views can pass in one batch; tested once for the current networks, on images of this size."""
        parts = (self.online_encoder, self.target_encoder, self.predictor)
        if len(self._converted) != len(parts) or any(a is not b for a, b in zip(self._converted, parts, strict=True)):
            example = torch.zeros(2, *view.shape[1:], dtype=view.dtype, device=view.device)
            with torch.random.fork_rng([view.device] if view.is_cuda else []), torch.enable_grad():
                check_copied(self.online_encoder, copy.deepcopy(self.online_encoder)(example))
            self.not_batched_reason = split_batchnorm.convert_split_batchnorm(
                nn.Sequential(self.online_encoder, self.predictor), example
            )
            if self.not_batched_reason is None:
                split_batchnorm.convert_split_batchnorm(self.target_encoder)
            else:
                logger.warning("the two views pass the networks one after the other: %s", self.not_batched_reason)
            self._converted = parts
        return self.not_batched_reason is None


def _feature_extractor(base_model: nn.Module, spec: nn.Module | str | Callable[[nn.Module], nn.Module]) -> nn.Module:
    if isinstance(spec, str):
        return _LayerOutput(base_model, spec)
    extractor = spec if isinstance(spec, nn.Module) else spec(base_model) if callable(spec) else spec
    if not isinstance(extractor, nn.Module):
        raise ValueError(
            "BYOL: feature_extractor must be a module, the name of a layer of base_model, or a function of base_model "
            f"that returns a module, got {type(extractor).__name__}; for a torchvision ResNet "
            "pass nn.Sequential(*list(base_model.children())[:-1])"
        )
    return extractor


class _LayerOutput(nn.Module):
    """A network up to one of its layers."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        names = get_graph_node_names(network)[0]
        if not any(name == layer or name.startswith(f"{layer}.") for name in names):
            children = dict.fromkeys(name.split(".")[0] for name in names)
            raise ValueError(
                f"BYOL: feature_extractor must name a layer of {type(network).__name__}, got {layer!r}; it has "
                f"{', '.join(children)}"
            )
        self.layer = layer
        self.layers: nn.Module = create_feature_extractor(network, [layer])

    def forward(self, images: Tensor) -> Tensor:
        """The layer's output."""
        return cast("Tensor", self.layers(images)[self.layer])


def to_bytes(images: Tensor, mean: Normalization, std: Normalization) -> Tensor:
    """Undo the normalization of images: `round(255 (x std + mean))`, exactly the original bytes.

    Args:
        images: `[B, 3, H, W]`, floating point; uint8 is returned unchanged.
        mean: subtracted channel means, of values in 0..1.
        std: channel standard deviations by which the images were divided.

    Returns:
        uint8 `[B, 3, H, W]`.

    Raises:
        ValueError: another dtype; or values that cannot result from this normalization (checked on the CPU only, as it
            would synchronize a GPU).
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"transform: image must be uint8 or floating point, got {images.dtype}; convert it with .to()")
    scale = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    levels = torch.addcmul(shift, images.float(), scale).round_()
    if levels.device.type == "cpu":
        low, high = (float(end) for end in levels.aminmax())
        if not (low >= -_MAX_OVERSHOOT and high <= 255 + _MAX_OVERSHOOT):
            raise ValueError(
                f"transform: image must be normalized with mean {mean} and std {std}, or be uint8, got values that "
                f"correspond to levels from {low:g} to {high:g}; pass BYOL the mean and std of your images"
            )
    return levels.clamp_(0, 255).to(torch.uint8)


def transform_image(images: Tensor | Sequence[Any], model: SelfSupervisedTask) -> Pair:
    """Two views of each image of a batch.

    Args:
        images: `[B, 3, H, W]` as in `BYOL.transform`, or a sequence of images of any sizes.
        model: makes the views. An overridden `transform` is called with one image at a time.

    Returns:
        Two views, each `[B, 3, S, S]`, on the device of the model.

    Raises:
        ValueError: no images, or images that the model's transform rejects.
    """
    if not len(images):
        raise ValueError("transform_image: images must be one or more, got none; skip empty batches")
    if type(model).transform is BYOL.transform:
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ValueError(
                    f"transform_image: images must be a batch [B, 3, H, W], got {list(images.shape)}; "
                    "model.transform(image) takes a single one"
                )
            return model.transform(images)
        if all(isinstance(image, Tensor) for image in images) and len({(i.shape, i.dtype) for i in images}) == 1:
            return model.transform(torch.stack(list(images)))
    pairs = [model.transform(image) for image in images]
    device = next(model.parameters()).device
    first, second = (torch.stack(list(views)).to(device, non_blocking=True) for views in zip(*pairs, strict=True))
    return first, second

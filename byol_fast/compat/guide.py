"""A practical guide's names, on our kernels: a script written for them runs with its imports changed and nothing else.

    from byol_fast.compat import BYOL, device, load_data, train_byol

    base_model = torchvision.models.resnet18(weights="DEFAULT")
    feature_extractor = torch.nn.Sequential(*list(base_model.children())[:-1])
    model = BYOL(base_model, feature_extractor, 512).to(device)
    train_byol(model, load_data())

The numbers are the guide's (recipe `seed_guide`): views of 224 px, heads 256 -> 256, Adam, a constant tau. What differs
from the guide's own code: both views pass a network at once, with batch-norm statistics for each; views of a batch are
drawn together, for each image apart, without PIL; errors are raised. And one thing that changes the pictures: the guide
hands normalised floats to `ToPILImage`, which multiplies by 255 and drops all but the last eight bits, so that
colours wrap around. Here the normalization is undone first.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from byol_fast.compat.random_views import image_tensor, random_view
from byol_fast.config import Config, DataConfig, KNNConfig, ViewConfig, recipes
from byol_fast.data.loaders.prefetch import resolve_num_threads, single_core_threads
from byol_fast.data.loaders.threaded import decode_image
from byol_fast.data.sources import ArraySource, ImageSource, SourceError
from byol_fast.data.sources.open import split
from byol_fast.models import split_batchnorm
from byol_fast.models.encoders import build_encoder
from byol_fast.models.layers import MLPHead, Normalize
from byol_fast.models.split_batchnorm_layers import num_splits
from byol_fast.utils import cpu_tuning
from byol_kernels import byol_loss, ema_update_

__all__ = [
    "BYOL",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "SelfSupervisedTask",
    "device",
    "entrypoint",
    "load_data",
    "logger",
    "train_byol",
    "transform_image",
]

CIFAR10_MEAN = recipes.CIFAR_MEAN
"""Channel means of CIFAR-10, of values scaled to 0..1: `load_data` subtracts them."""
CIFAR10_STD = recipes.CIFAR_STD
"""Channel standard deviations of CIFAR-10: `load_data` divides by them."""

logger = logging.getLogger(__name__)
"""Where `train_byol` writes a line every 100 steps; on standard error where logging is not set up."""

device: torch.device
"""The GPU where there is one, else the CPU; found when it is first asked for."""

FOLDER = "BYOL_FAST_DATA"
"""Environment variable: the images that `load_data` reads where it is given no `root`."""

LOG_EVERY = 100
PADDING = 4
_SIZE = 32

Pair = tuple[Tensor, Tensor]
Normalization = tuple[float, float, float]


def __getattr__(name: str) -> Any:
    """`device`, on first use: importing must not ask for a GPU."""
    if name == "device":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ------------------------------------------------------------------------------------------------ model


class SelfSupervisedTask(nn.Module):
    """What a task has: a model, a loss, and the transform that makes two views of an image.

    Args:
        model: the network that the task is about.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs; a task that needs more overrides it."""
        return self.model(*inputs)

    def loss(self, *outputs: Any) -> Tensor:
        """The scalar to descend, from what `forward` gave."""
        raise NotImplementedError(f"{type(self).__name__}: loss must be defined by the task; override it")

    def transform(self, image: Any) -> Pair:
        """Two views of an image."""
        raise NotImplementedError(f"{type(self).__name__}: transform must be defined by the task; override it")


class Encoder(nn.Module):
    """Features of images, then the projector: `[B, 3, H, W]` to `[B, 256]`."""

    def __init__(self, feature_extractor: nn.Module, projector: nn.Module, feature_size: int) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.projector = projector
        self.feature_size = feature_size

    def forward(self, images: Tensor) -> Tensor:
        """Projections `[B, 256]` of normalised images `[B, 3, H, W]`."""
        features = self.feature_extractor(images).flatten(1)
        if features.shape[1] != self.feature_size:
            raise ValueError(
                f"BYOL: feature_size must be what feature_extractor gives for an image, {features.shape[1]} numbers "
                f"once flattened, got {self.feature_size}; pass {features.shape[1]}, or leave the classifier out"
            )
        return cast("Tensor", self.projector(features))


class BYOL(SelfSupervisedTask):
    """Bootstrap Your Own Latent (arXiv 2006.07733) as the guide calls it.

    Args:
        base_model: the network that features are taken from; kept as `model`, and trained in place as far as the
            feature extractor consists of its layers.
        feature_extractor: a module that maps `[B, 3, H, W]` to features (behind the batch everything is flattened);
            or the name of the layer of `base_model` whose output they are (`"avgpool"`); or a function that takes
            `base_model` and returns such a module.
        feature_size: numbers that the features of an image have.
        tau: decay of the target, constant.
        view: how a view is drawn; the guide's when None.
        mean: channel means that floating-point images given to `transform` were normalised with.
        std: channel standard deviations, likewise.

    Attributes:
        online_encoder: feature extractor and projector, trained.
        target_encoder: the same, following the online one's parameters.
        predictor: from the online projection to the target's.
        tau: decay of the target.

    Raises:
        ValueError: an argument is out of its contract.

    Example:
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
        mean: Normalization = CIFAR10_MEAN,
        std: Normalization = CIFAR10_STD,
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
        self.views_note: str | None = None
        """Why the views pass the networks one after the other, where they do; known after the first pass."""
        self._prepared: tuple[nn.Module, ...] = ()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions of the online network and projections of the target, each network called once for both views.

        Args:
            x1: first view of each image, `[B, 3, H, W]`, normalised floating point: what `transform` gives.
            x2: second view, likewise.

        Returns:
            `p1, p2, t1, t2`, each `[B, 256]`; no gradient reaches t1 and t2.

        Raises:
            ValueError: views of other or unequal shapes, or a feature size that is not the network's.
        """
        if x1.ndim != 4 or x1.shape != x2.shape or not (x1.is_floating_point() and x1.dtype == x2.dtype):
            raise ValueError(
                f"BYOL: x1 and x2 must be two views [B, 3, H, W] in floating point, got {list(x1.shape)} of {x1.dtype} "
                f"and {list(x2.shape)} of {x2.dtype}; transform_image(images, model) makes them"
            )
        if not self._takes_both(x1):
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
            targets: `(t1, t2)`, each `[B, D]`; they get no gradient.
        """
        (p1, p2), (t1, t2) = predictions, targets
        return byol_loss(p1, p2, t1, t2)

    @torch.no_grad()
    def update_target_network(self) -> None:
        """`target = tau * target + (1 - tau) * online`, parameters only; call it after the optimizer's step."""
        ema_update_(self.target_encoder.parameters(), self.online_encoder.parameters(), self.tau)

    def transform(self, image: Any) -> Pair:
        """Two views of an image, or of each image of a batch; every image has draws of its own.

        Draws come from torch's default generator: `torch.manual_seed` repeats them.

        Args:
            image: `[3, H, W]` or `[B, 3, H, W]`: floating point as `load_data` normalises it (`mean`, `std`), or
                uint8; or a PIL image or a uint8 array `[H, W, 3]`.

        Returns:
            Two views `[3, S, S]` or `[B, 3, S, S]`, fp32, normalised with mean and standard deviation 0.5, on the
            model's device.

        Raises:
            ValueError: no such image, or one that was not normalised with `mean` and `std`.
        """
        image = image_tensor("transform", image)
        images = image if image.ndim == 4 else image[None]
        images = to_bytes(images, self.mean, self.std).to(self.normalize.scale.device)
        first, second = (self.normalize(random_view(images, self.view)) for _ in range(2))
        return (first, second) if image.ndim == 4 else (first[0], second[0])

    def _takes_both(self, view: Tensor) -> bool:
        """Whether both views may pass at once; tried once for the networks as they are, on images of this size."""
        parts = (self.online_encoder, self.target_encoder, self.predictor)
        if len(self._prepared) != len(parts) or any(a is not b for a, b in zip(self._prepared, parts, strict=True)):
            example = torch.zeros(2, *view.shape[1:], device=view.device)
            self.views_note = split_batchnorm.convert_split_batchnorm(
                nn.Sequential(self.online_encoder, self.predictor), example
            )
            if self.views_note is None:
                split_batchnorm.convert_split_batchnorm(self.target_encoder)
            else:
                logger.warning("the two views pass the networks one after the other: %s", self.views_note)
            self._prepared = parts
        return self.views_note is None


def _feature_extractor(base_model: nn.Module, given: nn.Module | str | Callable[[nn.Module], nn.Module]) -> nn.Module:
    if isinstance(given, str):
        return _LayerOutput(base_model, given)
    extractor = given if isinstance(given, nn.Module) else given(base_model) if callable(given) else given
    if not isinstance(extractor, nn.Module):
        raise ValueError(
            "BYOL: feature_extractor must be a module, the name of a layer of base_model, or a function of base_model "
            f"that returns a module, got {type(extractor).__name__}; for a torchvision ResNet "
            "nn.Sequential(*list(base_model.children())[:-1]) does it"
        )
    return extractor


class _LayerOutput(nn.Module):
    """A network up to one of its layers."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        names = get_graph_node_names(network)[0]
        if not any(name == layer or name.startswith(f"{layer}.") for name in names):
            tops = dict.fromkeys(name.split(".")[0] for name in names)
            raise ValueError(
                f"BYOL: feature_extractor must name a layer of {type(network).__name__}, got {layer!r}; it has "
                f"{', '.join(tops)}"
            )
        self.layer = layer
        self.layers: nn.Module = create_feature_extractor(network, [layer])

    def forward(self, images: Tensor) -> Tensor:
        """The layer's output."""
        return cast("Tensor", self.layers(images)[self.layer])


def to_bytes(images: Tensor, mean: Normalization, std: Normalization) -> Tensor:
    """Undo the normalisation of images: `round(255 (x std + mean))`, exactly the bytes that were normalised.

    Args:
        images: `[B, 3, H, W]`, floating point; uint8 passes unchanged.
        mean: channel means that were subtracted, of values scaled to 0..1.
        std: channel standard deviations that were divided by.

    Returns:
        uint8 `[B, 3, H, W]`.

    Raises:
        ValueError: another dtype; or values that cannot come from this normalisation (looked for on the CPU only: a
            GPU would have to be waited for).
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
        if not (low >= -_SLACK and high <= 255 + _SLACK):
            raise ValueError(
                f"transform: image must be normalised with mean {mean} and std {std}, or be uint8, got values that "
                f"would be pixels from {low:g} to {high:g}; give BYOL the mean and std that the images were "
                "normalised with"
            )
    return levels.clamp_(0, 255).to(torch.uint8)


_SLACK = 32.0
"""Levels beyond 0..255 that are cut off without complaint: a resize after the normalisation overshoots."""


# ------------------------------------------------------------------------------------------------ data


class CIFARLoader:
    """Batches of `(images, labels)` in a new order every epoch, as a `DataLoader` gives them.

    Images are fp32 `[B, 3, 32, 32]`, padded by 4 pixels and cropped at random, mirrored at random, and normalised with
    `CIFAR10_MEAN` and `CIFAR10_STD`; labels int64 `[B]`, -1 where there are none. Draws come from torch's default
    generator. The last batch of an epoch has what is left.
    """

    def __init__(self, dataset: ArraySource, batch_size: int, num_workers: int) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self._images = torch.from_numpy(dataset.images)
        labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
        self._labels = torch.from_numpy(labels)
        self._normalize = Normalize(CIFAR10_MEAN, CIFAR10_STD)

    def __len__(self) -> int:
        return (len(self.dataset) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Pair]:
        draws = (self._draw(rows) for rows in torch.split(torch.randperm(len(self.dataset)), self.batch_size))
        if self.num_workers == 0:
            yield from (self._batch(*drawn) for drawn in draws)
            return
        pool = single_core_threads(self.num_workers, "byol-fast-images")
        try:
            ahead: deque[Future[Pair]] = deque()
            for drawn in draws:
                ahead.append(pool.submit(self._batch, *drawn))
                if len(ahead) > self.num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the images, their rows and columns from the top left of the padded image, and whether to mirror.

        Drawn by the thread that asks for batches: workers cannot change the order.
        """
        at = torch.randint(2 * PADDING + 1, (2, len(rows)))
        return rows, at, torch.rand(len(rows)) < 0.5

    def _batch(self, rows: Tensor, at: Tensor, mirror: Tensor) -> Pair:
        padded = nn.functional.pad(self._images[rows], (0, 0, PADDING, PADDING, PADDING, PADDING))
        along = torch.arange(_SIZE)
        columns = torch.where(mirror[:, None], along.flip(0), along) + at[1][:, None]
        numbers = torch.arange(len(rows))[:, None, None]
        images = padded[numbers, (along + at[0][:, None])[:, :, None], columns[:, None, :]]
        return self._normalize(images.permute(0, 3, 1, 2)), self._labels[rows]


def load_data(batch_size: int = 256, num_workers: int = 10, *, root: str | Path | None = None) -> CIFARLoader:
    """CIFAR-10's training images, augmented and normalised, with their labels.

    Args:
        batch_size: images of a batch.
        num_workers: threads that make batches ahead, no more of them than there are cores; 0 makes them when asked.
        root: the folder that torchvision put CIFAR-10 into; or images of 32 x 32 pixels, anything that
            `byol_fast.data.open_source` opens from a path. None: what the environment variable BYOL_FAST_DATA says,
            and without it CIFAR-10 in ~/.cache/byol_fast, fetched if it is not there.

    Raises:
        ValueError: sizes out of range; images that are not there, cannot be fetched, or are of another size.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"load_data: batch_size must be 1 or more and num_workers 0 or more, got {batch_size} and {num_workers}; "
            "the guide's are 256 and 10"
        )
    threads = min(num_workers, resolve_num_threads(0))
    return CIFARLoader(_in_memory(_open(root), max(threads, 1)), batch_size, threads)


def _open(root: str | Path | None) -> ImageSource:
    given = root if root is not None else os.environ.get(FOLDER) or None
    folder = None if given is None else Path(given).expanduser()
    data = DataConfig(builtin="cifar10", root=folder)
    if folder is not None and any((folder / n).exists() for n in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        data = DataConfig(builtin="cifar10", cache=folder)
    try:
        return split(Config(data=data, knn=KNNConfig(enabled="off")))[0]
    except SourceError as error:
        raise SourceError(
            f"load_data: {error}; in Python that is load_data(root=FOLDER), or {FOLDER}=FOLDER in the environment"
        ) from error


def _in_memory(source: ImageSource, threads: int) -> ArraySource:
    if not isinstance(source, ArraySource):
        with single_core_threads(threads, "byol-fast-decode") as pool:
            images = list(pool.map(lambda i: decode_image(source, i)[0].permute(1, 2, 0).numpy(), range(len(source))))
        odd = next((i for i, image in enumerate(images) if image.shape != (_SIZE, _SIZE, 3)), None)
        if odd is not None:
            height, width = images[odd].shape[:2]
            raise SourceError(
                f"load_data: images must be of 32 x 32 pixels as CIFAR-10's, got {height} x {width} in "
                f"{source.sample_name(odd)}; train_byol takes any iterable of (images, labels)"
            )
        return ArraySource(np.stack(images), source.labels, source.classes, source.describe())
    if source.images.shape[1:3] != (_SIZE, _SIZE):
        height, width = source.images.shape[1:3]
        raise SourceError(
            f"load_data: images must be of 32 x 32 pixels as CIFAR-10's, got {height} x {width} in {source.name}; "
            "train_byol takes any iterable of (images, labels)"
        )
    return source


def transform_image(images: Tensor | Sequence[Any], model: SelfSupervisedTask) -> Pair:
    """Two batches of views of a batch of images; draws are of each image.

    Args:
        images: `[B, 3, H, W]` as `BYOL.transform` takes it, or a sequence of images of any sizes.
        model: who draws the views. A `transform` of its own, if it has one, is called with one image at a time.

    Returns:
        Two views, each `[B, 3, S, S]`, on the model's device.

    Raises:
        ValueError: no images, or some that the model's transform does not take.
    """
    if not len(images):
        raise ValueError("transform_image: images must be one or more, got none; leave empty batches out")
    if type(model).transform is BYOL.transform:
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ValueError(
                    f"transform_image: images must be a batch [B, 3, H, W], got {list(images.shape)}; "
                    "model.transform(image) takes one"
                )
            return model.transform(images)
        if all(isinstance(image, Tensor) for image in images) and len({(i.shape, i.dtype) for i in images}) == 1:
            return model.transform(torch.stack(list(images)))
    pairs = [model.transform(image) for image in images]
    where = next(model.parameters()).device
    first, second = (torch.stack(list(views)).to(where, non_blocking=True) for views in zip(*pairs, strict=True))
    return first, second


# ------------------------------------------------------------------------------------------------ training


def train_byol(
    model: SelfSupervisedTask,
    train_loader: Iterable[tuple[Any, Any]],
    num_epochs: int = 10,
    lr: float = 0.001,
) -> list[float]:
    """Train with Adam: two views of each image, loss, step, then the target follows; a log line every 100 steps.

    The networks compute in the dtype of their weights; a model is brought into NHWC memory (values stay).

    Args:
        model: a `BYOL`, or a task of one's own with `forward(x1, x2) -> p1, p2, t1, t2`, `loss`, `transform` and
            `update_target_network`; on the device to train on.
        train_loader: whatever gives `(images, labels)`, over and over; labels play no part. Images as
            `transform_image` takes them.
        num_epochs: passes over it.
        lr: Adam's learning rate.

    Returns:
        The loss of every step.

    Raises:
        ValueError: the loader gives something else, or nothing (a generator is used up after one epoch); or the loss
            is not finite.
    """
    where = next(model.parameters()).device
    model.train()
    model.to(memory_format=torch.channels_last)
    if where.type == "cpu":
        cpu_tuning.keep_freed_memory()
        cpu_tuning.use_small_map_convolutions(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=where.type in {"cpu", "cuda"})
    update_target: Callable[[], None] = cast("Any", model).update_target_network
    _show_log()
    losses: list[float] = []
    pending: list[Tensor] = []
    step = 0
    for epoch in range(num_epochs):
        begun = step
        for item in train_loader:
            x1, x2 = transform_image(_images(item), model)
            p1, p2, t1, t2 = model(x1, x2)
            loss = model.loss((p1, p2), (t1, t2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            update_target()
            pending.append(loss.detach())
            if step % LOG_EVERY == 0 or where.type == "cpu":  # a GPU is waited for once in 100 steps
                losses += _finite(pending, len(losses), lr)
            if step % LOG_EVERY == 0:
                logger.info("epoch %d of %d, step %d: loss %.4f", epoch + 1, num_epochs, step, losses[-1])
            step += 1
        if step == begun:
            raise ValueError(
                f"train_byol: train_loader must give batches in every epoch, got none in epoch {epoch + 1}; a "
                "generator is used up after one pass: give a list or a DataLoader"
            )
        losses += _finite(pending, len(losses), lr)
    return losses


def _images(item: Any) -> Any:
    if not isinstance(item, tuple | list) or len(item) != 2:
        shape = f" {list(item.shape)}" if isinstance(item, Tensor) else ""
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise ValueError(
            f"train_byol: train_loader must give (images, labels), got {type(item).__name__}{shape}{size}; without "
            "labels give (images, None)"
        )
    return item[0]


def _finite(pending: list[Tensor], before: int, lr: float) -> list[float]:
    """The values of the losses that are waiting; none of them waits any more."""
    values = torch.stack(pending).tolist() if pending else []
    pending.clear()
    for number, value in enumerate(values, before):
        if not np.isfinite(value):
            raise ValueError(
                f"train_byol: loss must be finite, got {value} in step {number}; lower lr ({lr}), or look for images "
                "that are not finite"
            )
    return values


def _show_log() -> None:
    """Where nobody has set logging up, the log goes to standard error, as the guide's does."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def entrypoint() -> BYOL:
    """The guide's whole run: CIFAR-10, a ResNet-18 with ImageNet's weights, ten epochs, on `device`.

    Returns:
        The trained model; `model.online_encoder.feature_extractor` is what to keep.

    Raises:
        ValueError: images or weights are not there and cannot be fetched; says where to put them.
    """
    train_loader = load_data()
    base_model = build_encoder("resnet18", pretrained=True)
    model = BYOL(base_model, base_model, 512).to(__getattr__("device"))
    train_byol(model, train_loader)
    return model

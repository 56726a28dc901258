"""The names of a practical guide, on our kernels: a script written for them runs with its imports changed.

    from byol_fast.compat.guide import BYOL, device, load_data, train_byol

    base_model = torchvision.models.resnet18(weights="DEFAULT")
    feature_extractor = torch.nn.Sequential(*list(base_model.children())[:-1])
    model = BYOL(base_model, feature_extractor, 512).to(device)
    train_byol(model, load_data())

The hyperparameters are the guide's (recipe `seed_guide`): views of 224 px, heads 256 -> 256, Adam, a constant tau.
Differences from the guide's own code: both views pass a network in one batch, with batch-norm statistics for each; the
views of a batch are made together, with parameters per image, without PIL; errors are raised. The guide also passes
normalized floats to `ToPILImage`, which multiplies by 255 and keeps the last eight bits, so that colors wrap around;
here the normalization is undone first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from byol_fast.compat.guide_data import load_data
from byol_fast.compat.guide_model import BYOL, SelfSupervisedTask, logger, transform_image
from byol_fast.config import recipes
from byol_fast.models.encoders import build_encoder
from byol_fast.utils import cpu_tuning

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
"""Channel means of CIFAR-10 for values in 0..1, subtracted by `load_data`."""
CIFAR10_STD = recipes.CIFAR_STD
"""Channel standard deviations of CIFAR-10, by which `load_data` divides."""

device: torch.device
"""The GPU if there is one, else the CPU; determined at the first access."""

LOG_EVERY = 100


def __getattr__(name: str) -> Any:
    """`device`, determined at the first access, because importing must not initialize CUDA."""
    if name == "device":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train_byol(
    model: SelfSupervisedTask,
    train_loader: Iterable[tuple[Any, Any]],
    num_epochs: int = 10,
    lr: float = 0.001,
) -> list[float]:
    """Train with Adam: two views of each image, loss, step, EMA of the target; a log line every 100 steps.

    The networks compute in the dtype of their weights, in NHWC memory.

    Args:
        model: a `BYOL`, or another task with `forward(x1, x2) -> p1, p2, t1, t2`, `loss`, `transform` and
            `update_target_network`; on the device to train on.
        train_loader: iterable over `(images, labels)`, once per epoch; labels are ignored. Images as in
            `transform_image`.
        num_epochs: number of epochs.
        lr: learning rate of Adam.

    Returns:
        The loss of every step.

    Raises:
        ValueError: the loader yields something else, or nothing (a generator is exhausted after one epoch); or the loss
            is not finite.
    """
    device = next(model.parameters()).device
    model.train()
    model.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        cpu_tuning.keep_freed_memory()
        cpu_tuning.use_small_map_convolutions(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=device.type in {"cpu", "cuda"})
    update_target: Callable[[], None] = cast("Any", model).update_target_network
    _show_log()
    losses: list[float] = []
    pending: list[Tensor] = []
    step = 0
    for epoch in range(num_epochs):
        first_step = step
        for item in train_loader:
            x1, x2 = transform_image(_images(item), model)
            p1, p2, t1, t2 = model(x1, x2)
            loss = model.loss((p1, p2), (t1, t2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            update_target()
            pending.append(loss.detach())
            if step % LOG_EVERY == 0 or device.type == "cpu":  # a GPU is synchronized once in 100 steps
                losses += _read_losses(pending, len(losses), lr)
            if step % LOG_EVERY == 0:
                logger.info("epoch %d of %d, step %d: loss %.4f", epoch + 1, num_epochs, step, losses[-1])
            step += 1
        if step == first_step:
            raise ValueError(
                f"train_byol: train_loader must yield batches in every epoch, got none in epoch {epoch + 1}; a "
                "generator is exhausted after one epoch: pass a list or a DataLoader"
            )
        losses += _read_losses(pending, len(losses), lr)
    return losses


def _images(item: Any) -> Any:
    if not isinstance(item, tuple | list) or len(item) != 2:
        shape = f" {list(item.shape)}" if isinstance(item, Tensor) else ""
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise ValueError(
            f"train_byol: train_loader must yield (images, labels), got {type(item).__name__}{shape}{size}; without "
            "labels yield (images, None)"
        )
    return item[0]


def _read_losses(pending: list[Tensor], before: int, lr: float) -> list[float]:
    """Values of the pending losses, which are removed from the list."""
    values = torch.stack(pending).tolist() if pending else []
    pending.clear()
    for number, value in enumerate(values, before):
        if not np.isfinite(value):
            raise ValueError(
                f"train_byol: loss must be finite, got {value} in step {number}; lower lr ({lr}), or look for "
                "non-finite images"
            )
    return values


def _show_log() -> None:
    """Log to standard error if logging is not configured, as in the guide."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def entrypoint() -> BYOL:
    """The guide's complete run: CIFAR-10, a ResNet-18 with ImageNet's weights, ten epochs, on `device`.

    Returns:
        The trained model; `model.online_encoder.feature_extractor` is the encoder.

    Raises:
        ValueError: images or weights are missing and cannot be downloaded; the message names their place.
    """
    train_loader = load_data()
    base_model = build_encoder("resnet18", pretrained=True)
    model = BYOL(base_model, base_model, 512).to(__getattr__("device"))
    train_byol(model, train_loader)
    return model

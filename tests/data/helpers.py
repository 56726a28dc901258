"""Small configurations and loaders, and comparisons of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from byol_fast import config as configs
from byol_fast.config import Config, DataConfig, ViewConfig, recipes
from byol_fast.data.augment_params import PROBABILITIES
from byol_fast.data.batch import Batch, ViewLoader
from byol_fast.data.loaders.factory import make_loader
from byol_fast.data.sources import ImageSource

CPU = torch.device("cpu")
OFF: dict[str, Any] = dict.fromkeys(PROBABILITIES.values(), 0.0)
# Written out, so that an operation that is lost from the package's own lists is noticed.
OPERATORS = ["crop", "flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize"]
WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def plain(size: int, **changes: Any) -> ViewConfig:
    """View of a whole square image without augmentation, except for `changes`."""
    return ViewConfig(**{**OFF, **WHOLE, "size": size, **changes})


def config_of(
    backend: str,
    view1: ViewConfig,
    view2: ViewConfig | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    threads: int = 2,
) -> Config:
    """`backend` is a loader with our kernels; "dali" has DALI's own operators, "dali+kernels" ours."""
    loader, _, _ = backend.partition("+")
    assert backend in {"dali", "dali+kernels", "threaded", "device_cache"}
    options: dict[str, Any] = {"loader": loader, "augment": "dali" if backend == "dali" else "kernels"}
    data = DataConfig(**options, threads=threads)
    return Config(batch_size=batch_size, seed=seed, data=data, view1=view1, view2=view2 or view1)


def loader_of(source: ImageSource, config: Config, **more: Any) -> ViewLoader:
    return make_loader(source, config, device=CPU, **more)


def pixels(view: torch.Tensor) -> NDArray[np.uint8]:
    """A view as `[B, H, W, 3]`."""
    array: NDArray[np.uint8] = view.permute(0, 2, 3, 1).numpy()
    return array


def error(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Absolute difference in levels of 255."""
    return np.abs(a.astype(np.float64) - b.astype(np.float64))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.views, a.index), (*b.views, b.index), strict=True))


def paper(backend: str, size: int, **changes: Any) -> Config:
    """The paper's recipe with smaller views."""
    views = {name: {"size": size, **changes} for name in ("view1", "view2")}
    return configs.replace(recipes.imagenet_resnet50(), {"data": config_of(backend, plain(size)).data, **views})

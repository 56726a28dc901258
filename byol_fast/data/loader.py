"""What all loaders of two views share: the order of the images, the position in the stream, and what it belongs to."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byol_fast.config import Config, DataConfig, ViewConfig
from byol_fast.data.batch import Batch, ViewLoader
from byol_fast.data.integrity import BadImages
from byol_fast.data.sources import ArraySource, ImageSource, SourceError
from byol_fast.data.views import ViewDraws, draw, permutation, substitutes
from byol_fast.environment import num_cpus

log = logging.getLogger(__name__)

REPLACED = 10
"""Of the sizes that are compared when a run goes on (`ImageSource.sizes`), so many may differ: images that were bad
and replaced."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A batch before it is made."""

    index: NDArray[np.int64]
    """Positions of its images in the source `[B]`."""
    draws: tuple[ViewDraws, ViewDraws]
    """Augmentation parameters of the two views."""


class Planner:
    """Says what batch number n consists of; holds nothing but the order of the current epoch.

    Each epoch shuffles all images and deals them out to the shards in turn. Where they do not divide evenly, images
    from the front of the epoch's order fill up the last deal: all shards make the same number of steps. Images that
    do not fill a batch are left out of that epoch.

    Another image takes the place of an excluded one; who does depends on the seed, the epoch and the place alone.
    """

    excluded: Collection[int] = ()
    """Images that cannot be read; may grow from one call to the next."""

    def __init__(
        self,
        num_images: int,
        views: tuple[ViewConfig, ViewConfig],
        *,
        batch_size: int,
        seed: int,
        shard_id: int = 0,
        num_shards: int = 1,
    ) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"loader: shard_id must be 0..{num_shards - 1} (num_shards - 1), got {shard_id}")
        per_shard = -(-num_images // num_shards)
        if batch_size > per_shard:
            share = f" on each of {num_shards} shards" if num_shards > 1 else ""
            raise SourceError(
                f"batch_size: must be at most the number of training images{share}, {per_shard}, got {batch_size}; "
                f"use --batch-size {per_shard} or less, or more images"
            )
        self.num_images, self.views, self.seed = num_images, views, seed
        self.batch_size, self.shard_id, self.num_shards = batch_size, shard_id, num_shards
        self.steps_per_epoch = per_shard // batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """This shard's images in the order of an epoch, bad ones included."""
        if epoch != self._epoch:
            order = permutation(self.num_images, seed=self.seed, epoch=epoch)
            dealt = np.arange(self.shard_id, self.shard_id + self._per_shard() * self.num_shards, self.num_shards)
            self._order, self._epoch = order[dealt % self.num_images], epoch
        return self._order

    def index(self, step: int) -> NDArray[np.int64]:
        """The images of batch number `step`."""
        epoch, at = divmod(step, self.steps_per_epoch)
        index = self.order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return self._without_excluded(index, epoch, at * self.batch_size) if self.excluded else index

    def __call__(self, step: int) -> Plan:
        """Batch number `step`."""
        epoch, index = step // self.steps_per_epoch, self.index(step)
        first, second = (draw(v, index, seed=self.seed, epoch=epoch, view=i) for i, v in enumerate(self.views))
        return Plan(index, (first, second))

    def _without_excluded(self, index: NDArray[np.int64], epoch: int, start: int) -> NDArray[np.int64]:
        index = index.copy()
        for row in np.flatnonzero(np.isin(index, np.fromiter(self.excluded, np.int64))):
            place = (start + int(row)) * self.num_shards + self.shard_id
            candidates = substitutes(self.num_images, seed=self.seed, epoch=epoch, place=place)
            index[row] = next(i for i in candidates if i not in self.excluded)
        return index

    def _per_shard(self) -> int:
        return -(-self.num_images // self.num_shards)


class PlannedLoader(ABC):
    """A `ViewLoader` whose batches are a function of their number: its position is all the state there is."""

    backend: str

    def __init__(
        self,
        source: ImageSource,
        config: Config,
        *,
        device: torch.device,
        shard_id: int = 0,
        num_shards: int = 1,
        report: Path | None = None,
    ) -> None:
        """Take images, and of the config `batch_size`, `seed`, `view1`, `view2` and `data`.

        Args:
            source: the images.
            config: the run.
            device: where the batches are wanted.
            shard_id: which part of every epoch this process takes.
            num_shards: number of parts.
            report: file that lists the bad images that are passed over.

        Raises:
            SourceError: there are fewer images than one batch takes.
        """
        self.source, self.config, self.device = source, config, device
        self.planner = Planner(
            len(source),
            (config.view1, config.view2),
            batch_size=config.batch_size,
            seed=config.seed,
            shard_id=shard_id,
            num_shards=num_shards,
        )
        self.bad = BadImages(
            source.where, len(source), on_bad=config.data.on_bad, share=config.data.max_bad, report=report
        )
        self.planner.excluded = self.bad.found.keys()
        self.batch_size = config.batch_size
        self.steps_per_epoch = self.planner.steps_per_epoch
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._make()
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Number of the next batch, what the stream belongs to, and the bad images: integers and strings."""
        return {
            "step": self._step,
            "belongs_to": self._belongs_to(),
            "made_by": self._made_by(),
            "sizes": list(self.source.sizes),
            "bad": self.bad.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the one that was handed out last when `state` was taken.

        A state of any shard serves all shards.

        Raises:
            ValueError: the state belongs to other images, views, batch size, number of shards or seed. Other images
                are accepted, with a warning, if `DataConfig.accept_changed` says so; a few images whose size changed
                always are: bad ones that were replaced.
        """
        mine, theirs = self._belongs_to(), state["belongs_to"]
        changed = [name for name in mine if mine[name] != theirs.get(name)]
        accept = self.config.data.accept_changed
        if changed and not (changed == ["images"] and accept):
            details = "; ".join(f"{name} was {theirs.get(name)}, now is {mine[name]}" for name in changed)
            fix = " (--data.accept-changed goes on with other images)" if "images" in changed else ""
            raise ValueError(
                f"loader state: must belong to the same images and settings, but {', '.join(changed)} changed "
                f"({details}); restore them{fix}, or start a new run"
            )
        self._restart()
        if changed:
            log.warning(
                "resuming with other images: %s, were %s; the rest of the run is not what it would have been",
                mine["images"],
                theirs["images"],
            )
            self.bad.load_state_dict(())  # their numbers mean other images now
        else:
            self._compare_sizes(state["sizes"], accept)
            self.bad.load_state_dict(state["bad"])
        if state["made_by"] != self._made_by():
            log.warning(
                "resuming with %s what was begun with %s: the same augmentations, but pixels may differ by a level",
                self._made_by(),
                state["made_by"],
            )
        self._step = int(state["step"])

    def _compare_sizes(self, then: list[int], accept: bool) -> None:
        """A few other sizes are images that were replaced; many are another data set under the old names."""
        now = self.source.sizes
        differing = sum(a != b for a, b in zip(then, now, strict=True))
        if differing > REPLACED and not accept:
            raise ValueError(
                f"loader state: must belong to the same images, but of {len(now)} that were compared {differing} have "
                "another size in bytes; restore them (--data.accept-changed goes on with these), or start a new run"
            )
        if differing:
            log.warning(
                "resuming with images that changed: of %d that were compared, %d have another size in bytes; what is "
                "made of them is not what it would have been",
                len(now),
                differing,
            )

    def _belongs_to(self) -> dict[str, str | int]:
        return {
            "images": f"{len(self.source)} with fingerprint {self.source.fingerprint}",
            "view1": json.dumps(dataclasses.asdict(self.config.view1)),
            "view2": json.dumps(dataclasses.asdict(self.config.view2)),
            "color": self.config.data.color,
            "batch_size": self.batch_size,
            "num_shards": self.planner.num_shards,
            "seed": self.config.seed,
        }

    @abstractmethod
    def _made_by(self) -> str:
        """Name and version of whoever computes the pixels."""

    @abstractmethod
    def _make(self) -> Batch:
        """Return batch number `self._step`; it may prepare later ones."""

    @abstractmethod
    def _restart(self) -> None:
        """Forget all that was prepared: the position is about to change."""

    def close(self) -> None:
        """Release threads and memory; the loader can still go on afterwards."""
        self._restart()


def thread_count(threads: int) -> int:
    """`DataConfig.threads`, or one for each CPU core that this process may use."""
    return threads or num_cpus()


def dali_installed() -> bool:
    """Whether DALI can be imported; does not import it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


_said: set[str] = set()

RESIDENT_SHARE = 0.1
"""Arrays of at most this share of a GPU's memory are kept there. Of all its memory: what is free differs from start to
start, and a resumed run should make its choice again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """Who makes the views: `DataConfig.loader` and `.augment` without "auto"."""

    loader: Literal["dali", "torchvision", "resident"]
    augment: Literal["kernels", "library"]


def resolve(data: DataConfig, source: ImageSource, device: torch.device) -> Backend:
    """Decide what the configuration leaves open; figures: `benchmarks/NOTES.md`.

    Raises:
        SourceError: DALI was asked for and is not installed; `resident` was, and the images are not in memory.
    """
    augment = data.augment
    if augment == "auto":
        augment = "library" if data.color == "hsv" else "kernels"
    if data.loader == "resident" and not isinstance(source, ArraySource):
        raise SourceError(
            f"data.loader: resident must have images in memory, got {source.describe()}; give arrays (.npz), or use "
            "--data.loader auto"
        )
    if data.loader == "resident" or (data.loader == "auto" and augment == "kernels" and _fits(source, device)):
        return Backend("resident", "kernels")
    if data.loader == "auto" and data.color == "hsv":  # only DALI has it
        return Backend(choose_backend("dali"), augment)
    return Backend(choose_backend(data.loader, device), augment)


def _fits(source: ImageSource, device: torch.device) -> bool:
    if device.type != "cuda" or not isinstance(source, ArraySource):
        return False
    return source.images.nbytes <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory


def choose_backend(loader: str, device: torch.device | None = None) -> Literal["dali", "torchvision"]:
    """Who decodes: for "auto" torchvision on a CPU, and on a GPU DALI where it is installed. Says once when it is not.

    Raises:
        SourceError: DALI was asked for by name and is not installed.
    """
    if loader == "dali":
        if dali_installed():
            return "dali"
        raise SourceError(f"data.loader: dali is not installed; {_ADVICE}, or use --data.loader torchvision")
    if loader == "torchvision" or device is None or device.type == "cpu":
        return "torchvision"
    if dali_installed():
        return "dali"
    if "no dali" not in _said:
        _said.add("no dali")
        log.warning("NVIDIA DALI is not installed: CPU threads decode the images, which is slower; %s", _ADVICE)
    return "torchvision"


_ADVICE = "pip install nvidia-dali-cuda130 (Linux), or nvidia-dali-cuda120 for CUDA 12 drivers"


def make_loader(
    source: ImageSource,
    config: Config,
    *,
    device: torch.device,
    shard_id: int = 0,
    num_shards: int = 1,
    report: Path | None = None,
) -> ViewLoader:
    """Make the loader that `config.data.loader` asks for.

    Args:
        source: the training images.
        config: of it `batch_size` (for each shard), `seed`, `view1`, `view2` and `data` are used.
        device: where the batches are wanted.
        shard_id: which part of every epoch this process takes.
        num_shards: number of parts.
        report: file that lists the bad images that are passed over (`DataConfig.on_bad`), a JSON object a line.

    Raises:
        SourceError: fewer images than one batch takes; DALI asked for and not installed.
    """
    loader: type[PlannedLoader]
    match resolve(config.data, source, device).loader:
        case "dali":
            from byol_fast.data.dali import DaliLoader

            loader = DaliLoader
        case "torchvision":
            from byol_fast.data.torchvision_loader import TorchvisionLoader

            loader = TorchvisionLoader
        case "resident":
            from byol_fast.data.resident import ResidentLoader

            loader = ResidentLoader
    return loader(source, config, device=device, shard_id=shard_id, num_shards=num_shards, report=report)


def eval_batches(
    source: ImageSource,
    size: int,
    batch_size: int,
    *,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    threads: int = 0,
    loader: Literal["auto", "dali", "torchvision", "resident"] = "auto",
    device: torch.device | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a source once, in order, without augmentation, for evaluation.

    The shorter side is resized to 256 / 224 of `size`, unless it is `size` already, and the middle is cut out.

    Args:
        source: the images.
        size: height and width of the result in pixels.
        batch_size: images at a time; the last batch may have fewer.
        interpolation: of the resize, antialiased.
        threads: decoding threads; 0 means one per CPU core that this process may use.
        loader: who decodes, as in `DataConfig.loader`.
        device: where the images are wanted; the CPU when None.
        on_bad: whether an image that cannot be read ends it, or is left out: its position is then not yielded.

    Yields:
        Images, uint8 `[b, 3, size, size]`, channels_last, and their positions in the source, int64 `[b]` on the CPU.

    Raises:
        BadImageError: an image cannot be read, and `on_bad` is "raise"; or half of all cannot.
    """
    device = device or torch.device("cpu")
    if isinstance(source, ArraySource) and source.images.shape[1:3] == (size, size):
        for start in range(0, len(source), batch_size):
            images = torch.from_numpy(source.images[start : start + batch_size].copy())
            yield images.permute(0, 3, 1, 2).to(device), torch.arange(start, start + len(images))
        return
    if choose_backend(loader, device) == "dali":
        from byol_fast.data.dali import eval_batches as made
    else:
        from byol_fast.data.torchvision_loader import eval_batches as made
    bad = BadImages(source.where, len(source), on_bad=on_bad, share=0.5, who="evaluated")
    yield from made(source, size, batch_size, interpolation=interpolation, threads=threads, device=device, bad=bad)

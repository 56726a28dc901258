"""The base of all loaders of two views: a batch is a function of its number."""

from __future__ import annotations

import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byol_fast.config import Config
from byol_fast.data.batch import Batch
from byol_fast.data.integrity import CorruptImages
from byol_fast.data.sampler import Planner
from byol_fast.data.sources import ImageSource
from byol_fast.utils.env import num_cpus

log = logging.getLogger(__name__)


REPLACED = 10
"""Of the sizes that are compared when a run goes on (`ImageSource.sizes`), so many may differ: images that were bad
and replaced."""


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
        self.bad = CorruptImages(
            source.sample_name,
            len(source),
            on_corrupt=config.data.on_bad,
            max_fraction=config.data.max_bad,
            report=report,
        )
        self.planner.excluded = self.bad.by_index.keys()
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

    def _batch(self, views: tuple[Tensor, ...], index: NDArray[np.int64]) -> Batch:
        """The batch of some images, with their labels."""
        labels = self.source.labels
        return Batch(views, None if labels is None else torch.as_tensor(labels)[index], torch.from_numpy(index.copy()))

    def close(self) -> None:
        """Release threads and memory; the loader can still go on afterwards."""
        self._restart()


def thread_count(threads: int) -> int:
    """`DataConfig.threads`, or one for each CPU core that this process may use."""
    return threads or num_cpus()


_ADVICE = "pip install nvidia-dali-cuda130 (Linux), or nvidia-dali-cuda120 for CUDA 12 drivers"

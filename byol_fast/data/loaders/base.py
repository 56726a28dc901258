"""Base class of the loaders, which can be resumed at any batch."""

from __future__ import annotations

import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment import row_chunks
from byol_fast.data.batch import Batch, Views
from byol_fast.data.integrity import CorruptImages
from byol_fast.data.loaders.augment_stream import AugmentStream
from byol_fast.data.loaders.threads import resolve_num_threads, single_core_threads
from byol_fast.data.sampler import BatchSampler
from byol_fast.data.sources import ImageSource

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_REPLACED = 10
"""Images whose size in bytes may differ when a run is resumed (of `ImageSource.sizes`): corrupt ones that were
replaced."""


class DeterministicLoader(ABC):
    """A `ViewLoader` whose batches are a function of their number: the number of the next one is the only state.

    Args:
        source: the images.
        config: of it `batch_size`, `seed` and `data` are used.
        view_configs: configurations of the views.
        device: where the batches go.
        shard_id: part of every epoch that this process takes.
        num_shards: number of parts.
        corrupt_list: file that lists skipped corrupt images.

    Raises:
        SourceError: there are fewer images than one batch takes, or they may be read by one thread only.
    """

    name: str

    def __init__(
        self,
        source: ImageSource,
        config: Config,
        view_configs: tuple[ViewConfig, ...],
        *,
        device: torch.device,
        shard_id: int = 0,
        num_shards: int = 1,
        corrupt_list: Path | None = None,
    ) -> None:
        self.num_threads = resolve_num_threads(config.data.threads)
        source.check_thread_safety(self.num_threads)
        self.source, self.config, self.view_configs, self.device = source, config, view_configs, device
        self.sizes = tuple(view.size for view in view_configs)
        self.corrupt = CorruptImages(
            source.sample_name,
            len(source),
            on_corrupt=config.data.on_corrupt,
            max_fraction=config.data.max_corrupt_fraction,
            corrupt_list=corrupt_list,
        )
        self.sampler = BatchSampler(
            len(source),
            view_configs,
            batch_size=config.batch_size,
            seed=config.seed,
            shard_id=shard_id,
            num_shards=num_shards,
            excluded=self.corrupt.by_index.keys(),  # grows with every corrupt image that is found
        )
        self.batch_size = config.batch_size
        self.batches_per_epoch = self.sampler.batches_per_epoch
        self._augment_stream = AugmentStream(device, max_ahead=config.data.prefetch + 1)
        self._pool: ThreadPoolExecutor | None = None
        self._batch_number = 0

    @property
    def gpu_wait_seconds(self) -> float:
        """See `ViewLoader`."""
        return self._augment_stream.gpu_wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._load_batch()
        self._batch_number += 1
        return batch

    @abstractmethod
    def _load_batch(self) -> Batch:
        """Return the batch with number `self._batch_number`; it may prepare later ones."""

    def _on_threads(self, fill: Callable[[slice], T]) -> list[Future[T]]:
        """Let threads call `fill` for all rows of a batch, chunk by chunk."""
        if self._pool is None:
            self._pool = single_core_threads(self.num_threads, "byol-fast-views")
        chunks = row_chunks(self.batch_size, self.sizes, self.num_threads)
        return [self._pool.submit(fill, rows) for rows in chunks]

    def _batch(self, views: Views, index: NDArray[Any]) -> Batch:
        """Batch of some images, with their labels."""
        labels = self.source.labels
        return Batch(views, None if labels is None else torch.as_tensor(labels)[index], torch.from_numpy(index.copy()))

    def _restart(self) -> None:
        """Discard all that was prepared: the position is about to change."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def close(self) -> None:
        """Release threads and memory; the loader can still continue afterwards."""
        self._restart()

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Number of the next batch, keys of data and back end, and the corrupt images: integers and strings."""
        return {
            "batch_number": self._batch_number,
            "dataset_key": self._dataset_key(),
            "backend_version": self._backend_version(),
            "sizes": list(self.source.sizes),
            "corrupt": self.corrupt.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the last one that was returned when `state` was taken.

        A state of any shard serves all shards.

        Raises:
            ValueError: the state belongs to other images, views, batch size, number of shards or seed. Other images
                are accepted, with a warning, if `DataConfig.accept_changed` is set; a few images whose size changed
                always are: corrupt ones that were replaced.
        """
        now, then = self._dataset_key(), state["dataset_key"]
        changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        accept = self.config.data.accept_changed
        if changed and not (changed == ["images"] and accept):
            details = "; ".join(f"{name} was {then.get(name)}, now is {now.get(name)}" for name in changed)
            fix = " (--data.accept-changed resumes with the current files)" if "images" in changed else ""
            raise ValueError(
                f"loader state: must belong to the same images and settings, but {', '.join(changed)} changed "
                f"({details}); restore them{fix}, or start a new run"
            )
        self._restart()
        if changed:
            log.warning(
                "resuming with other images: %s, were %s; training continues, but is not bit-exact",
                now["images"],
                then["images"],
            )
            self.corrupt.load_state_dict(())  # their numbers stand for other images now
        else:
            self._compare_sizes(state["sizes"], accept)
            self.corrupt.load_state_dict(state["corrupt"])
        if state["backend_version"] != self._backend_version():
            log.warning(
                "resuming with %s a run that was started with %s: the same augmentations, but pixels may differ by a "
                "level",
                self._backend_version(),
                state["backend_version"],
            )
        self._batch_number = int(state["batch_number"])

    def _dataset_key(self) -> dict[str, str | int]:
        """Everything that the batches depend on, apart from the arithmetic of the back end."""
        return {
            "images": f"{len(self.source)} with fingerprint {self.source.fingerprint}",
            **{f"view{i}": json.dumps(dataclasses.asdict(view)) for i, view in enumerate(self.view_configs, 1)},
            "batch_size": self.batch_size,
            "num_shards": self.sampler.num_shards,
            "seed": self.config.seed,
        }

    @abstractmethod
    def _backend_version(self) -> str:
        """Name and version of the software that computes the pixels."""

    def _compare_sizes(self, then: list[int], accept: bool) -> None:
        """Warn if a few sizes differ: images that were replaced. Many are another data set under the old names."""
        now = self.source.sizes
        differing = sum(a != b for a, b in zip(then, now, strict=True))
        if differing > MAX_REPLACED and not accept:
            raise ValueError(
                f"loader state: must belong to the same images, but of {len(now)} that were compared {differing} have "
                "another size in bytes; restore them (--data.accept-changed resumes with the current files), or start "
                "a new run"
            )
        if differing:
            log.warning(
                "resuming with changed images: of %d that were compared, %d have another size in bytes; training "
                "continues, but is not bit-exact",
                len(now),
                differing,
            )

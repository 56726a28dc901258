"""Metrics of a run: records of steps, throughput, and `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byol_fast.data import ViewLoader
from byol_fast.training.metrics_file import Record, parse
from byol_fast.training.train_step import StepOutput
from byol_fast.utils.errors import CheckpointError, write_advice
from byol_fast.utils.files import atomic_write

log = logging.getLogger(__name__)


class MetricsLogger:
    """Appends records to `metrics.jsonl`; they wait in memory until the next `flush`.

    Args:
        path: the metrics file.
        is_main_process: whether this process writes; the others drop their records.
    """

    def __init__(self, path: Path, *, is_main_process: bool = True) -> None:
        self.path = path
        self._is_main_process = is_main_process
        self._pending: list[Record] = []

    def open(self, step: int, *, evaluated: bool, source: Path | None = None) -> None:
        """Begin with the records up to the checkpoint of `step`; those after it are about to be made again.

        Args:
            step: step of the checkpoint that training resumes from; 0 for a new run.
            evaluated: whether that checkpoint already counts the evaluation at its step; if not, that goes too.
            source: metrics file of the run that the checkpoint is of; None: this one.

        Raises:
            OSError: the folder cannot be written.
        """

        def stays(record: Record) -> bool:
            return record["step"] < step or (record["step"] == step and (evaluated or "loss" in record))

        source = source or self.path
        records, damaged = parse(source)
        if damaged:
            log.warning("metrics: %s has damaged lines (%s); left out", source, ", ".join(map(str, damaged)))
        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in records if stays(r)))

    def add(self, record: Record) -> None:
        """Queue a record."""
        self._pending.append(record)

    def flush(self) -> None:
        """Write the queued records.

        Raises:
            CheckpointError: the disk is full or read-only; the records stay queued.
        """
        if not self._is_main_process:
            self.discard()
        if not self._pending:
            return
        try:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in self._pending))
        except OSError as error:
            raise CheckpointError(
                f"metrics: {self.path} could not be written ({error}); {write_advice(error)}, then resume"
            ) from error
        self.discard()

    def discard(self) -> None:
        """Drop the queued records."""
        self._pending.clear()


@dataclass(frozen=True, slots=True)
class Throughput:
    """Throughput over some steps."""

    images_per_second: float
    data_wait: float
    """Share of the time in which the host waited for data, 0..1, without its waits for earlier steps on the GPU."""


class ThroughputMeter:
    """Measures throughput by the host's clock, from one `read` to the next."""

    data_wait_seconds: float = 0.0
    """Time spent waiting for data, in all."""
    paused_seconds: float = 0.0
    """Time left out by `paused`, in all."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._waited_before = 0.0
        self._images = 0

    @contextmanager
    def data_wait(self, loader: ViewLoader | None) -> Iterator[None]:
        """Count the time of the block as waiting for data, except what the loader waits for the GPU.

        Args:
            loader: where the block gets its batches; None for one that never waits for the GPU.
        """

        def now() -> float:
            return time.perf_counter() - (0.0 if loader is None else loader.gpu_wait_seconds)

        begin = now()
        yield
        self.data_wait_seconds += now() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._begin += seconds
            self.paused_seconds += seconds

    def count(self, images: int) -> None:
        """Add images that were trained on."""
        self._images += images

    def read(self) -> Throughput:
        """Throughput since the last reading."""
        now = time.perf_counter()
        elapsed = max(now - self._begin, 1e-9)
        waited = self.data_wait_seconds - self._waited_before
        result = Throughput(self._images / elapsed, min(waited / elapsed, 1.0))
        self._begin, self._waited_before, self._images = now, self.data_wait_seconds, 0
        return result


class StepRecords:
    """Values of steps, kept on the device until they are read.

    Args:
        steps_per_epoch: optimizer steps per epoch.
        throughput: counts images and waiting time.
        device: whose peak memory is recorded.
        all_reduce_mean: with several processes, averages a tensor over them.
    """

    def __init__(
        self,
        steps_per_epoch: float,
        throughput: ThroughputMeter,
        device: torch.device,
        all_reduce_mean: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._throughput = throughput
        self._device = device
        self._all_reduce_mean = all_reduce_mean
        self._pending: list[tuple[int, float, float, Tensor]] = []

    def add(self, step: int, output: StepOutput, probe_top1: Tensor | None) -> None:
        """Keep the values of a finished step.

        Args:
            step: its number, from 1.
            output: of the step.
            probe_top1: accuracy of the online probe on the step's views, scalar.
        """
        values = output.values if probe_top1 is None else torch.cat([output.values, probe_top1.double()[None]])
        self._pending.append((step, output.lr, output.tau, values))

    def read(self) -> list[Record]:
        """Records of the steps since the last reading. Waits for the device, once for all of them."""
        if not self._pending:
            return []
        values = torch.stack([values for *_, values in self._pending])
        if self._all_reduce_mean is not None:
            values = self._all_reduce_mean(values)
        throughput, peak = self._throughput.read(), peak_gib(self._device)
        pending, self._pending = self._pending, []
        return [
            self._record(step, lr, tau, row, throughput, peak)
            for (step, lr, tau, _), row in zip(pending, values.tolist(), strict=True)
        ]

    def _record(
        self, step: int, lr: float, tau: float, row: list[float], throughput: Throughput, peak: float
    ) -> Record:
        loss, std, skipped, *probe_top1 = row
        record: Record = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "loss": loss,
            "lr": lr,
            "tau": tau,
            "images_per_second": round(throughput.images_per_second, 2),
            "data_wait": round(throughput.data_wait, 4),
            "embedding_std": std,
            "peak_memory_gib": round(peak, 3),
        }
        if probe_top1:
            record["probe_top1"] = probe_top1[0]
        if skipped > 0:
            record |= {name: None for name in ("loss", "embedding_std", "probe_top1") if name in record}
            record["skipped"] = True
        return record


def peak_gib(device: torch.device) -> float:
    """Most memory in use at once so far, in GiB: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 / (1024 if sys.platform == "darwin" else 1)

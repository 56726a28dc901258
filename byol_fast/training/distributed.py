"""Processes of a run started by torchrun: groups, broadcasts, DDP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from byol_fast.config import ConfigError
from byol_fast.training.errors import MainProcessError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; also describes a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine, and index of the GPU."""
    local_size: int = 1
    """Processes on this machine."""
    cpu_group: Any = None
    """Gloo group for small host values; None for a single process."""

    @property
    def is_single(self) -> bool:
        """True if there is only this process."""
        return self.size == 1

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all ranks.

        Args:
            value: picklable; ignored on other ranks.
        """
        if self.is_single:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank, on all of them."""
        if self.is_single:
            return [value]
        box: list[Any] = [None] * self.size
        distributed.all_gather_object(box, value, group=self.cpu_group)
        return box

    def barrier(self) -> None:
        """Barrier over all ranks."""
        if not self.is_single:
            distributed.barrier(group=self.cpu_group)

    def all_reduce_max(self, value: int) -> int:
        """The largest value of all ranks; all of them must call it."""
        if self.is_single:
            return value
        largest = torch.tensor([value])
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.cpu_group)
        return int(largest)

    def run_on_main(self, fn: Callable[[], T]) -> T:
        """Run `fn` on rank 0 and broadcast the result; exceptions propagate to all ranks.

        Args:
            fn: called on rank 0 only; returns picklable data.

        Raises:
            MainProcessError: on the other ranks, if `fn` raised on rank 0.
        """
        if self.is_single:
            return fn()
        error: Exception | None = None
        value: Any = None
        if self.is_main_process:
            try:
                value = fn()
            except Exception as raised:
                error = raised
        value, message = self.broadcast((value, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if message is not None:
            raise MainProcessError(f"the main process failed with {message}")
        return cast("T", value)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run a block on rank 0, then on the other ranks, so that downloads and caches are written once."""
        if not self.is_main_process:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main_process:
                self.barrier()


def started_by_torchrun() -> bool:
    """True if torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str, timeout_minutes: float) -> World:
    """Initialize the process groups, if torchrun started several processes.

    Args:
        device: `Config.device`; NCCL connects processes on GPUs, otherwise gloo.
        timeout_minutes: time after which a collective fails.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    if not started_by_torchrun():
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: there must be a GPU for each process, process {local_rank} of this machine found "
                f"{torch.cuda.device_count()}; start it with --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    if not distributed.is_initialized():
        _connect("nccl" if cuda else "gloo", timeout)
    cpu_group = distributed.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cpu_group)


def _connect(backend: str, timeout: timedelta) -> None:
    """Initialize torch's default group, also after a restart.

    On one machine torchrun keeps its store from one attempt to the next, and a restarted process would find the
    addresses of dead processes there. Several machines rendezvous again, with a new store.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def destroy_process_group() -> None:
    """Destroy the process groups; does nothing for a single process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def wrap_ddp(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a network in DDP, which averages gradients during the backward pass.

    Buffers are not broadcast: synchronized statistics are equal on all ranks, and a broadcast breaks captured steps.
    """
    return DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average a tensor over all processes, in place; returns it."""
    distributed.all_reduce(values)
    return values.div_(distributed.get_world_size())


def all_reduce_found_inf(flag: Tensor) -> None:
    """Make a flag on the device 1 on all ranks if it is 1 on any."""
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)

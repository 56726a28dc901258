"""Several processes, started by torchrun: who is who, and what they have to agree on."""

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

T = TypeVar("T")


class MainProcessError(RuntimeError):
    """The leading process met an error, which it reports itself."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; one process is a world of its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, and of its GPU."""
    cpu_group: Any = None
    """Process group on the CPU for small decisions; None alone."""

    @property
    def is_single(self) -> bool:
        """Whether there is only this process."""
        return self.size == 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """What the leader holds, on all processes.

        Args:
            value: plain data; only the leader's counts.
        """
        if self.is_single:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """What every process holds, in order of rank, on all of them."""
        if self.is_single:
            return [value]
        box: list[Any] = [None] * self.size
        distributed.all_gather_object(box, value, group=self.cpu_group)
        return box

    def barrier(self) -> None:
        """Go on when all have come here."""
        if not self.is_single:
            distributed.barrier(group=self.cpu_group)

    def all_reduce_max(self, value: int) -> int:
        """The largest of all processes' values; all of them must ask."""
        if self.is_single:
            return value
        vote = torch.tensor([value])
        distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self.cpu_group)
        return int(vote)

    def run_on_main(self, make: Callable[[], T]) -> T:
        """What the leader makes, on all processes; an error there is raised on all of them.

        Args:
            make: called on the leader only; returns plain data.
        """
        if self.is_single:
            return make()
        error: Exception | None = None
        value: Any = None
        if self.is_main_process:
            try:
                value = make()
            except Exception as raised:
                error = raised
        value, message = self.broadcast((value, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if message is not None:
            raise MainProcessError(f"the leading process failed with {message}")
        return cast("T", value)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run a block on the leader, then on the others: so that only one fetches or writes what all need."""
        if not self.is_main_process:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main_process:
                self.barrier()


def started_by_torchrun() -> bool:
    """Whether this process is one of several that belong together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str, timeout_minutes: float) -> World:
    """Meet the other processes, if there are any.

    Args:
        device: `Config.device`; on GPUs NCCL connects the processes, else gloo.
        timeout_minutes: how long one waits for the others.

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
    return World(rank, size, local_rank, cpu_group)


def _connect(backend: str, timeout: timedelta) -> None:
    """Initialise torch's default group, also after a restart.

    On one machine torchrun keeps its store from one attempt to the next, and a restarted process would find the
    addresses of dead ones there. Several machines meet anew, with a store of their own.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def destroy_process_group() -> None:
    """Part from the other processes; harmless when there are none."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def wrap_ddp(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A network whose gradients are averaged over all processes during the backward pass.

    Buffers are not broadcast: synchronized statistics are equal anyway, and a broadcast breaks captured steps.
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
    """Make a flag on the device 1 on all processes where it is 1 on any."""
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)

"""Ceilings of a device: its speed of copying memory and of multiplying matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from byol_fast.profiling.gpus import COPY_SHARE, COPY_TB, GPUS, PRODUCT_SHARE, SHEETS, gpu_name

Dtype = Literal["bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Maximum speeds of a device."""

    name: str
    """Name of the device."""
    dtype: Dtype
    """Precision of the products."""
    bytes_per_s: float
    """Reads plus writes of a large copy."""
    flops_per_s: float
    """FLOP/s of a large matrix product."""
    peak_flops_per_s: float
    """Dense peak of the data sheet, for MFU; without one (a CPU), the measured value."""
    source: str
    """`measured`, or the origin of the values."""
    cache_bytes: int = 0
    """Size of the last cache before the memory; 0: not known, all traffic counts as the memory's."""
    cache_bytes_per_s: float = 0.0
    """Reads plus writes of the fastest copy within the caches."""

    @property
    def ridge(self) -> float:
        """FLOP per byte above which a kernel is no longer bound by memory."""
        return self.flops_per_s / self.bytes_per_s

    def seconds(self, flops: int, num_bytes: int) -> float:
        """Least seconds of a kernel, by its arithmetic or its traffic."""
        return max(flops / self.flops_per_s, self.memory_seconds(num_bytes))

    def memory_seconds(self, num_bytes: int) -> float:
        """Least seconds of a kernel's traffic.

        A cache may hold inputs when the kernel begins, and outputs when it ends: up to twice its size is moved at the
        caches' speed.
        """
        if not self.cache_bytes:
            return num_bytes / self.bytes_per_s
        beyond = max(num_bytes - 2 * self.cache_bytes, 0)
        return max(beyond / self.bytes_per_s, num_bytes / self.cache_bytes_per_s)


def stated(gpu: str, dtype: Dtype = "bf16") -> Ceilings:
    """Ceilings of a GPU by its data sheet and the measured shares of it that Hopper reaches; needs no GPU.

    Args:
        gpu: `A100`, `H100`, `H200` or `RTX 4090` (also `4090`), in any case.
        dtype: of the products.

    Raises:
        ConfigError: another GPU.
    """
    name = gpu_name(gpu)
    half, tf32, fp32, bandwidth = SHEETS[name]
    peak = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}[dtype] * 1e12
    shares = "measured shares" if name in COPY_TB else "shares of Hopper, assumed"
    return Ceilings(
        name=name,
        dtype=dtype,
        bytes_per_s=COPY_TB.get(name, bandwidth * COPY_SHARE) * 1e12,
        flops_per_s=peak * PRODUCT_SHARE,
        peak_flops_per_s=peak,
        source=f"data sheet, {shares}",
    )


def measure(device: torch.device, dtype: Dtype, *, seconds: float = 0.3) -> Ceilings:
    """Ceilings of this machine: the best of several sizes of a copy and of a matrix product.

    Args:
        device: to measure; on a CPU with the current number of torch's threads.
        dtype: of the products.
        seconds: approximate time spent on each size.
    """
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    cuda = device.type == "cuda"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    try:
        # Larger than any cache: 256 MiB and more on each side.
        bandwidth = max(_copy(size, device, seconds) for size in ((2**28, 2**29, 2**30) if cuda else (2**28, 2**29)))
        # Also small ones on a CPU: they finish before another process gets the core.
        sizes = (4096, 8192, 16384) if cuda else (256, 512, 1024, 2048)
        flops = max(_product(size, torch_dtype, device, seconds) for size in sizes)
        cache = 0 if cuda else _last_cache()
        # From the first cache to the last: source and target fill half of each.
        within = (2**13, 2**17, cache // 4) if cache else ()
        cache_speed = max((_copy(size, device, seconds) for size in within), default=0.0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, torch threads: {torch.get_num_threads()}"
    sheet = next((gpu for gpu in GPUS if gpu in name), None) if cuda else None
    peak = flops if sheet is None else stated(sheet, dtype).peak_flops_per_s
    return Ceilings(
        name=name,
        dtype=dtype,
        bytes_per_s=bandwidth,
        flops_per_s=flops,
        peak_flops_per_s=peak,
        source="measured",
        cache_bytes=cache,
        cache_bytes_per_s=max(cache_speed, bandwidth) if cache else 0.0,
    )


def _last_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux lists it; 0 if it lists none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(1024 * int(path.read_text().strip().removesuffix("K")))
    return max(sizes)


def _copy(num_bytes: int, device: torch.device, seconds: float) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best(lambda: target.copy_(source), device, seconds)


def _product(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of a square product."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call, because interference only slows it down."""
    cuda = device.type == "cuda"
    work()
    if cuda:
        torch.cuda.synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        # Several calls in a row on a GPU, so that launch latency is not measured.
        calls = 10 if cuda else 1
        for _ in range(calls):
            work()
        if cuda:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - start) / calls)
        if now > end:
            return best

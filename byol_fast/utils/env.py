"""Environment of a run or measurement: machine, versions, commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("byol_fast", "torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy")

GPU_FIELDS = (
    "name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "temperature.gpu", "persistence_mode", "mig.mode.current",
)  # fmt: skip


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_first_process() -> bool:
    """True for the first of several processes, by the environment that torchrun sets, and for the only one."""
    return os.environ.get("RANK", "0") == "0"


def num_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_has_bf16() -> bool:
    """Return True if the CPU has bf16 matrix instructions; without them, bf16 is slower than fp32."""
    flags = _cpuinfo().get("flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    """Model name of the CPU."""
    return _cpuinfo().get("model name", platform.processor())


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and threads as plain JSON values."""
    import torch  # imported here: `byol-fast doctor` reads the CPU even if torch cannot be imported

    record: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": num_cpus(),
        "torch_threads": torch.get_num_threads(),
        "cpu_bf16": cpu_has_bf16(),
        "device": str(device),
        "packages": {name: version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        record["cuda"] = torch.version.cuda
    return record


def describe_measurement(device: torch.device) -> dict[str, Any]:
    """`describe`, plus date, commit, load, and the GPU's driver, clocks and power limit."""
    record = describe(device) | {
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **git_state(),
    }
    if device.type == "cuda":
        index = device.index or 0
        line = _output(
            "nvidia-smi", f"--id={index}", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"
        )
        values = line.split(", ") if line else []
        record["nvidia_smi"] = dict(zip(GPU_FIELDS, values, strict=False))
    return record


def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether it has uncommitted changes; None if unknown."""
    root = Path(__file__).parents[2]
    if not _output("git", "-C", str(root), "ls-files", "--error-unmatch", "byol_fast/__init__.py"):
        # A copy without its repository: the process that copied it passes the commit.
        return {"commit": os.environ.get("BYOL_FAST_COMMIT"), "dirty": None}
    return {
        "commit": _output("git", "-C", str(root), "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "-C", str(root), "status", "--porcelain")),
    }


def _output(*command: str) -> str:
    """Standard output of a program; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences in the fields that bit-exact resuming depends on: `"name: then -> now"`."""
    fields = (
        "cpu", "torch_threads", "device", "gpu", "precision", "mode", "max_autotune", "cudnn_benchmark"
    )  # fmt: skip
    changed = [f"{name}: {then.get(name)} -> {now.get(name)}" for name in fields if then.get(name) != now.get(name)]
    old, new = then.get("packages", {}), now.get("packages", {})
    return changed + [f"{name}: {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
